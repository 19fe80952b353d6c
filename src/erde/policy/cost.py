"""The cost of an image that leaves at an exit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """MACs of an image that leaves at each exit, heads included (E,), and of the network without exits."""

    exit_macs: tuple[int, ...]
    no_exit_macs: int
    exit_milliseconds: tuple[float, ...] | None = None  # of a profiled machine, likewise cumulative
