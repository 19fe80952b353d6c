"""Do front and fallback of a chain want worker threads of their own? Two threads on two cores, open-loop arrivals.

    python benchmarks/serving_pools.py fast/bundle --out pools.json

``shared``: either thread answers a request from front to fallback, as ``erde serve`` does. ``apart``: one thread runs the
front and hands what stays undecided to the other, which runs the fallback. Images are CIFAR-10's test split.
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from erde.bundle import read
from erde.common import environment
from erde.common.files import write_json
from erde.data.load import load_data
from erde.runtime.session import Session

Task = Callable[[], None]


class Pools:
    """The chain, and how its work is shared among two threads."""

    def __init__(self, bundle: Path) -> None:
        data = load_data("cifar10")
        self.images = np.ascontiguousarray(np.asarray(data.test.images[:]))
        manifest = read(bundle)
        self.last = len(manifest.stages) - 1
        # A front and a fallback for each thread: sessions of the runtime are not shared between threads.
        self.fronts = [Session(bundle, threads=1, spinning=False) for _ in range(2)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.fallback = onnxruntime.InferenceSession(str(bundle / manifest.stages[-1].file), options)
        self.exits = self.fronts[0].predict(self.images).exits

    def front(self, thread: int, image: int) -> None:
        """The exits of the front; the last of them answers where none is sure."""
        self.fronts[thread].predict(self.images[image : image + 1], max_exit=self.last - 1)

    def back(self, image: int) -> None:
        """The fallback alone."""
        self.fallback.run(None, {self.fallback.get_inputs()[0].name: self.images[image : image + 1]})

    def run(self, apart: bool, arrivals: NDArray[np.float64], order: NDArray[np.int64]) -> dict[str, float]:
        """Latencies of a load in milliseconds: of all, and of what the front answers."""
        first: queue.SimpleQueue[tuple[int, float] | None] = queue.SimpleQueue()
        second: queue.SimpleQueue[tuple[int, float] | None] = queue.SimpleQueue()
        ended: list[tuple[int, float]] = []

        def answer(thread: int) -> None:
            while (job := first.get()) is not None:
                image, due = job
                self.front(thread, image)
                if self.exits[image] == self.last:
                    if apart:
                        second.put(job)
                        continue
                    self.back(image)
                ended.append((image, time.perf_counter() - due))

        def fall_back() -> None:
            while (job := second.get()) is not None:
                self.back(job[0])
                ended.append((job[0], time.perf_counter() - job[1]))

        threads = [threading.Thread(target=answer, args=(0,))]
        threads.append(
            threading.Thread(target=fall_back) if apart else threading.Thread(target=answer, args=(1,))
        )
        for thread in threads:
            thread.start()
        start = time.perf_counter()
        for number, arrival in enumerate(arrivals):
            wait = start + arrival - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            first.put((int(order[number % len(order)]), start + arrival))
        while len(ended) < len(arrivals):
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        for work in (first, first, second):
            work.put(None)
        for thread in threads:
            thread.join()
        latency = 1000 * np.array([pause for _, pause in ended])
        early = self.exits[[image for image, _ in ended]] < self.last
        return {
            "requests_a_second": len(arrivals) / seconds,
            "p50_ms": float(np.median(latency)),
            "p99_ms": float(np.quantile(latency, 0.99)),
            "early_p50_ms": float(np.median(latency[early])),
            "early_p99_ms": float(np.quantile(latency[early], 0.99)),
        }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pools, generator = Pools(arguments.bundle), np.random.default_rng(0)
    order = generator.permutation(len(pools.images))
    ways = {"shared": False, "apart": True}
    results: dict[str, list[dict[str, float]]] = {}
    # All at once: how many a second there can be.
    for turn in range(arguments.rounds):
        for way in sorted(ways, reverse=bool(turn % 2)):
            results.setdefault(f"{way}, all at once", []).append(pools.run(ways[way], np.zeros(2000), order))
    capacity = float(np.median([row["requests_a_second"] for row in results["shared, all at once"]]))
    for load in (0.3, 0.5, 0.7):
        for turn in range(arguments.rounds):
            gaps = generator.exponential(1 / (load * capacity), int(load * capacity * arguments.seconds))
            for way in sorted(ways, reverse=bool(turn % 2)):
                row = pools.run(ways[way], np.cumsum(gaps), order)
                results.setdefault(f"{way}, load {load}", []).append(row)
    medians: dict[str, Any] = {
        name: {key: round(float(np.median([row[key] for row in rows])), 3) for key in rows[0]}
        for name, rows in results.items()
    }
    for name, row in medians.items():
        print(name, json.dumps(row))
    write_json(
        arguments.out, {"environment": environment.describe("cpu", 1), "medians": medians, "rounds": results}
    )


if __name__ == "__main__":
    main()
