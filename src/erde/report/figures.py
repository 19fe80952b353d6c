"""Figures and tables for a paper, from the results of one or several runs.

Figures are as wide as one column, keep their meaning in grey print (markers, dashes, hatching), and are the
same bytes for the same results. Import this module where it is used: it brings matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from erde.common.errors import UserError, nearest
from erde.common.files import make_folder, replacing_file, write_json, write_text
from erde.evaluation.results import Arm, Curve, Interval, Results
from erde.report.tables import TABLES, csv_text, rows_of

FIGURE_FORMATS = ("png", "svg")
TABLE_FORMATS = ("csv", "json")
FORMATS = (*FIGURE_FORMATS, *TABLE_FORMATS)

# Inches: one column of a two-column page.
WIDTH = 3.4
# Okabe and Ito's palette, darkened where white is behind it: the report's.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b5568f", "#a67c00", "#3aa0d8", "#5b4fa0", "#4d5561")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
DASHES: tuple[Any, ...] = ("solid", (0, (6, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
DOTTED: Any = (0, (1, 1.2))
# Beyond this ratio of costs, the cheap networks would be crowded at one end of a linear axis.
LOGARITHMIC_FROM = 6
FIRST_EXIT, LAST_EXIT = "#6cb4cc", "#1d3b73"
GREY = "#4d5561"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ecf1",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.5,
    "savefig.dpi": 300,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.02,
    "svg.hashsalt": "erde",
    "text.parse_math": False,  # a name with a dollar sign is a name
}

# Letters of a legend entry beside which a second column would leave the page's column.
LONG_LABEL = 30

CostName = Literal["macs", "milliseconds"]


@dataclass(frozen=True)
class Series:
    """An arm of a run as it is drawn."""

    label: str
    arm: Arm
    colour: str
    marker: str
    dash: Any

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to decide: one exit."""
        return len(self.arm.exits) == 1


def write(results: Mapping[str, Results], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write figures (``png``, ``svg``) and tables (``csv``, ``json``) of named runs into ``folder``.

    What there is nothing to show of is left out. Returns the files written.

    Raises:
        UserError: an unknown format.
    """
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"unknown format '{name}'{nearest(name, FORMATS)}")
    make_folder(folder)
    written = []
    with matplotlib.style.context(["default", STYLE]):
        for name, draw in FIGURES.items():
            chosen = [form for form in FIGURE_FORMATS if form in formats]
            figure = draw(series_of(results)) if chosen else None
            for form in chosen if figure is not None else []:
                written.append(folder / f"{name}.{form}")
                _save(figure, written[-1], name)
    for name in TABLES:
        rows = rows_of(name, results)
        for form in [form for form in TABLE_FORMATS if form in formats and rows]:
            written.append(folder / f"{name}.{form}")
            if form == "csv":
                write_text(written[-1], csv_text(rows))
            else:
                write_json(written[-1], rows)
    return written


def _save(figure: Figure | None, path: Path, title: str) -> None:
    assert figure is not None
    # A date would make two equal figures differ.
    metadata = {"Title": title, **({"Date": None} if path.suffix == ".svg" else {})}
    with replacing_file(path) as beside:
        figure.savefig(beside, format=path.suffix[1:], metadata=metadata)


def series_of(results: Mapping[str, Results]) -> list[Series]:
    """Every arm of every run with its own colour and marker; the run is named where there are several.

    Of the lines across a figure, which have no marker, each has its own dashes.
    """
    arms = [
        (run, name, arm) for run, run_results in results.items() for name, arm in run_results.arms.items()
    ]
    series, fixed = [], 0
    for index, (run, name, arm) in enumerate(arms):
        fixed += len(arm.exits) == 1
        # Past the end of the palette a colour comes back with another marker.
        marker = MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]
        dash = DASHES[fixed % len(DASHES)] if len(arm.exits) == 1 else "solid"
        label = f"{name} ({run})" if len(results) > 1 else name
        series.append(Series(label, arm, PALETTE[index % len(PALETTE)], marker, dash))
    return series


def _legend(figure: Figure, handles: list[Line2D], columns: int = 2) -> None:
    """A legend below the axes, where it covers nothing."""
    labels = [str(handle.get_label()) for handle in handles]
    if max(len(label) for label in labels) > LONG_LABEL:
        columns = 1
    # matplotlib leaves out what begins with an underscore: the names are put in afterwards.
    stand_ins = ["x" * len(label) for label in labels]
    legend = figure.legend(handles, stand_ins, loc="outside lower center", ncols=columns)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


def _percent_errors(share: float, interval: Interval) -> list[list[float]]:
    return [[100 * max(0.0, share - interval[0])], [100 * max(0.0, interval[1] - share)]]


# ---------------------------------------------------------------- accuracy against cost


def accuracy_against_macs(series: Sequence[Series]) -> Figure | None:
    """The curves, the operating points (default: filled, with interval), the paper's rule dotted."""
    largest = max(entry.arm.curve.macs[0] for entry in series)
    unit, word = (1e9, "billion") if largest >= 1e9 else (1e6, "million")
    return _accuracy_against("macs", unit, f"MACs per image ({word})", series)


def accuracy_against_milliseconds(series: Sequence[Series]) -> Figure | None:
    """The same over milliseconds per image, of the arms for which they are known."""
    known = [entry for entry in series if entry.arm.curve.milliseconds is not None]
    return _accuracy_against("milliseconds", 1.0, "milliseconds per image", known) if known else None


def _accuracy_against(cost_name: CostName, unit: float, label: str, series: Sequence[Series]) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    dotted = False
    for entry in series:
        if not entry.is_fixed:
            _draw_curve(axes, entry, entry.arm.curve, cost_name, unit, "solid")
        paper = entry.arm.paper_curve
        # Where the policy is the paper's rule, the two are one.
        if paper is not None and paper != entry.arm.curve and not entry.is_fixed:
            _draw_curve(axes, entry, paper, cost_name, unit, DOTTED)
            dotted = True
        _draw_points(axes, entry, cost_name, unit)
    handles = [_handle(entry) for entry in series]
    handles += [
        Line2D([], [], color=GREY, linestyle="none", marker="o", label="default point, 95 % interval"),
        Line2D(
            [], [], color=GREY, linestyle="none", marker="o", markerfacecolor="white", label="other points"
        ),
    ]
    if dotted:
        handles.append(Line2D([], [], color=GREY, linestyle=DOTTED, label="entropy, sharpness 1"))
    axes.set_xlabel(label)
    axes.set_ylabel("test accuracy (%)")
    axes.margins(0.04)
    low, high = axes.dataLim.intervalx
    if high > LOGARITHMIC_FROM * low > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
    _legend(figure, handles)
    return figure


def _draw_curve(axes: Axes, entry: Series, curve: Curve, cost_name: CostName, unit: float, dash: Any) -> None:
    cost = curve.macs if cost_name == "macs" else curve.milliseconds
    if cost is not None:
        y = 100 * np.asarray(curve.accuracy)
        width = 0.9 if dash == DOTTED else 1.2
        axes.plot(np.asarray(cost) / unit, y, color=entry.colour, linestyle=dash, linewidth=width)


def _draw_points(axes: Axes, entry: Series, cost_name: CostName, unit: float) -> None:
    for point in entry.arm.operating_points:
        measured = point.test
        cost = None if measured is None else measured.macs if cost_name == "macs" else measured.milliseconds
        if measured is None or cost is None:
            continue
        default = point.name == entry.arm.default_operating_point
        axes.errorbar(
            cost / unit,
            100 * measured.accuracy,
            yerr=_percent_errors(measured.accuracy, measured.accuracy_interval) if default else None,
            color=entry.colour,
            marker=entry.marker,
            markerfacecolor=entry.colour if default else "white",
            markersize=5.0 if default else 3.2,
            markeredgewidth=0.8,
            elinewidth=0.8,
            zorder=4 if default else 3,
        )


def _handle(entry: Series) -> Line2D:
    dash: Any = "none" if entry.is_fixed else "solid"
    return Line2D([], [], color=entry.colour, marker=entry.marker, linestyle=dash, label=entry.label)


# ---------------------------------------------------------------- exits


def exits(series: Sequence[Series]) -> Figure | None:
    """Accuracy of each exit had it answered all images, with 95 % intervals; fixed networks as lines across."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes = figure.subplots()
    most = max(len(entry.arm.exits) for entry in series)
    dodged = [entry for entry in series if not entry.is_fixed]
    for entry in series:
        measures = entry.arm.exits
        if entry.is_fixed:
            low, high = measures[0].accuracy_interval
            axes.axhspan(100 * low, 100 * high, color=entry.colour, alpha=0.15, linewidth=0)
            axes.axhline(100 * measures[0].accuracy, color=entry.colour, linestyle=entry.dash, linewidth=0.9)
            continue
        # Side by side, so that intervals do not hide each other.
        shift = min(0.07, 0.7 / len(dodged)) * (dodged.index(entry) - (len(dodged) - 1) / 2)
        errors = [_percent_errors(exit_.accuracy, exit_.accuracy_interval) for exit_ in measures]
        axes.errorbar(
            np.arange(len(measures)) + shift,
            [100 * exit_.accuracy for exit_ in measures],
            yerr=np.asarray(errors)[:, :, 0].T,
            color=entry.colour,
            marker=entry.marker,
            elinewidth=0.8,
        )
    axes.set_xticks(range(most))
    axes.set_xlim(-0.4, most - 0.6)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("exit")
    axes.set_ylabel("test accuracy (%)")
    _legend(
        figure,
        [
            Line2D([], [], color=entry.colour, linestyle=entry.dash, label=entry.label,
                   marker="none" if entry.is_fixed else entry.marker)
            for entry in series
        ],
    )  # fmt: skip
    return figure


def _exit_colours(count: int) -> list[str]:
    """From light to dark, which grey print keeps."""
    first, last = np.asarray(to_rgb(FIRST_EXIT)), np.asarray(to_rgb(LAST_EXIT))
    return [to_hex(tuple(first + (last - first) * share)) for share in np.linspace(0, 1, max(2, count))][
        -count:
    ]


def reliability(series: Sequence[Series]) -> Figure | None:
    """Accuracy against reported confidence, one panel per arm; markers grow with the images in a bin."""
    columns = min(2, len(series))
    rows = math.ceil(len(series) / columns)
    figure = Figure(figsize=(WIDTH, 0.45 + 1.65 * rows * (2 / columns) ** 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in grid.flat[len(series) :]:
        panel.set_visible(False)
    most = max(len(entry.arm.exits) for entry in series)
    for place, (panel, entry) in enumerate(zip(grid.flat, series, strict=False)):
        panel.plot([0, 100], [0, 100], color=GREY, linewidth=0.7, linestyle=DOTTED)
        colours = _exit_colours(most)[-len(entry.arm.exits) :]
        for index, (exit_, colour) in enumerate(zip(entry.arm.exits, colours, strict=True)):
            bins = exit_.reliability
            count = np.asarray(bins.count)
            x, y = 100 * np.asarray(bins.confidence), 100 * np.asarray(bins.accuracy)
            filled = count > 0
            panel.plot(x[filled], y[filled], color=colour, linewidth=0.8)
            sizes = 40 * count[filled] / count.sum() + 2
            marker = MARKERS[(most - len(entry.arm.exits) + index) % len(MARKERS)]
            panel.scatter(x[filled], y[filled], s=sizes, color=colour, marker=marker, zorder=3, clip_on=False)
        panel.set_title(entry.label)
        panel.set(xlim=(0, 100), ylim=(0, 100), xticks=(0, 50, 100), yticks=(0, 50, 100), aspect="equal")
        # The lowest panel of each column says what its axis is, also where the last row is not full.
        lowest = place + columns >= len(series)
        panel.tick_params(labelbottom=lowest)
        panel.set_xlabel("confidence (%)" if lowest else "")
        panel.set_ylabel("test accuracy (%)" if place % columns == 0 else "")
    handles = [
        Line2D([], [], color=colour, marker=MARKERS[index % len(MARKERS)], label=f"exit {index}")
        for index, colour in enumerate(_exit_colours(most))
    ]
    _legend(figure, handles, columns=min(4, most))
    return figure


def entropies(series: Sequence[Series]) -> Figure | None:
    """The doubt of exits where the teacher is right (filled) and wrong (outlined), a row per arm."""
    known = [(entry, entry.arm.entropies) for entry in series if entry.arm.entropies is not None]
    if not known:
        return None
    most = max(len(entry.arm.exits) for entry, _ in known)
    figure = Figure(figsize=(WIDTH, 0.6 + 1.15 * len(known)), layout="constrained")
    grid = figure.subplots(len(known), most, squeeze=False, sharex=True, sharey="row")
    for row, (entry, histograms) in zip(grid, known, strict=True):
        for panel in row[len(entry.arm.exits) :]:
            panel.set_visible(False)
        pairs = zip(histograms.teacher_right, histograms.teacher_wrong, strict=True)
        for index, (panel, (right, wrong)) in enumerate(zip(row, pairs, strict=False)):
            edges = np.linspace(0, 1, len(right) + 1)
            panel.stairs(_shares(right), edges, fill=True, color="#a9c9e2", edgecolor="none")
            panel.stairs(_shares(wrong), edges, color="#b04a00", linewidth=1.1, linestyle=(0, (4, 1)))
            panel.set_title(f"{entry.label}, exit {index}" if index == 0 else f"exit {index}")
            panel.set_xlim(0, 1)
            panel.set_xticks([0, 0.5, 1], ["0", "½", "1"])
            panel.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        row[0].set_ylabel("images (%)")
    grid[-1, (most - 1) // 2].set_xlabel("normalised entropy")
    handles = [
        Line2D([], [], color="#a9c9e2", linewidth=6, label="teacher right"),
        Line2D([], [], color="#b04a00", linestyle=(0, (4, 1)), label="teacher wrong"),
    ]
    _legend(figure, handles)
    return figure


def _shares(counts: Sequence[int]) -> list[float]:
    return [100 * count / max(1, sum(counts)) for count in counts]


FIGURES: dict[str, Callable[[Sequence[Series]], Figure | None]] = {
    "accuracy-against-macs": accuracy_against_macs,
    "accuracy-against-milliseconds": accuracy_against_milliseconds,
    "exits": exits,
    "reliability": reliability,
    "entropies": entropies,
}
