"""The schema of ``results.json``: what a run found, in one typed tree.

``results.schema.json`` beside this file is the same as JSON Schema; a test keeps the two equal.
Everything that may differ between two runs of the same recipe and seed on the same machine stands
under ``environment`` and ``timings``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from erde.bundle import OperatingPoint, ScoreCandidate
from erde.errors import UserError
from erde.files import write_json

SCHEMA_FILE = Path(__file__).with_name("results.schema.json")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Curve(_Model):
    """Points along a path of thresholds, from no early exit to the first exit for all."""

    macs: list[float]
    accuracy: list[float]
    risk: list[float]
    exit_rates: list[list[float]]


class ExitMeasures(_Model):
    """One exit on the test split, had it answered every image. NLL and ECE are tempered."""

    accuracy: float
    accuracy_interval: tuple[float, float]
    nll: float
    ece: float
    auroc_correctness: float | None
    auroc_harm: float | None
    temperature: float


class ExitCost(_Model):
    """An exit's place and the cost of leaving there: MACs and parameters, heads so far included."""

    name: str
    macs: int
    parameters: int


class Epoch(_Model):
    """Means over one epoch; per-exit lists where a part has one value per exit."""

    epoch: int
    phase: Literal["backbone", "joint"]
    learning_rate: float
    parts: dict[str, float | list[float]]


class Arm(_Model):
    """One trained network of the run."""

    role: Literal["teacher", "student", "fixed"]
    loss: str
    backbone: str
    head: str
    parameters: int
    no_exit_macs: int
    no_exit_parameters: int
    cost: list[ExitCost]
    exits: list[ExitMeasures]
    score: str
    sharpness: float
    score_candidates: list[ScoreCandidate]
    operating_points: list[OperatingPoint]
    default_operating_point: str
    curve: Curve
    teacher_wrong: list[float] | None
    history: list[Epoch]


class SplitInfo(_Model):
    """Size and fingerprint of one split."""

    size: int
    fingerprint: str


class DataInfo(_Model):
    """The data set of the run."""

    name: str
    classes: list[str]
    image_shape: tuple[int, int, int]
    mean: list[float]
    std: list[float]
    splits: dict[str, SplitInfo]


class Agreement(_Model):
    """The torch-free runtime, and torch, against the evaluation: label and exit of every test image.

    ``disagreements`` (of the runtime) and ``torch_disagreements`` count answers outside the band, over all
    operating points; ``band`` counts images that lie in it at any of them.
    """

    images: int
    operating_points: list[str]
    disagreements: int
    torch_disagreements: int
    band: int
    band_width: float


class Results(_Model):
    """A whole run."""

    format_version: Literal[1] = 1
    name: str
    seed: int
    exported_arm: str
    recipe: dict[str, Any]
    data: DataInfo
    arms: dict[str, Arm]
    agreement: Agreement
    bundle_seal: str
    environment: dict[str, Any]
    timings: dict[str, Any]

    def write(self, path: Path) -> None:
        """Write as JSON, in one step, after a second reading against the schema."""
        value = self.model_dump(mode="json")
        Results.model_validate(value)
        write_json(path, value)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read and check a ``results.json``; :class:`UserError` where it is none."""
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise UserError(f"no results at {path}: finish the run first (erde run ... --resume)") from error
        except (ValueError, ValidationError) as error:
            raise UserError(
                f"{path} is not a results file of this erde: {str(error).splitlines()[0]}"
            ) from error


def schema_text() -> str:
    """The JSON Schema of :class:`Results`, as the package ships it."""
    return json.dumps(Results.model_json_schema(), indent=1, sort_keys=True) + "\n"
