"""What was counted: since the start, in the text format of Prometheus (version 0.0.4), and in the last seconds."""

from __future__ import annotations

import bisect
import math
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from erde.runtime.monitor import DriftReport
from erde.runtime.prediction import Prediction

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
Labels = tuple[str, ...]
# Seconds that the page looks back, and the requests that are kept for it: above so many, the last of these seconds.
WINDOW, MOST = 10.0, 4096


class Metrics:
    """What happened since the start; several threads may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests: Counter[Labels] = Counter()  # model, outcome
        self._exits: Counter[Labels] = Counter()  # model, exit
        self._points: Counter[Labels] = Counter()  # model, operating point
        # model, operating point, last exit
        self._buckets: dict[Labels, list[int]] = defaultdict(lambda: [0] * (len(BUCKETS) + 1))
        self._seconds: Counter[Labels] = Counter()

    def request(
        self, model: str, outcome: str, seconds: float, point: str = "", exits: Sequence[int] = ()
    ) -> None:
        """One request has ended; ``exits`` (E,) are its images by exit. Times are kept of those that were answered."""
        with self._lock:
            self.requests[model, outcome] += 1
            if outcome == "answered":
                # Its time is that of the image which went furthest.
                last = max((exit for exit, count in enumerate(exits) if count), default="")
                self._buckets[model, point, str(last)][bisect.bisect_left(BUCKETS, seconds)] += 1
                self._seconds[model, point, str(last)] += seconds  # type: ignore[assignment]

    def images(self, model: str, prediction: Prediction) -> None:
        """Images were answered: where they left, at which operating point."""
        with self._lock:
            for exit, count in enumerate(np.bincount(prediction.exits).tolist()):
                self._exits[model, str(exit)] += count
            self._points[model, str(prediction.operating_point)] += len(prediction.exits)

    def keep_only(self, model: str, points: Set[str]) -> None:
        """Drop what was counted of other operating points: bundles may be exchanged without end, memory has one."""
        with self._lock:
            for counts in (self._points, self._buckets, self._seconds):
                for labels in [key for key in counts if key[0] == model and key[1] not in points]:
                    del counts[labels]

    def text(
        self,
        queue_length: int,
        defaults: Mapping[str, str],
        drift: Mapping[str, DriftReport],
        objectives: Mapping[str, float],
    ) -> str:
        """All of it, by model: ``defaults`` are the operating points of requests that name none, ``objectives`` the
        latencies to keep, in seconds."""
        with self._lock:
            lines = [
                *_family("erde_requests_total", "counter", "Requests, by model and outcome.",
                         ("model", "outcome"), self.requests.items()),
                *_family("erde_exits_total", "counter", "Images, by the exit that answered.",
                         ("model", "exit"), self._exits.items()),
                *_family("erde_operating_points_total", "counter", "Images, by operating point.",
                         ("model", "operating_point"), self._points.items()),
                *_family("erde_queue_length", "gauge", "Requests that wait for a thread.", (), [((), queue_length)]),
                *_family("erde_default_operating_point", "gauge", "The point of requests that name none.",
                         ("model", "operating_point"), [(item, 1) for item in defaults.items()]),
                *_family("erde_latency_objective_seconds", "gauge", "The latency that load control keeps.",
                         ("model",), [((name,), seconds) for name, seconds in objectives.items()]),
                *_family("erde_drift_alarm", "gauge", "1 where images have drifted from calibration.",
                         ("model",), [((name,), int(report.drifted)) for name, report in drift.items()]),
                *_family("erde_drift_p_value", "gauge", "Chance of so much drift if there is none, all looks together.",
                         ("model",), [((name,), report.p_value) for name, report in drift.items()]),
                *_family("erde_drift_images", "gauge", "Images that the drift watch has counted.",
                         ("model",), [((name,), report.images) for name, report in drift.items()]),
                *self._histogram(),
            ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def _histogram(self) -> list[str]:
        name = "erde_request_seconds"
        lines = _head(name, "histogram", "Time of answered requests, from their first byte on.")
        names = ("model", "operating_point", "exit")
        for labels, buckets in self._buckets.items():
            total = 0
            for bound, count in zip((*map(str, BUCKETS), "+Inf"), buckets, strict=True):
                total += count
                lines.append(f"{name}_bucket{_labels((*names, 'le'), (*labels, bound))} {total}")
            lines.append(f"{name}_sum{_labels(names, labels)} {self._seconds[labels]:.6f}")
            lines.append(f"{name}_count{_labels(names, labels)} {total}")
        return lines


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


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]


def _family(
    name: str, kind: str, meaning: str, labels: Labels, values: Iterable[tuple[Labels, float]]
) -> list[str]:
    return [
        *_head(name, kind, meaning),
        *(f"{name}{_labels(labels, given)} {value}" for given, value in values),
    ]


def _labels(names: Labels, values: Labels) -> str:
    # Operating points may be called anything.
    escaped = [value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for value in values]
    inside = ",".join(f'{name}="{value}"' for name, value in zip(names, escaped, strict=True))
    return f"{{{inside}}}" if inside else ""
