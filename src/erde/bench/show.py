"""What ``erde bench`` shows of its measurements: a table for the terminal and a figure."""

from __future__ import annotations

import sys
from pathlib import Path

from erde.bench.race import Bench, Measurement


def show(found: Bench) -> None:
    """Print the measurements, one table for each number of threads."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    for threads in sorted({one.threads for one in found.measurements}):
        table = Table(
            title=f"{threads} thread{'s' if threads > 1 else ''}: milliseconds per call, shares of {found.reference}",
        )
        for column in (
            "images", "contender", "p50", "p95", "p99", "images/s", "MACs", "time (quartiles)", "time/MACs saved"
        ):  # fmt: skip
            table.add_column(column, justify="left" if column == "contender" else "right")
        last = None
        for one in found.measurements:
            if one.threads != threads:
                continue
            if last is not None and one.batch_size != last:
                table.add_section()
            table.add_row("" if one.batch_size == last else str(one.batch_size), *_cells(one))
            last = one.batch_size
        console.print(table)
    for line in verdicts(found):
        print(line)
    for overhead in found.overheads:
        print(
            f"outside the graphs, {overhead.batch_size} image(s) a call: {overhead.microseconds_per_stage:.0f} µs a stage "
            f"({Path(overhead.bundle).name})"
        )
    for start in found.starts:
        low, high = start.first_answer_quartiles
        peak = "" if start.peak_mib is None else f"; peak memory {start.peak_mib:.0f} MiB"
        print(
            f"fresh process to first answer: {start.first_answer_ms:.0f} ms ({low:.0f} to {high:.0f}){peak} "
            f"after a batch of {start.batch_size} ({start.contender})"
        )
    print(f"load before {found.load_before}, after {found.load_after}; {found.rounds} rounds, {found.data}")


def verdicts(found: Bench) -> list[str]:
    """A line per number of threads and images per call where points of the bundle are slower than the reference.

    Slower is said where three quarters of the rounds say it.
    """
    points = {
        one.name
        for one in found.contenders
        if one.kind == "operating-point" and one.operating_point != "no-exit"
    }
    slower: dict[tuple[int, int], list[Measurement]] = {}
    for one in found.measurements:
        if one.contender in points and one.time_share_quartiles[0] > 1:
            slower.setdefault((one.threads, one.batch_size), []).append(one)
    return [
        f"slower than {found.reference} at {threads} thread{'s' if threads > 1 else ''}, {size} "
        f"image{'s' if size > 1 else ''} a call: "
        + ", ".join(f"{one.contender} ({one.time_share:.0%} of its time)" for one in those)
        + ": exits do not pay there"
        for (threads, size), those in sorted(slower.items())
    ]


def _cells(one: Measurement) -> list[str]:
    low, high = one.time_share_quartiles
    return [
        one.contender,
        f"{one.p50:.3f}",
        f"{one.p95:.3f}",
        f"{one.p99:.3f}",
        f"{one.images_per_second:,.0f}",
        "" if one.macs_share is None else f"{one.macs_share:.1%}",
        f"{one.time_share:.1%} ({low:.1%} to {high:.1%})",
        "" if one.time_per_macs_saved is None else f"{one.time_per_macs_saved:.2f}",
    ]


def write_figure(found: Bench, path: Path) -> Path | None:
    """Time against MACs, and latencies for the smallest call; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    from erde.common.files import replacing_file

    threads = min(one.threads for one in found.measurements)
    shown = [one for one in found.measurements if one.threads == threads]
    sizes = sorted({one.batch_size for one in shown})
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axline((100, 100), slope=1, color="0.6", linewidth=1, linestyle=(0, (4, 3)))
    precisions = {one.name: one.precision for one in found.contenders}
    for number, size in enumerate(sizes):
        for precision in sorted(set(precisions.values())):
            points = [
                one
                for one in shown
                if one.batch_size == size
                and one.macs_share is not None
                and precisions[one.contender] == precision
            ]
            spread = [
                [100 * (one.time_share - one.time_share_quartiles[0]) for one in points],
                [100 * (one.time_share_quartiles[1] - one.time_share) for one in points],
            ]
            left.errorbar(
                [100 * (one.macs_share or 0) for one in points], [100 * one.time_share for one in points],
                yerr=spread, fmt="osD^vP"[number % 6], color=f"C{number}", markersize=5, capsize=2, linewidth=1,
                markerfacecolor="white" if precision == "int8" else None,
                label=f"{size} images a call, {precision}" if points else None,
            )  # fmt: skip
    left.set(xlabel=f"MACs (% of {found.reference})", ylabel=f"time (% of {found.reference})")
    left.set_title("On the dashed line every MAC saved is time saved", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    left.grid(alpha=0.3)
    rows = [one for one in shown if one.batch_size == sizes[0]][::-1]
    places = range(len(rows))
    right.barh(places, [one.p50 for one in rows], color="tab:blue", height=0.6)
    right.hlines(places, [one.p50 for one in rows], [one.p99 for one in rows], color="0.3", linewidth=1)
    right.plot([one.p95 for one in rows], places, "|", color="0.1", markersize=9)
    right.set_yticks(places, [one.contender for one in rows], fontsize=8)
    right.set(xlabel="milliseconds per call: p50 (bar), p95 (tick), p99 (line's end)", xlim=(0, None))
    right.set_title(
        f"{sizes[0]} image{'s' if sizes[0] > 1 else ''} a call, {threads} thread{'s' if threads > 1 else ''}",
        fontsize=10,
    )
    right.grid(axis="x", alpha=0.3)
    with replacing_file(path) as beside:
        figure.savefig(beside, format="png", dpi=130)
    return path
