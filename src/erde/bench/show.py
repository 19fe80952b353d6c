"""The measurements of ``erde bench`` as tables for the terminal and as a figure."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from erde.bench.race import Bench, Measurement


def show(result: Bench) -> None:
    """Print the measurements, one table for each number of threads."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    for threads in sorted({measurement.threads for measurement in result.measurements}):
        table = Table(
            title=f"{threads} thread{'s' if threads > 1 else ''}: milliseconds per call, shares of {result.reference}",
        )
        for column in (
            "images", "contender", "p50", "p95", "p99", "images/s", "MACs", "time (quartiles)", "time/MACs saved"
        ):  # fmt: skip
            table.add_column(column, justify="left" if column == "contender" else "right")
        last = None
        for measurement in result.measurements:
            if measurement.threads != threads:
                continue
            if last is not None and measurement.batch_size != last:
                table.add_section()
            table.add_row(
                "" if measurement.batch_size == last else str(measurement.batch_size), *_cells(measurement)
            )
            last = measurement.batch_size
        console.print(table)
    for line in verdicts(result):
        print(line)
    print(
        f"load before {result.load_before}, after {result.load_after}; {result.rounds} rounds, {result.data}"
    )


def verdicts(result: Bench) -> list[str]:
    """A line per number of threads and images per call where points of the bundle are slower than the reference.

    Slower is said where three quarters of the rounds say it.
    """
    engines = {contender.name: contender.engine for contender in result.contenders}
    points = {
        contender.name
        for contender in result.contenders
        if contender.kind == "operating-point"
        and contender.operating_point != "no-exit"
        and contender.engine == engines[result.reference]
    }
    slower: dict[tuple[int, int], list[Measurement]] = {}
    for timed in result.measurements:
        if timed.contender in points and timed.time_share_quartiles[0] > 1:
            slower.setdefault((timed.threads, timed.batch_size), []).append(timed)
    return [
        f"slower than {result.reference} at {threads} thread{'s' if threads > 1 else ''}, {size} "
        f"image{'s' if size > 1 else ''} a call: "
        + ", ".join(f"{timed.contender} ({timed.time_share:.0%} of its time)" for timed in those)
        + ": exits do not pay there"
        for (threads, size), those in sorted(slower.items())
    ]


def _cells(measurement: Measurement) -> list[str]:
    low, high = measurement.time_share_quartiles
    return [
        measurement.contender,
        f"{measurement.p50:.3f}",
        f"{measurement.p95:.3f}",
        f"{measurement.p99:.3f}",
        f"{measurement.images_per_second:,.0f}",
        "" if measurement.macs_share is None else f"{measurement.macs_share:.1%}",
        f"{measurement.time_share:.1%} ({low:.1%} to {high:.1%})",
        "" if measurement.time_per_macs_saved is None else f"{measurement.time_per_macs_saved:.2f}",
    ]


def write_figure(result: Bench, path: Path) -> Path | None:
    """Draw time against MACs; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    from erde.common.files import replacing_file

    threads = min(measurement.threads for measurement in result.measurements)
    precisions = {contender.name: contender.precision for contender in result.contenders}
    groups: dict[tuple[int, str], list[Measurement]] = {}
    for measurement in result.measurements:
        if measurement.threads == threads and measurement.macs_share is not None:
            group = measurement.batch_size, precisions[measurement.contender]
            groups.setdefault(group, []).append(measurement)
    figure = Figure(figsize=(6.5, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.axline((100, 100), slope=1, color="0.6", linewidth=1, linestyle=(0, (4, 3)))
    sizes = sorted({size for size, _ in groups})
    for (size, precision), points in groups.items():
        number = sizes.index(size)
        times = 100 * np.array([(point.time_share, *point.time_share_quartiles) for point in points])
        axes.errorbar(
            [100 * (point.macs_share or 0) for point in points], times[:, 0],
            yerr=np.abs(times[:, 1:] - times[:, :1]).T, fmt="osD^vP"[number % 6], color=f"C{number}",
            markersize=5, capsize=2, linewidth=1, markerfacecolor="white" if precision == "int8" else None,
            label=f"{size} image{'' if size == 1 else 's'} a call, {precision}",
        )  # fmt: skip
    axes.set(xlabel=f"MACs (% of {result.reference})", ylabel=f"time (% of {result.reference})")
    axes.set_title(f"{threads} thread(s); on the dashed line every MAC saved is time saved", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    with replacing_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
    return path
