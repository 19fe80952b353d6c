"""The comparison page: runs side by side, in one HTML page that needs nothing beside it.

Runs whose recipes are equal but for the seed are one group: their mean and spread stand for the recipe.
Python gives the numbers, ``templates/compare.html.j2`` the text and the tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from erde.common.files import write_text
from erde.evaluation.results import Arm, Comparison, Curve, Results
from erde.evaluation.study import estimate
from erde.policy.points import OperatingPoint
from erde.recipe.schema import FREE_TO_CHANGE
from erde.report.numbers import NONE, flat, rounded
from erde.report.rendering import page, promised_on

SCRIPTS = ("common.js", "compare.js")
# Points of all curves together: more would make a large page, and a screen shows fewer.
MAX_POINTS = 20_000
# Keys of a recipe that tell runs of the same recipe apart, or the machines they were made on.
_NOT_RECIPE = ("seed", "name", "device", "threads")

Runs = Mapping[str, Results]


@dataclass(frozen=True)
class SeedGroup:
    """Runs of one recipe: equal but for the seed and the name."""

    label: str
    runs: tuple[str, ...]


def write_comparison(runs: Runs, path: Path, comparisons: Sequence[Comparison] = ()) -> None:
    """Write the comparison of ``runs`` to ``path``, in one step.

    ``comparisons`` are paired tests between runs with the same test images; their arms are named ``run/arm``.
    """
    write_text(path, render_comparison(runs, comparisons))


def render_comparison(runs: Runs, comparisons: Sequence[Comparison] = ()) -> str:
    """The comparison of ``runs`` as the text of one HTML page."""
    groups = seed_groups(runs)
    repeated = [group for group in groups if len(group.runs) > 1]
    return page(
        "compare.html.j2",
        SCRIPTS,
        figure_data(runs, groups),
        runs=runs,
        comparisons=comparisons,
        recipe_count=len(groups),
        data_sets=runs_by({name: results.data.name for name, results in runs.items()}),
        test_images=runs_by({name: tested_images(results) for name, results in runs.items()}),
        arm_names=arm_names(runs),
        chained=chained_fronts(runs),
        spreads=[spread(runs, group) for group in repeated],
        differences=[seed_differences(runs, group) for group in repeated],
        recipe_differences=recipe_differences(runs),
        tested_images=tested_images,
    )


def seed_groups(runs: Runs) -> list[SeedGroup]:
    """The runs by recipe, in the order given; a run whose recipe is its own is a group of one."""
    recipes = {
        name: json.dumps(_without_free_keys(results.recipe), sort_keys=True) for name, results in runs.items()
    }
    return [
        SeedGroup(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", tuple(names))
        for names in runs_by(recipes).values()
    ]


def runs_by(values: Mapping[str, str | None]) -> dict[str | None, list[str]]:
    """The names of runs by a value of theirs."""
    named: dict[str | None, list[str]] = {}
    for name, value in values.items():
        named.setdefault(value, []).append(name)
    return named


def _without_free_keys(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the keys that tell runs of it apart, or leave the results as they are."""
    kept = {key: value for key, value in recipe.items() if key not in _NOT_RECIPE}
    for group, free in FREE_TO_CHANGE:
        if isinstance(kept.get(group), dict):
            kept[group] = {key: value for key, value in kept[group].items() if key != free}
    return kept


def tested_images(results: Results) -> str | None:
    """The fingerprint of the test images; None where the run has none."""
    split = results.data.splits.get("test")
    return None if split is None else split.fingerprint


def arm_names(runs: Runs) -> list[str]:
    """The arms of all runs: exported ones first, then in their order."""
    exported = [results.exported_arm for results in runs.values()]
    return list(dict.fromkeys([*exported, *(name for results in runs.values() for name in results.arms)]))


@dataclass(frozen=True)
class ChainedFront:
    """An arm in front of the teacher of its run, at the chain's default operating point."""

    run: str
    arm: str
    point: OperatingPoint


def chained_fronts(runs: Runs) -> list[ChainedFront]:
    """The fronts of all runs that keep their teacher in a chain."""
    return [
        ChainedFront(run, arm, front.default_point())
        for run, results in runs.items()
        if results.cascade is not None
        for arm, front in results.cascade.fronts.items()
    ]


# ---------------------------------------------------------------- over seeds


def _values(arm: Arm) -> dict[str, float | None]:
    """The numbers that are averaged over seeds, as shares."""
    test = arm.default_point().test
    return {
        "accuracy": None if test is None else test.accuracy,
        "final": arm.exits[-1].accuracy,
        "macs": None if test is None else test.macs,
        "saved": None if test is None else test.macs_saved,
        "risk": None if test is None else test.risk,
        "area": arm.curve.area,
        "paper": None if arm.paper_curve is None else arm.paper_curve.area,
    }


def _common_arms(runs: Runs, group: SeedGroup) -> list[str]:
    first = runs[group.runs[0]]
    return [name for name in first.arms if all(name in runs[run].arms for run in group.runs)]


def spread(runs: Runs, group: SeedGroup) -> dict[str, Any]:
    """Mean and standard deviation of every arm over the runs of a recipe, and how many promises test kept."""
    rows = []
    for name in _common_arms(runs, group):
        arms = [runs[run].arms[name] for run in group.runs]
        values = [_values(arm) for arm in arms]
        columns = {key: [row[key] for row in values] for key in values[0] if key != "macs"}
        kept = [
            seen <= point.certificate.max_risk
            for arm in arms
            for point in arm.operating_points
            if point.certificate is not None and point.test is not None
            if (seen := promised_on(point.certificate, point.test)) is not None
        ]
        rows.append(
            {
                "arm": name,
                "exported": any(runs[run].exported_arm == name for run in group.runs),
                "spreads": {key: _mean_and_spread(column) for key, column in columns.items()},
                "kept": sum(kept),
                "promises": len(kept),
            }
        )
    return {"label": group.label, "seeds": [runs[run].seed for run in group.runs], "rows": rows}


def _mean_and_spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    return (mean(known), stdev(known)) if len(known) == len(values) else None


def seed_differences(runs: Runs, group: SeedGroup) -> dict[str, Any]:
    """Differences between arms of a recipe, paired by seed: those of the exported arm, and all others."""
    exported = runs[group.runs[0]].exported_arm
    names = sorted(_common_arms(runs, group), key=lambda name: name != exported)
    rows = []
    for first, second in combinations(names, 2):
        pairs = [(_values(runs[run].arms[first]), _values(runs[run].arms[second])) for run in group.runs]
        gaps = {}
        for key, scale in (("accuracy", 100), ("macs", 1e-6), ("area", 100)):
            known = [
                (mine, other)
                for a, b in pairs
                if (mine := a[key]) is not None and (other := b[key]) is not None
            ]
            gaps[key] = (
                mean_gap([scale * (mine - other) for mine, other in known])
                if len(known) == len(pairs)
                else None
            )
        rows.append({"first": first, "second": second, "gaps": gaps})
    return {
        "label": group.label,
        "exported": [row for row in rows if row["first"] == exported],
        "others": [row for row in rows if row["first"] != exported],
    }


def mean_gap(gaps: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and 95 % t-interval of differences; no interval where all are equal."""
    measured = estimate(gaps)
    return measured.mean, measured.interval


# ---------------------------------------------------------------- recipes


def recipe_differences(runs: Runs) -> dict[str, list[str]]:
    """The keys in which the recipes differ, and each run's value."""
    recipes = [flat(_lists_as_text(results.recipe)) for results in runs.values()]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    values = {key: [recipe.get(key, NONE) for recipe in recipes] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def _lists_as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_as_text(inner) for key, inner in value.items()}
    return json.dumps(value) if isinstance(value, list) else value


# ---------------------------------------------------------------- figure


def figure_data(runs: Runs, groups: Sequence[SeedGroup]) -> dict[str, Any]:
    """A series per recipe and arm, with a line for each of its runs; colours tell recipes, or arms of a single one."""
    names, series = arm_names(runs), []
    points = sum(2 * len(arm.curve.macs) for results in runs.values() for arm in results.arms.values())
    step = math.ceil(points / MAX_POINTS)
    for place, group in enumerate(groups):
        for index, name in enumerate(names):
            lines = [_line(run, runs[run].arms[name], step) for run in group.runs if name in runs[run].arms]
            if lines:
                label, colour = (f"{group.label}/{name}", place) if len(groups) > 1 else (name, index)
                series.append({"label": label, "arm": name, "colour": colour, "shape": index, "lines": lines})
    shown = {results.exported_arm for results in runs.values()}
    shown |= {results.quantised.arm for results in runs.values() if results.quantised is not None}
    shown |= {name for results in runs.values() for name, arm in results.arms.items() if arm.role == "fixed"}
    return {"series": series, "arms": names, "shown": [name for name in names if name in shown]}


def _line(run: str, arm: Arm, step: int) -> dict[str, Any]:
    """An arm of a run for the figure: every ``step``-th point of its curves, and its default operating point."""
    several, point = len(arm.exits) > 1, arm.default_point()

    def thinned(curve: Curve | None) -> dict[str, list[float]] | None:
        if curve is None or not several:
            return None
        # From the end, which is the cheapest point; the path's other end is that of "no early exit".
        kept = sorted({0, *range(len(curve.macs) - 1, -1, -step)})
        return {key: [getattr(curve, key)[index] for index in kept] for key in ("macs", "accuracy", "risk")}

    shown = None
    if point.test is not None:
        low, high = point.test.accuracy_interval
        certified = point.certificate is not None or not several
        shown = {
            "macs": point.test.macs,
            "accuracy": point.test.accuracy,
            "low": low,
            "high": high,
            "certified": certified,
        }
    line = {"run": run, "curve": thinned(arm.curve), "paper": thinned(arm.paper_curve), "point": shown}
    return dict(rounded(line))
