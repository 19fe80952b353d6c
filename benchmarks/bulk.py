"""Many images by every way of docs/bulk.md: is each answered once, are the answers the session's, and how quick is it?

    python benchmarks/bulk.py runs/a/bundle --images 100000 --out bulk.json

Images are CIFAR-10's test split, repeated, as PNG in Parquet shards. Each way answers all of them; ``killed`` is ``erde
predict --ray`` whose driver is killed half way and which is then resumed. ``throughput`` takes fewer images, and all ways
in turns. See README.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

import erde
from erde.common import environment
from erde.common.files import write_json
from erde.data.load import load_data
from erde.policy import rule as policy
from erde.runtime.session import Session

BATCH = 64
# Half of the shards are answered before the driver is killed.
KILL_AT = 0.5


def png(image: NDArray[np.uint8]) -> bytes:
    """The image as a file, which loses nothing."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


class Bulk:
    """All ways on one bundle; ``scratch`` holds the shards and the answers."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.bundle, self.count, self.rows = arguments.bundle.absolute(), arguments.images, arguments.rows
        self.few, self.many, self.rounds = 2, arguments.throughput_images, arguments.rounds
        self.scratch = scratch
        most = max(self.count, self.many)
        self.images = np.ascontiguousarray(np.asarray(load_data("cifar10").test.images[:most]))
        self.encoded = [png(image) for image in self.images]
        self.session = Session(self.bundle, threads=1, spinning=False)
        self.predictor = erde.Predictor(self.bundle, keep=["id"])
        answers = [self.session.predict(batch) for batch in self._batches(self.images)]
        self.labels = np.concatenate([answer.labels for answer in answers])
        self.exits = np.concatenate([answer.exits for answer in answers])
        logits = self.session.all_logits(self.images)
        thresholds = self.session.manifest.point(None).thresholds
        # Another batch may move a score by its last bits.
        self.unsure = policy.in_band(self.session.rule.apply(logits)[1], thresholds) | policy.near_tie(logits)
        self.ways: dict[str, Callable[[int, Path], None]] = {
            "session": self.by_session,
            "predictor": self.by_predictor,
            **{f"predict-{n}": partial(self.by_command, workers=n) for n in (1, 2)},
            **{f"predict-ray-{n}": partial(self.by_command, workers=n, ray=True) for n in (1, 2)},
            **{f"ray-data-{n}": partial(self.by_ray_data, actors=n) for n in (1, 2)},
        }

    @staticmethod
    def _batches(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        return (images[start : start + BATCH] for start in range(0, len(images), BATCH))

    def shards(self, count: int) -> Path:
        """The folder with ``count`` images; row ``id`` holds image ``id`` modulo the number of images there are."""
        folder = self.scratch / f"shards-{count}"
        if not folder.exists():
            folder.mkdir()
            # At least two, for two workers.
            rows = min(self.rows, count // 2)
            for number, start in enumerate(range(0, count, rows)):
                ids = range(start, min(start + rows, count))
                images = [self.encoded[id % len(self.encoded)] for id in ids]
                table = pa.table({"id": pa.array(ids, pa.int64()), "image": images})
                pq.write_table(table, folder / f"{number:05}.parquet")
        return folder

    # ------------------------------------------------------------ the ways: they answer into files below a folder

    def by_session(self, count: int, out: Path) -> None:
        """``Session.predict`` on decoded images."""
        labels, exits = [], []
        ids = np.arange(count)
        for start in range(0, count, BATCH):
            answer = self.session.predict(self.images[ids[start : start + BATCH] % len(self.images)])
            labels.append(answer.labels)
            exits.append(answer.exits)
        columns = {"id": ids, "label": np.concatenate(labels), "exit": np.concatenate(exits)}
        self._write({**columns, "error": np.full(count, "")}, out / "0.parquet")

    def by_predictor(self, count: int, out: Path) -> None:
        """``Predictor`` in this process, on the shards."""
        for shard in sorted(self.shards(count).iterdir()):
            table = pq.read_table(shard)
            columns = {"image": table["image"].to_pylist(), "id": table["id"].to_numpy()}
            self._write(self.predictor(columns), out / shard.name)

    @staticmethod
    def _write(columns: dict[str, Any], path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), path)

    def by_command(self, count: int, out: Path, workers: int, ray: bool = False) -> None:
        """``erde predict`` on the shards."""
        if code := self._start(count, out, workers, ray).wait():
            raise SystemExit(f"erde predict ended with exit code {code}")

    def _start(
        self, count: int, out: Path, workers: int, ray: bool, *options: str
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "erde", "predict", str(self.bundle), str(self.shards(count))]
        command += ["--out", str(out), "--keep", "id", "--workers", str(workers), *options]
        address = {}
        if ray:
            command.append("--ray")
            address["RAY_ADDRESS"] = self.ray.get_runtime_context().gcs_address
        return subprocess.Popen(command, env={**os.environ, **address}, stdout=subprocess.DEVNULL)

    def by_ray_data(self, count: int, out: Path, actors: int) -> None:
        """Ray Data, as docs/bulk.md has it."""
        images = self.ray.data.read_parquet(str(self.shards(count)))
        answers = images.map_batches(
            erde.Predictor,
            fn_constructor_kwargs={"bundle": str(self.bundle), "keep": ["id"]},
            batch_size=BATCH,
            num_cpus=1,
            compute=self.ray.data.ActorPoolStrategy(size=actors),
        )
        answers.write_parquet(str(out))

    @cached_property
    def ray(self) -> Any:
        """Ray with a processor more than there are actors, for the tasks that read."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # A token of this cluster's own, which the commands inherit: else Ray keeps one in the home folder.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        import ray
        import ray.data

        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        return ray

    # ------------------------------------------------------------ sections

    def whole(self, way: str) -> dict[str, Any]:
        """All images by one way."""
        out = self.scratch / way
        self.shards(self.count)
        started = time.perf_counter()
        self.ways[way](self.count, out)
        seconds = time.perf_counter() - started
        return {**self.checked(out), "seconds": seconds, "images_per_second": self.count / seconds}

    def checked(self, out: Path) -> dict[str, int]:
        """The answers below ``out`` against the session's; all but ``rows`` and ``different_in_band`` must be 0."""
        columns = ["id", "label", "exit", "error"]
        parts = [pq.read_table(file, columns=columns) for file in out.glob("*.parquet")]
        table = pa.concat_tables(parts, promote_options="permissive")
        ids = table["id"].to_numpy()
        place = ids % len(self.images)
        other = table["label"].to_numpy() != self.labels[place]
        other |= table["exit"].to_numpy() != self.exits[place]
        return {
            "rows": len(ids),
            "duplicates": len(ids) - len(np.unique(ids)),
            "missing": len(np.setdiff1d(np.arange(self.count), ids)),
            "unknown": int((ids >= self.count).sum()),
            "failed": sum(reason != "" for reason in table["error"].to_pylist()),
            "different": int((other & ~self.unsure[place]).sum()),
            "different_in_band": int((other & self.unsure[place]).sum()),
        }

    def killed(self) -> dict[str, Any]:
        """``erde predict --ray``, killed half way and resumed; the cluster lives on."""
        out = self.scratch / "killed"
        total = len(list(self.shards(self.count).iterdir()))
        command = self._start(self.count, out, 2, True)
        while len(list(out.glob("*.parquet"))) < KILL_AT * total:
            if command.poll() is not None:
                raise SystemExit("the command ended before it was killed: take more images, or fewer --rows")
            time.sleep(0.005)
        command.kill()
        command.wait()
        before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
        code = self._start(self.count, out, 2, True, "--resume").wait()
        kept = sum(path.stat().st_mtime_ns == changed for path, changed in before.items())
        return {
            **self.checked(out),
            "shards": total,
            "shards_at_the_kill": len(before),
            "shards_kept": kept,
            "exit_code_of_the_resumed": code,
            "files": len(list(out.iterdir())),
        }

    def throughput(self) -> dict[str, Any]:
        """Images a second of each way after its start, in turns.

        Each way answers few images and many; the difference of the two times is that of the difference of images.
        """
        starts: dict[str, list[float]] = {way: [] for way in self.ways}
        rates: dict[str, list[float]] = {way: [] for way in self.ways}
        for count in (self.few, self.many):
            self.shards(count)
        for turn in range(self.rounds):
            names = list(self.ways)
            for way in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds = []
                for count in (self.few, self.many):
                    started = time.perf_counter()
                    self.ways[way](count, self.scratch / f"turn-{turn}-{way}-{count}")
                    seconds.append(time.perf_counter() - started)
                starts[way].append(seconds[0])
                rates[way].append((self.many - self.few) / (seconds[1] - seconds[0]))
        results = {}
        for way in self.ways:
            rate = np.array(rates[way])
            results[way] = {
                "images_per_second": float(np.median(rate)),
                "times_session": np.quantile(rate / rates["session"], [0.25, 0.5, 0.75]).tolist(),
                "times_predictor": np.quantile(rate / rates["predictor"], [0.25, 0.5, 0.75]).tolist(),
                "start_seconds": float(np.median(starts[way])),
                "rounds": rates[way],
            }
        return {"images": self.many, **results}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=2500, help="of a shard")
    parser.add_argument("--throughput-images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5, help="of the throughput")
    parser.add_argument("--only", help="ways, killed, throughput; all of them without it")
    parser.add_argument("--scratch", type=Path, help="for shards and answers")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        bulk = Bulk(arguments, Path(scratch))
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            **{way: partial(bulk.whole, way) for way in bulk.ways},
            "killed": bulk.killed,
            "throughput": bulk.throughput,
        }
        results: dict[str, Any] = {}
        for section in arguments.only.split(",") if arguments.only else sections:
            results[section] = sections[section]()
            print(section, json.dumps(results[section]), flush=True)
    about = {
        "bundle": arguments.bundle.name,
        "operating_point": bulk.session.manifest.default_operating_point,
        "images": bulk.count,
        "rows_of_a_shard": bulk.rows,
        "in_band": int(bulk.unsure.sum()),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("ray", "pyarrow")},
    }
    write_json(arguments.out, {"environment": environment.describe("cpu", 1), **about, **results})


if __name__ == "__main__":
    main()
