"""Open mutated bundles and see what happens: `python -m tests.helpers.fuzz_bundles --count 5000 --seed 1000`.

Every mutated bundle has to be refused with a UserError of one line, or to answer rightly. Rightly means: where the
seal was not renewed, exactly as the bundle that was mutated; where it was, whatever its thresholds say of the logits
that its stages give, in the right shapes and finite. Nothing else may happen: no other exception, no crash, no hang, no
memory without bound, no file written, none read outside the bundle.

Bundles are opened in a process of its own, so that a crash has a seed: seeds count up from `--seed`, and each is a
mutation. `--keep FOLDER --count 1` leaves the mutated bundle there.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from erde.bundle.card import model_card
from erde.bundle.manifest import Manifest
from erde.bundle.profile import PROFILE
from erde.bundle.sealing import differences
from erde.common.errors import UserError
from erde.policy.rule import decide, in_band, near_tie, take_exit
from erde.runtime.prediction import Prediction
from erde.runtime.session import Session

MEMORY = 3 * 2**29  # that a mutated bundle may use: 1.5 GiB
SECONDS = 60.0  # that it may take, on a busy machine
MODULE = "tests.helpers.fuzz_bundles"  # what the other process runs
LONGEST = 2000  # characters of an error
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "tempfile.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")


@dataclass(frozen=True)
class Result:
    """What became of one mutation; ``outcome`` is one of GOOD, or it is a bug."""

    seed: int
    kind: str
    what: str
    resealed: bool
    outcome: str
    detail: str
    seconds: float = 0.0
    peak: int = 0  # bytes

    @property
    def good(self) -> bool:
        return self.outcome in GOOD


GOOD = ("refused", "refused for memory", "answered")


class WrongError(Exception):
    """An answer that is none."""


# ---------------------------------------------------------------- one bundle


def check(condition: Any, what: str) -> None:
    if not condition:
        raise WrongError(what)


def check_answer(session: Session, images: NDArray[np.uint8], answer: Prediction, point: str) -> None:
    """``answer`` has the right shapes and is what the manifest says of the logits that the stages give."""
    manifest, count = session.manifest, len(images)
    exits, classes = len(manifest.stages), len(manifest.classes)
    check(answer.probabilities.shape == (count, classes), "shape of probabilities")
    for name in ("labels", "exits", "scores", "macs", "first_scores"):
        check(getattr(answer, name).shape == (count,), f"shape of {name}")
    check(np.isfinite(answer.probabilities).all(), "probabilities are not finite")
    check(np.isfinite(answer.scores).all(), "scores are not finite")
    check(np.allclose(answer.probabilities.sum(axis=1), 1), "probabilities do not sum to 1")
    check(((answer.exits >= 0) & (answer.exits < exits)).all(), "exits out of range")
    check(((answer.labels >= 0) & (answer.labels < classes)).all(), "labels out of range")
    # An image may be carried along with its batch, past the exit that answered.
    macs = [stage.macs for stage in manifest.stages]
    check(all(one in macs[exit:] for one, exit in zip(answer.macs, answer.exits, strict=True)), "MACs")
    if not count:
        return
    logits = session.all_logits(images)
    check(logits.shape == (exits, count, classes), "shape of logits")
    alone = np.concatenate([session.all_logits(images[row : row + 1]) for row in range(count)], axis=1)
    if not np.allclose(alone, logits, atol=1e-4):
        return  # a graph whose answer for an image depends on the others of the batch
    rule = session.rule
    answers, scores = rule.apply(logits)
    thresholds = manifest.point(point).thresholds
    sure = ~(in_band(scores, thresholds) | near_tie(answers))
    expected = decide(scores, thresholds)
    check((answer.exits == expected)[sure].all(), "exits are not those of the policy")
    check(
        (answer.labels == take_exit(answers, expected).argmax(axis=-1))[sure].all(),
        "labels are not those of the exits",
    )


def use(session: Session, images: NDArray[np.uint8]) -> list[Prediction]:
    """All that somebody may ask of a bundle; the answers at its points."""
    manifest = session.manifest
    shape = manifest.input_shape
    if images.shape[1:] != shape:
        check(min(shape) >= 0 and np.prod(shape) < 2**20, f"accepted input shape {shape}")
        images = np.random.default_rng(0).integers(0, 256, (len(images), *shape), dtype=np.uint8)
    found = []
    for point in [None, *(one.name for one in manifest.operating_points[:5])]:
        for count in (0, 1, len(images)):
            answer = session.predict(images[:count], operating_point=point)
            check_answer(session, images[:count], answer, point or manifest.default_operating_point)
        found.append(answer)
    check((session.predict(images, max_exit=0).exits == 0).all(), "max_exit")
    streamed = list(session.predict_stream(images, batch_size=2))
    exits = [one for answer in streamed for one in answer.exits.tolist()]
    check(len(exits) == len(images), "a stream of another length")
    with suppress(UserError):  # too few MACs for any exit
        session.predict(images, max_macs=manifest.no_exit_macs)
    with suppress(UserError):  # no profile, or a bad one
        session.predict(images, deadline_ms=1000.0)
    with suppress(UserError):
        session.cost()
    try:
        monitor = session.monitor()
    except UserError:  # not calibrated, or by numbers that do not go together
        pass
    else:
        monitor.add(found[0])
        check(len(monitor.report().message.splitlines()) == 1, "a message of several lines")
    check(len(model_card(manifest)) < 10**8, "a huge card")
    check(
        differences(manifest, Manifest.model_validate(manifest.model_dump(mode="json"))) == {}, "a round trip"
    )
    return found


def same(found: Sequence[Prediction], expected: Sequence[Prediction]) -> bool:
    names = ("labels", "exits", "probabilities", "scores")
    return len(found) == len(expected) and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for one, other in zip(found, expected, strict=True)
        for name in names
    )


class Watch:
    """Python's own account of files opened and changed, while a bundle is in use."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch.resolve()
        self.allowed: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(path, str | bytes | os.PathLike):
                return
            real = os.path.realpath(os.fsdecode(path))
            writing = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & WRITING
            outside = real.startswith(f"{self.scratch}{os.sep}") and not real.startswith(
                self.allowed + os.sep
            )
            if writing or outside or real.startswith(("/dev/zero", "/dev/std", "/etc/hostname")):
                self.seen.append(f"{'wrote' if writing else 'read outside'}: {real}")
        elif event.startswith(CHANGES) and event not in HARMLESS:
            self.seen.append(f"{event}{arguments!r:.200}")

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        self.seen.clear()
        self.allowed = os.path.realpath(folder)
        try:
            yield
        finally:
            self.allowed = None


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below ``folder``."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            state = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = state.st_size, state.st_mtime_ns
    return found


def peak_memory() -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("VmHWM:")[1].split()[0])


def examine(
    folder: Path, images: NDArray[np.uint8], expected: Sequence[Prediction] | None, watch: Watch
) -> Any:
    """Outcome and detail for the bundle at ``folder``; ``expected`` where it has to answer so or not at all."""
    before = snapshot(watch.scratch)
    outcome, detail = "answered", ""
    with watch.over(folder):
        try:
            found = use(Session(folder, threads=1), images)
            if expected is not None and not same(found, expected):
                outcome, detail = "WRONG ANSWER", "the seal is old and the answers are new"
        except UserError as error:
            outcome, detail = "refused", str(error)
            if len(detail.splitlines()) != 1 or not detail.isprintable():
                outcome = "NOT ONE LINE"
            elif len(detail) > LONGEST:
                outcome = "LONG ERROR"
            elif any(one in detail for one in ("bad_alloc", "allocate memory", "MemoryError")):
                outcome = "refused for memory"
        except WrongError as error:
            outcome, detail = "WRONG ANSWER", str(error)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)
            ours = [one for one in place if f"{os.sep}erde{os.sep}" in one.filename] or place
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            outcome, detail = "RAISED", f"{type(error).__name__} at {where}: {error}"
    if watch.seen:
        outcome, detail = "TOUCHED FILES", "; ".join(watch.seen)
    else:
        changed = {name for name, _ in before.items() ^ snapshot(watch.scratch).items()}
        if changed:
            outcome, detail = "WROTE FILES", ", ".join(sorted(changed))
    return outcome, detail


# ---------------------------------------------------------------- the process that may die


def limit_memory() -> None:
    """No more than MEMORY beyond what the libraries took."""
    status = Path("/proc/self/status").read_text()
    now = 1024 * int(status.split("VmSize:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def worker(scratch: Path, first: int, count: int, keep: Path | None) -> None:
    """Results of some seeds as JSON lines; before each a line with what is about to be tried."""
    from tests.helpers.mutations import mutate

    sys.dont_write_bytecode = True
    images = np.random.default_rng(9).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    expected = use(Session(scratch / "original", threads=1), images)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ONNX Runtime says is no result
    watch = Watch(scratch)
    limit_memory()
    for seed in range(first, first + count):
        with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as place:
            folder = (keep or Path(place)) / "bundle"
            folder.parent.mkdir(exist_ok=True)
            made = mutate(scratch / "original", scratch / "other", folder, seed)
            print(json.dumps(asdict(made)), file=out, flush=True)
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
            before, started = peak_memory(), time.perf_counter()
            outcome, detail = examine(folder, images, None if made.resealed else expected, watch)
            seconds = time.perf_counter() - started
            if outcome == "answered" and made.must_refuse:
                outcome, detail = "NOT REFUSED", "whatever it answers"
            peak = peak_memory() - before
            found = Result(
                seed, made.kind, made.what, made.resealed, outcome,
                detail.replace(str(folder), "BUNDLE")[:LONGEST], seconds, peak,
            )  # fmt: skip
        print(json.dumps(asdict(found)), file=out, flush=True)


def read_lines(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def hunt(first: int, count: int, scratch: Path, keep: Path | None = None) -> Iterator[Result]:
    """The results of ``count`` mutations. A process that dies or hangs is replaced, and its mutation is to blame."""
    from tests.helpers.hand_made_bundle import convolution_bundle

    convolution_bundle(scratch / "original")
    convolution_bundle(scratch / "other", seed=1, classes=3, channels=1)
    for name in ("original", "other"):
        # The same times on every machine. One image more or less in a batch hardly matters to the second stage.
        profile = Session(scratch / name, threads=1).profile(rounds=1, batch_sizes=(1, 8))
        times = {1: [1.0, 1.0, 1.0], 8: [4.0, 1.1, 4.0]}
        fixed = {"machine": "any", "milliseconds": times, "gather_milliseconds": [0.1, 0.1]}
        profile.model_copy(update=fixed).write(scratch / name / PROFILE)
    (scratch / "elsewhere").mkdir()
    sys.path[0] = os.path.realpath(sys.path[0])
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(scratch / "elsewhere"))
    # From another folder, and the same modules.
    environment = {
        **os.environ,
        **places,
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    end = first + count
    while first < end:
        command = [sys.executable, "-X", "faulthandler", "-m", MODULE, "--worker", str(scratch)]
        command += ["--seed", str(first), "--count", str(end - first)]
        command += ["--keep", str(keep.resolve())] if keep else []
        with tempfile.TemporaryFile("w+") as noise:  # not below `scratch`, where nothing may change
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=noise, text=True, env=environment,
                cwd=scratch / "elsewhere",
            )  # fmt: skip
            assert process.stdout is not None
            lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=read_lines, args=(process.stdout, lines), daemon=True).start()
            tried: dict[str, Any] | None = None
            try:
                while True:
                    try:
                        line = lines.get(timeout=SECONDS)
                    except queue.Empty:
                        process.kill()
                        process.wait()
                        line, outcome, detail = None, "HUNG", f"no result after {SECONDS:g} seconds"
                    else:
                        if line is None:
                            code = process.wait()
                            if code == 0:
                                return
                            noise.seek(0)
                            outcome, detail = "CRASHED", f"exit code {code}: {noise.read()[-1500:]}"
                    if line is None:
                        if tried is None:
                            raise RuntimeError(f"the mutation with seed {first} could not be made: {detail}")
                        tried.pop("must_refuse")
                        yield Result(**tried, outcome=outcome, detail=detail)
                        first = tried["seed"] + 1
                        break
                    value = json.loads(line)
                    if "outcome" in value:
                        result = Result(**value)
                        first, tried = result.seed + 1, None
                        if result.peak > MEMORY:
                            value["outcome"], value["detail"] = "TOO MUCH MEMORY", f"{result.peak:,} bytes"
                        yield Result(**value)
                    else:
                        tried = value
            finally:
                process.kill()
                process.wait()
                process.stdout.close()


def table(results: Sequence[Result]) -> str:
    """Totals by kind and outcome."""
    outcomes = [*GOOD, *sorted({one.outcome for one in results} - set(GOOD))]
    kinds = list(dict.fromkeys(one.kind for one in sorted(results, key=lambda one: one.kind)))
    counts = Counter((one.kind, one.outcome) for one in results)
    rows = [["", "all", "resealed", *outcomes]]
    for kind in kinds:
        some = [one for one in results if one.kind == kind]
        sealed = sum(one.resealed for one in some)
        rows.append([kind, *map(str, (len(some), sealed, *(counts[kind, one] for one in outcomes)))])
    sealed = sum(one.resealed for one in results)
    totals = (len(results), sealed, *(sum(one.outcome == name for one in results) for name in outcomes))
    rows.append(["all", *map(str, totals)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def describe(result: Result) -> str:
    seal = "resealed" if result.resealed else "old seal"
    return f"seed {result.seed}: {result.outcome}: {result.kind} ({seal}): {result.what}\n    {result.detail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a new folder for the mutated bundle; with --count 1")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker is not None:
        worker(asked.worker, asked.seed, asked.count, asked.keep)
        return 0
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for result in hunt(asked.seed, asked.count, Path(scratch), asked.keep):
            results.append(result)
            if not result.good:
                print(describe(result), flush=True)
    print(table(results))
    slowest = max(results, key=lambda one: one.seconds)
    largest = max(results, key=lambda one: one.peak)
    print(f"slowest: {slowest.seconds:.1f} s (seed {slowest.seed}); most memory: {largest.peak / 2**20:.0f} MiB "
          f"(seed {largest.seed})")  # fmt: skip
    return 0 if all(one.good for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
