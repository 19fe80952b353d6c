"""The main sections of a run's report: arms, comparisons, operating points and images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from erde.evaluation.evidence import Evidence, Gallery, Thumbnail
from erde.evaluation.results import Arm, Comparison, Results
from erde.policy.points import Certificate, Measured, OperatingPoint
from erde.policy.rule import ExitRule
from erde.report.html import (
    NONE,
    NOTHING,
    Group,
    Html,
    Row,
    accuracy,
    badge,
    between,
    decimal,
    details,
    dot,
    exit_bar,
    exit_keys,
    image,
    join,
    limit,
    millions,
    p_value,
    percent,
    points_of,
    signed,
    table,
    tag,
)

# Pixels of a thumbnail on the page; smaller images are magnified.
_THUMBNAIL_SHOWN = 72


def rule_in_words(arm: Arm) -> str:
    """What an arm's exits decide on."""
    return ExitRule(arm.score, arm.sharpness, arm.ensemble).in_words()


def promise_in_words(certificate: Certificate) -> str:
    """A certificate's promise, short."""
    what = "accuracy drop" if certificate.guarantee == "net_drop" else "risk"
    sure = "in expectation"
    if certificate.confidence is not None:
        sure = f"with {limit(certificate.confidence)} confidence"
    return f"{what} ≤ {limit(certificate.max_risk)} {sure}"


def promised_on(certificate: Certificate, measured: Measured) -> float:
    """Of what was measured, that which the certificate is about."""
    return measured.net_drop if certificate.guarantee == "net_drop" else measured.risk


def exit_names(arm: Arm) -> list[str]:
    """The places of an arm's exits."""
    return [cost.name for cost in arm.cost]


def several(results: Results) -> Iterable[tuple[int, str, Arm]]:
    """Arms with early exits, with their place, which is their colour; the exported one first."""
    listed = [
        (index, name, arm) for index, (name, arm) in enumerate(results.arms.items()) if len(arm.exits) > 1
    ]
    return sorted(listed, key=lambda one: one[1] != results.exported_arm)


def unfolded(results: Results, title: str, made: Iterable[tuple[str, Html]]) -> Html:
    """The exported arm's part as it is, those of the others to be opened."""
    return join(
        *(
            part if name == results.exported_arm else details(f"{title} of {name}", part)
            for name, part in made
        )
    )


# ---------------------------------------------------------------- arms and comparisons


def arms(results: Results) -> Html:
    """All arms at their default operating point."""
    columns = (
        "arm", "role", "loss", "backbone", "MACs\nwithout exits\n(million)", "parameters",
        "final exit:\naccuracy (%)", "default\npoint", "test\naccuracy (%)", "MACs\nsaved (%)", "risk (%)",
    )  # fmt: skip
    rows = []
    for index, (name, arm) in enumerate(results.arms.items()):
        point, final = arm.default_point(), arm.exits[-1]
        exported = tag("small", "exported") if name == results.exported_arm else NOTHING
        cells = [
            join(dot(index), name, exported), arm.role, arm.loss, arm.backbone, millions(arm.no_exit_macs),
            f"{arm.parameters:,}", accuracy(final.accuracy, final.accuracy_interval),
        ]  # fmt: skip
        if len(arm.exits) == 1:
            cells += [tag("span", "one exit", class_="soft"), *[NONE] * 3]
        else:
            measured = point.test
            cells += [
                join(point.name, tag("small", "certified" if point.certificate else "not certified")),
                NONE if measured is None else accuracy(measured.accuracy, measured.accuracy_interval),
                NONE if measured is None else points_of(measured.macs_saved),
                NONE if measured is None else points_of(measured.risk, 2),
            ]
        rows.append((cells, name == results.exported_arm))
    caption = "All arms on the test split. The last four columns are at each arm's default operating point."
    return table(caption, columns, [(None, rows)], text={0, 1, 2, 3, 7})


def area_cell(area: float | None, bounds: tuple[float, float] | None) -> str:
    """An area under a curve with its interval, as far as they are known."""
    if area is None:
        return NONE
    return (
        points_of(area, 2) if bounds is None else join(points_of(area, 2), tag("small", between(bounds, 2)))
    )


def areas(results: Results) -> Html:
    """Areas under the curves of the chosen score and of the paper's rule, and the oracle."""
    columns = (
        "arm", "chosen score", "its area (%)", "the paper's\nrule: area (%)", "oracle:\naccuracy (%)",
        "oracle:\nMACs saved (%)",
    )  # fmt: skip

    rows = []
    for index, name, arm in several(results):
        paper = arm.paper_curve
        cells = [
            join(dot(index), name), rule_in_words(arm), area_cell(arm.curve.area, arm.curve.area_interval),
            NONE if paper is None else area_cell(paper.area, paper.area_interval),
            points_of(arm.oracle.accuracy), points_of(1 - arm.oracle.macs / arm.no_exit_macs),
        ]  # fmt: skip
        rows.append((cells, name == results.exported_arm))
    caption = (
        "Area: the mean accuracy over a curve's range of MACs, with a 95 % bootstrap interval. The paper's rule is "
        "the entropy at sharpness 1 along its own path. The oracle knows the label and takes the first exit that "
        "is right: no rule does better."
    )
    return table(caption, columns, [(None, rows)], text={0, 1}, wrap={1})


def comparison_table(comparisons: Sequence[Comparison], caption: str) -> Html:
    """Paired differences between arms, with intervals and McNemar's test."""
    columns = (
        "first – second", "accuracy\ndifference\n(points)", "MACs\ndifference\n(million)", "only first\nright",
        "only second\nright", "McNemar's\np-value", "accuracy",
    )  # fmt: skip
    groups: list[Group] = []
    headings = {"default": "At each arm's default operating point", "no-exit": "Final exits alone"}
    for at, heading in headings.items():
        rows: list[Row] = []
        for one in comparisons:
            if one.at != at:
                continue
            low, high = one.accuracy_interval
            verdict = "no difference seen"
            if low > 0 or high < 0:
                verdict = f"{one.first if low > 0 else one.second} is better"
            cells = [
                f"{one.first} – {one.second}",
                join(signed(100 * one.accuracy_difference, 2), tag("small", _signed_bounds(low, high, 100, 2))),
                join(
                    signed(one.macs_difference / 1e6, 2),
                    tag("small", _signed_bounds(*one.macs_interval, 1e-6, 2)),
                ),
                f"{one.only_first_right:,}", f"{one.only_second_right:,}", p_value(one.mcnemar_p_value), verdict,
            ]  # fmt: skip
            rows.append((cells, False))
        if rows:
            groups.append((join(heading), rows))
    return table(caption, columns, groups, text={0, 6})


def _signed_bounds(low: float, high: float, scale: float, digits: int) -> str:
    return f"{signed(scale * low, digits)} to {signed(scale * high, digits)}"


def comparisons(results: Results) -> Html:
    """Arms against each other on the same images."""
    if not results.comparisons:
        return tag("p", "This run compares no arms.", class_="soft")
    exported = results.exported_arm
    first = [
        one for one in results.comparisons if one.at == "default" and exported in (one.first, one.second)
    ]
    rest = [one for one in results.comparisons if one not in first]
    caption = (
        f"Of {len(results.comparisons):,} comparisons those with {exported}, on the same test images, with paired 95 % "
        "bootstrap intervals. McNemar's test looks at accuracy only, not at what it costs; p-values are not corrected "
        "for their number."
    )
    others = details(
        f"The other {len(rest):,} comparisons", comparison_table(rest, "All other pairs of arms.")
    )
    return join(comparison_table(first, caption), *([others] if rest else []))


# ---------------------------------------------------------------- operating points


def points(results: Results) -> Html:
    """The promises beside what came of them, and what could not be promised."""
    count = max(len(arm.exits) for arm in results.arms.values())
    made = [
        (name, join(_ladder(name, arm, count), _left_out(arm), _settings(name, arm)))
        for _, name, arm in several(results)
    ]
    exported = results.arms[results.exported_arm]
    if len(exported.exits) == 1:
        made.insert(0, (results.exported_arm, _ladder(results.exported_arm, exported, count)))
    return join(exit_keys(count), unfolded(results, "Operating points", made))


def _ladder(name: str, arm: Arm, count: int) -> Html:
    timed = any(
        point.test is not None and point.test.milliseconds is not None for point in arm.operating_points
    )
    proofs = [point.certificate for point in arm.operating_points if point.certificate is not None]
    what = "drop" if any(one.guarantee == "net_drop" for one in proofs) else "risk"
    columns = [
        "operating point", "promise", f"{what} on\ncertify (%)", f"{what} on\ntest (%)", "test\naccuracy (%)",
        "MACs saved\non test (%)", *(["ms per\nimage"] if timed else []), "exit rates on test",
    ]  # fmt: skip
    rows = []
    for point in arm.operating_points:
        standard, test, proof = point.name == arm.default_operating_point, point.test, point.certificate
        seen = NONE
        if proof is not None:
            bound = (
                NOTHING
                if proof.upper_bound is None
                else tag("small", f"bound {points_of(proof.upper_bound, 2)}")
            )
            seen = join(points_of(proof.risk, 2), bound)
        cells = [
            join(point.name, tag("small", _target(point)), tag("small", "default") if standard else NOTHING),
            _promise(point), seen, _outcome(point),
            NONE if test is None else accuracy(test.accuracy, test.accuracy_interval),
            NONE if test is None else points_of(test.macs_saved),
        ]  # fmt: skip
        if timed:
            cells.append(NONE if test is None else decimal(test.milliseconds, 2))
        cells.append(NONE if test is None else exit_bar(test.exit_rates, exit_names(arm), count))
        rows.append((cells, standard))
    caption = (
        f"Operating points of {name}: what was promised from the certify split, and what came of it on test."
    )
    last = len(columns) - 1
    return table(caption, columns, [(None, rows)], text={0, 1, last}, wrap={1, last})


def _target(point: OperatingPoint) -> str:
    if point.target is None:
        return "no early exit"
    if point.kind == "latency":
        return f"at most {point.target:g} ms"
    if point.kind == "budget":
        return f"MACs at most {limit(point.target)}"
    return f"risk at most {limit(point.target)}"


def _promise(point: OperatingPoint) -> Html:
    note = tag("small", point.note) if point.note else NOTHING
    if point.certificate is not None:
        return join(badge("certified", "good"), tag("small", promise_in_words(point.certificate)), note)
    return join(badge("not certified", "warn" if point.kind == "risk" else "soft"), note)


def _outcome(point: OperatingPoint) -> str:
    """Risk (or drop) on test, marked where it is above the promise."""
    if point.test is None:
        return NONE
    if point.certificate is None:
        return points_of(point.test.risk, 2)
    value = promised_on(point.certificate, point.test)
    text = points_of(value, 2)
    if value > point.certificate.max_risk:
        return tag("span", f"{text} above the promise", class_="warn-text")
    return join(text, tag("small", "promise kept"))


def _left_out(arm: Arm) -> Html:
    if not arm.left_out:
        return NOTHING
    made = []
    for one in arm.left_out:
        text = f" (risk at most {limit(one.target)}): {one.note}."
        made.append(tag("li", tag("strong", one.name), text))
    return join(tag("h3", "Asked for, but not promised"), tag("ul", *made, class_="plain"))


def _settings(name: str, arm: Arm) -> Html:
    columns = (
        "operating point", "thresholds", "risk on\ntune (%)", "risk on\ntest (%)", "net drop\non test (%)",
        "test\naccuracy (%)", "MACs on test\n(million)",
    )  # fmt: skip
    rows = []
    for point in arm.operating_points:
        tune, test = point.tune, point.test
        cells = [
            point.name, ", ".join(map(_threshold, point.thresholds)) or NONE,
            NONE if tune is None else points_of(tune.risk, 2), NONE if test is None else points_of(test.risk, 2),
            NONE if test is None else points_of(test.net_drop, 2),
            NONE if test is None else points_of(test.accuracy, 2), NONE if test is None else millions(test.macs),
        ]  # fmt: skip
        rows.append((cells, point.name == arm.default_operating_point))
    caption = (
        f"The exits of {name} decide by the score {rule_in_words(arm)}; an image leaves where its score is above the "
        "threshold, and “off” disables an exit. Net drop: images lost minus images won by leaving early."
    )
    return details(f"Thresholds of {name}", table(caption, columns, [(None, rows)], text={0, 1}, wrap={1}))


def _threshold(threshold: float | None) -> str:
    return "off" if threshold is None else f"{threshold:.4f}"


# ---------------------------------------------------------------- images


_KINDS = {
    "surest": ("Leave first, at exit {exit}", "the surest of {total:,} images that leave there"),
    "unsure": ("Barely leave at exit {exit}", "the least sure of {total:,} images that leave there"),
    "stayed": ("Stay to the end, exit {exit}", "the least sure of {total:,} images that no early exit takes"),
    "wrong": (
        "Confidently wrong",
        "left early with a wrong answer, the most confident of {total:,}",
    ),
}
# Where no image leaves at an exit, that is said once.
_NONE_OF_THESE = {
    "surest": "No image leaves at exit {exit}.",
    "stayed": "No image stays to the end.",
    "wrong": "No early answer is wrong.",
}


def galleries(evidence: Evidence | None, classes: Sequence[str]) -> Html:
    """Images that leave first and last, and the confidently wrong ones."""
    if evidence is None or not evidence.galleries:
        return tag(
            "p", "No images were kept for this page: it was made from the results alone.", class_="soft"
        )
    return join(*(_gallery(one, classes) for one in evidence.galleries))


def _gallery(gallery: Gallery, classes: Sequence[str]) -> Html:
    if not gallery.thumbnails:
        none = _NONE_OF_THESE.get(gallery.kind)
        return (
            NOTHING if none is None else tag("p", none.format(exit=gallery.exit), class_="gallery-none soft")
        )
    title, note = (text.format(exit=gallery.exit, total=gallery.total) for text in _KINDS[gallery.kind])
    heading = tag("h3", title, tag("small", note, class_="soft"))
    shown = tag("ul", *(tag("li", _thumbnail(one, classes)) for one in gallery.thumbnails), class_="gallery")
    return tag("div", heading, shown, class_="gallery-group")


def _thumbnail(one: Thumbnail, classes: Sequence[str]) -> Html:
    true, answer, right = classes[one.true], classes[one.answer], one.true == one.answer
    # No answer is certain, whatever rounding says.
    sure = (
        f"> {percent(0.9999, 2)}"
        if one.confidence >= 0.9999
        else percent(one.confidence, 0 if one.confidence < 0.995 else 2)
    )
    said = "rightly" if right else "wrongly"
    alternative = f"true class {true}, {said} answered {answer} at exit {one.exit} with confidence {sure}"
    # The alternative says it all: what is written below would only be read a second time.
    caption = tag(
        "span", tag("b", answer), *([] if right else [f" not {true}"]), tag("small", sure),
        class_="right" if right else "wrong", aria_hidden="true",
    )  # fmt: skip
    return join(image(one.address, alternative, _THUMBNAIL_SHOWN), caption)
