"""The comparison page: runs side by side, in one HTML page that needs nothing beside it.

Runs whose recipes are equal but for the seed are one group: their mean and spread stand for the recipe.
Style, tables and scripts are those of :mod:`erde.report.run_page`.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student_t

from erde.common.files import write_text
from erde.evaluation.results import Arm, Comparison, Curve, Results
from erde.evaluation.run_folder import FREE_TO_CHANGE
from erde.report.html import (
    NONE,
    Group,
    Html,
    Row,
    accuracy,
    details,
    flat,
    join,
    millions,
    page,
    percent,
    points_of,
    rounded,
    signed,
    table,
    tag,
)
from erde.report.sections import area_cell, comparison_table, promised_on, rule_in_words

SCRIPTS = ("common.js", "compare.js")
# Points of all curves together: more would make a large page, and a screen shows fewer.
MAX_POINTS = 20_000
# Keys of a recipe that tell runs of the same recipe apart, or the machines they were made on.
_NOT_RECIPE = ("seed", "name", "device", "threads")


@dataclass(frozen=True)
class SeedGroup:
    """Runs of one recipe: equal but for the seed and the name."""

    label: str
    runs: tuple[str, ...]


CHOOSING = (
    "Whoever takes the arm or the run that saves most here has chosen on the images that certify: its promise is then broken "
    "more often than its confidence says. Certify the chosen one again on other images."
)


def write_comparison(runs: Mapping[str, Results], path: Path, comparisons: Sequence[Comparison] = ()) -> None:
    """Write the comparison of ``runs`` to ``path``, in one step.

    ``comparisons`` are paired tests between runs with the same test images; their arms are named ``run/arm``.
    """
    write_text(path, render_comparison(runs, comparisons))


def render_comparison(runs: Mapping[str, Results], comparisons: Sequence[Comparison] = ()) -> str:
    """The comparison of ``runs`` as the text of one HTML page."""
    groups = seed_groups(runs)
    values: dict[str, str] = {
        "title": html.escape(f"{len(runs)} runs: erde comparison"),
        "header": _header(runs, groups),
        "notes": _notes(runs),
        "legend": "Colours tell recipes, shapes tell arms."
        if len(groups) > 1
        else "Each arm has its colour.",
        "arms": _matrix(runs),
        "numbers": _numbers(runs),
        "seeds": _seeds(runs, groups),
        "seed_differences": _seed_differences(runs, groups),
        "paired": _paired(runs, comparisons),
        "recipes": _recipes(runs),
        "runs": _runs(runs),
    }
    return page("compare.html", SCRIPTS, _figure_data(runs, groups), values)


def seed_groups(runs: Mapping[str, Results]) -> list[SeedGroup]:
    """The runs by recipe, in the order given; a run whose recipe is its own is a group of one."""
    by_recipe: dict[str, list[str]] = {}
    for name, results in runs.items():
        by_recipe.setdefault(json.dumps(_without_free_keys(results.recipe), sort_keys=True), []).append(name)
    groups = []
    for members in by_recipe.values():
        label = members[0]
        if len(members) > 1:
            label = f"{members[0]} and {len(members) - 1} more"
        groups.append(SeedGroup(label, tuple(members)))
    return groups


def _without_free_keys(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a recipe: without the keys that tell runs of it apart, or leave the results as they are."""
    kept = {key: value for key, value in recipe.items() if key not in _NOT_RECIPE}
    for group, free in FREE_TO_CHANGE:
        if isinstance(kept.get(group), dict):
            kept[group] = {key: value for key, value in kept[group].items() if key != free}
    return kept


# ---------------------------------------------------------------- header


def _header(runs: Mapping[str, Results], groups: Sequence[SeedGroup]) -> Html:
    recipes = "one recipe" if len(groups) == 1 else f"{len(groups)} recipes"
    lines = []
    for name, results in runs.items():
        arm = results.arms[results.exported_arm]
        measured = arm.default_point().test
        said = " was not measured on test"
        if measured is not None:
            said = f" answers {percent(measured.accuracy)} right at {percent(1 - measured.macs_saved)} of the MACs without exits"
        lines.append(tag("li", tag("strong", f"{name}/{results.exported_arm}"), said))
    return join(
        tag("h1", f"{len(runs)} runs of {recipes}"),
        tag("p", "The exported arms on test, at their default operating points:", class_="verdict"),
        tag("ul", *lines, class_="plain"),
    )


def tested_images(results: Results) -> str | None:
    """What tells whether two runs were measured on the same images; None where the run does not say."""
    split = results.data.splits.get("test")
    return None if split is None else split.fingerprint


def _notes(runs: Mapping[str, Results]) -> Html:
    """What makes numbers of different runs hard to compare."""
    notes = []
    sets: dict[str, list[str]] = {}
    images: dict[str | None, list[str]] = {}
    for name, results in runs.items():
        sets.setdefault(results.data.name, []).append(name)
        images.setdefault(tested_images(results), []).append(name)
    if len(sets) > 1:
        listed = "; ".join(f"{data}: {', '.join(names)}" for data, names in sets.items())
        notes.append(
            f"These runs are of different data sets ({listed}): their accuracies say nothing about each other."
        )
    if len(images) > 1:
        listed = "; ".join(
            f"{', '.join(names)} ({NONE if mark is None else mark[:12]})" for mark, names in images.items()
        )
        notes.append(
            f"These runs were measured on different test images ({listed}): no paired test between them, and their "
            "differences hold the luck of drawing those images."
        )
    choosing = tag("p", CHOOSING, class_="soft small")
    if not notes:
        return join(
            tag("p", "All runs were measured on the same test images.", class_="soft small"), choosing
        )
    return join(tag("div", *(tag("p", note) for note in notes), class_="promise warn"), choosing)


# ---------------------------------------------------------------- tables


def _arm_names(runs: Mapping[str, Results]) -> list[str]:
    """The arms of all runs: exported ones first, then in their order."""
    exported = [results.exported_arm for results in runs.values()]
    return list(dict.fromkeys([*exported, *(name for results in runs.values() for name in results.arms)]))


def _matrix(runs: Mapping[str, Results]) -> Html:
    rows: list[Row] = []
    for name in _arm_names(runs):
        cells: list[str] = [name]
        for results in runs.values():
            arm = results.arms.get(name)
            measured = None if arm is None else arm.default_point().test
            if arm is None or measured is None:
                cells.append(NONE)
                continue
            note = (
                f"{percent(measured.macs_saved)} saved"
                if len(arm.exits) > 1
                else f"{millions(measured.macs)} M MACs"
            )
            cells.append(join(points_of(measured.accuracy), tag("small", note)))
        rows.append((cells, any(results.exported_arm == name for results in runs.values())))
    caption = (
        "Test accuracy (%) of every arm in every run at its default operating point, and the MACs it saves."
    )
    return table(caption, ("arm", *runs), [(None, rows)])


def _numbers(runs: Mapping[str, Results]) -> Html:
    columns = (
        "run", "default\npoint", "score", "test\naccuracy (%)", "final exit:\naccuracy (%)", "MACs\n(million)",
        "MACs\nsaved (%)", "risk (%)", "area under\nthe curve (%)", "the paper's\nrule: area (%)",
    )  # fmt: skip
    groups: list[Group] = []
    for name in _arm_names(runs):
        rows: list[Row] = []
        for run, results in runs.items():
            if name in results.arms:
                rows.append(([run, *_arm_cells(results.arms[name])], results.exported_arm == name))
        groups.append((join(name), rows))
    caption = (
        "Every arm on test, with 95 % intervals; of the area they are bootstrap intervals over test images."
    )
    return details("All numbers", table(caption, columns, groups, text={0, 1, 2}, wrap={2}))


def _arm_cells(arm: Arm) -> list[str]:
    point, final = arm.default_point(), arm.exits[-1]
    certified = tag("small", "certified" if point.certificate else "not certified")
    test, several = point.test, len(arm.exits) > 1

    paper = arm.paper_curve if several else None
    return [
        join(point.name, certified), rule_in_words(arm) if several else NONE,
        NONE if test is None else accuracy(test.accuracy, test.accuracy_interval),
        accuracy(final.accuracy, final.accuracy_interval), NONE if test is None else millions(test.macs),
        NONE if test is None else points_of(test.macs_saved), NONE if test is None else points_of(test.risk, 2),
        area_cell(arm.curve.area, arm.curve.area_interval) if several else NONE,
        NONE if paper is None else area_cell(paper.area, paper.area_interval),
    ]  # fmt: skip


def _values(arm: Arm) -> dict[str, float | None]:
    """What is averaged over seeds, as shares."""
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


def _common_arms(runs: Mapping[str, Results], group: SeedGroup) -> list[str]:
    first = runs[group.runs[0]]
    return [name for name in first.arms if all(name in runs[run].arms for run in group.runs)]


def _seeds(runs: Mapping[str, Results], groups: Sequence[SeedGroup]) -> Html:
    """Mean and spread over the runs of each recipe."""
    columns = (
        "arm", "test\naccuracy (%)", "final exit:\naccuracy (%)", "MACs\nsaved (%)", "risk (%)",
        "area under\nthe curve (%)", "the paper's\nrule: area (%)", "promises\nkept on test",
    )  # fmt: skip
    made: list[Group] = []
    for group in groups:
        if len(group.runs) < 2:
            continue
        rows: list[Row] = []
        for name in _common_arms(runs, group):
            arms = [runs[run].arms[name] for run in group.runs]
            found = [_values(arm) for arm in arms]
            cells = [_mean_and_spread([one[key] for one in found]) for key in found[0] if key != "macs"]
            exported = any(runs[run].exported_arm == name for run in group.runs)
            rows.append(([name, *cells, _promises_kept(arms)], exported))
        seeds = ", ".join(str(runs[run].seed) for run in group.runs)
        made.append((join(f"{group.label}: seeds {seeds}"), rows))
    if not made:
        return tag(
            "p",
            "No two of these runs differ by their seed only, so there is no spread to show.",
            class_="soft",
        )
    caption = "Mean over runs that differ by their seed only, and the standard deviation of one run below it."
    return table(caption, columns, made)


def _mean_and_spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return NONE
    return join(points_of(mean(known), 2), tag("small", f"± {points_of(stdev(known), 2)}"))


def _promises_kept(arms: Sequence[Arm]) -> str:
    """Of all certified points of these arms, those whose outcome on test is within the promise."""
    kept = [
        promised_on(point.certificate, point.test) <= point.certificate.max_risk
        for arm in arms
        for point in arm.operating_points
        if point.certificate is not None and point.test is not None
    ]
    return f"{sum(kept)} of {len(kept)}" if kept else NONE


def _seed_differences(runs: Mapping[str, Results], groups: Sequence[SeedGroup]) -> Html:
    """Differences between arms of one recipe, paired by seed: those of the exported arm, and all others."""
    exported: list[Group] = []
    others: list[Group] = []
    for group in groups:
        if len(group.runs) < 2:
            continue
        first = runs[group.runs[0]].exported_arm
        names = sorted(_common_arms(runs, group), key=lambda name: name != first)
        rows = {pair: _seed_difference(runs, group, *pair) for pair in combinations(names, 2)}
        exported.append((join(group.label), [row for pair, row in rows.items() if pair[0] == first]))
        others.append((join(group.label), [row for pair, row in rows.items() if pair[0] != first]))
    if not any(rows for _, rows in exported + others):
        return Html("")
    caption = (
        "Differences between arms, paired by seed, each at its default operating point, with 95 % t-intervals over "
        "seeds: they hold the luck of training, which intervals over test images do not."
    )
    columns = (
        "first – second",
        "test accuracy\n(points)",
        "MACs per image\n(million)",
        "area under the\ncurve (points)",
    )
    shown = [table(caption, columns, made) for made in (exported, others) if any(rows for _, rows in made)]
    return join(
        tag("h3", "Arm against arm, over seeds"),
        shown[0],
        *(details("All other pairs", one) for one in shown[1:]),
    )


def _seed_difference(runs: Mapping[str, Results], group: SeedGroup, first: str, second: str) -> Row:
    pairs = [(_values(runs[run].arms[first]), _values(runs[run].arms[second])) for run in group.runs]
    cells = []
    for key, scale in (("accuracy", 100), ("macs", 1e-6), ("area", 100)):
        known = [(a[key], b[key]) for a, b in pairs]
        cells.append(
            _difference([scale * (a - b) for a, b in known if a is not None and b is not None], len(known))
        )
    return [f"{first} – {second}", *cells], False


def _difference(gaps: Sequence[float], expected: int) -> str:
    """Mean and 95 % t-interval; a dash where some run does not have the number."""
    if len(gaps) < expected:
        return NONE
    half = float(student_t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / math.sqrt(len(gaps))
    centre = mean(gaps)
    return join(signed(centre, 2), tag("small", f"{signed(centre - half, 2)} to {signed(centre + half, 2)}"))


def _paired(runs: Mapping[str, Results], comparisons: Sequence[Comparison]) -> Html:
    """Paired tests between runs, and within each."""
    parts = []
    if comparisons:
        caption = (
            f"{len(comparisons):,} comparisons between runs on the same test images, with paired 95 % bootstrap "
            "intervals; p-values are not corrected for their number. They do not hold the luck of training."
        )
        parts.append(comparison_table(comparisons, caption))
    else:
        parts.append(tag("p", "There are no paired tests between these runs.", class_="soft"))
    for run, results in runs.items():
        if results.comparisons:
            caption = f"Arms of {run} on the same test images, with paired 95 % bootstrap intervals."
            parts.append(details(f"Within {run}", comparison_table(results.comparisons, caption)))
    return join(*parts)


def _recipes(runs: Mapping[str, Results]) -> Html:
    """The keys in which the recipes differ."""
    recipes = {run: flat(_without_lists(results.recipe)) for run, results in runs.items()}
    keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe)
    rows: list[Row] = []
    for key in keys:
        values = [recipe.get(key, NONE) for recipe in recipes.values()]
        if len(set(values)) > 1:
            rows.append(([key, *values], False))
    if not rows:
        return tag("p", "The recipes are equal, seed and name included.", class_="soft")
    caption = "What differs between the recipes; a dash where a recipe has no such key."
    wrap = set(range(1, len(runs) + 1))
    return table(caption, ("key", *runs), [(None, rows)], text={0, *wrap}, wrap=wrap)


def _without_lists(value: Any) -> Any:
    """Lists as text, which is how they are compared and shown."""
    if isinstance(value, dict):
        return {key: _without_lists(one) for key, one in value.items()}
    return json.dumps(value) if isinstance(value, list) else value


def _runs(runs: Mapping[str, Results]) -> Html:
    columns = (
        "run",
        "name",
        "seed",
        "data set",
        "test images",
        "test\nfingerprint",
        "exported arm",
        "bundle seal",
    )
    rows: list[Row] = []
    for run, results in runs.items():
        split, mark = results.data.splits.get("test"), tested_images(results)
        cells = [
            run, results.name, str(results.seed), results.data.name, NONE if split is None else f"{split.size:,}",
            NONE if mark is None else tag("code", mark[:12], title=mark), results.exported_arm,
            tag("code", results.bundle_seal[:12], title=results.bundle_seal),
        ]  # fmt: skip
        rows.append((cells, False))
    return table("The runs of this page.", columns, [(None, rows)], text={0, 1, 3, 5, 6, 7})


# ---------------------------------------------------------------- figure


def _figure_data(runs: Mapping[str, Results], groups: Sequence[SeedGroup]) -> dict[str, Any]:
    """One series per recipe and arm, with a line for each of its runs; colours tell recipes, or arms of one."""
    names, series = _arm_names(runs), []
    points = sum(2 * len(arm.curve.macs) for results in runs.values() for arm in results.arms.values())
    step = math.ceil(points / MAX_POINTS)
    for place, group in enumerate(groups):
        for index, name in enumerate(names):
            lines = [_line(run, runs[run].arms[name], step) for run in group.runs if name in runs[run].arms]
            one = {
                "label": f"{group.label}/{name}" if len(groups) > 1 else name,
                "arm": name,
                "colour": place if len(groups) > 1 else index,
                "shape": index,
                "lines": lines,
            }
            series += [one] if lines else []
    shown = {results.exported_arm for results in runs.values()}
    shown |= {results.quantised.arm for results in runs.values() if results.quantised is not None}
    shown |= {name for results in runs.values() for name, arm in results.arms.items() if arm.role == "fixed"}
    return {"series": series, "arms": names, "shown": [name for name in names if name in shown]}


def _line(run: str, arm: Arm, step: int) -> dict[str, Any]:
    """An arm of one run for the figure: every ``step``-th point of its curves, and its default operating point."""
    several, point = len(arm.exits) > 1, arm.default_point()
    test, shown = point.test, None

    def thinned(curve: Curve | None) -> dict[str, list[float]] | None:
        if curve is None or not several:
            return None
        # From the end, which is the cheapest point; the path's other end is that of "no early exit".
        kept = sorted({0, *range(len(curve.macs) - 1, -1, -step)})
        return {key: [getattr(curve, key)[index] for index in kept] for key in ("macs", "accuracy", "risk")}

    if test is not None:
        low, high = test.accuracy_interval
        certified = point.certificate is not None or not several
        shown = {
            "macs": test.macs,
            "accuracy": test.accuracy,
            "low": low,
            "high": high,
            "certified": certified,
        }
    line = {"run": run, "curve": thinned(arm.curve), "paper": thinned(arm.paper_curve), "point": shown}
    return dict(rounded(line))
