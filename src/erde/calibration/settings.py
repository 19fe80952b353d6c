"""The request to a calibration: promises, budgets, and which exit rules are tried."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from erde.policy import rule as policy
from erde.policy.rule import Ensemble, ExitRule
from erde.recipe.schema import CalibrationConfig, check_guarantee

# "auto" tries these: on 24 networks ensembles, energy, patience and a finer grid saved no more (LOG.md).
AUTO_SCORES = ("entropy", "max_probability", "margin", "harm")
AUTO_SHARPNESS = (0.5, 1.0)
# Tried for a score that is named, where the sharpness is not.
SHARPNESS_GRID = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)


class Settings(CalibrationConfig):
    """A recipe's settings, and budgets of a machine that was profiled.

    Make it with :func:`erde.recipe.validation.validate` from values that a user gave: wrong ones are then one line.
    """

    latency_budgets: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="mean milliseconds per image; met on tune, not certified"
    )

    @field_validator("latency_budgets")
    @classmethod
    def _each_time_once(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{value:g}" for value in values}) != len(values):
            raise ValueError(f"expected each once, got {list(values)}")
        return values

    def against_given(self) -> Settings:
        """The same settings against a reference that comes with the logits."""
        check_guarantee(self.guarantee, "given")
        return self.model_copy(update={"reference": "given"})

    def rules(self) -> list[ExitRule]:
        """The exit rules to try, the learned one still without its parameters."""
        automatic = self.score == "auto"
        names = AUTO_SCORES if automatic else (self.score,)
        grid: tuple[float, ...] = AUTO_SHARPNESS if automatic else SHARPNESS_GRID
        if self.sharpness is not None:
            grid = (self.sharpness,)
        ensemble: Ensemble = "none" if self.ensemble == "auto" else self.ensemble
        own = [name for name in names if name in policy.OWN_SCORES]
        rules = [ExitRule(name, sharpness, ensemble) for name in own for sharpness in grid]
        if ensemble == "none":
            # Patience and harm look at earlier exits by themselves.
            rules += [ExitRule(name) for name in names if name not in own]
        return rules
