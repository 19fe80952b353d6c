"""``profile.json``: how long each stage of a bundle takes on one machine.

It lies in the bundle's folder and outside its seal, since a latency belongs to a machine. It is bound to the
stage files by their hash, so it survives a new calibration and not a new export.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from erde.common.errors import UserError
from erde.common.files import write_json

PROFILE = "profile.json"
MAX_BYTES = 2**20
VERSION = 2


class Profile(BaseModel):
    """Median milliseconds of each stage, decision included, for batches of several sizes.

    ``gather_milliseconds`` (E-1) is what it takes to bring one image's feature map over to the next stage when
    the images that are done leave its batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: int = VERSION
    stages: str  # bundle.stages_hash
    machine: str
    engine: str = "onnxruntime"  # a profile without the name is of an older erde
    threads: int | None
    rounds: int
    milliseconds: dict[int, list[float]] = Field(min_length=1)  # batch size -> per stage, for the whole batch
    gather_milliseconds: list[Annotated[float, Field(ge=0)]]

    @model_validator(mode="after")
    def _positive(self) -> Profile:
        if 1 not in self.milliseconds:
            raise ValueError("batch size 1 is missing")
        if any(size < 1 or not min(times, default=1) > 0 for size, times in self.milliseconds.items()):
            raise ValueError("batch sizes and milliseconds must be above 0")
        return self

    def exit_milliseconds(self, batch_size: int = 1) -> tuple[float, ...]:
        """Milliseconds per image that leaves at each exit (E,), cumulative, in full batches of ``batch_size``."""
        return tuple((np.cumsum(self.milliseconds[batch_size]) / batch_size).tolist())

    def stage_milliseconds(self, stage: int, count: int) -> float:
        """Milliseconds of a stage for ``count`` images: linear between the profiled sizes, in proportion beyond them."""
        sizes = sorted(self.milliseconds)
        largest = sizes[-1]
        if count > largest:
            return self.milliseconds[largest][stage] * count / largest
        return float(np.interp(count, sizes, [self.milliseconds[size][stage] for size in sizes]))

    def write(self, path: Path) -> None:
        """Write as JSON, in one step; :class:`UserError` where that cannot be."""
        try:
            write_json(path, self.model_dump(mode="json"))
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}): profile a copy of the bundle"
            ) from error

    @classmethod
    def at_hand(cls, path: Path, stages: str, exits: int) -> Profile | None:
        """The profile if there is a good one: what merely gains by one does without."""
        try:
            return cls.read(path, stages, exits)
        except UserError:
            return None

    @classmethod
    def read(cls, path: Path, stages: str, exits: int) -> Profile:
        """Read and check; :class:`UserError` where it is none, or of other stages than those with hash ``stages``."""
        try:
            if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_BYTES:  # a pipe, a device
                raise FileNotFoundError(path)
            profile = cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"no profile at {path}: `erde bundle profile` writes one") from error
        except (ValueError, ValidationError, RecursionError) as error:
            raise UserError(
                f"{path} is not a profile of this erde: delete it and write it again with `erde bundle profile`"
            ) from error
        fits = all(len(times) == exits for times in profile.milliseconds.values())
        fits &= len(profile.gather_milliseconds) == exits - 1
        if profile.stages != stages or profile.format_version != VERSION or not fits:
            raise UserError(
                f"{path} belongs to other stages than this bundle's: write it again with `erde bundle profile`"
            )
        return profile
