"""The cost of an image that leaves at an exit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from erde.policy.rule import Thresholds


def first_stage(networks: tuple[int, ...], thresholds: Thresholds) -> int:
    """The stage that takes the image first: 0, or the last network's first where no earlier exit is enabled.

    ``networks`` are the first exits of the networks of a chain, (0,) where it is a single one. With every early exit
    disabled the networks before the last one could change nothing, so they do not run.
    """
    return networks[-1] if all(threshold is None for threshold in thresholds) else 0


@dataclass(frozen=True)
class Cost:
    """MACs of an image that leaves at each exit, heads included (E,), and of the network without exits.

    In a chain of networks both are cumulative over all networks so far, and ``no_exit_macs`` is the last network alone.
    """

    exit_macs: tuple[int, ...]
    no_exit_macs: int
    exit_milliseconds: tuple[float, ...] | None = None  # of a profiled machine, likewise cumulative
    networks: tuple[int, ...] = (0,)  # the first exit of each network of a chain

    def macs_at(self, thresholds: Thresholds) -> NDArray[np.float64]:
        """MACs (E,) of an image that leaves at each exit, where ``thresholds`` (E-1) are in use."""
        return self._without_idle(self.exit_macs, thresholds)

    def milliseconds_at(self, thresholds: Thresholds) -> NDArray[np.float64] | None:
        """The same in milliseconds; None where no machine was profiled."""
        if self.exit_milliseconds is None:
            return None
        return self._without_idle(self.exit_milliseconds, thresholds)

    def _without_idle(self, cumulative: tuple[float, ...], thresholds: Thresholds) -> NDArray[np.float64]:
        costs = np.asarray(cumulative, dtype=np.float64)
        start = first_stage(self.networks, thresholds)
        return costs - costs[start - 1] if start else costs
