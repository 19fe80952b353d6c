"""Operating points and their promises: the words in which calibration, bundles and results speak."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from erde.common.model import Frozen
from erde.policy.rule import Ensemble

# Whole numbers that are kept in arrays of int64.
Count = Annotated[int, Field(ge=0, lt=2**63)]
# mixed: a chain of networks in both.
Precision = Literal["fp32", "int8", "mixed"]
Reference = Literal["final_exit", "no_exit_network", "teacher", "given", "fallback"]
Guarantee = Literal["risk", "net_drop", "expected_risk", "disagreement"]
_REFERENCE_IN_WORDS: dict[Reference, str] = {
    "final_exit": "the full network",
    "no_exit_network": "the network without exits",
    "teacher": "the teacher",
    "given": "the given reference",
    "fallback": "the last network alone",
}


class Certificate(Frozen):
    """A promise about one operating point: with this confidence, risk (or net drop) <= max_risk.

    Confidence is over the draw of the certify split; it holds for images drawn like that split's. Without a
    confidence the promise is about the risk's expectation over that draw. Of the certify ``images``, ``lost``
    are those that the reference gets right and the early answer wrong, ``won`` the other way round; ``risk`` is what
    is promised about as it was seen (lost less won for a net drop), ``upper_bound`` the one-sided bound that these
    counts give by themselves: it describes, the promise is ``max_risk``. For a disagreement ``lost`` are the images whose
    early answer is another one than the reference's, and none is won: no label plays a part.
    """

    guarantee: Guarantee
    max_risk: float = Field(gt=0, lt=1)
    confidence: float | None = Field(gt=0, lt=1)
    images: int = Field(ge=1)
    lost: int = Field(ge=0)
    won: int = Field(ge=0)
    risk: float
    upper_bound: float | None
    reference: Reference
    method: str
    assumptions: str

    def reference_in_words(self, precision: Precision = "fp32") -> str:
        """What the promise is held against; of an int8 bundle the full network is the one in int8."""
        if precision == "int8" and self.reference == "final_exit":
            return "the full network in int8"
        return _REFERENCE_IN_WORDS[self.reference]

    def sentence(self, precision: Precision = "fp32") -> str:
        """The promise in words."""
        who, share = self.reference_in_words(precision), f"{self.max_risk * 100:g} %"
        sure = "In expectation" if self.confidence is None else f"With {self.confidence * 100:g} % confidence"
        seen = f"{self.lost:,} of {self.images:,} certify images"
        if self.guarantee == "net_drop":
            promise = f"the accuracy is at most {share} (of all images) below that of {who}"
            seen = f"{self.lost:,} lost and {self.won:,} won of {self.images:,} certify images"
        elif self.guarantee == "disagreement":
            promise = f"at most {share} of images get another answer than {who} gives them"
        else:
            promise = (
                f"at most {share} of images are ones that {who} gets right and the early answer gets wrong"
            )
        return f"{sure}, {promise} (seen: {seen}; {self.method})."


class Measured(Frozen):
    """An operating point on one split: shares of images; MACs, and milliseconds if known, per image."""

    images: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    risk: float
    net_drop: float
    macs: float
    macs_saved: float
    milliseconds: float | None = None
    exit_rates: list[float]


class Agreement(Frozen):
    """What an operating point does on images without labels: how often it answers otherwise than the reference."""

    images: int
    disagreement: float
    macs: float
    macs_saved: float
    milliseconds: float | None = None
    exit_rates: list[float]


class OperatingPoint(Frozen):
    """One named setting of the policy: E-1 thresholds (None disables an exit) and what is known of it.

    ``target`` is a share of images (risk), a share of the MACs (budget) or milliseconds (latency). Where no label was
    looked at, ``tune_agreement`` stands in place of ``tune``.
    """

    name: str
    kind: Literal["no-exit", "risk", "budget", "latency"]
    target: float | None
    thresholds: list[float | None]
    certificate: Certificate | None
    note: str | None = None
    tune: Measured | None = None
    test: Measured | None = None
    tune_agreement: Agreement | None = None

    @property
    def macs_saved(self) -> float | None:
        """The share of the MACs that was saved on tune; None where nothing is known."""
        seen = self.tune or self.tune_agreement
        return None if seen is None else seen.macs_saved


class LeftOut(Frozen):
    """A promise that was asked for and could not be made: there is no operating point of this name."""

    name: str
    target: float
    images_needed: int | None  # where the certify split was too small, the least number that would do
    note: str


class ScoreCandidate(Frozen):
    """The share of MACs that a score saves on tune at the default risk.

    ``fragile`` is the share of tune images whose score lies within 1e-5 of a threshold there.
    """

    score: str
    sharpness: float
    ensemble: Ensemble = "none"
    macs_saved: float
    fragile: float = 0.0


class Calibration(Frozen):
    """Facts of a calibration: exit rates and score histograms on certify, at the default point, and its splits.

    Histograms have 20 equal bins over ``score_ranges``; what lies beyond is in the outermost. ``choices`` is a
    hash of the settings, the costs, the tune split and where a reference is right; it tells a repeated calibration from a
    second choice on the same certify images (or on images of the same ``sources``), which would void the certificates.
    """

    exit_rates: list[Annotated[float, Field(ge=0, le=1)]]
    score_histograms: list[list[Count]]
    score_ranges: list[tuple[float, float]]
    tune_images: Count
    certify_images: Count
    tune_fingerprint: str
    certify_fingerprint: str
    sources: list[str]
    choices: str

    @model_validator(mode="after")
    def _consistent(self) -> Calibration:
        if len(self.score_histograms) != len(self.score_ranges):
            raise ValueError(f"{len(self.score_histograms)} histograms with {len(self.score_ranges)} ranges")
        for low, high in self.score_ranges:
            if not (low <= high and math.isfinite(high - low)):
                raise ValueError(f"scores cannot range from {low:g} to {high:g}")
        return self
