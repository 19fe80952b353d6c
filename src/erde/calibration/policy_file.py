"""A calibrated policy, and policy.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from erde.calibration.choice import Contender, ContenderTarget
from erde.calibration.thresholds import ThresholdPath
from erde.policy.points import Calibration, LeftOut, OperatingPoint, ScoreCandidate
from erde.policy.rule import ExitRule


@dataclass(frozen=True)
class CalibratedPolicy:
    """What calibration gives: the rule, temperatures, the path, and the named operating points.

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

    def to_json(self) -> dict[str, Any]:
        """What ``policy.json`` holds."""
        return {
            "rule": asdict(self.rule),
            "temperatures": self.temperatures,
            "path": self.path.to_json(),
            "points": [point.model_dump(mode="json") for point in self.points],
            "default": self.default,
            "left_out": [one.model_dump(mode="json") for one in self.left_out],
            "calibration": self.calibration.model_dump(mode="json"),
            "candidates": [one.model_dump(mode="json") for one in self.candidates],
            "paper_path": self.paper_path.to_json(),
            "contenders": [asdict(one) for one in self.contenders],
        }

    def default_point(self) -> OperatingPoint:
        """The operating point that answers when none is named."""
        return next(one for one in self.points if one.name == self.default)

    def summary(self) -> dict[str, Any]:
        """What the command line prints as JSON."""
        return {
            "score": self.rule.score,
            "sharpness": self.rule.sharpness,
            "ensemble": self.rule.ensemble,
            "default_operating_point": self.default,
            "operating_points": [point.model_dump(mode="json") for point in self.points],
            "left_out": [one.model_dump(mode="json") for one in self.left_out],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CalibratedPolicy:
        """Read what :meth:`to_json` gave."""
        return cls(
            rule=ExitRule.from_json(value["rule"]),
            temperatures=value["temperatures"],
            path=ThresholdPath.from_json(value["path"]),
            points=[OperatingPoint.model_validate(one) for one in value["points"]],
            default=value["default"],
            left_out=[LeftOut.model_validate(one) for one in value["left_out"]],
            calibration=Calibration.model_validate(value["calibration"]),
            candidates=[ScoreCandidate.model_validate(one) for one in value["candidates"]],
            paper_path=ThresholdPath.from_json(value["paper_path"]),
            contenders=[
                Contender(
                    ExitRule.from_json(one["rule"]),
                    tuple(
                        ContenderTarget(target["target"], tuple(target["thresholds"]), target["macs_saved"])
                        for target in one["targets"]
                    ),
                )
                for one in value["contenders"]
            ],
        )
