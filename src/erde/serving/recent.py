"""The last seconds, for the page: how many requests came, how long they took, and where their images left."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

WINDOW = 10.0
# Requests that are kept: above so many in WINDOW seconds, the last ones of these seconds are looked at.
MOST = 4096


class Recent:
    """Requests of one model that have ended lately; belongs to one thread. Memory: ``MOST`` short tuples."""

    def __init__(self, since: float) -> None:
        self._since = since
        self._ended: deque[tuple[float, str, float, Sequence[int]]] = deque(maxlen=MOST)

    def add(self, ended: float, outcome: str, seconds: float, exits: Sequence[int]) -> None:
        """A request ended at this time, after ``seconds``; ``exits`` (E,) are its images by exit, () for none."""
        self._ended.append((ended, outcome, seconds, exits))

    def summary(self, now: float) -> dict[str, Any]:
        """``seconds`` that are looked at, requests by outcome, p50 and p99 of the answered (None without), images by exit."""
        entries = [entry for entry in self._ended if entry[0] > now - WINDOW]
        began = entries[0][0] if len(entries) == MOST else max(self._since, now - WINDOW)
        latencies = sorted(seconds for _, outcome, seconds, _ in entries if outcome == "answered")
        exits: Counter[int] = Counter()
        for _, _, _, counts in entries:
            exits.update(dict(enumerate(counts)))
        return {
            # A server that has just started has no rate yet.
            "seconds": max(1.0, now - began),
            "requests": dict(Counter(outcome for _, outcome, _, _ in entries)),
            "p50_ms": _milliseconds(latencies, 0.5),
            "p99_ms": _milliseconds(latencies, 0.99),
            "exits": [exits[exit] for exit in range(max(exits, default=-1) + 1)],
        }


def _milliseconds(latencies: list[float], share: float) -> float | None:
    """The least latency that at least ``share`` of them do not exceed; ``latencies`` are sorted seconds."""
    return 1000 * latencies[math.ceil(share * len(latencies)) - 1] if latencies else None
