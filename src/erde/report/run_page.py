"""The report of a run: one HTML page that needs nothing beside it, no network included.

Python builds the text and the tables, the scripts of ``assets`` draw the figures from the JSON that
lies in the page. With :class:`~erde.evaluation.evidence.Evidence` the page has a slider that moves the operating point,
and images to look at; without it, it says so.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from erde.calibration.checks import poor_network
from erde.common.files import write_text
from erde.evaluation.evidence import Evidence
from erde.evaluation.results import Arm, Results
from erde.report import details, sections
from erde.report.html import (
    NOTHING,
    Html,
    interval,
    join,
    limit,
    millions,
    page,
    percent,
    points_of,
    rounded,
    tag,
)
from erde.report.sections import promised_on, rule_in_words

SCRIPTS = ("common.js", "explore.js", "report.js")


def write_report(results: Results, path: Path, evidence: Evidence | None = None) -> None:
    """Write the report of ``results`` to ``path``, in one step."""
    write_text(path, render(results, evidence))


def render(results: Results, evidence: Evidence | None = None) -> str:
    """The report of ``results`` as the text of one HTML page."""
    values: dict[str, str] = {
        "title": html.escape(f"{results.name}: erde report"),
        "header": _header(results),
        "tradeoff": html.escape(_tradeoff_in_words(results)),
        "exported": html.escape(results.exported_arm),
        "explore": _explore(results, evidence),
        "smaller": smaller_networks(results),
        "galleries": sections.galleries(evidence, results.data.classes),
        "arms": sections.arms(results),
        "areas": sections.areas(results),
        "comparisons": sections.comparisons(results),
        "points": sections.points(results),
        "exits": details.exits(results),
        "probabilities": details.probabilities(results),
        "reliability": details.reliability(results),
        "rates": details.rates(results),
        "class_drop": html.escape(details.class_drop_in_words(results)),
        "classes": details.classes(results),
        "teacher_wrong": details.teacher_wrong(results),
        "entropies": details.entropies(results),
        "scores": details.scores(results),
        "score_outcomes": details.score_outcomes(results),
        "history": details.history(results),
        "unhealthy_heads": details.unhealthy_heads(results),
        "agreement": details.agreement(results),
        "data_tables": details.data_tables(results),
        "environment": details.environment(results),
        "timings": details.timings(results),
        "recipe": html.escape(json.dumps(results.recipe, indent=2, ensure_ascii=False)),
        "seal": html.escape(results.bundle_seal),
    }
    return page("report.html", SCRIPTS, _figure_data(results, evidence), values)


# ---------------------------------------------------------------- header


def _header(results: Results) -> Html:
    arm, data = results.arms[results.exported_arm], results.data
    about = f"Data set {data.name}, {len(data.classes):,} classes, seed {results.seed}"
    return join(
        tag("h1", results.name),
        tag("p", _verdict(results), class_="verdict"),
        _promise(arm, len(data.classes)),
        _tiles(arm),
        tag("p", about, class_="soft small"),
    )


def _verdict(results: Results) -> Html:
    name, arm = results.exported_arm, results.arms[results.exported_arm]
    measured = arm.default_point().test
    if measured is None:
        return join("Arm ", tag("strong", name), " was not measured on the test split.")
    twins = [
        other
        for other, twin in results.arms.items()
        if other != name
        and len(twin.exits) == 1
        and (twin.backbone, twin.no_exit_macs) == (arm.backbone, arm.no_exit_macs)
    ]
    if twins:
        against = f"that network, arm {twins[0]}, gets {percent(results.arms[twins[0]].exits[-1].accuracy)}"
    else:
        against = f"the final exit alone gets {percent(arm.exits[-1].accuracy)}"
    share = percent(1 - measured.macs_saved, 0)
    return join(
        f"The {name} {'network' if arm.role == 'fixed' else arm.role} answers ",
        tag("strong", f"{percent(measured.accuracy)} of the test images right at {share} of the MACs"),
        f" of the same network without exits ({against}).",
    )


def _promise(arm: Arm, classes: int) -> Html:
    point = arm.default_point()
    disabled = point.thresholds and all(threshold is None for threshold in point.thresholds)
    rest = "There is no early exit here: every image goes to the final exit." if disabled else ""
    if point.certificate is None:
        text = f" Operating point {point.name}: {point.note or 'nothing was promised'}."
        missing = "".join(f" Asked for was {one.name}, but {one.note}." for one in arm.left_out[:1])
        return tag(
            "div",
            tag("p", tag("strong", "No certificate."), text, missing),
            *([tag("p", rest)] if rest else []),
            class_="promise warn",
        )
    assumptions = point.certificate.assumptions
    early = max((one.accuracy for one in arm.exits[:-1]), default=0.0)
    poor = poor_network(arm.exits[-1].accuracy, early, classes, "test")
    return tag(
        "div",
        tag("p", tag("strong", "Certified. "), point.certificate.sentence(arm.precision)),
        tag("p", f"Operating point {point.name}. {assumptions[:1].upper()}{assumptions[1:]}. {rest}"),
        *([tag("p", tag("strong", "But "), f"{poor}.")] if poor else []),
        class_="promise warn" if poor else "promise good",
    )


def _tiles(arm: Arm) -> Html:
    point, final = arm.default_point(), arm.exits[-1]
    test, certificate = point.test, point.certificate
    if test is None:
        return NOTHING
    seen, promised = ("Risk seen on test", percent(test.risk, 2)), "nothing promised"
    if certificate is not None:
        promised = f"promised: at most {limit(certificate.max_risk)}"
        if certificate.guarantee == "net_drop":
            seen = ("Accuracy drop on test", percent(promised_on(certificate, test), 2))
    tiles = (
        ("Test accuracy", percent(test.accuracy), f"95 % interval {interval(test.accuracy_interval)}"),
        (
            "MACs per image",
            percent(1 - test.macs_saved),
            f"{millions(test.macs)} of {millions(arm.no_exit_macs)} million",
        ),
        (*seen, promised),
        (
            "Final exit alone",
            percent(final.accuracy),
            f"{millions(arm.cost[-1].macs)} million MACs, {interval(final.accuracy_interval)}",
        ),
    )
    return tag(
        "dl",
        *(
            tag("div", tag("dt", label), tag("dd", value), tag("dd", note, class_="note"))
            for label, value, note in tiles
        ),
        class_="tiles",
    )


# ---------------------------------------------------------------- the figure and its slider


def _tradeoff_in_words(results: Results) -> str:
    return "; ".join(
        f"{name} {percent(point.accuracy)} at {millions(point.macs)} million MACs"
        for name, arm in results.arms.items()
        if (point := arm.default_point().test) is not None
    )


def _explore(results: Results, evidence: Evidence | None) -> Html:
    """What stands below the first figure: the slider's place, which explore.js fills, or why there is none."""
    if evidence is None or not evidence.arms:
        why = (
            "no arm of this run has more than one exit."
            if all(len(arm.exits) == 1 for arm in results.arms.values())
            else "this page was made from the results alone, without the scores of the test images."
        )
        return tag("p", f"There is no slider here: {why}", class_="soft small")
    images = len(next(iter(evidence.arms.values())).reference_right)
    counted = f"all {images:,} test images"
    if images < evidence.test_images:
        counted = f"{images:,} of the {evidence.test_images:,} test images, drawn at random, so that the page stays small"
    note = (
        f"Counted in this page from {counted}. A setting between the named ones carries no promise, and one that "
        "is picked by looking at test images looks better here than it will in use."
    )
    return tag("div", tag("p", note, class_="soft small", id="explore-note"), id="explore")


def smaller_networks(results: Results) -> Html:
    """Whether a smaller network would do: each fixed one against the exported arm at no more MACs."""
    name, arm = results.exported_arm, results.arms[results.exported_arm]
    fixed = [
        (other, one)
        for other, one in results.arms.items()
        if other != name and len(one.exits) == 1 and one.cost[-1].macs < arm.no_exit_macs
    ]
    question = tag("strong", "Why not just a smaller network? ")
    if len(arm.exits) == 1:
        return NOTHING
    if not fixed:
        return tag("p", question, "This run trained none, so it does not say whether one would do as well.")
    sentences = [_against_smaller(name, arm, other, one) for other, one in fixed]
    return tag("p", question, " ".join(sentences))


def _against_smaller(name: str, arm: Arm, other: str, fixed: Arm) -> str:
    macs, final, curve = fixed.cost[-1].macs, fixed.exits[-1], arm.curve
    answer = f"{other} answers {percent(final.accuracy)} right at {millions(macs)} million MACs."
    affordable = [index for index, one in enumerate(curve.macs) if one <= macs]
    # The path falls in MACs, so the first that is affordable is the dearest: nothing is picked by its test accuracy.
    index = affordable[0] if affordable else int(np.argmin(curve.macs))
    early = curve.accuracy[index]
    low, high = final.accuracy_interval
    if not affordable:
        answer += (
            f" {name} cannot go that low: with every image leaving at the first exit it answers {percent(early)} right at "
            f"{millions(curve.macs[index])} million"
        )
        # Dearer, and within the interval of the other's accuracy: nothing speaks for it.
        return f"{answer}." if early > high else f"{answer}, not clearly more: here the smaller network wins."
    answer += f" At no more than that, {name} with early exits answers {percent(early)} right"
    if low <= early <= high:
        return f"{answer}: too close to tell apart with these test images."
    gap = f"{points_of(abs(early - final.accuracy))} points"
    return (
        f"{answer}, {gap} more." if early > high else f"{answer}, {gap} less: here the smaller network wins."
    )


def _figure_data(results: Results, evidence: Evidence | None) -> dict[str, Any]:
    """What the scripts draw: the arms as in ``results.json``, of the history only the loss."""
    arms = {}
    for name, arm in results.arms.items():
        value = arm.model_dump(mode="json", exclude={"history", "score_outcomes", "left_out"})
        value["rule"] = rule_in_words(arm)
        value["classes"] = _largest_drops(arm, results.data.classes)
        arms[name] = rounded(value) | {"losses": _losses(arm)}
    return {
        "exported": results.exported_arm,
        "order": list(arms),
        "arms": arms,
        # Not rounded: the page counts with these, and shows thresholds to be copied.
        "evidence": {name: one.embedded() for name, one in evidence.arms.items()} if evidence else {},
    }


def _largest_drops(arm: Arm, names: list[str], most: int = 30) -> list[dict[str, Any]]:
    """The classes with the largest drop, as many as a figure can show."""
    order = sorted(range(len(arm.classes)), key=lambda index: -arm.classes[index].drop)
    return [
        {"name": names[index], **arm.classes[index].model_dump(include={"drop", "exit_rates", "images"})}
        for index in order[:most]
    ]


def _losses(arm: Arm) -> list[dict[str, Any]]:
    return [
        {"loss": float(f"{loss:.7g}"), "phase": epoch.phase, "rate": float(f"{epoch.learning_rate:.4g}")}
        for epoch in arm.history
        if isinstance(loss := epoch.parts.get("loss"), float)
    ]
