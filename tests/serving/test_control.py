"""Load control without a clock: arrivals and stage times are played to the controller, as the server would."""

from __future__ import annotations

import heapq
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erde.bundle.sealing import read, seal
from erde.serving.control import HOLD, Controller, Rung, ladder
from erde.serving.models import Model
from erde.serving.server import Settings, serve
from erde.serving.service import Load
from tests.helpers.checks import user_error
from tests.helpers.served import SLOW, Served, as_json, serving, some_images, until

# Seconds until an image has left at each of three exits, and the share of images that leave there on each rung.
EXITS = np.array([0.0010, 0.0022, 0.0040])
SHARES = np.array([[0.2, 0.2, 0.6], [0.5, 0.2, 0.3], [0.8, 0.15, 0.05]])
CUMULATIVE = np.cumsum(SHARES, axis=1)[:, :-1]
MEANS = SHARES @ EXITS
RUNGS = [Rung(f"risk-{index}", float(mean)) for index, mean in enumerate(MEANS)]
OBJECTIVE = 0.030


@dataclass
class Outcome:
    """What a simulation ended with; ``latencies`` are (time of arrival, seconds) of what was answered."""

    latencies: list[tuple[float, float]] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    rungs: Counter[int] = field(default_factory=Counter)
    moves: list[tuple[float, int]] = field(default_factory=list)

    def windows_within(self, objective: float) -> float:
        """The share of one-second windows whose p99 is within the objective."""
        windows: dict[int, list[float]] = {}
        for arrival, latency in self.latencies:
            windows.setdefault(int(arrival), []).append(latency)
        return float(np.mean([np.quantile(group, 0.99) <= objective for group in windows.values()]))


def simulate(
    arrivals: Sequence[float],
    controller: Controller | None,
    rung: int = 0,
    seed: int = 0,
    beside: float = 0.0,
) -> Outcome:
    """A queue before one thread; without a controller every request is answered, at ``rung``.

    ``beside`` are seconds that the thread's CPU is busy with a request besides computing.
    """
    generator, outcome = np.random.default_rng(seed), Outcome()
    waiting: deque[tuple[float, int]] = deque()
    events: list[
        tuple[float, int, tuple[float, int], int, float]
    ] = []  # end, rank, (arrival, inside), rung, computing
    free, rank = True, 0

    def begin(now: float) -> None:
        nonlocal free, rank
        free = False
        at = rung if controller is None else controller.current
        computing = float(EXITS[np.searchsorted(CUMULATIVE[at], generator.random(), side="right")])
        rank += 1
        heapq.heappush(events, (now + computing + beside, rank, waiting.popleft(), at, computing))

    def finish_until(now: float) -> None:
        nonlocal free
        while events and events[0][0] <= now:
            end, _, (arrival, inside), at, computing = heapq.heappop(events)
            free = True
            outcome.latencies.append((arrival, end - arrival))
            outcome.rungs[at] += 1
            if controller is not None:
                controller.answered(end, at, end - arrival, computing, inside)
            if waiting:
                begin(end)

    looked = 0.0
    for arrival in arrivals:
        finish_until(arrival)
        while controller is not None and looked + 0.1 <= arrival:
            looked += 0.1
            controller.look(looked, len(waiting) + (not free))
        before = None if controller is None else controller.current
        inside = len(waiting) + (not free)
        if controller is not None and not controller.admits(arrival, inside):
            outcome.refused.append(arrival)
        else:
            waiting.append((arrival, inside))
            if free:
                begin(arrival)
        if controller is not None and controller.current != before:
            outcome.moves.append((arrival, controller.current))
    finish_until(np.inf)
    return outcome


def poisson(rate: Callable[[float], float], seconds: float, seed: int = 0) -> list[float]:
    """Arrivals at a rate per second that changes with time, by thinning."""
    generator = np.random.default_rng(seed)
    most = max(rate(time) for time in np.arange(0, seconds, 0.5))
    times = np.cumsum(generator.exponential(1 / most, int(most * seconds * 1.2)))
    times = times[times < seconds]
    return [float(time) for time in times if generator.random() < rate(time) / most]


def new_controller() -> Controller:
    return Controller(RUNGS, OBJECTIVE, parallel=1)


@pytest.mark.parametrize("seed", range(2))
def test_what_only_the_floor_can_carry_is_answered_in_time(seed: int) -> None:
    # 0.8 of the floor's capacity is 1.9 times that of the dearest point.
    rate = 0.8 / MEANS[-1]
    arrivals = poisson(lambda _: rate, 40, seed)
    controlled = simulate(arrivals, new_controller(), seed=seed)
    alone = simulate(arrivals, None, seed=seed)
    assert controlled.windows_within(OBJECTIVE) >= 0.99
    assert len(controlled.refused) <= 0.005 * len(arrivals)
    assert controlled.rungs[2] > 0.9 * len(arrivals)
    # Without control the queue grows without end.
    assert alone.windows_within(OBJECTIVE) < 0.1


@pytest.mark.parametrize("seed", range(2))
def test_what_a_request_takes_beside_computing_is_learnt(seed: int) -> None:
    # As long again as the floor takes in the mean: with computing alone in view the queue would be twice as long.
    beside = float(MEANS[-1])
    rate = 0.8 / (MEANS[-1] + beside)
    arrivals = poisson(lambda _: rate, 40, seed)
    controller = new_controller()
    controlled = simulate(arrivals, controller, seed=seed, beside=beside)
    assert controlled.windows_within(OBJECTIVE) >= 0.99
    assert len(controlled.refused) <= 0.03 * len(arrivals)
    assert controller.seconds(2) == pytest.approx(MEANS[2] + beside, rel=0.2)
    overload = simulate(poisson(lambda _: 2.5 * rate, 20, seed), new_controller(), seed=seed, beside=beside)
    assert overload.windows_within(OBJECTIVE) >= 0.95


def test_a_stall_is_forgotten_soon() -> None:
    controller, now = new_controller(), 0.0

    def quick(requests: int) -> int:
        nonlocal now
        admitted = 0
        for _ in range(requests):
            now += 0.005
            if controller.admits(now, 0):
                admitted += 1
                controller.answered(now, controller.current, 0.002, 0.002, 0)
        return admitted

    assert quick(500) == 500
    # The machine stands still for a minute; ten requests were in the queue.
    now += 60
    for inside in range(10):
        controller.answered(now, 0, 60.0, 60.0 if inside == 0 else 0.002, inside)
    assert quick(500) == 500
    # Ten minutes of stalls: then requests are refused, and when they end some are tried.
    for _ in range(600):
        now += 1
        controller.answered(now, 2, 1.0, 1.0, 0)
    assert not controller.admits(now + 0.01, 0)
    now += 2
    assert not controller.admits(now, 1)
    assert quick(1) == 1


@pytest.mark.parametrize("slow", [2, 60])
@pytest.mark.parametrize("rungs", [RUNGS, RUNGS[:1]], ids=len)
def test_a_slow_moment_at_a_light_load_shuts_nobody_out(rungs: list[Rung], slow: float) -> None:
    # Until then a request takes longer than the objective, at every rung; after it 2 ms, a tenth of the thread's time.
    controller, arrivals = Controller(rungs, OBJECTIVE, parallel=1), poisson(lambda _: 50, slow + 60)
    generator, free, refused = np.random.default_rng(0), 0.0, []
    inside: deque[tuple[float, int, float, float]] = deque()  # end, inside, arrival, computing
    looked = 0.0
    for arrival in arrivals:
        while inside and inside[0][0] <= arrival:
            end, others, came, computing = inside.popleft()
            controller.answered(end, controller.current, end - came, computing, others)
        while looked + 0.02 <= arrival:
            looked += 0.02
            controller.look(looked, len(inside))
        if not controller.admits(arrival, len(inside)):
            refused.append(arrival)
            continue
        computing = (1.2 * OBJECTIVE if arrival < slow else 0.002) * generator.uniform(0.7, 1.3)
        free = max(free, arrival) + computing
        inside.append((free, len(inside), arrival, computing))
    assert any(time < slow + 1 for time in refused)
    late = [time for time in arrivals if time > slow + 30]
    assert len([time for time in refused if time > slow + 30]) <= 0.01 * len(late)


@pytest.mark.parametrize("fast_first", [False, True])
def test_a_slow_answer_after_a_pause_shuts_nobody_out(fast_first: bool) -> None:
    controller, now = Controller(RUNGS[:1], 0.1, parallel=2), 0.0

    def admits(pause: float, seconds: float) -> bool:
        nonlocal now
        now += pause
        controller.look(now, 0)
        if not controller.admits(now, 0):
            return False
        now += seconds
        controller.answered(now, 0, seconds, seconds, 0)
        return True

    assert all(admits(0.05, 0.01) for _ in range(1000))
    if fast_first:
        assert admits(2.0, 0.0099)
    # A machine that woke up: as slow as the objective, and of a thousand answers it is the only such.
    assert admits(0.05 if fast_first else 2.0, 0.1)
    assert all(admits(0.05, 0.01) for _ in range(10))


def test_requests_that_wait_unseen_count() -> None:
    controller = new_controller()
    controller.answered(0.0, 0, 0.002, 0.002, 0)
    controller.look(0.1, 0)
    assert controller.admits(0.11, 0)
    # The server itself came late: so long a request may have waited in a socket.
    controller.look(0.12, 0, late=0.9 * OBJECTIVE)
    controller.answered(0.12, 0, 0.002, 0.002, 0)
    assert not controller.admits(0.5, 0)
    for tick in range(60):
        controller.look(0.14 + 0.02 * tick, 0)
    assert controller.admits(1.3, 0)


@pytest.mark.parametrize("seed", range(2))
def test_bursts(seed: int) -> None:
    # Two seconds of 0.8 of the floor's capacity in ten, between quiet.
    arrivals = poisson(lambda time: (0.8 if time % 10 < 2 else 0.2) / MEANS[-1], 40, seed)
    controlled = simulate(arrivals, new_controller(), seed=seed)
    assert controlled.windows_within(OBJECTIVE) >= 0.95
    assert len(controlled.refused) <= 0.005 * len(arrivals)
    # Between bursts the dearest point answers again.
    assert controlled.rungs[0] > 0.2 * len(arrivals)
    # No swinging: down in one step or two with a burst, and back up.
    assert len(controlled.moves) <= 6 * 5


@pytest.mark.parametrize("seed", range(2))
def test_a_fallback_that_is_slow_now_and_then(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    # A chain: most images leave early, and the others take five times as long. The mean alone says too little of a queue.
    late, slow = 0.12, 0.006
    mean = (1 - late) * 0.0013 + late * slow
    monkeypatch.setattr(sys.modules[__name__], "EXITS", np.array([0.0013, slow]))
    monkeypatch.setattr(sys.modules[__name__], "CUMULATIVE", np.array([[1 - late]]))
    arrivals = poisson(lambda _: 0.8 / mean, 120, seed)
    outcome = simulate(arrivals, Controller([Rung("floor", 1.0)], 0.020, parallel=1), seed=seed)
    assert outcome.windows_within(0.020) >= 0.97
    # Without refusals the slowest hundredth would take 35 ms.
    assert len(outcome.refused) <= 0.12 * len(arrivals)


def test_above_the_floors_capacity_the_rest_is_refused_and_what_is_taken_is_in_time() -> None:
    arrivals = poisson(lambda _: 2 / MEANS[-1], 30)
    controlled = simulate(arrivals, new_controller())
    assert controlled.windows_within(OBJECTIVE) >= 0.95
    # Half is too much; the thread is never idle.
    assert 0.4 < len(controlled.refused) / len(arrivals) < 0.6
    assert np.quantile([latency for _, latency in controlled.latencies], 0.99) <= 1.1 * OBJECTIVE


def test_a_light_load_stays_at_the_default_and_a_rise_ends() -> None:
    arrivals = poisson(lambda _: 0.5 / MEANS[0], 30)
    outcome = simulate(arrivals, new_controller())
    assert not outcome.refused
    assert outcome.rungs[0] > 0.8 * len(arrivals)
    # After a heavy load has ended the dearest point is back, a rung at a time.
    controller = new_controller()
    outcome = simulate(poisson(lambda time: (0.8 if time < 10 else 0.1) / MEANS[-1], 30), controller)
    assert controller.current == 0
    up = [move for move in outcome.moves if move[0] > 10]
    assert all(time > 10 + HOLD for time, _ in up)


def test_a_request_is_not_known_to_be_slow_before_any_was_answered() -> None:
    controller = new_controller()
    assert controller.seconds(0) is None
    assert all(controller.admits(0.001 * number, 0) for number in range(50))
    assert controller.current == 0
    # The times of other rungs follow from the cost.
    controller.answered(0.1, 0, 0.004, 0.004, 0)
    assert controller.seconds(2) == pytest.approx(0.004 * MEANS[2] / MEANS[0])


def test_a_server_gives_way_refuses_at_the_floor_and_comes_back(bundle_a: Path) -> None:
    images = some_images(1)
    images[0, 0, 0, 0] = SLOW

    def point(served: Served) -> Any:
        return served.request("GET", "/v2/models/a").json["properties"]["default_operating_point"]

    # A slow request takes 0.6 s. Of two that wait the second would be answered after 1.8, at the floor after 1.4.
    with serving([bundle_a], "--slo-ms", "2000", "--floor", "risk-5", "--parallel", "1") as served:
        assert served.infer(as_json(images)).json["parameters"]["operating_point"] == "risk-1"
        with ThreadPoolExecutor(6) as threads:
            replies = list(threads.map(lambda _: served.infer(as_json(images)), range(6)))
        taken = [reply for reply in replies if reply.status == 200]
        refused = [reply for reply in replies if reply.status != 200]
        assert {reply.status for reply in refused} == {503}
        assert "cannot answer in time, even at its floor" in refused[0].json["error"]
        assert refused[0].headers["retry-after"] == "1"
        assert "risk-5" in {reply.json["parameters"]["operating_point"] for reply in taken}
        assert all(reply.json["parameters"]["certified"] for reply in taken)
        assert point(served) == "risk-5"
        until(lambda: point(served) == "risk-1")
        code, _, err = served.stop()
    assert code == 0
    assert "a: load: risk-1 -> risk-5, " in err
    assert "a: load: risk-5 -> risk-1, 0 requests wait" in err


def test_an_exchanged_bundle_without_the_floor_keeps_its_default(
    bundle_a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(bundle_a, tmp_path / "a"))
    model = Model("a", folder, 1)
    load = Load(model, "risk-5", OBJECTIVE, 1)
    # A request that takes longer than the objective: at once to the floor.
    load.answered(0.0, "risk-1", 0.1, 0.1, 0)
    load.admits(0.1, 1)
    assert model.current_default(model.loaded) == "risk-5"
    manifest = read(folder)
    kept = [point for point in manifest.operating_points if point.name != "risk-5"]
    seal(folder, manifest.model_copy(update={"operating_points": kept}))
    assert model.refresh()
    load.renew()
    for tick in range(5):
        load.look(1.0 + tick, 0)
    assert model.current_default(model.loaded) == "risk-1"
    assert [rung.name for rung in load.controller.rungs] == ["risk-1"]
    assert capsys.readouterr().err.count("a: load: no operating point 'risk-5'") == 1
    # With the floor it gives way again.
    seal(folder, manifest)
    assert model.refresh()
    load.renew()
    assert [rung.name for rung in load.controller.rungs] == ["risk-1", "risk-5"]


def test_options_that_do_not_fit(bundle_a: Path) -> None:
    for settings, bundles, message in (
        (Settings(objective=0.02), [bundle_a], "belong together: give both or none"),
        (Settings(floor="risk-5"), [bundle_a], "belong together: give both or none"),
        (
            Settings(objective=0.02, floor="risk-5"),
            [bundle_a, bundle_a],
            "--slo-ms is for one bundle, and 2 are",
        ),
        (
            Settings(http_port=0, grpc_port=0, objective=0.02, floor="risk-7"),
            [bundle_a],
            "no operating point 'risk-7'",
        ),
    ):
        with user_error(message):
            serve(list(map(str, bundles)), settings, lambda *_: None)


def test_the_ladder_of_a_bundle(bundle_a: Path) -> None:
    manifest = read(bundle_a)
    assert ladder(manifest, "risk-1") == [Rung("risk-1", pytest.approx(0.8))]
    assert ladder(manifest, "risk-5") == [
        Rung("risk-1", pytest.approx(0.8)),
        Rung("risk-5", pytest.approx(0.6)),
    ]
    # Not certified.
    for floor in ("no-exit", "early"):
        with user_error(
            f"the floor is '{floor}', expected the default 'risk-1' or .* that saves more: risk-5"
        ):
            ladder(manifest, floor)
    with user_error("no operating point 'risk-7'"):
        ladder(manifest, "risk-7")
