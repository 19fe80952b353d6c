"""Classes of an arm as the report shows them: a row each, at the arm's default operating point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from erde.evaluation.confusion import Confusion
from erde.evaluation.results import Arm, ClassMeasures
from erde.evaluation.run_folder import cost_of


@dataclass(frozen=True)
class ClassRow:
    """A class by its index: its measures, the shares that leave early and of the MACs saved, the most frequent mistake.

    Shares are None for a class without test images; ``mistake`` is the wrong answer and its number of images.
    """

    index: int
    measures: ClassMeasures
    early: float | None
    macs_saved: float | None
    mistake: tuple[int, int] | None


def class_rows(arm: Arm, confusion: Confusion | None = None) -> list[ClassRow]:
    """The classes of ``arm``, the largest drop first; mistakes where ``confusion`` is known."""
    macs = cost_of(arm).macs_at(arm.default_point().thresholds)
    first: dict[int, tuple[int, int]] = {}
    for true, answer, count in confusion.mistakes() if confusion else []:
        first.setdefault(true, (answer, count))
    rows = [
        ClassRow(
            index=index,
            measures=measures,
            early=1 - measures.exit_rates[-1] if measures.images else None,
            macs_saved=1 - float(np.dot(measures.exit_rates, macs)) / arm.no_exit_macs
            if measures.images
            else None,
            mistake=first.get(index),
        )
        for index, measures in enumerate(arm.classes)
    ]
    return sorted(rows, key=lambda row: -row.measures.drop)


def worst_class(arm: Arm) -> ClassRow | None:
    """The class that loses most by leaving early; None where nothing can leave early."""
    return class_rows(arm)[0] if len(arm.exits) > 1 and arm.classes else None
