"""What a calibration is asked for: promises, budgets, and which exit rules are tried."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from erde import policy
from erde.calibration.certificates import GUARANTEES
from erde.common.errors import UserError, nearest
from erde.policy.points import Guarantee, Reference
from erde.policy.rule import Ensemble, ExitRule

SHARPNESS_GRID = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
# ε of the certified operating points, the default one first.
LADDER = (0.01, 0.0025, 0.005, 0.02, 0.03, 0.05)


@dataclass(frozen=True)
class Settings:
    """What is promised, and how the policy is chosen.

    Args:
        max_risks: ε of the certified operating points; the first is the default one, and the score is chosen for it.
        confidence: of the certificates (``guarantee="expected_risk"`` has none) and of what is said of budgets.
        budgets: shares of the MACs of the network without exits; chosen on tune, not certified.
        latency_budgets: mean milliseconds per image on the profiled machine; likewise.
        reference: what early answers are held against.
        guarantee: see certificates.py.
        score: one of policy.SCORES, or "auto": what saves most MACs on tune at the first of ``max_risks``.
        sharpness: of the score; None chooses it likewise.
        ensemble: one of policy.ENSEMBLES; "auto" tries all with ``score="auto"`` and none with a named score.
    """

    max_risks: tuple[float, ...] = LADDER
    confidence: float = 0.9
    budgets: tuple[float, ...] = ()
    latency_budgets: tuple[float, ...] = ()
    reference: Reference = "final_exit"
    guarantee: Guarantee = "risk"
    score: str = "auto"
    sharpness: float | None = None
    ensemble: Literal["auto"] | Ensemble = "auto"

    def __post_init__(self) -> None:
        for what, values in (
            ("target risk", self.max_risks),
            ("confidence", (self.confidence,)),
            ("budget", self.budgets),
            ("latency budget", self.latency_budgets),
            ("sharpness", () if self.sharpness is None else (self.sharpness,)),
        ):
            for value in values:
                if not isinstance(value, Real) or isinstance(value, bool):
                    raise UserError(
                        f"a {what} must be a number, got {value!r} (a share such as 0.05, for 5 %)"
                    )
        for what, values in (
            ("target risk", self.max_risks),
            ("confidence", (self.confidence,)),
            ("budget", self.budgets),
        ):
            for value in values:
                if not 0 < value < 1:
                    raise UserError(f"a {what} must lie between 0 and 1 (0 % and 100 %), got {value:g}")
        for what, values in (
            ("target risk", self.max_risks),
            ("budget", self.budgets),
            ("latency budget", self.latency_budgets),
        ):
            # Compared as operating points are named.
            if len({f"{100 * value:g}" for value in values}) != len(values):
                raise UserError(f"a {what} is given twice in {list(values)}: give each once")
        if not self.max_risks:
            raise UserError("calibration needs at least one target risk")
        for value in self.latency_budgets:
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"a latency budget must be a number of milliseconds above 0, got {value:g}")
        known = ["auto", *policy.SCORES]
        if self.score not in known:
            raise UserError(f"unknown score '{self.score}'{nearest(self.score, known)}")
        if self.ensemble not in ("auto", *policy.ENSEMBLES):
            raise UserError(
                f"unknown ensemble '{self.ensemble}': expected auto, {', '.join(policy.ENSEMBLES)}"
            )
        if self.score in ("energy", "patience", "harm") and self.ensemble not in ("auto", "none"):
            why = "reads raw logits" if self.score == "energy" else "looks at earlier exits by itself"
            raise UserError(f"the score '{self.score}' {why}: it has no {self.ensemble} ensemble")
        if self.guarantee not in GUARANTEES:
            raise UserError(f"unknown guarantee '{self.guarantee}': expected {', '.join(GUARANTEES)}")
        if self.guarantee == "expected_risk" and self.reference != "final_exit":
            raise UserError(
                f"the guarantee 'expected_risk' needs the reference 'final_exit', got '{self.reference}': it holds only where "
                "no early exit loses nothing; ask for 'risk'"
            )
        if self.sharpness is not None and not 1e-3 <= self.sharpness <= 1e3:
            raise UserError(f"a sharpness must lie between 0.001 and 1000, got {self.sharpness:g}")

    def rules(self) -> list[ExitRule]:
        """The exit rules to try, the learned one still without its parameters."""
        names = policy.SCORES if self.score == "auto" else (self.score,)
        ensembles: tuple[Ensemble, ...] = ("none",) if self.ensemble == "auto" else (self.ensemble,)
        if self.ensemble == "auto" and self.score == "auto":
            ensembles = ("none", "arithmetic", "geometric")
        grid = SHARPNESS_GRID if self.sharpness is None else (self.sharpness,)
        rules = []
        for ensemble in ensembles:
            for name in names:
                if name == "energy" and ensemble != "none":
                    continue  # an ensemble's log-probabilities have lost the scale that the energy reads
                if name in policy.OWN_SCORES:
                    rules += [ExitRule(name, value, ensemble) for value in grid]
                elif ensemble == "none":
                    # Patience and harm look at earlier exits by themselves.
                    rules.append(ExitRule(name, 1.0, ensemble))
        return rules
