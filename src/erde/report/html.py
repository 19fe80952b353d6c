"""Markup for the pages that erde writes: elements, tables and numbers, all escaped.

Everything from the data goes through :func:`tag`, :func:`join` or :func:`json_text`, which escape it; only
:class:`Html` passes as it is.
"""

from __future__ import annotations

import html
import json
from collections.abc import Collection, Iterable, Sequence
from importlib import resources
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

NONE = "–"
SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"


class Html(str):
    """Markup whose data is already escaped."""


Row = tuple[Sequence[str], bool]  # the cells, and whether the row is shaded
Group = tuple[Html | None, Sequence[Row]]  # rows below a heading, or without one

NOTHING = Html("")


def join(*parts: str) -> Html:
    """The parts in a row; what is not :class:`Html` is escaped."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def tag(name: str, *children: str, **attributes: str | int) -> Html:
    """An element; what is not :class:`Html` is escaped, empty attributes are left out."""
    given = {
        key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items() if value != ""
    }
    opening = "".join(f' {key}="{html.escape(value)}"' for key, value in given.items())
    return Html(f"<{name}{opening}>{join(*children)}</{name}>")


def image(source: str, alternative: str, side: int) -> Html:
    """An ``<img>`` that is drawn when it comes near the screen; ``source`` is a ``data:`` address."""
    return Html(
        f'<img src="{html.escape(source)}" alt="{html.escape(alternative)}" width="{side}" height="{side}" '
        'loading="lazy" decoding="async">'
    )


def json_text(value: Any) -> str:
    """JSON that can stand in a ``<script>``: no ``<`` in it, so nothing can close the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def rounded(value: Any, digits: int = 7) -> Any:
    """``value`` with every float at so many significant digits: figures show fewer, and the page stays small."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(one, digits) for key, one in value.items()}
    return [rounded(one, digits) for one in value] if isinstance(value, (list, tuple)) else value


def page(template: str, scripts: Sequence[str], data: Any, values: dict[str, str]) -> str:
    """The text of a whole page: a template of ``assets`` with style, scripts, figures' data and values."""
    assets = resources.files("erde.report") / "assets"

    def read(name: str) -> str:
        return (assets / name).read_text(encoding="utf-8")

    shared = {
        "plotly": get_plotlyjs(),
        "data": json_text(data),
        "style": read("report.css"),
        "script": "".join(read(name) for name in scripts),
    }
    return Template(read(template)).substitute(shared | values)


# ---------------------------------------------------------------- tables


def table(
    caption: str,
    columns: Sequence[str],
    groups: Iterable[Group],
    *,
    text: Collection[int] = (0,),
    wrap: Collection[int] = (),
    narrow: bool = False,
) -> Html:
    """A table that scrolls in its frame and can be copied: groups of rows, the first cell of each its heading.

    ``text`` are the columns that stand to the left, ``wrap`` those whose lines may break.
    """

    def kind(index: int) -> str:
        return " ".join(name for name, where in (("text", text), ("wrap", wrap)) if index in where)

    def row(cells: Sequence[str], shaded: bool) -> Html:
        data = (tag("td", cell, class_=kind(index)) for index, cell in enumerate(cells[1:], start=1))
        return tag("tr", tag("th", cells[0], scope="row"), *data, class_="chosen" if shaded else "")

    head = [tag("th", label, scope="col", class_=kind(index)) for index, label in enumerate(columns)]
    bodies = []
    for label, rows in groups:
        heading = [tag("tr", tag("th", label, scope="rowgroup", colspan=len(columns)))] if label else []
        bodies.append(tag("tbody", *heading, *(row(*one) for one in rows)))
    made = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", tag("tr", *head)),
        *bodies,
        class_="narrow" if narrow else "",
    )
    # The script shows the button: without one it could do nothing.
    button = tag(
        "button", "Copy", type="button", class_="copy", hidden="hidden", aria_label=f"Copy table: {caption}"
    )
    frame = tag("div", made, class_="scroll", role="region", aria_label=caption, tabindex="0")
    return tag("div", button, frame, class_="table")


def pairs(caption: str, values: dict[str, str]) -> Html:
    """A table of names and values."""
    rows = [([key, value], False) for key, value in values.items()]
    return table(caption, ("what", "value"), [(None, rows)], text={0, 1}, wrap={1}, narrow=True)


def flat(value: Any, key: str = "") -> dict[str, str]:
    """Nested values as one level of dotted keys, in words."""
    if isinstance(value, dict) and value:
        parts = [flat(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items()]
        return {name: text for part in parts for name, text in part.items()}
    if isinstance(value, float):
        return {key: f"{value:,.1f} s" if "seconds" in key else f"{value:.6g}"}
    return {key: NONE if value is None else str(value)}


def details(summary: str, *content: str) -> Html:
    """A part that opens on request."""
    return tag("details", tag("summary", summary), *content)


def badge(text: str, kind: str) -> Html:
    """A small label; ``kind`` is good, warn or soft."""
    return tag("span", text, class_=f"badge {kind}")


def dot(index: int) -> Html:
    """The colour of an arm, as in the figures."""
    return tag("span", class_="dot", style=f"--colour: var(--arm-{index % 8})", aria_hidden="true")


def meter(share: float) -> Html:
    """A thin bar of a share."""
    return tag("span", tag("i", style=f"--share: {share:.2%}"), class_="meter")


def exit_keys(count: int) -> Html:
    """The legend of the exit bars."""
    return tag(
        "ul",
        *(
            tag("li", tag("i", style=f"--mix: {exit_mix(index, count)}"), f"exit {index}")
            for index in range(count)
        ),
        class_="keys",
    )


def exit_bar(rates: Sequence[float], names: Sequence[str], count: int) -> Html:
    """A stacked bar of exit rates and its numbers, in the colours of a legend of ``count`` exits."""
    label = "; ".join(
        f"exit {index} ({name}): {percent(rate)}"
        for index, (name, rate) in enumerate(zip(names, rates, strict=True))
    )
    parts = [
        tag("i", style=f"--share: {rate:.3%}; --mix: {exit_mix(index, count)}")
        for index, rate in enumerate(rates)
        if rate > 0
    ]
    numbers = " · ".join(f"{index}:{SPACE}{points_of(rate)}" for index, rate in enumerate(rates))
    bar = tag("span", *parts, class_="bar", role="img", aria_label=label, title=label)
    return join(bar, tag("small", f"{numbers}{SPACE}%"))


def exit_mix(index: int, count: int) -> str:
    """Where an exit's colour lies between the first exit's and the last one's."""
    return f"{100 * index / max(count - 1, 1):.0f}%"


# ---------------------------------------------------------------- numbers


def percent(share: float, digits: int = 1) -> str:
    """A share with its unit."""
    return f"{points_of(share, digits)}{SPACE}%"


def points_of(share: float, digits: int = 1) -> str:
    """A share in per cent, for columns that name the unit."""
    text = f"{100 * share:.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text.removeprefix("-")


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign; a zero has none."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text[1:]


def limit(share: float) -> str:
    """A promised or wanted share, as it was asked for: no digits that nobody gave."""
    return f"{100 * share:g}{SPACE}%"


def interval(bounds: tuple[float, float]) -> str:
    """A 95 % interval of a share, with its unit."""
    return f"{between(bounds)}{SPACE}%"


def between(bounds: tuple[float, float], digits: int = 1) -> str:
    """A 95 % interval of a share, in per cent."""
    return f"{points_of(bounds[0], digits)} to {points_of(bounds[1], digits)}"


def accuracy(share: float, bounds: tuple[float, float]) -> Html:
    """A cell with a share in per cent and its interval."""
    return join(points_of(share), tag("small", between(bounds)))


def millions(count: float) -> str:
    """A count of operations, in millions."""
    value = count / 1e6
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals, or a dash."""
    return NONE if value is None else f"{value:.{digits}f}"


def p_value(value: float) -> str:
    """A p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
