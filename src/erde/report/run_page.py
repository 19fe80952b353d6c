"""The report of a run: one HTML page that needs nothing beside it, no network included.

Python gives the numbers, ``templates/report.html.j2`` the text and the tables; the scripts of ``assets`` draw the
figures from the JSON that lies in the page. With :class:`~erde.evaluation.evidence.Evidence` the page has a slider
that moves the operating point, and images to look at; without it, it says so.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np

from erde.calibration.checks import poor_network
from erde.common.files import write_text
from erde.evaluation.evidence import Evidence
from erde.evaluation.results import Arm, Results, ScoreOutcome, mean_of_bins
from erde.policy.points import ScoreCandidate
from erde.report.classes import class_rows, worst_class
from erde.report.numbers import flat, rounded, signed
from erde.report.rendering import page, rule_in_words
from erde.report.summary import sentences

SCRIPTS = ("common.js", "sort.js", "explore.js", "report.js")
# Of more classes than these, a table and a figure show those with the largest drop, which are those to look for.
ALL_CLASSES, CLASSES_IN_TABLE, CLASSES_IN_FIGURE = 100, 20, 30
# Of more classes than these, the mistakes are a list of so many pairs instead of a matrix.
CLASSES_IN_MATRIX, PAIRS = 20, 25


def write_report(results: Results, path: Path, evidence: Evidence | None = None) -> None:
    """Write the report of ``results`` to ``path``, in one step."""
    write_text(path, render(results, evidence))


def render(results: Results, evidence: Evidence | None = None) -> str:
    """The report of ``results`` as the text of one HTML page."""
    exported = results.arms[results.exported_arm]
    listed = [(index, name, arm) for index, (name, arm) in enumerate(results.arms.items())]
    several = [row for row in listed if len(row[2].exits) > 1]
    doubtful = doubt(results)
    confusion = evidence.confusion if evidence else None
    return page(
        "report.html.j2",
        SCRIPTS,
        figure_data(results, evidence),
        results=results,
        exported=results.exported_arm,
        arm=exported,
        # An arm's place is its colour; the exported one comes first where each has a part of its own.
        arms=listed,
        several=sorted(several, key=lambda row: row[1] != results.exported_arm),
        most_exits=max(len(arm.exits) for arm in results.arms.values()),
        twin=twin(results),
        doubt=doubtful,
        summary=sentences(results, doubtful is not None),
        is_rule=is_rule,
        exit_columns=exit_columns,
        evidence=evidence,
        shown_images=shown_images(evidence),
        smaller=smaller_networks(results),
        main_comparisons=[
            pair
            for pair in results.comparisons
            if pair.at == "default" and results.exported_arm in (pair.first, pair.second)
        ],
        worst_class=worst_class(exported),
        class_rows=class_rows,
        confusion=confusion,
        mistakes=confusion.mistakes() if confusion else [],
        with_matrix=len(results.data.classes) <= CLASSES_IN_MATRIX,
        most_pairs=PAIRS,
        shown_classes=CLASSES_IN_TABLE if len(results.data.classes) > ALL_CLASSES else ALL_CLASSES,
        mean_entropies=mean_entropies,
        losses={name: losses for name, arm in results.arms.items() if (losses := losses_of(arm))},
        health={name: health for name, arm in results.arms.items() if (health := last_health(arm))},
        environment=flat(results.environment),
        timings=flat(results.timings),
        recipe=json.dumps(results.recipe, indent=2, ensure_ascii=False),
        today=datetime.date.today().isoformat(),
    )


# ---------------------------------------------------------------- the exported arm


def twin(results: Results) -> tuple[str, Arm] | None:
    """The arm that is the exported network without exits, where this run trained it."""
    for name, arm in results.arms.items():
        if name != results.exported_arm and _is_twin(arm, results.arms[results.exported_arm]):
            return name, arm
    return None


def _is_twin(arm: Arm, exported: Arm) -> bool:
    """Whether ``arm`` is the network of ``exported`` without exits."""
    # Without exits boosted ones count all their heads, and the other network has one: the backbone has to do.
    boosted = len(exported.exits) > 1 and exported.no_exit_macs == exported.cost[-1].macs
    same_cost = boosted or arm.no_exit_macs == exported.no_exit_macs
    return len(arm.exits) == 1 and arm.backbone == exported.backbone and same_cost


def is_rule(candidate: ScoreCandidate | ScoreOutcome, arm: Arm) -> bool:
    """Whether a candidate is the score that the arm decides on."""
    rule = (arm.score, arm.sharpness, arm.ensemble)
    return (candidate.score, candidate.sharpness, candidate.ensemble) == rule


def exit_columns(count: int, unit: str = "\n(%)") -> list[str]:
    """The headings of columns that belong to exits."""
    return [f"exit {index}{unit}" for index in range(count)]


def doubt(results: Results) -> str | None:
    """A line where a promise against the full network says little, since it is poor."""
    exits = results.arms[results.exported_arm].exits
    early = max((exit.accuracy for exit in exits[:-1]), default=0.0)
    return poor_network(exits[-1].accuracy, early, len(results.data.classes), "test")


def shown_images(evidence: Evidence | None) -> int:
    """The number of images whose scores the page holds; 0 without a slider."""
    if evidence is None or not evidence.arms:
        return 0
    return len(next(iter(evidence.arms.values())).reference_right)


def smaller_networks(results: Results) -> list[dict[str, Any]]:
    """Each smaller network without exits against the exported arm, at no more MACs where it can go that low.

    ``verdict``: the early exits are "better" or "worse" than it, "close" within its interval; "dearer" and
    "dearer-not-better" where the exported arm's cheapest setting costs more.
    """
    name, arm = results.exported_arm, results.arms[results.exported_arm]
    curve, rows = arm.curve, []
    for other, fixed in results.arms.items():
        macs, final = fixed.cost[-1].macs, fixed.exits[-1]
        if other == name or len(fixed.exits) > 1 or macs >= arm.no_exit_macs or _is_twin(fixed, arm):
            continue
        affordable = [index for index, cost in enumerate(curve.macs) if cost <= macs]
        # The path falls in MACs, so the first that is affordable is the dearest: nothing is picked by its test accuracy.
        index = affordable[0] if affordable else int(np.argmin(curve.macs))
        early = curve.accuracy[index]
        low, high = final.accuracy_interval
        if not affordable:
            # Dearer, and within the interval of the other's accuracy: nothing speaks for it.
            verdict = "dearer" if early > high else "dearer-not-better"
        else:
            verdict = "better" if early > high else "worse" if early < low else "close"
        rows.append(
            {
                "name": other,
                "accuracy": final.accuracy,
                "macs": macs,
                "early": early,
                "early_macs": curve.macs[index],
                "gap": abs(early - final.accuracy),
                "verdict": verdict,
            }
        )
    return rows


# ---------------------------------------------------------------- entropies, training


def mean_entropies(arm: Arm) -> list[tuple[float | None, float | None]]:
    """Of each exit the mean normalised entropy where the teacher is right, and where it is wrong."""
    if arm.entropies is None:
        return []
    return [
        (mean_of_bins(right), mean_of_bins(wrong))
        for right, wrong in zip(arm.entropies.teacher_right, arm.entropies.teacher_wrong, strict=True)
    ]


def losses_of(arm: Arm) -> list[dict[str, Any]]:
    """Loss, phase and learning rate of every epoch that has a loss."""
    return [
        {"loss": float(f"{loss:.7g}"), "phase": epoch.phase, "rate": float(f"{epoch.learning_rate:.4g}")}
        for epoch in arm.history
        if isinstance(loss := epoch.parts.get("loss"), float)
    ]


def last_health(arm: Arm) -> Any:
    """The health of an arm's heads as training left them."""
    return next((epoch.health for epoch in reversed(arm.history) if epoch.health), None)


# ---------------------------------------------------------------- figures


def figure_data(results: Results, evidence: Evidence | None) -> dict[str, Any]:
    """The data that the scripts draw: the arms as in ``results.json``, of the history only the loss."""
    arms = {}
    for name, arm in results.arms.items():
        value = arm.model_dump(mode="json", exclude={"history", "score_outcomes", "left_out"})
        value["rule"] = rule_in_words(arm)
        value["classes"] = [
            {
                "name": results.data.classes[row.index],
                **row.measures.model_dump(include={"drop", "exit_rates", "images"}),
                # As the table writes it: the two stand on one page.
                "signed_drop": signed(100 * row.measures.drop, 1),
            }
            for row in class_rows(arm)[:CLASSES_IN_FIGURE]
        ]
        arms[name] = rounded(value) | {"losses": losses_of(arm)}
    return {
        "exported": results.exported_arm,
        "order": list(arms),
        "arms": arms,
        # Not rounded: the page counts with these, and shows thresholds to be copied.
        "evidence": {name: inner.embedded() for name, inner in evidence.arms.items()} if evidence else {},
    }
