"""The report of a run: one HTML page that needs nothing beside it, no network included.

Python builds the text and the tables, ``report_assets/report.js`` draws the figures from the JSON that
lies in the page. Everything from the data goes through :func:`_tag` or :func:`_json`, which escape it.
"""

from __future__ import annotations

import html
import json
from collections.abc import Collection, Iterable, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from erde.bundle import Measured, OperatingPoint, ScoreCandidate
from erde.files import write_text
from erde.results import Arm, Results

NONE = "–"
SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


class _Html(str):
    """Markup whose data is already escaped."""


def write_report(results: Results, path: Path) -> None:
    """Write the report of ``results`` to ``path``, in one step."""
    write_text(path, render(results))


def render(results: Results) -> str:
    """The report of ``results`` as the text of one HTML page."""
    assets = resources.files("erde") / "report_assets"
    values = {
        "title": html.escape(f"{results.name}: erde report"),
        "header": _header(results),
        "tradeoff": html.escape(_tradeoff_in_words(results)),
        "exported": html.escape(results.exported_arm),
        "arms": _arms(results),
        "points": _points(results),
        "exits": _exits(results),
        "rates": _rates(results),
        "teacher_wrong": _teacher_wrong(results),
        "scores": _scores(results),
        "history": _history(results),
        "agreement": _agreement(results),
        "data_tables": _data_tables(results),
        "environment": _pairs("Where the run was made.", _flat(results.environment)),
        "timings": _pairs("What took how long.", _flat(results.timings)),
        "recipe": html.escape(json.dumps(results.recipe, indent=2, ensure_ascii=False)),
        "seal": html.escape(results.bundle_seal),
        "plotly": get_plotlyjs(),
        "data": _json(_figure_data(results)),
        "style": (assets / "report.css").read_text(encoding="utf-8"),
        "script": (assets / "report.js").read_text(encoding="utf-8"),
    }
    return Template((assets / "report.html").read_text(encoding="utf-8")).substitute(values)


# ---------------------------------------------------------------- header


def _header(results: Results) -> _Html:
    arm, data = results.arms[results.exported_arm], results.data
    return _join(
        _tag("h1", results.name),
        _tag("p", _verdict(results), class_="verdict"),
        _promise(_default(arm)),
        _tiles(arm),
        _tag(
            "p",
            f"Data set {data.name}, {len(data.classes):,} classes, seed {results.seed}",
            class_="soft small",
        ),
    )


def _verdict(results: Results) -> _Html:
    name, arm = results.exported_arm, results.arms[results.exported_arm]
    measured = _default(arm).test
    if measured is None:
        return _join("Arm ", _tag("strong", name), " was not measured on the test split.")
    twins = [
        other
        for other, twin in results.arms.items()
        if other != name
        and len(twin.exits) == 1
        and (twin.backbone, twin.no_exit_macs) == (arm.backbone, arm.no_exit_macs)
    ]
    if twins:
        against = f"that network, arm {twins[0]}, gets {_percent(results.arms[twins[0]].exits[-1].accuracy)}"
    else:
        against = f"the final exit alone gets {_percent(arm.exits[-1].accuracy)}"
    share = _percent(1 - measured.macs_saved, 0)
    return _join(
        f"The {name} {'network' if arm.role == 'fixed' else arm.role} answers ",
        _tag("strong", f"{_percent(measured.accuracy)} of the test images right at {share} of the MACs"),
        f" of the same network without exits ({against}).",
    )


def _promise(point: OperatingPoint) -> _Html:
    disabled = point.thresholds and all(threshold is None for threshold in point.thresholds)
    rest = "There is no early exit here: every image goes to the final exit." if disabled else ""
    if point.certificate is None:
        text = f" Operating point {point.name}: {point.note or 'nothing was promised'}."
        return _tag(
            "div",
            _tag("p", _tag("strong", "No certificate."), text),
            *([_tag("p", rest)] if rest else []),
            class_="promise warn",
        )
    assumptions = point.certificate.assumptions
    return _tag(
        "div",
        _tag("p", _tag("strong", "Certified. "), point.certificate.sentence()),
        _tag("p", f"Operating point {point.name}. {assumptions[:1].upper()}{assumptions[1:]}. {rest}"),
        class_="promise good",
    )


def _tiles(arm: Arm) -> _Html:
    point, final = _default(arm), arm.exits[-1]
    test = point.test
    if test is None:
        return _Html("")
    promised = "nothing promised"
    if point.certificate is not None:
        promised = f"promised: at most {_percent(point.certificate.max_risk, 2)}"
    tiles = (
        ("Test accuracy", _percent(test.accuracy), f"95 % interval {_interval(test.accuracy_interval)}"),
        (
            "MACs per image",
            _percent(1 - test.macs_saved),
            f"{_millions(test.macs)} of {_millions(arm.no_exit_macs)} million",
        ),
        ("Risk seen on test", _percent(test.risk, 2), promised),
        (
            "Final exit alone",
            _percent(final.accuracy),
            f"{_millions(arm.cost[-1].macs)} million MACs, {_interval(final.accuracy_interval)}",
        ),
    )
    return _tag(
        "dl",
        *(
            _tag("div", _tag("dt", label), _tag("dd", value), _tag("dd", note, class_="note"))
            for label, value, note in tiles
        ),
        class_="tiles",
    )


# ---------------------------------------------------------------- sections


def _tradeoff_in_words(results: Results) -> str:
    return "; ".join(
        f"{name} {_percent(point.accuracy)} at {_millions(point.macs)} million MACs"
        for name, arm in results.arms.items()
        if (point := _default(arm).test) is not None
    )


def _arms(results: Results) -> _Html:
    columns = (
        "arm", "role", "loss", "backbone", "MACs\nwithout exits\n(million)", "parameters",
        "final exit:\naccuracy (%)", "default\npoint", "test\naccuracy (%)", "MACs\nsaved (%)", "risk (%)",
    )  # fmt: skip
    rows = []
    for index, (name, arm) in enumerate(results.arms.items()):
        point, final = _default(arm), arm.exits[-1]
        exported = _tag("small", "exported") if name == results.exported_arm else _Html("")
        cells = [
            _join(_dot(index), name, exported), arm.role, arm.loss, arm.backbone, _millions(arm.no_exit_macs),
            f"{arm.parameters:,}", _accuracy(final.accuracy, final.accuracy_interval),
        ]  # fmt: skip
        if len(arm.exits) == 1:
            cells += [_tag("span", "one exit", class_="soft"), *[NONE] * 3]
        else:
            cells += [_join(point.name, _tag("small", _certified(point))), *_measured(point.test)]
        rows.append((cells, name == results.exported_arm))
    caption = "All arms on the test split. The last four columns are at each arm's default operating point."
    return _table(caption, columns, [(None, rows)], text={0, 1, 2, 3, 7})


def _points(results: Results) -> _Html:
    count = _most_exits(results)
    blocks = [_keys(count)]
    for name, arm in results.arms.items():
        if name == results.exported_arm:
            blocks.insert(0, _points_table(name, arm, count))
        elif len(arm.exits) > 1:
            blocks.append(
                _tag(
                    "details", _tag("summary", f"Operating points of {name}"), _points_table(name, arm, count)
                )
            )
    return _join(*blocks)


def _points_table(name: str, arm: Arm, count: int) -> _Html:
    columns = (
        "operating point", "promise", "thresholds", "risk on\ntune (%)", "risk on\ntest (%)",
        "test\naccuracy (%)", "MACs saved\non test (%)", "exit rates on test",
    )  # fmt: skip
    rows = []
    for point in arm.operating_points:
        default = point.name == arm.default_operating_point
        target = {"risk": "risk at most ", "budget": "MACs at most "}.get(point.kind, "no early exit")
        target += "" if point.target is None else _percent(point.target, 2 if point.kind == "risk" else 0)
        promise = _tag("small", point.note) if point.note else _Html("")
        if point.certificate is not None:
            sure = f"with {_percent(point.certificate.confidence, 0)} confidence"
            promise = _tag("small", f"risk ≤ {_percent(point.certificate.max_risk, 2)} {sure}")
        accuracy, saved, risk = _measured(point.test)
        cells = [
            _join(point.name, _tag("small", target), _tag("small", "default") if default else _Html("")),
            _join(_certified(point), promise), ", ".join(map(_threshold, point.thresholds)) or NONE,
            _measured(point.tune)[2], _risk_on_test(point, risk), accuracy, saved,
            NONE if point.test is None else _rates_bar(point.test.exit_rates, arm, count),
        ]  # fmt: skip
        rows.append((cells, default))
    caption = (
        f"Operating points of {name}. The exit decides by the score {arm.score} at sharpness "
        f"{arm.sharpness:g}; an image leaves where its score is above the threshold, and “off” disables an exit."
    )
    return _table(caption, columns, [(None, rows)], text={0, 1, 2, 7}, wrap={1, 2, 7})


def _exits(results: Results) -> _Html:
    columns = (
        "exit", "MACs\n(million)", "of no\nexits (%)", "parameters", "test\naccuracy (%)", "95 %\ninterval", "NLL\n(nats)",
        "ECE (%)", "AUROC\nright", "AUROC\nno harm", "temper-\nature", "teacher\nwrong (%)",
    )  # fmt: skip
    groups: list[tuple[_Html | None, list[tuple[list[str], bool]]]] = []
    for index, (name, arm) in enumerate(results.arms.items()):
        rows = []
        for place, (cost, one) in enumerate(zip(arm.cost, arm.exits, strict=True)):
            wrong = arm.teacher_wrong[place] if arm.teacher_wrong and place < len(arm.teacher_wrong) else None
            cells = [
                _join(f"{place} ", _tag("span", cost.name, class_="soft")), _millions(cost.macs),
                _points_of(cost.macs / arm.no_exit_macs), f"{cost.parameters:,}",
                _points_of(one.accuracy), _bounds(one.accuracy_interval), f"{one.nll:.3f}", _points_of(one.ece, 2),
                _auroc(one.auroc_correctness), _auroc(one.auroc_harm), f"{one.temperature:.2f}",
                NONE if wrong is None else _points_of(wrong, 2),
            ]  # fmt: skip
            rows.append((cells, False))
        groups.append((_join(_dot(index), name), rows))
    caption = "Every exit on the test split. MACs and parameters are cumulative and hold all heads so far."
    return _table(caption, columns, groups)


def _rates(results: Results) -> _Html:
    count = _most_exits(results)
    parts: list[_Html] = []
    for index, (name, arm) in enumerate(results.arms.items()):
        point = _default(arm)
        bar = "not measured" if point.test is None else _rates_bar(point.test.exit_rates, arm, count)
        parts += [_tag("dt", _dot(index), name), _tag("dd", bar)]
    return _join(_keys(count), _tag("dl", *parts, class_="rates"))


def _teacher_wrong(results: Results) -> _Html:
    known = [(name, arm.teacher_wrong) for name, arm in results.arms.items() if arm.teacher_wrong]
    if not known:
        return _tag("p", "No arm of this run recorded it.", class_="soft")
    count = max(len(shares) for _, shares in known)
    rows = []
    for name, shares in known:
        cells = [
            _join(_percent(share, 2), _tag("span", _tag("i", style=f"--share: {share:.2%}"), class_="meter"))
            for share in shares
        ]
        rows.append(
            (
                [_join(_dot(list(results.arms).index(name)), name), *cells, *[NONE] * (count - len(cells))],
                False,
            )
        )
    columns = ("arm", *(f"exit {index}" for index in range(count)))
    caption = (
        "Share of training images, in the last epoch, on which the teacher of each student exit is wrong."
    )
    return _table(caption, columns, [(None, rows)], narrow=True)


def _scores(results: Results) -> _Html:
    arm = results.arms[results.exported_arm]
    rows = [
        ([one.score, f"{one.sharpness:g}", _points_of(one.macs_saved, 2)], _is_chosen(one, arm))
        for one in sorted(arm.score_candidates, key=lambda one: -one.macs_saved)
    ]
    caption = f"The best first. Chosen: {arm.score} at sharpness {arm.sharpness:g}."
    return _table(caption, ("score", "sharpness", "MACs saved (%)"), [(None, rows)], narrow=True)


def _history(results: Results) -> _Html:
    rows = [
        ([name, str(len(losses)), f"{losses[0]['loss']:.4g}", f"{losses[-1]['loss']:.4g}"], False)
        for name, arm in results.arms.items()
        if (losses := _losses(arm))
    ]
    columns = ("arm", "epochs", "loss, first epoch", "loss, last epoch")
    return _table("Mean training loss of an epoch.", columns, [(None, rows)], narrow=True)


def _agreement(results: Results) -> _Html:
    found = results.agreement
    answers = found.images * len(found.operating_points)

    def sentence(who: str, disagreements: int) -> str:
        if disagreements:
            return f"{who} disagreed with this evaluation on {disagreements:,} of {answers:,} answers"
        return f"{who} agreed with this evaluation on {found.images:,} of {found.images:,} test images"

    badge = _badge("disagrees", "warn") if found.disagreements else _badge("agrees", "good")
    near = f"{found.band:,} lie within {found.band_width:g} of a threshold."
    return _join(
        _tag("p", badge, f" {sentence('The torch-free runtime', found.disagreements)}; {near}"),
        _tag("p", f"{sentence('The network in torch', found.torch_disagreements)}."),
        _tag(
            "p",
            f"Operating points compared: {', '.join(found.operating_points) or NONE}.",
            class_="soft small",
        ),
    )


def _data_tables(results: Results) -> _Html:
    data = results.data
    splits: list[Row] = [
        ([name, f"{one.size:,}", _tag("code", one.fingerprint[:12], title=one.fingerprint)], False)
        for name, one in data.splits.items()
    ]
    facts = {
        "name": data.name,
        "image shape (H, W, C)": " × ".join(map(str, data.image_shape)),
        "mean": ", ".join(f"{value:.4g}" for value in data.mean),
        "standard deviation": ", ".join(f"{value:.4g}" for value in data.std),
    }
    caption = "The splits; a fingerprint is a hash of their images and labels."
    return _join(
        _table(caption, ("split", "images", "fingerprint"), [(None, splits)], narrow=True),
        _pairs("The data set.", facts),
        _tag(
            "details", _tag("summary", f"{len(data.classes):,} classes"), _tag("p", ", ".join(data.classes))
        ),
    )


def _figure_data(results: Results) -> dict[str, Any]:
    """What report.js draws: the arms as in ``results.json``, of the history only the loss."""
    arms = {}
    for name, arm in results.arms.items():
        arms[name] = arm.model_dump(mode="json", exclude={"history"}) | {"losses": _losses(arm)}
    return {"exported": results.exported_arm, "order": list(arms), "arms": arms}


def _losses(arm: Arm) -> list[dict[str, Any]]:
    return [
        {"loss": loss, "phase": epoch.phase, "rate": epoch.learning_rate}
        for epoch in arm.history
        if isinstance(loss := epoch.parts.get("loss"), float)
    ]


# ---------------------------------------------------------------- pieces


def _default(arm: Arm) -> OperatingPoint:
    return next(point for point in arm.operating_points if point.name == arm.default_operating_point)


def _most_exits(results: Results) -> int:
    return max(len(arm.exits) for arm in results.arms.values())


def _is_chosen(candidate: ScoreCandidate, arm: Arm) -> bool:
    return (candidate.score, candidate.sharpness) == (arm.score, arm.sharpness)


def _certified(point: OperatingPoint) -> _Html:
    if point.certificate is not None:
        return _badge("certified", "good")
    return _badge("not certified", "warn" if point.kind == "risk" else "soft")


def _risk_on_test(point: OperatingPoint, risk: str) -> str:
    if point.certificate is None or point.test is None or point.test.risk <= point.certificate.max_risk:
        return risk
    return _tag("span", f"{risk} above the promise", class_="warn-text")


def _measured(measured: Measured | None) -> tuple[str, str, str]:
    """Accuracy, MACs saved and risk."""
    if measured is None:
        return NONE, NONE, NONE
    accuracy = _accuracy(measured.accuracy, measured.accuracy_interval)
    return accuracy, _points_of(measured.macs_saved), _points_of(measured.risk, 2)


def _rates_bar(rates: Sequence[float], arm: Arm, count: int) -> _Html:
    """A stacked bar and its numbers, in the colours of a legend of ``count`` exits."""
    named = zip(arm.cost, rates, strict=True)
    label = "; ".join(f"exit {i} ({cost.name}): {_percent(rate)}" for i, (cost, rate) in enumerate(named))
    parts = [
        _tag("i", style=f"--share: {rate:.3%}; --mix: {_mix(i, count)}")
        for i, rate in enumerate(rates)
        if rate > 0
    ]
    numbers = " · ".join(f"{i}:{SPACE}{_points_of(rate)}" for i, rate in enumerate(rates))
    bar = _tag("span", *parts, class_="bar", role="img", aria_label=label, title=label)
    return _join(bar, _tag("small", f"{numbers}{SPACE}%"))


def _keys(count: int) -> _Html:
    """The legend of the exit bars."""
    names = [f"exit {index}" for index in range(count)]
    return _tag(
        "ul",
        *(
            _tag("li", _tag("i", style=f"--mix: {_mix(index, count)}"), name)
            for index, name in enumerate(names)
        ),
        class_="keys",
    )


def _mix(index: int, count: int) -> str:
    return f"{100 * index / max(count - 1, 1):.0f}%"


Row = tuple[list[str], bool]  # the cells, and whether the row is shaded


def _table(
    caption: str,
    columns: Sequence[str],
    groups: Iterable[tuple[_Html | None, list[Row]]],
    *,
    text: Collection[int] = (0,),
    wrap: Collection[int] = (),
    narrow: bool = False,
) -> _Html:
    """A table that scrolls in its frame: groups of rows, the first cell of each its heading."""

    def kind(index: int) -> str:
        return " ".join(name for name, where in (("text", text), ("wrap", wrap)) if index in where)

    def row(cells: list[str], shaded: bool) -> _Html:
        data = (_tag("td", cell, class_=kind(index)) for index, cell in enumerate(cells[1:], start=1))
        return _tag("tr", _tag("th", cells[0], scope="row"), *data, class_="chosen" if shaded else "")

    head = [_tag("th", label, scope="col", class_=kind(index)) for index, label in enumerate(columns)]
    bodies = []
    for label, rows in groups:
        heading = [_tag("tr", _tag("th", label, scope="rowgroup", colspan=len(columns)))] if label else []
        bodies.append(_tag("tbody", *heading, *(row(*one) for one in rows)))
    table = _tag(
        "table",
        _tag("caption", _tag("span", caption)),
        _tag("thead", _tag("tr", *head)),
        *bodies,
        class_="narrow" if narrow else "",
    )
    return _tag("div", table, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _pairs(caption: str, values: dict[str, str]) -> _Html:
    rows = [([key, value], False) for key, value in values.items()]
    return _table(caption, ("what", "value"), [(None, rows)], text={0, 1}, wrap={1}, narrow=True)


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """Nested values as one level of dotted keys, in words."""
    if isinstance(value, dict) and value:
        parts = [_flat(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items()]
        return {name: text for part in parts for name, text in part.items()}
    if isinstance(value, float):
        return {key: f"{value:,.1f} s" if "seconds" in key else f"{value:.6g}"}
    return {key: NONE if value is None else str(value)}


def _badge(text: str, kind: str) -> _Html:
    return _tag("span", text, class_=f"badge {kind}")


def _dot(index: int) -> _Html:
    """The colour of an arm, as in the figures."""
    return _tag("span", class_="dot", style=f"--colour: var(--arm-{index % 8})", aria_hidden="true")


def _join(*parts: str) -> _Html:
    return _Html("".join(part if isinstance(part, _Html) else html.escape(part) for part in parts))


def _tag(name: str, *children: str, **attributes: str | int) -> _Html:
    """An element; what is not :class:`_Html` is escaped, empty attributes are left out."""
    given = {
        key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items() if value != ""
    }
    opening = "".join(f' {key}="{html.escape(value)}"' for key, value in given.items())
    return _Html(f"<{name}{opening}>{_join(*children)}</{name}>")


def _json(value: Any) -> str:
    """JSON that can stand in a ``<script>``: no ``<`` in it, so nothing can close the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---------------------------------------------------------------- numbers


def _percent(share: float, digits: int = 1) -> str:
    return f"{_points_of(share, digits)}{SPACE}%"


def _points_of(share: float, digits: int = 1) -> str:
    """A share in per cent, for columns that name the unit."""
    text = f"{100 * share:.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text.removeprefix("-")


def _interval(interval: tuple[float, float]) -> str:
    return f"{_bounds(interval)}{SPACE}%"


def _bounds(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _accuracy(accuracy: float, interval: tuple[float, float]) -> _Html:
    return _join(_points_of(accuracy), _tag("small", _bounds(interval)))


def _millions(count: float) -> str:
    value = count / 1e6
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _auroc(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _threshold(threshold: float | None) -> str:
    return "off" if threshold is None else f"{threshold:.4f}"
