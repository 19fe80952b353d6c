"""``erde bench``: a bundle against the clock, beside the same network without exits and smaller ones.

Speed on a shared machine means little by itself: a busy moment hits whoever is being timed. So all contenders take
turns within each round, in a new random order, on the same batches of real images, and what is reported of two is
the ratio within a round: its median and quartiles over the rounds.
"""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from erde import bundle
from erde.bundle.profile import PROFILE, Profile
from erde.common import environment, progress
from erde.common.errors import UserError
from erde.common.files import write_json
from erde.common.model import Frozen
from erde.policy.points import OperatingPoint
from erde.runtime.engines import check_engine, open_stages
from erde.runtime.session import Session

Kind = Literal["no-exits", "operating-point", "every-exit", "fixed"]
# A contender's turn within a round: no longer than this, no more calls than that.
TURN_SECONDS, TURN_CALLS = 0.25, 64
WARM_UP = 3


class Contender(Frozen):
    """A contender in the race: a bundle at one setting, or a plain graph; ``bytes`` is the size of its ONNX files.

    ``profiled_threads``: of the ``profile.json`` in the bundle's folder, by which batches are thinned out.

    ``every-exit`` computes and scores all exits and leaves at none: what exits cost where they never pay.
    """

    name: str
    kind: Kind
    source: str
    precision: str
    operating_point: str | None
    certified: bool
    bytes: int
    profiled_threads: int | None = None
    engine: str = "onnxruntime"


class Measurement(Frozen):
    """One contender with one number of threads and images per call.

    Percentiles are of milliseconds per call. ``macs_share`` and ``time_share`` are held against the reference, whose own
    shares are 1: the mean of what was computed, and the median (quartiles) over rounds of the ratio of times. A bundle
    at ``no-exit`` computes all heads, and those count.
    ``time_per_macs_saved`` is (1 - time_share) / (1 - macs_share); None where less than 2 % of the MACs are saved, or where
    the precision or the engine is not the reference's.
    """

    contender: str
    threads: int
    batch_size: int
    calls: int
    p50: float
    p95: float
    p99: float
    images_per_second: float
    macs_share: float | None
    exit_rates: list[float] | None
    time_share: float
    time_share_quartiles: tuple[float, float]
    time_per_macs_saved: float | None


class Bench(Frozen):
    """The measurements of ``erde bench``, and the machine and images they are of."""

    format_version: Literal[2] = 2
    bundle: str
    seal: str
    data: str
    images: int
    rounds: int
    seed: int
    reference: str
    contenders: list[Contender]
    measurements: list[Measurement]
    machine: dict[str, Any]
    load_before: list[float]
    load_after: list[float]

    def write(self, path: Path) -> None:
        """Write as JSON, in one step."""
        write_json(path, self.model_dump(mode="json"))


@dataclass
class _Entry:
    """A contender with its ``open``: threads -> (images -> MACs per image and exits, or None for a plain graph)."""

    about: Contender
    open: Callable[[int], Callable[[NDArray[np.uint8]], tuple[NDArray[np.int64], NDArray[np.int64]] | None]]
    macs: float | None  # of a plain graph, per image; None where unknown
    exits: int


def bench(
    path: Path,
    images: NDArray[np.uint8],
    *,
    data: str,
    against: Sequence[Path] | None = None,
    points: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = (1, 8, 32, 128),
    threads: Sequence[int] = (1, 2),
    rounds: int = 20,
    seed: int = 0,
    engines: Sequence[str] = ("onnxruntime",),
) -> Bench:
    """Time the bundle at ``path`` on uint8 ``images`` (N, H, W, C) that ``data`` describes.

    Args:
        against: further bundles and plain ONNX graphs (uint8 images to logits). Without it, what a run folder has
            beside the bundle: ``bundle-int8`` and ``baselines/``.
        points: operating points by name; all without it.
        engines: by which all are timed; with several each contender runs in each of them.

    The reference is the run's own graph without exits in the bundle's precision where it is among them, else the bundle
    itself at ``no-exit``; in the first engine.
    """
    for name, numbers in (("batch sizes", batch_sizes), ("threads", threads), ("rounds", (rounds,))):
        if not numbers or min(numbers) < 1:
            raise UserError(f"{name} are {', '.join(map(str, numbers)) or 'missing'}, expected 1 or more")
    points = list(dict.fromkeys(points)) if points else None
    engines = list(dict.fromkeys(map(check_engine, engines)))
    before = _load()
    rivals = find_rivals(path) if against is None else list(against)
    manifest = bundle.read(path)
    labels = _labels([path, *rivals])
    entries = []
    for engine in engines:
        first = "" if engine == engines[0] else f"{engine} "
        entries += _bundle_entries(path, manifest, points, first, engine)
        for rival in rivals:
            if rival.is_dir():
                rival_manifest = bundle.read(rival)
                _check_same_task(rival, rival_manifest, manifest)
                names = {point.name for point in rival_manifest.operating_points}
                # A rung that one bundle could certify, another may have left out.
                common = [name for name in points if name in names] if points else None
                entries += _bundle_entries(rival, rival_manifest, common, f"{first}{labels[rival]} ", engine)
            else:
                own = rival.parent.resolve() == (path.parent / "baselines").resolve()
                entries.append(_plain_entry(rival, manifest, f"{first}{labels[rival]}", own, engine))
    # The first engine's come first.
    graphs = [entry.about for entry in entries if entry.about.kind == "no-exits"]
    reference = next((graph.name for graph in graphs if graph.precision == manifest.precision), "no-exit")
    entries.sort(key=lambda entry: entry.about.name != reference)
    measurements = []
    cells = [(count, size) for count in threads for size in batch_sizes]
    with progress.task("bench", len(cells) * rounds) as task:
        for number, (count, size) in enumerate(cells):
            done = (number + 1) * rounds
            measurements += _race(
                entries, reference, images, count, size, rounds, np.random.default_rng([seed, number]),
            )  # fmt: skip
            if task.due():
                task.update(done, f"{count} threads, {size} images a call")
    return Bench(
        bundle=str(path),
        seal=bundle.seal_of(manifest),
        data=data,
        images=len(images),
        rounds=rounds,
        seed=seed,
        reference=reference,
        contenders=[entry.about for entry in entries],
        measurements=measurements,
        machine={
            "platform": platform.platform(),
            "cpu": environment.cpu_model(),
            "cpus": environment.available_cpus(),
            "versions": environment.versions(),
            "commit": environment.commit(),
        },
        load_before=before,
        load_after=_load(),
    )


def find_rivals(path: Path) -> list[Path]:
    """The bundle in int8 and the plain graphs that a run folder has beside its bundle."""
    quantised = path.parent / f"{path.name}-int8"
    graphs = sorted((path.parent / "baselines").glob("*.onnx"))
    return [*([quantised] if quantised.is_dir() else []), *graphs]


def _labels(paths: Sequence[Path]) -> dict[Path, str]:
    """Name each path by the shortest tail that tells them all apart."""
    resolved = [path.resolve() for path in paths]
    for path in paths:
        if resolved.count(path.resolve()) > 1:
            raise UserError(f"{path} is given twice: name each bundle and each graph once")
    for depth in itertools.count(1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            break
    return dict(zip(paths, names, strict=True))


def _check_same_task(path: Path, rival: bundle.Manifest, manifest: bundle.Manifest) -> None:
    if rival.input_shape != manifest.input_shape or len(rival.classes) != len(manifest.classes):
        raise UserError(
            f"bundle {path} takes images of shape {rival.input_shape} and tells {len(rival.classes)} classes, the one that "
            f"is timed {manifest.input_shape} and {len(manifest.classes)}: give bundles of the same task"
        )


def _load() -> list[float]:
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else []


# ---------------------------------------------------------------- contenders


def _bundle_entries(
    path: Path, manifest: bundle.Manifest, points: Sequence[str] | None, prefix: str, engine: str
) -> list[_Entry]:
    size = sum((path / stage.file).stat().st_size for stage in manifest.stages)
    sessions: dict[int, Session] = {}
    profile = Profile.at_hand(path / PROFILE, bundle.stages_hash(manifest), len(manifest.stages))

    def session(threads: int) -> Session:
        if threads not in sessions:
            sessions[threads] = Session(path, threads=threads, engine=engine)
        return sessions[threads]

    def entry(name: str, kind: Kind, point: OperatingPoint | None, setting: dict[str, Any]) -> _Entry:
        def open_session(
            threads: int,
        ) -> Callable[[NDArray[np.uint8]], tuple[NDArray[np.int64], NDArray[np.int64]]]:
            predict = session(threads).predict

            def call(images: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
                answer = predict(images, **setting)
                return answer.macs, answer.exits

            return call

        about = Contender(
            name=f"{prefix}{name}",
            kind=kind,
            source=str(path),
            precision=manifest.precision,
            operating_point=point.name if point else None,
            certified=point is not None and point.certificate is not None,
            bytes=size,
            profiled_threads=profile.threads if profile and profile.engine == engine else None,
            engine=engine,
        )
        return _Entry(about, open_session, None, len(manifest.stages))

    known = manifest.operating_points if points is None else [manifest.point(name) for name in points]
    if "no-exit" not in {point.name for point in known}:
        known = [*known, manifest.point("no-exit")]
    timed = [entry(point.name, "operating-point", point, {"operating_point": point.name}) for point in known]
    never = {"thresholds": [np.inf] * (len(manifest.stages) - 1)}
    return [*timed, entry("every exit computed", "every-exit", None, never)]


def _plain_entry(
    path: Path, manifest: bundle.Manifest, name: str, beside_bundle: bool, engine: str
) -> _Entry:
    if not path.is_file():
        raise UserError(f"nothing at {path}: expected a bundle's folder or an ONNX file to hold it against")
    shape = manifest.input_shape
    # Only what the run itself wrote is known to be the same network; of a chain it is the front alone.
    own = beside_bundle and len(manifest.networks()) == 1 and path.stem in ("no-exit", "no-exit-int8")
    # Of files of the run's, others that are called so are arms, in float.
    is_int8 = path.stem == "no-exit-int8" if beside_bundle else path.stem.endswith("int8")

    def open_graph(threads: int) -> Callable[[NDArray[np.uint8]], None]:
        runner = open_stages(engine, [path], threads)
        if runner.image_shape != shape:
            raise UserError(
                f"{path} takes images of shape {runner.image_shape}, the bundle {shape}: give a graph of the same task"
            )

        def call(images: NDArray[np.uint8]) -> None:
            runner.run_bound(0, images)[1].argmax(axis=-1)

        return call

    open_graph(1)
    about = Contender(
        name=name,
        kind="no-exits" if own else "fixed",
        source=str(path),
        precision="int8" if is_int8 else "fp32",
        operating_point=None,
        certified=False,
        bytes=path.stat().st_size,
        engine=engine,
    )
    return _Entry(about, open_graph, float(manifest.no_exit_macs) if own else None, 1)


# ---------------------------------------------------------------- the race


def _race(
    entries: Sequence[_Entry],
    reference: str,
    images: NDArray[np.uint8],
    threads: int,
    size: int,
    rounds: int,
    generator: np.random.Generator,
) -> list[Measurement]:
    """All contenders with one number of threads and images per call."""

    def draw() -> NDArray[np.uint8]:
        return images[generator.integers(0, len(images), size)]

    calls = [entry.open(threads) for entry in entries]
    slowest = 0.0
    for call in calls:
        for _ in range(WARM_UP):
            started = time.perf_counter()
            call(draw())
            last = time.perf_counter() - started
        slowest = max(slowest, last)
    turns = int(np.clip(TURN_SECONDS / slowest, 1, TURN_CALLS))
    seconds = np.zeros((rounds, len(entries), turns))
    macs = [(entry.macs or 0.0) * rounds * turns * size for entry in entries]
    exits = [np.zeros(entry.exits, dtype=np.int64) for entry in entries]
    for turn in range(rounds):
        batches = [draw() for _ in range(turns)]
        for index in generator.permutation(len(entries)):
            call = calls[index]
            call(batches[0])  # the contender before left its own data in the caches
            for number, batch in enumerate(batches):
                started = time.perf_counter()
                answer = call(batch)
                seconds[turn, index, number] = time.perf_counter() - started
                if answer is not None:
                    macs[index] += float(answer[0].sum())
                    exits[index] += np.bincount(answer[1], minlength=len(exits[index]))
    names = [entry.about.name for entry in entries]
    first = entries[names.index(reference)]
    totals = seconds.sum(axis=2)
    shares = totals / totals[:, [names.index(reference)]]
    answered = rounds * turns * size
    # As times are: of the work that the reference really did.
    whole = macs[names.index(reference)] / answered
    return [
        _measurement(
            entry, seconds[:, index], shares[:, index], threads, size,
            macs[index] / answered / whole if macs[index] else None,
            (exits[index] / answered).tolist() if exits[index].any() else None,
            (entry.about.precision, entry.about.engine) == (first.about.precision, first.about.engine),
        )
        for index, entry in enumerate(entries)
    ]  # fmt: skip


def _measurement(
    entry: _Entry,
    seconds: NDArray[np.float64],
    shares: NDArray[np.float64],
    threads: int,
    size: int,
    macs_share: float | None,
    exit_rates: list[float] | None,
    comparable: bool,
) -> Measurement:
    p50, p95, p99 = (1e3 * np.percentile(seconds, [50, 95, 99])).tolist()
    low, middle, high = np.percentile(shares, [25, 50, 75]).tolist()
    saved = 1 - macs_share if comparable and macs_share is not None else None
    return Measurement(
        contender=entry.about.name,
        threads=threads,
        batch_size=size,
        calls=seconds.size,
        p50=p50,
        p95=p95,
        p99=p99,
        images_per_second=size * seconds.size / float(seconds.sum()),
        macs_share=macs_share,
        exit_rates=exit_rates,
        time_share=middle,
        time_share_quartiles=(low, high),
        time_per_macs_saved=(1 - middle) / saved if saved is not None and saved > 0.02 else None,
    )
