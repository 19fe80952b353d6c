"""A study as Markdown: one pair of tables for each group of measures, means over seeds and differences from the reference."""

from __future__ import annotations

from collections.abc import Callable

from erde.evaluation.study import ArmMeasure, Difference, Estimate, Study
from erde.report.numbers import NONE, points, signed

# Title, which measures, and what their columns need not repeat.
GROUPS: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    ("Accuracy", lambda name: "accuracy" in name and "MACs" not in name, "accuracy of "),
    (
        "Accuracy along the curve",
        lambda name: name.startswith("area") or "of the MACs" in name,
        "accuracy at ",
    ),
    ("MACs saved at certified points", lambda name: name.startswith("MACs saved"), "MACs saved at "),
    ("Risk at these points", lambda name: name.startswith("risk"), "risk at "),
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
        names = [name for name in study.measures if belongs(name)]
        arms = [arm for arm in study.measures[names[0]] if _measured(study, names, arm)] if names else []
        if not arms:
            continue
        parts.append(f"## {title}\n")
        parts.append(_table(study, names, known, arms, _mean))
        others = [arm for arm in arms if _compared(study, names, arm)]
        if others:
            parts.append(f"Minus `{study.reference}`:\n")
            parts.append(_table(study, names, known, others, _difference))
    return "\n".join(parts)


def _measured(study: Study, names: list[str], arm: str) -> bool:
    return any(study.measures[name][arm].estimate for name in names)


def _compared(study: Study, names: list[str], arm: str) -> bool:
    return any(study.measures[name][arm].difference for name in names)


def _table(
    study: Study, names: list[str], known: str, arms: list[str], cell: Callable[[ArmMeasure], str]
) -> str:
    columns = [name.removeprefix(known) for name in names]
    lines = ["| arm | " + " | ".join(columns) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {arm} | " + " | ".join(cell(study.measures[name][arm]) for name in names) + " |" for arm in arms
    ]
    return "\n".join([*lines, ""])


def _half(estimate: Estimate) -> str:
    if estimate.interval is None:
        return ""
    return f" ± {points((estimate.interval[1] - estimate.interval[0]) / 2)}"


def _mean(measure: ArmMeasure) -> str:
    return NONE if measure.estimate is None else points(measure.estimate.mean) + _half(measure.estimate)


def _difference(measure: ArmMeasure) -> str:
    difference: Difference | None = measure.difference
    if difference is None:
        return NONE
    text = signed(100 * difference.mean, 1) + _half(difference)
    return text if difference.holm_p_value is None else f"{text}, p {difference.holm_p_value:.2g}"
