"""The schema of ``results.json``: the results of a run, in one typed tree.

``results.schema.json`` beside this file is the same as JSON Schema; a test keeps the two equal.
Everything that may differ between two runs of the same recipe and seed on the same machine stands
under ``environment`` and ``timings``. Only a choice of exits by time (``exit_choice``) may differ too, and with it its arm.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from erde.calibration.exit_choice import ExitChoice
from erde.common.errors import UserError
from erde.common.files import write_json
from erde.common.history import Epoch
from erde.common.model import Frozen
from erde.policy.points import LeftOut, OperatingPoint, Precision, ScoreCandidate
from erde.policy.rule import Ensemble

SCHEMA_FILE = Path(__file__).with_name("results.schema.json")
Interval = tuple[float, float]  # 95 %


class Curve(Frozen):
    """Points along a path of thresholds, from no early exit to the first exit for all.

    ``area`` is the mean accuracy over the curve's range of MACs (trapezoids), with a bootstrap interval over
    test images; None where the curve is a single point. Milliseconds are there if a profile was given.
    """

    macs: list[float]
    accuracy: list[float]
    risk: list[float]
    exit_rates: list[list[float]]
    milliseconds: list[float] | None = None
    area: float | None = None
    area_interval: Interval | None = None


class Oracle(Frozen):
    """A rule that knows the label: the first exit whose answer is right answers, else the first of all."""

    accuracy: float
    macs: float


class Reliability(Frozen):
    """Equal bins of the reported confidence: images in each, their mean confidence and accuracy (0 if empty)."""

    count: list[int]
    confidence: list[float]
    accuracy: list[float]


class ExitMeasures(Frozen):
    """One exit on the test split, had it answered every image; NLL, Brier and ECE are tempered.

    ``answered`` and ``answered_accuracy`` are of the images that leave here at the default operating point.
    """

    accuracy: float
    accuracy_interval: Interval
    nll: float
    brier: float
    ece: float
    auroc_correctness: float | None
    auroc_harm: float | None
    temperature: float
    answered: float
    answered_accuracy: float | None
    reliability: Reliability


class ClassMeasures(Frozen):
    """One class at the default operating point: accuracy of the final exit alone, with early exits, and the drop.

    All zero for a class without test images.
    """

    images: int
    no_exit_accuracy: float
    accuracy: float
    drop: float
    exit_rates: list[float]


class ScoreOutcome(Frozen):
    """A score at one target risk: thresholds from tune, uncertified; what they do on tune and on test."""

    score: str
    sharpness: float
    ensemble: Ensemble
    target: float
    tune_macs_saved: float
    test_macs_saved: float
    test_risk: float
    test_accuracy: float


class EntropyHistograms(Frozen):
    """Normalised entropy H/ln K of an arm's exits on test images, 20 equal bins over [0, 1]: (E, 20) each."""

    teacher_right: list[list[int]]
    teacher_wrong: list[list[int]]


def mean_of_bins(counts: Sequence[int]) -> float | None:
    """The mean of what a histogram of equal bins over [0, 1] counts, by the middles of its bins."""
    middles = (np.arange(len(counts)) + 0.5) / len(counts)
    return float(np.asarray(counts) @ middles / sum(counts)) if sum(counts) else None


class Comparison(Frozen):
    """Two arms on the same test images: ``first`` minus ``second``, with paired 95 % bootstrap intervals.

    ``at`` is "default" (each arm's default operating point) or "no-exit" (the final exits). McNemar's exact
    test looks at the images that only one of the two gets right.
    """

    first: str
    second: str
    at: Literal["default", "no-exit"]
    accuracy_difference: float
    accuracy_interval: Interval
    macs_difference: float
    macs_interval: Interval
    only_first_right: int
    only_second_right: int
    mcnemar_p_value: float


class ExitCost(Frozen):
    """An exit's place and the cost of leaving there: MACs and parameters, heads so far included."""

    name: str
    macs: int
    parameters: int


class Arm(Frozen):
    """One trained network of the run, or the exported one in int8: its training is then that of the float one."""

    role: Literal["teacher", "student", "fixed"]
    precision: Precision = "fp32"
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
    ensemble: Ensemble
    score_candidates: list[ScoreCandidate]
    score_outcomes: list[ScoreOutcome]
    operating_points: list[OperatingPoint]
    default_operating_point: str
    left_out: list[LeftOut]
    curve: Curve
    paper_curve: Curve | None  # of the entropy at sharpness 1, along its own path
    oracle: Oracle
    classes: list[ClassMeasures]
    teacher_wrong: list[float] | None
    entropies: EntropyHistograms | None
    history: list[Epoch]
    exit_choice: ExitChoice | None = None  # with ``exits: auto``

    def default_point(self) -> OperatingPoint:
        """The operating point that answers when none is named."""
        return next(point for point in self.operating_points if point.name == self.default_operating_point)


class SplitInfo(Frozen):
    """Size and fingerprint of one split."""

    size: int
    fingerprint: str


class DataInfo(Frozen):
    """The data set of the run."""

    name: str
    classes: list[str]
    image_shape: tuple[int, int, int]
    mean: list[float]
    std: list[float]
    splits: dict[str, SplitInfo]


class RuntimeAgreement(Frozen):
    """The torch-free runtime against the evaluation: label and exit of every test image.

    ``disagreements`` counts answers outside the band, over all operating points; ``band`` counts images that lie
    in it at any of them.
    """

    images: int
    operating_points: list[str]
    disagreements: int
    band: int
    band_width: float


class Agreement(RuntimeAgreement):
    """The same, and torch against the evaluation: ``torch_disagreements``."""

    torch_disagreements: int


class Quantised(Frozen):
    """The exported arm in int8: its own arm and bundle, and what rounding cost on tune, per exit.

    ``kept_in_float`` names layers ("first", "last"); ``label_agreement`` is the share of tune images with the label
    that the same exit gives in float; bytes are of all stages together.
    """

    arm: str
    bundle_seal: str
    agreement: RuntimeAgreement
    kept_in_float: list[str]
    tune_images: int
    fp32_tune_accuracy: list[float]
    tune_accuracy: list[float]
    label_agreement: list[float]
    fp32_bytes: int
    bytes: int


class CascadeFront(Frozen):
    """A student in front of the fallback: the chain's exits with cumulative MACs, and its certified points on test."""

    exit_names: list[str]
    exit_macs: list[int]
    score: str
    operating_points: list[OperatingPoint]
    default_operating_point: str
    left_out: list[LeftOut]

    def default_point(self) -> OperatingPoint:
        """The operating point that answers when none is named."""
        return next(point for point in self.operating_points if point.name == self.default_operating_point)


class Cascade(Frozen):
    """The students in front of the fallback, against the fallback alone (``no_exit_macs``); one is a bundle."""

    fallback: str
    front: str
    bundle_seal: str
    agreement: RuntimeAgreement
    no_exit_macs: int
    fronts: dict[str, CascadeFront]


class Results(Frozen):
    """A whole run."""

    format_version: Literal[2] = 2
    name: str
    seed: int
    exported_arm: str
    recipe: dict[str, Any]
    data: DataInfo
    arms: dict[str, Arm]
    comparisons: list[Comparison]
    agreement: Agreement
    bundle_seal: str
    quantised: Quantised | None = None
    cascade: Cascade | None = None
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
