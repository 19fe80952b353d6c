"""The history of a training: means per epoch, and the health of exit heads."""

from __future__ import annotations

from typing import Literal

from erde.common.model import Frozen

# Heads are in trouble beyond this share of dead units, or this far behind a linear probe.
MOST_DEAD, MOST_BEHIND = 0.1, 0.03
HEADS_REMEDY = (
    "warning: the heads learn less than they could: train longer, lower train.learning_rate, or set "
    "train.gradient_clip=1 or train.refit_heads"
)


class Health(Frozen):
    """The intermediate heads at the end of a phase of training, on train images without augmentation.

    ``dead_units`` of ``units`` per intermediate exit are as good as constant. ``probe_accuracy`` is that of a linear
    classifier on the first exit's features, fitted on other images; None where there are too few.
    """

    dead_units: list[int]
    units: list[int]
    first_exit_accuracy: float
    probe_accuracy: float | None
    images: int

    @property
    def is_good(self) -> bool:
        """Whether few units are dead, and the first exit is not behind the probe."""
        dead = any(dead > MOST_DEAD * units for dead, units in zip(self.dead_units, self.units, strict=True))
        probe = self.probe_accuracy
        return not dead and (probe is None or self.first_exit_accuracy >= probe - MOST_BEHIND)

    def line(self) -> str:
        """One line of text, with a remedy if the heads are in trouble."""
        dead = " / ".join(
            f"{dead} of {units}" for dead, units in zip(self.dead_units, self.units, strict=True)
        )
        line = f"dead units {dead}; first exit right on {self.first_exit_accuracy:.1%} of {self.images:,} train images"
        if self.probe_accuracy is not None:
            line += f", a linear probe on {self.probe_accuracy:.1%}"
        return line if self.is_good else f"{line}; {HEADS_REMEDY}"


class Epoch(Frozen):
    """Means over one epoch; per-exit lists where a part has one value per exit.

    ``health`` stands in the last epoch of a phase that trains intermediate heads.
    """

    epoch: int
    phase: Literal["backbone", "joint", "refit"]
    learning_rate: float
    parts: dict[str, float | list[float]]
    health: Health | None = None
