"""A calibrated policy, and policy.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from erde.calibration.choice import Contender
from erde.calibration.thresholds import ThresholdPath
from erde.common.errors import UserError
from erde.policy.points import Calibration, LeftOut, OperatingPoint, ScoreCandidate
from erde.policy.rule import ExitRule

# Reading the bytes of something else raises one of these.
NO_POLICY = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


class UnreadablePolicyError(UserError):
    """No policy, or one that is damaged or of another version."""


@dataclass(frozen=True)
class CalibratedPolicy:
    """The result of a calibration: the rule, temperatures, the path, and the named operating points.

    ``paper_path`` is the path that tune gives the paper's rule; ``contenders`` are the other scores.
    """

    rule: ExitRule
    temperatures: list[float]
    path: ThresholdPath
    points: list[OperatingPoint]
    default: str
    left_out: list[LeftOut]
    calibration: Calibration
    candidates: list[ScoreCandidate]
    paper_path: ThresholdPath
    contenders: list[Contender]

    def default_point(self) -> OperatingPoint:
        """The operating point that answers when none is named."""
        return next(point for point in self.points if point.name == self.default)

    def summary(self) -> dict[str, Any]:
        """The JSON that the command line prints."""
        whole = self.to_json()
        return {
            "score": self.rule.score,
            "sharpness": self.rule.sharpness,
            "ensemble": self.rule.ensemble,
            "default_operating_point": self.default,
            "operating_points": whole["points"],
            "left_out": whole["left_out"],
        }

    def to_json(self) -> dict[str, Any]:
        """The content of ``policy.json``."""
        value: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CalibratedPolicy:
        """Read the content of ``policy.json``; ``ValueError``, ``TypeError`` or ``OverflowError`` where it is something else."""
        return _ADAPTER.validate_python(value)


_ADAPTER = TypeAdapter(CalibratedPolicy)
