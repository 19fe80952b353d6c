"""Load control: accuracy gives way before latency does, along the certified operating points, and never below a floor.

:class:`Controller` knows no clock, no bundle and no network: it is told what happens and when, so that a simulation can
drive it as the server does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from erde.bundle.manifest import Manifest
from erde.common.errors import UserError, listed

# Seconds of arrivals and latencies that are looked at.
WINDOW = 1.0
# The share of the threads' time that may be taken: above it queues grow long now and then.
MOST_BUSY = 0.7
# Shares of the objective. A request is refused if its chance to take more than the first is above 1 in 400, even at the
# floor; a point gives way if a request is expected to take more than the second.
ADMITTED, UNHURRIED = 0.9, 0.8
# Standard deviations above the mean that a normal variable exceeds once in 400 times.
_SELDOM = 2.8
# Seconds that a dearer point must have fitted before it is taken again.
HOLD = 3.0
# Of a new time in the running mean, once there are some; and of how many it is the mean after a pause.
_MEMORY, _KEPT = 0.01, 9
# Seconds after which a rung's times are forgotten, if requests were answered at others.
_FORGOTTEN = 10.0


@dataclass(frozen=True)
class Rung:
    """An operating point of the ladder, and its mean cost in any unit that is proportional to time."""

    name: str
    cost: float


def ladder(manifest: Manifest, floor: str) -> list[Rung]:
    """The default operating point, and cheaper certified ones down to ``floor``, the dearest first.

    Raises:
        UserError: no such point, or one that is dearer than the default or not certified.
    """
    start, last = manifest.point(None), manifest.point(floor)
    saved = {point.name: point.macs_saved or 0.0 for point in manifest.operating_points}
    certified = [
        point.name
        for point in manifest.operating_points
        if point.certificate is not None and saved[point.name] > saved[start.name]
    ]
    if last.name != start.name and last.name not in certified:
        raise UserError(
            f"the floor is '{floor}', expected the default '{start.name}' or a certified point that saves more: "
            f"{listed(certified) or 'there is none'}"
        )
    names = [start.name, *(name for name in certified if saved[name] <= saved[last.name])]
    return [Rung(name, 1.0 - saved[name]) for name in sorted(names, key=lambda name: saved[name])]


class Controller:
    """Chooses the rung for requests that name no operating point, and which requests are refused.

    The rung is the cheapest that was needed in the last ``HOLD`` seconds: a cheaper one is taken at once, a dearer one
    only when nothing has spoken against it for so long, so that a load that swings does not make the point swing. A rung
    is needed where dearer ones would keep the threads too busy or let requests wait too long, and one rung more where the
    slowest hundredth takes longer than the objective.

    Args:
        rungs: the dearest first; the last is the floor.
        objective: seconds within which requests are to be answered, waiting included.
        parallel: requests that are answered at once.
    """

    def __init__(self, rungs: Sequence[Rung], objective: float, parallel: int) -> None:
        self.rungs, self.objective, self.parallel = list(rungs), objective, parallel
        self._needed: deque[tuple[float, int]] = deque()  # cheapest first: see _need
        self._arrivals: deque[float] = deque()
        self._latencies: deque[tuple[float, float]] = deque()
        # By rung: how many, the mean of their seconds, and the mean of the squared distance to it.
        self._computing: dict[int, tuple[int, float, float]] = {}
        self._answered: dict[int, float] = {}  # when last, by rung
        self._beside = 0.0
        self._late: deque[tuple[float, float]] = deque()
        self._stepped = -WINDOW

    @property
    def current(self) -> int:
        """The rung in use; 0 is the dearest."""
        return self._needed[0][1] if self._needed else 0

    @property
    def rung(self) -> Rung:
        """The operating point in use."""
        return self.rungs[self.current]

    def seconds(self, rung: int) -> float | None:
        """The mean time that a request takes of a thread at a rung, None before any was answered.

        Computing is as seen, or in proportion to the cost of the nearest rung seen. To it comes what a request takes
        beside it: reading, writing and counting, and whatever else the CPUs are busy with.
        """
        if not self._computing:
            return None
        known = self._nearest(rung)
        return self._computing[known][1] * self.rungs[rung].cost / self.rungs[known].cost + self._beside

    def _nearest(self, rung: int) -> int:
        """The nearest rung at which a request was answered."""
        return min(self._computing, key=lambda seen: abs(seen - rung))

    def admits(self, now: float, inside: int) -> bool:
        """Whether a request that comes ``now`` can be answered in time, while so many others wait or are answered.

        It is counted as come.
        """
        self._arrivals.append(now)
        if self._expected(inside, self.current) > UNHURRIED * self.objective:
            self._need(now, self._cheapest_needed(inside))
        unseen = max((late for _, late in self._late), default=0.0)
        in_time = self._slowest(inside, len(self.rungs) - 1) + unseen <= ADMITTED * self.objective
        # What was slow may be over; without an answer now and then nobody would know.
        unknown = not self._latencies or now - self._latencies[-1][0] >= WINDOW
        return in_time or (unknown and inside < self.parallel)

    def answered(self, now: float, rung: int, latency: float, computing: float, inside: int) -> None:
        """A request was answered at ``rung``: ``latency`` seconds after it came, of which ``computing`` in a thread.

        ``inside`` others waited or were answered when it came.
        """
        self._latencies.append((now, latency))
        count, mean, variance = self._computing.get(rung, (0, 0.0, 0.0))
        share = 1 / (count + 1)
        if computing < mean and now - max(self._answered.values(), default=now) >= WINDOW:
            # A slow moment may be over: a fast answer after a pause counts more. A slow one may be chance. See admits.
            share = 1 / (min(count, _KEPT) + 1)
        self._answered[rung] = now
        for other, last in list(self._answered.items()):
            if now - last > _FORGOTTEN:
                # A slow moment at the floor would else shut out what the points in use could answer.
                del self._answered[other], self._computing[other]
        share = max(_MEMORY, share)
        # A stall of the machine is to be forgotten soon.
        distance = min(computing, self.objective) - mean
        mean += share * distance
        variance = (1 - share) * (variance + share * distance * distance)
        self._computing[rung] = count + 1, mean, variance
        beside = min(latency / self._turns(inside), self.objective) - mean
        self._beside += _MEMORY * (beside - self._beside)

    def look(self, now: float, inside: int, late: float = 0.0) -> None:
        """Choose the rung anew; to be called many times a second.

        ``late`` are the seconds by which the call itself came too late: as long a request may wait before it is seen.
        """
        self._late.append((now, late))
        while self._late[0][0] < now - WINDOW:
            self._late.popleft()
        while self._arrivals and self._arrivals[0] < now - WINDOW:
            self._arrivals.popleft()
        while self._latencies and self._latencies[0][0] < now - WINDOW:
            self._latencies.popleft()
        needed = self._cheapest_needed(inside)
        # Latencies lag behind what caused them: a step, and then time to see what it does.
        if now - self._stepped >= WINDOW and self._too_slow():
            needed, self._stepped = max(needed, min(self.current + 1, len(self.rungs) - 1)), now
        self._need(now, needed)
        while self._needed[0][0] < now - HOLD:
            self._needed.popleft()

    def _need(self, now: float, rung: int) -> None:
        """Note that ``rung`` was needed; what was needed before and is no cheaper can never be the cheapest again."""
        while self._needed and self._needed[-1][1] <= rung:
            self._needed.pop()
        self._needed.append((now, rung))

    def _cheapest_needed(self, inside: int) -> int:
        """The dearest rung that keeps the threads free enough and the queue short; else the floor."""
        for rung in range(len(self.rungs)):
            seconds = self.seconds(rung) or 0.0
            busy = len(self._arrivals) / WINDOW * seconds / self.parallel
            if busy <= MOST_BUSY and self._expected(inside, rung) <= UNHURRIED * self.objective:
                return rung
        return len(self.rungs) - 1

    def _expected(self, inside: int, rung: int) -> float:
        """Seconds until a request that comes now is answered."""
        return self._turns(inside) * (self.seconds(rung) or 0.0)

    def _slowest(self, inside: int, rung: int) -> float:
        """Seconds within which 399 of 400 requests that come now are answered: those before it take longer now and then."""
        if not self._computing:
            return 0.0
        spread = math.sqrt(self._computing[self._nearest(rung)][2] * self._turns(inside))
        return self._expected(inside, rung) + _SELDOM * spread

    def _turns(self, inside: int) -> float:
        """How often a thread's time for a request passes until a request that comes now is answered."""
        waiting = inside - self.parallel
        # Those under way are half done in the mean.
        return 1.0 if waiting < 0 else 1 + (waiting + 0.5) / self.parallel

    def _too_slow(self) -> bool:
        latencies = sorted(latency for _, latency in self._latencies)
        return bool(latencies) and latencies[int(0.99 * len(latencies))] > self.objective
