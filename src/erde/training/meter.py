"""Means over an epoch, kept on the device until asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Sums of a step's parts: of the loss, the exits' training accuracy, gradient norms."""

    def __init__(
        self, sums: Tensor | None = None, steps: int = 0, layout: list[list[Any]] | None = None
    ) -> None:
        self.sums, self.steps = sums, steps
        # [name, number of values, or 0 for a scalar], in the order of ``sums``.
        self.layout: list[list[Any]] = layout or []

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add one step's parts: scalars, or (E,)."""
        row = torch.cat([part.detach().reshape(-1).double() for part in parts.values()])
        layout = [[name, part.numel() if part.ndim else 0] for name, part in parts.items()]
        if self.sums is None or layout != self.layout:
            # A checkpoint of an earlier version of erde may hold other parts: the means start again.
            self.sums, self.steps, self.layout = torch.zeros_like(row), 0, layout
        self.sums += row
        self.steps += 1

    def means(self) -> dict[str, float | list[float]]:
        """Means over the steps so far; the only place that waits for the device."""
        assert self.sums is not None
        values = (self.sums / self.steps).tolist()
        means: dict[str, float | list[float]] = {}
        for name, count in self.layout:
            means[name] = values[:count] if count else values[0]
            values = values[max(1, count) :]
        return means
