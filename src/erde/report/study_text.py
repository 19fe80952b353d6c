"""A study as Markdown: one pair of tables for each group of measures, means over seeds and differences from the reference."""

from __future__ import annotations

import re
from collections.abc import Callable

from erde.evaluation.study import ArmMeasure, Estimate, Study
from erde.report.numbers import NONE, points, signed

# Title, which measures, and what their columns need not repeat.
GROUPS: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    ("Accuracy", lambda name: name.startswith("accuracy of"), "accuracy of "),
    (
        "Accuracy along the curve",
        lambda name: name.startswith("area") or "of the MACs" in name,
        "accuracy at ",
    ),
    ("MACs saved at certified points", lambda name: name.startswith("MACs saved at risk"), "MACs saved at "),
    ("Risk at these points", lambda name: name.startswith("risk"), "risk at "),
    ("The same entropy at every exit, and for every arm", lambda name: "at entropy" in name, ""),
    ("Scores and teacher", lambda name: name.startswith(("AUROC", "teacher", "entropy")), ""),
)
INTRODUCTION = """# Study {name}

{runs} of one recipe, {seeds}; {images:,} test images, the same for all arms. All numbers are in per cent and means over
seeds, with half the width of their 95 % interval (Student's t over seeds). Arms of a run learned from the same teacher
on the same batches. A difference is an arm minus `{reference}`, seed by seed; p is of the paired t-test, corrected by
Holm's method for all arms of its column. Choose by tune; what test shows was not chosen by.
"""


def study_text(study: Study) -> str:
    """The tables of a study."""
    count = len(study.seeds)
    parts = [
        INTRODUCTION.format(
            name=study.name,
            runs="One run" if count == 1 else f"{count} runs",
            seeds=f"seed{'s' if count > 1 else ''} {', '.join(map(str, study.seeds))}",
            images=study.test_images,
            reference=study.reference,
        )
    ]
    for title, belongs, known in GROUPS:
        names = sorted((name for name in study.measures if belongs(name)), key=_place)
        arms = [arm for arm in study.measures[names[0]] if _measured(study, names, arm)] if names else []
        if not arms:
            continue
        parts.append(f"## {title}\n")
        parts.append(_table(study, names, known, arms, mean_cell))
        others = [arm for arm in arms if _compared(study, names, arm)]
        if others:
            parts.append(f"Minus `{study.reference}`:\n")
            parts.append(_table(study, names, known, others, difference_cell))
    return "\n".join(parts)


def _place(name: str) -> tuple[bool, float]:
    """Operating points in the order of their risk, those of the cascade last; the rest stays in its order."""
    risk = re.search(r"risk-([\d.]+)", name)
    return name.endswith("before the teacher"), float(risk[1]) if risk else 0.0


def _measured(study: Study, names: list[str], arm: str) -> bool:
    return any(study.measures[name][arm].estimate for name in names)


def _compared(study: Study, names: list[str], arm: str) -> bool:
    return any(study.measures[name][arm].difference for name in names)


def _table(
    study: Study, names: list[str], known: str, arms: list[str], cell: Callable[[ArmMeasure], str]
) -> str:
    # The name of the measure is kept: rows of ledgers have it.
    columns = [
        name.removeprefix(known).replace("before the teacher", "in front of the teacher") for name in names
    ]
    lines = ["| arm | " + " | ".join(columns) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {arm} | " + " | ".join(cell(study.measures[name][arm]) for name in names) + " |" for arm in arms
    ]
    return "\n".join([*lines, ""])


def mean_cell(measure: ArmMeasure) -> str:
    """``71.3 ± 1.2``, in per cent."""
    known = measure.estimate
    return NONE if known is None else points(known.mean) + _half_width(known)


def difference_cell(measure: ArmMeasure) -> str:
    """``+1.5 ± 1.1, p 0.093``, in points, from the reference."""
    known = measure.difference
    if known is None:
        return NONE
    text = signed(100 * known.mean, 1) + _half_width(known)
    return text if known.holm_p_value is None else f"{text}, p {known.holm_p_value:.2g}"


def _half_width(known: Estimate) -> str:
    if known.interval is None:
        return ""
    low, high = known.interval
    return f" ± {points((high - low) / 2)}"
