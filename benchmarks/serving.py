"""``erde serve`` under load, on loopback: what a request costs beside the model, and what load control keeps.

    python benchmarks/serving.py runs/a/bundle --slo-ms 20 --floor risk-5 --out serving.json --plot serving.png

The server runs on one core and the load on another (``--cores 0,1``). Arrivals are open-loop: a request is sent when it is
due, however many wait, and its latency counts from then. Images are CIFAR-10's test split, which trained and chose nothing,
in a random order; their labels say what load control costs in accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from serving_load import (
    Client,
    Floats,
    Reply,
    Served,
    bursts,
    children,
    poisson,
    resident_bytes,
    serving,
    together,
)  # fmt: skip
from serving_malformed import malformed_grpc, malformed_http, over_grpc, over_http

from erde.bundle import read, seal
from erde.common import environment
from erde.common.files import write_json
from erde.data.load import load_data
from erde.runtime.session import Session
from erde.serving.messages import SERVICE

SECTIONS = ("overhead", "throughput", "load", "overload", "malformed", "kill", "swap", "memory", "plot")


# ---------------------------------------------------------------- what is measured


class Bench:
    """All sections on one bundle."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.bundle, self.floor, self.slo = arguments.bundle, arguments.floor, arguments.slo_ms
        self.server_core, load_core = arguments.cores
        self.seconds, self.memory_seconds = arguments.seconds, arguments.memory_seconds
        self.malformed_requests = arguments.malformed
        os.sched_setaffinity(0, {load_core})
        self.generator = np.random.default_rng(arguments.seed)
        data = load_data("cifar10")
        self.images = np.ascontiguousarray(np.asarray(data.test.images[:]))
        self.labels = np.asarray(data.test.labels)
        self.order = self.generator.permutation(len(self.images))
        self.session = Session(self.bundle, threads=1, spinning=False)
        self.default = self.session.manifest.default_operating_point
        self.full = self.session.predict(self.images, operating_point="no-exit").labels
        self.control = ("--threads", "1", "--parallel", "1", "--slo-ms", str(self.slo), "--floor", self.floor)
        self._capacity: float | None = None

    def run(self, served: Served, point: str | None, seconds: float, connections: int = 4) -> list[Reply]:
        """A closed loop of requests at one operating point."""
        return together(Client(served, self.images, point).busy(seconds, connections, self.order))

    def capacity(self) -> float:
        """Requests a second that are answered at the floor where more than that come, open loop."""
        if self._capacity is None:
            with serving(self.bundle, self.server_core, "--threads", "1", "--parallel", "1") as served:
                self.run(served, self.floor, 2)
                most = len(self.run(served, self.floor, 4)) / 4
                due = poisson(1.2 * most, 8, self.generator)
                replies = together(Client(served, self.images, self.floor).at(due, self.order))
                self._capacity = sum(reply.status == 200 for reply in replies) / 8
        return self._capacity

    def risk(self, replies: Sequence[Reply], disagreement: bool = False) -> float:
        """The share of answered images that the full network gets right and the answer does not; or answers otherwise."""
        answered = [reply for reply in replies if reply.status == 200]
        rows = np.array([reply.image for reply in answered])
        given = np.array([reply.label for reply in answered])
        if disagreement:
            return float((given != self.full[rows]).mean())
        return float(((self.full[rows] == self.labels[rows]) & (given != self.labels[rows])).mean())

    def windows(self, replies: Sequence[Reply]) -> float:
        """The share of one-second windows whose p99 is within the objective."""
        groups: dict[int, list[float]] = {}
        for reply in replies:
            if reply.status == 200:
                groups.setdefault(int(reply.due), []).append(reply.seconds)
        return float(np.mean([np.quantile(group, 0.99) <= self.slo / 1000 for group in groups.values()]))

    # ------------------------------------------------------------ sections

    def overhead(self) -> dict[str, Any]:
        """The round trip of a request less the time of ``Session.predict`` for its image, in turns, on one core each."""
        trips, models = [], []
        own = os.sched_getaffinity(0)
        with serving(self.bundle, self.server_core, "--threads", "1", "--parallel", "1") as served:
            client = Client(served, self.images, "no-exit")

            async def turns() -> None:
                for turn in range(40):
                    trips.extend([(await client.ask(int(image))).seconds for image in self.order[:50]])
                    os.sched_setaffinity(0, {self.server_core})
                    for image in self.order[:50] if turn % 2 else self.order[50:100]:
                        started = time.perf_counter()
                        self.session.predict(self.images[image : image + 1], operating_point="no-exit")
                        models.append(time.perf_counter() - started)
                    os.sched_setaffinity(0, own)

            together(turns())
        trip, model = 1000 * float(np.median(trips)), 1000 * float(np.median(models))
        return {"round_trip_p50_ms": trip, "model_p50_ms": model, "beside_the_model_ms": trip - model}

    def throughput(self) -> dict[str, Any]:
        """Requests a second at the default point over those at no-exit, beside the same ratio of a session, in turns."""
        ratios, alone = [], []
        with serving(self.bundle, self.server_core, "--threads", "1", "--parallel", "1") as served:
            self.run(served, None, 2)
            for turn in range(6):
                points = [self.default, "no-exit"] if turn % 2 else ["no-exit", self.default]
                counts = {point: len(self.run(served, point, 4)) for point in points}
                ratios.append(counts[self.default] / counts["no-exit"])
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self.server_core})
        for turn in range(6):
            points = [self.default, "no-exit"] if turn % 2 else ["no-exit", self.default]
            seconds = {}
            for point in points:
                started = time.perf_counter()
                for image in self.order[turn * 500 : turn * 500 + 500]:
                    self.session.predict(self.images[image : image + 1], operating_point=point)
                seconds[point] = time.perf_counter() - started
            alone.append(seconds["no-exit"] / seconds[self.default])
        os.sched_setaffinity(0, own)
        server, session = float(np.median(ratios)), float(np.median(alone))
        return {"server": server, "session": session, "ratio": server / session, "rounds": [ratios, alone]}

    def load(self) -> dict[str, Any]:
        """0.8 of the floor's capacity: windows within the objective, requests lost, and the risk of the answers."""
        rate, result = 0.8 * self.capacity(), {}
        kinds: dict[str, Callable[..., Floats]] = {"poisson": poisson, "bursts": bursts}
        for kind, arrivals in kinds.items():
            with serving(self.bundle, self.server_core, *self.control) as served:
                self.run(served, None, 2)
                due = arrivals(rate, self.seconds, self.generator)
                result[kind] = self.open_loop(served, due)
        return result

    def overload(self) -> dict[str, Any]:
        """Twice the floor's capacity: what is accepted is in time, and what is refused is refused at once."""
        rate = 2 * self.capacity()
        with serving(self.bundle, self.server_core, *self.control) as served:
            self.run(served, None, 2)
            return self.open_loop(served, poisson(rate, self.seconds / 2, self.generator))

    def open_loop(self, served: Served, due: Floats) -> dict[str, Any]:
        """A load, and what became of it."""
        client = Client(served, self.images)
        replies = together(client.at(due, self.order))
        return {**self._summary(replies), "sent_late_p99_ms": 1000 * float(np.quantile(client.late, 0.99))}

    def _summary(self, replies: Sequence[Reply]) -> dict[str, Any]:
        latencies = [reply.seconds for reply in replies if reply.status == 200]
        refused = [reply.seconds for reply in replies if reply.status == 503]
        half, most = (1000 * np.quantile(refused, [0.5, 0.99])).tolist() if refused else (None, None)
        return {
            "requests": len(replies),
            "requests_a_second": len(replies) / max(reply.due for reply in replies),
            "statuses": dict(Counter(str(reply.status) for reply in replies)),
            "points": dict(Counter(reply.point for reply in replies if reply.status == 200)),
            "p50_ms": 1000 * float(np.median(latencies)),
            "p99_ms": 1000 * float(np.quantile(latencies, 0.99)),
            "within_objective": float(np.mean([1000 * latency <= self.slo for latency in latencies])),
            "windows_within_objective": self.windows(replies),
            "refused_p50_ms": half,
            "refused_p99_ms": most,
            "risk": self.risk(replies),
            "other_answers": self.risk(replies, disagreement=True),
        }

    def malformed(self) -> dict[str, Any]:
        """Requests with one to three defects each, half of them over HTTP and half over gRPC; a quarter as memory warms."""
        statuses: Counter[str] = Counter()
        sizes = []
        with serving(self.bundle, self.server_core, "--threads", "1", "--parallel", "1") as served:
            channel = grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}")
            infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            for number in range(self.malformed_requests):
                if number * 4 in (self.malformed_requests, 4 * (self.malformed_requests - 1)):
                    sizes.append(resident_bytes(served.process.pid))
                if number % 2:
                    statuses[f"HTTP {over_http(served.port, *malformed_http(self.generator))}"] += 1
                else:
                    statuses[f"gRPC {over_grpc(infer, malformed_grpc(self.generator))}"] += 1
            channel.close()
            valid = self.run(served, None, 1)
        return {
            "requests": self.malformed_requests,
            "statuses": dict(sorted(statuses.items())),
            "growth": sizes[1] / sizes[0] - 1,
            "valid_afterwards": dict(Counter(str(reply.status) for reply in valid)),
        }

    def kill(self) -> dict[str, Any]:
        """SIGKILL of one of two processes under load."""
        options = ("--threads", "1", "--parallel", "2", "--processes", "--log-json")
        with tempfile.TemporaryFile("w+") as log:
            with serving(self.bundle, self.server_core, *options, log=log) as served:
                self.run(served, None, 2)

                def kill() -> None:
                    time.sleep(2)
                    os.kill(children(served.process.pid)[0], signal.SIGKILL)

                thread = threading.Thread(target=kill)
                thread.start()
                replies = self.run(served, None, 8)
                thread.join()
            log.seek(0)
            events = {line["event"]: line["time"] for line in map(json.loads, log)}
        return {
            "requests": len(replies),
            "statuses": dict(Counter(str(reply.status) for reply in replies)),
            "slowest_ms": 1000 * max(reply.seconds for reply in replies),
            "two_processes_again_after_s": events["process_started"] - events["process_died"],
        }

    def swap(self) -> dict[str, Any]:
        """A bundle that is exchanged under load."""
        with tempfile.TemporaryDirectory() as scratch:
            folder, other = Path(scratch) / "a", Path(scratch) / "b"
            shutil.copytree(self.bundle, folder)
            shutil.copytree(self.bundle, other)
            seal(other, read(other).model_copy(update={"default_operating_point": "no-exit"}))
            with serving(folder, self.server_core, "--threads", "1", "--parallel", "1") as served:

                def exchange() -> None:
                    time.sleep(2)
                    os.replace(folder, Path(scratch) / "old")
                    os.replace(other, folder)

                thread = threading.Thread(target=exchange)
                thread.start()
                replies = self.run(served, None, 8)
                thread.join()
        return {
            "requests": len(replies),
            "statuses": dict(Counter(str(reply.status) for reply in replies)),
            "versions": dict(Counter(reply.version for reply in replies)),
        }

    def memory(self) -> dict[str, Any]:
        """Half of the floor's capacity for minutes: does memory grow after the first of them?"""
        sizes = []
        with serving(self.bundle, self.server_core, *self.control) as served:
            for _ in range(int(self.memory_seconds / 30)):
                due = poisson(0.5 * self.capacity(), 30, self.generator)
                together(Client(served, self.images).at(due, self.order))
                sizes.append(resident_bytes(served.process.pid))
        warm = sizes[min(2, len(sizes) - 1)]
        return {"mebibytes": [round(size / 2**20, 1) for size in sizes], "growth": sizes[-1] / warm - 1}

    def plot(self, file: Path) -> dict[str, Any]:
        """A load that rises and falls, with load control and without."""
        rates = self.capacity() * np.array([0.3, 0.5, 0.7, 0.9, 0.9, 0.7, 0.5, 0.3])
        step = self.seconds / len(rates)
        due = np.concatenate(
            [number * step + poisson(rate, step, self.generator) for number, rate in enumerate(rates)]
        )
        runs: dict[str, list[Reply]] = {}
        for name, options in {"load control": self.control, "without": self.control[:4]}.items():
            with serving(self.bundle, self.server_core, *options) as served:
                self.run(served, None, 2)
                runs[name] = together(Client(served, self.images).at(due, self.order))
        draw(runs, self, file)
        return {name: self._summary(replies) for name, replies in runs.items()}


def draw(runs: dict[str, list[Reply]], bench: Bench, file: Path) -> None:
    """Arrivals, p99, operating points and risk over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, figsize=(8, 9), sharex=True, layout="constrained")
    colors = {"load control": "#1d4ed8", "without": "#b45309"}
    names = [point.name for point in bench.session.manifest.operating_points]
    promise = bench.session.manifest.point(bench.floor).certificate
    assert promise is not None
    seconds = np.arange(int(max(reply.due for replies in runs.values() for reply in replies)) + 1)
    for name, replies in runs.items():
        due = np.array([reply.due for reply in replies]).astype(int)
        answered = np.array([reply.status == 200 for reply in replies])
        latency = np.array([reply.seconds for reply in replies])
        if name == "load control":
            axes[0].step(seconds, np.bincount(due, minlength=len(seconds)), color="#374151", where="post")
            shares = np.array(
                [
                    [np.mean([r.point == point for r in replies if int(r.due) == s]) for s in seconds]
                    for point in names
                ]
            )
            used = [index for index in range(len(names)) if shares[index].any()]
            axes[2].stackplot(seconds, shares[used], labels=[names[index] for index in used], step="post")
        p99 = [
            np.quantile(latency[(due == s) & answered], 0.99) if ((due == s) & answered).any() else np.nan
            for s in seconds
        ]
        axes[1].plot(seconds, 1000 * np.array(p99), color=colors[name], label=name)
        blocks = [[r for r in replies if s <= r.due < s + 5 and r.status == 200] for s in seconds[::5]]
        risks = [
            100 * bench.risk(block, promise.guarantee == "disagreement") if block else np.nan
            for block in blocks
        ]
        axes[3].plot(seconds[::5] + 2.5, risks, "o-", color=colors[name], label=name)
    axes[1].axhline(bench.slo, color="#6b7280", linestyle="--", label="objective")
    axes[1].set_yscale("log")
    axes[3].axhline(100 * promise.max_risk, color="#6b7280", linestyle="--", label="promise of the floor")
    axes[3].set_ylim(bottom=0)
    for axis, title in zip(
        axes,
        ["requests a second", "p99, ms", "answered at (white: refused)", f"{promise.guarantee}, %"],
        strict=True,
    ):
        axis.set_ylabel(title)
    for axis in axes[1:]:
        # Beside the axes, where it covers nothing.
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    axes[3].set_xlabel("seconds")
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--slo-ms", type=float, default=20.0)
    parser.add_argument("--floor", default="risk-5")
    parser.add_argument(
        "--cores", type=lambda text: tuple(map(int, text.split(","))), default=(0, 1), help="server,load"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of a load")
    parser.add_argument("--memory-seconds", type=float, default=600.0)
    parser.add_argument("--malformed", type=int, default=10_000, help="malformed requests")
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("serving.png"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    results: dict[str, Any] = {}
    for section in arguments.only.split(","):
        results[section] = bench.plot(arguments.plot) if section == "plot" else getattr(bench, section)()
        print(section, json.dumps(results[section]), flush=True)
    about = {
        "slo_ms": bench.slo,
        "floor": bench.floor,
        "default": bench.default,
        "floor_capacity": bench._capacity,
    }
    write_json(arguments.out, {"environment": environment.describe("cpu", 1), **about, **results})


if __name__ == "__main__":
    main()
