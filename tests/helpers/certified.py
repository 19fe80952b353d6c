"""One certificate by itself, of the functions that a calibration uses."""

from __future__ import annotations

from erde.calibration.certificates import certificate_at, count_along, walk
from erde.calibration.thresholds import ScoredSplit, ThresholdPath
from erde.policy.points import Certificate, Guarantee, Reference


def certify(
    path: ThresholdPath,
    certify_split: ScoredSplit,
    max_risk: float,
    confidence: float,
    reference: Reference,
    guarantee: Guarantee = "risk",
) -> tuple[int, Certificate | None]:
    """Walk ``path`` on the certify split: the index of the certified point and its certificate.

    ``(0, None)`` where not even the first point passes.
    """
    counts = count_along(path, certify_split)
    accepted = walk(counts, max_risk, confidence, guarantee)
    if accepted < 0:
        return 0, None
    return accepted, certificate_at(counts, accepted, max_risk, confidence, reference, guarantee)
