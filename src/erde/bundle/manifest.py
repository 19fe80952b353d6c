"""The manifest of a bundle: all that the runtime knows of it. docs/formats.md describes every field."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from erde.common.errors import UserError, nearest
from erde.common.model import Frozen
from erde.policy.cost import Cost
from erde.policy.points import Calibration, Count, LeftOut, OperatingPoint, Precision
from erde.policy.rule import SCORES, Ensemble, ExitRule, HarmParameters, harm_feature_count

FORMAT_VERSION = 3
# Version 2 knew no chains: its bundles mean the same in version 3.
READABLE_VERSIONS = (2, 3)
MANIFEST = "manifest.json"
# Of the reference sample, as a share of its largest logit (of 1, where all are smaller): what int8 stages get. On another
# machine a last bit that differs may tip a rounding.
MAX_TOLERANCE = 0.02
# What logits are divided by; calibration stays well within.
Divisor = Annotated[float, Field(ge=1e-3, le=1e3)]
Side = Annotated[int, Field(ge=1, lt=2**31)]


class Stage(Frozen):
    """One stage: its file and the cost of an image that leaves at its exit, all heads so far included.

    A stage takes the ``features`` of the stage before, or the ``image`` again: with such a stage the next network of a
    chain begins. ``network`` is the name of the network that it belongs to, where there are several.
    """

    file: str
    exit_name: str
    macs: Count
    parameters: Count
    input: Literal["features", "image"] = "features"
    network: str | None = None


class ReferenceSample(Frozen):
    """Images and the logits that every exit must give for them: how a loaded bundle checks itself."""

    images: str  # base64 of uint8 (N, H, W, C)
    count: int = Field(ge=1, le=64)
    logits: list[list[list[float]]]  # (E, N, K)
    tolerance: float

    @model_validator(mode="after")
    def _tight(self) -> ReferenceSample:
        largest = max((abs(logit) for rows in self.logits for row in rows for logit in row), default=0.0)
        allowed = MAX_TOLERANCE * max(1.0, largest)
        if not self.tolerance <= allowed:
            raise ValueError(
                f"the reference sample's tolerance is {self.tolerance:g}, at most {allowed:g} is allowed"
            )
        return self

    def decode(self, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        """The images, uint8 (N, H, W, C)."""
        return np.frombuffer(base64.b64decode(self.images), dtype=np.uint8).reshape(self.count, *shape)

    @staticmethod
    def encode(images: NDArray[np.uint8]) -> str:
        """The base64 text of uint8 images."""
        return base64.b64encode(np.ascontiguousarray(images).tobytes()).decode()


class Manifest(Frozen):
    """All that the runtime knows of a bundle."""

    format_version: int
    name: str
    classes: list[str] = Field(min_length=2)
    input_shape: tuple[Side, Side, Side]  # H, W, C
    mean: list[float]
    std: list[float]
    resize: Literal["shorter side, then centre crop; bilinear"]
    precision: Precision
    opset: int
    stages: list[Stage] = Field(min_length=1)
    no_exit_macs: Count
    no_exit_parameters: Count
    score: str
    sharpness: Divisor
    ensemble: Ensemble
    score_parameters: list[HarmParameters] | None
    temperatures: list[Divisor]
    operating_points: list[OperatingPoint] = Field(min_length=1)
    default_operating_point: str
    left_out: list[LeftOut]
    calibration: Calibration | None
    reference_sample: ReferenceSample
    provenance: dict[str, Any]
    files: dict[str, str]  # name -> SHA-256

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        exits = len(self.stages)
        if len(self.temperatures) != exits:
            raise ValueError(f"{len(self.temperatures)} temperatures for {exits} exits")
        if self.score not in SCORES:
            raise ValueError(f"unknown score '{self.score}'{nearest(self.score, SCORES)}")
        self._check_parameters(exits)
        sample = self.reference_sample
        rows = [row for logits in sample.logits for row in logits]
        if (
            len(sample.logits) != exits
            or any(len(logits) != sample.count for logits in sample.logits)
            or any(len(row) != len(self.classes) for row in rows)
        ):
            raise ValueError(
                f"the reference sample's logits are not {exits} exits x {sample.count} images x "
                f"{len(self.classes)} classes"
            )
        if not len(self.mean) == len(self.std) == self.input_shape[2]:
            raise ValueError(f"mean and std do not fit {self.input_shape[2]} channels")
        names = [point.name for point in self.operating_points]
        if len(set(names)) != len(names):
            raise ValueError("two operating points have the same name")
        if self.default_operating_point not in names:
            raise ValueError(f"the default operating point '{self.default_operating_point}' is not listed")
        for point in self.operating_points:
            if len(point.thresholds) != exits - 1:
                raise ValueError(f"'{point.name}' has {len(point.thresholds)} thresholds for {exits} exits")
        self._check_stage_files()
        return self

    def _check_stage_files(self) -> None:
        for stage in self.stages:
            if stage.file not in self.files:
                raise ValueError(f"{stage.file} has no checksum")
        if len({stage.file for stage in self.stages}) < len(self.stages):
            raise ValueError("two stages have the same file")

    def _check_parameters(self, exits: int) -> None:
        if (self.score == "harm") != (self.score_parameters is not None):
            raise ValueError("score_parameters belong to the score 'harm', and to no other")
        for index, parameters in enumerate(self.score_parameters or ()):
            features = harm_feature_count(index, len(self.classes))
            if len(parameters.weights) != features or len(parameters.class_weights) != len(self.classes):
                raise ValueError(
                    f"score_parameters of exit {index} are not {features} weights and one per class"
                )
        if self.score_parameters is not None and len(self.score_parameters) != exits - 1:
            raise ValueError(f"{len(self.score_parameters)} score_parameters for {exits} exits")

    def takes_image(self) -> list[bool]:
        """Per stage, whether it takes the image: the first one, and in a chain the first of each network."""
        return [index == 0 or stage.input == "image" for index, stage in enumerate(self.stages)]

    def networks(self) -> tuple[int, ...]:
        """The first exit of each network of a chain; (0,) where there is a single one."""
        return tuple(index for index, takes_image in enumerate(self.takes_image()) if takes_image)

    def cost(self, milliseconds: tuple[float, ...] | None = None) -> Cost:
        """The cost of the exits; ``milliseconds`` (E,) of a profile, cumulative."""
        macs = tuple(stage.macs for stage in self.stages)
        return Cost(macs, self.no_exit_macs, milliseconds, self.networks())

    def rule(self) -> ExitRule:
        """The exit rule of this bundle."""
        harm = None if self.score_parameters is None else tuple(self.score_parameters)
        return ExitRule(self.score, self.sharpness, self.ensemble, harm)

    def point(self, name: str | None) -> OperatingPoint:
        """The operating point ``name``, the default one for None; :class:`UserError` if there is none."""
        name = name or self.default_operating_point
        for point in self.operating_points:
            if point.name == name:
                return point
        known = ", ".join(point.name for point in self.operating_points)
        raise UserError(f"no operating point '{name}' in this bundle; it has: {known}")


def uncalibrated(
    *,
    sample: NDArray[np.uint8],
    logits: NDArray[np.float32],
    tolerance: float,
    stages: list[Stage],
    note: str,
    **fields: Any,
) -> Manifest:
    """The manifest of stages before calibration: no image leaves early.

    ``logits`` (E, N, K) are those of the uint8 images ``sample`` (N, H, W, C), ``tolerance`` is a share of the largest
    one; ``fields`` are the manifest's others: name, classes, normalisation, precision, costs without exits, files.
    """
    return Manifest(
        format_version=FORMAT_VERSION,
        input_shape=sample.shape[1:],
        resize="shorter side, then centre crop; bilinear",
        stages=stages,
        score="entropy",
        sharpness=1.0,
        ensemble="none",
        score_parameters=None,
        temperatures=[1.0] * len(stages),
        operating_points=[
            OperatingPoint(
                name="no-exit",
                kind="no-exit",
                target=None,
                thresholds=[None] * (len(stages) - 1),
                certificate=None,
                note=note,
            )
        ],
        default_operating_point="no-exit",
        left_out=[],
        calibration=None,
        reference_sample=ReferenceSample(
            images=ReferenceSample.encode(sample),
            count=len(sample),
            logits=logits.astype(float).tolist(),
            tolerance=tolerance * max(1.0, float(np.abs(logits).max())),
        ),
        **fields,
    )
