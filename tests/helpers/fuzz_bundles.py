"""Mutations of bundles, and a process of its own that opens them and says what happened.

A mutated bundle is refused with a UserError of one line, or it answers rightly: under its old seal exactly as the bundle
that was mutated, under a new one as its thresholds say of its stages' logits. No other exception, crash, hang, memory
without bound, or file written or read outside the bundle.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from erde.bundle.card import model_card
from erde.bundle.manifest import MANIFEST, Manifest
from erde.bundle.sealing import differences
from erde.common.errors import UserError
from erde.policy.rule import decide, in_band, near_tie, take_exit
from erde.runtime.prediction import Prediction
from erde.runtime.session import Session

MEMORY = 3 * 2**29  # of a bundle in use: 1.5 GiB
LONGEST = 2000  # characters of an error
CHANGES = ("os.", "shutil.", "subprocess.", "socket.", "ctypes.", "tempfile.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
GOOD = ("refused", "refused for memory", "answered")
IMAGES = np.random.default_rng(9).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)

# ---------------------------------------------------------------- mutations

Draw = Callable[[st.SearchStrategy[Any]], Any]
NUMBERS = (
    None, True, 0, 1, -1, 2, 7, 2**16, 2**31, 2**40, 2**63, 10**30, 10**400, -(2**63), 0.0, 0.5, 1e-6, 1e300, 5e-324,
    float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
TEXTS = (
    "", "a", "1", "x" * 100_000, "\n", "two\nlines", "\ud800", "\0", "\x1b[31m", "..", "../outside.bin", "/etc/hostname",
    "stage_0.onnx", "stage_9.onnx", "~", "none", "harm", "patience", "energy", "geometric", "no-exit", "logits", "%s%n",
)  # fmt: skip
JSON = st.recursive(
    st.sampled_from(NUMBERS + TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=6,
)


def change_json(draw: Draw, node: Any) -> None:
    """Change something at or below ``node``, a dict or a list: another value, one less, one more."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
        return
    key = draw(st.sampled_from(keys))
    if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 4)):
        change_json(draw, node[key])
        return
    number = isinstance(node[key], int | float)
    change = draw(
        st.sampled_from(("replace", "delete", "repeat", *(("scale",) * 5 if number else ("replace",))))
    )
    if change == "delete":
        del node[key]
    elif change == "repeat" and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    elif change == "scale":
        with suppress(OverflowError):
            node[key] = node[key] * draw(st.sampled_from((-1, 0.5, 1.001, 2, 1e6)))
    else:
        node[key] = draw(JSON)


def change_message(draw: Draw, message: Any) -> None:
    """Change something below a protobuf message: fields cleared, repeated, turned round, or with odd values."""
    if not message.ListFields():
        return
    field, value = draw(st.sampled_from(message.ListFields()))
    with suppress(ValueError, TypeError, UnicodeError):  # protobuf refuses what its types cannot hold
        if not (hasattr(value, "add") or hasattr(value, "append")):
            if field.message_type is None:
                setattr(message, field.name, _odd(draw, value))
            elif draw(st.integers(0, 9)):
                change_message(draw, value)
            else:
                message.ClearField(field.name)
            return
        index = draw(st.integers(0, len(value) - 1))
        change = draw(st.sampled_from(("inside", "inside", "inside", "delete", "again", "turn")))
        if change == "delete":
            del value[index]
        elif change == "again":
            value.append(value[index])
        elif change == "turn":
            parts = [copy.deepcopy(part) for part in value][::-1]
            del value[:]
            value.extend(parts)
        elif hasattr(value, "add"):
            change_message(draw, value[index])
        else:
            value[index] = _odd(draw, value[index])


def _odd(draw: Draw, value: Any) -> Any:
    if isinstance(value, bytes):
        return change_bytes(draw, value)
    return draw(st.sampled_from(TEXTS if isinstance(value, str) else NUMBERS))


def change_bytes(draw: Draw, content: bytes) -> bytes:
    """Flip a bit, or cut, repeat, leave out or overwrite a stretch."""
    start = draw(st.integers(0, max(0, len(content) - 1)))
    end = start + draw(st.sampled_from((1, 2, 8, 100, 10_000)))
    change = draw(st.sampled_from(("flip", "flip", "cut", "repeat", "leave out", "overwrite")))
    if change == "flip":
        flipped = bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in content[start : start + 1])
        return content[:start] + flipped + content[start + 1 :]
    middle = {"cut": b"", "repeat": content[start:end] * 2, "leave out": b"", "overwrite": bytes(end - start)}
    return content[:start] + middle[change] + (b"" if change == "cut" else content[end:])


def write_manifest(folder: Path, value: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(value), encoding="utf-8")


def reseal(folder: Path) -> bool:
    """Renew checksums and seal, as somebody would who knows the format; False where the manifest is too broken."""
    path = folder / MANIFEST

    def readable(path: Path) -> bool:  # no pipe, no device, and not huge
        return os.path.isfile(path) and path.stat().st_size < 2**28

    if not readable(path):
        return False
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        for name in value["files"]:
            if readable(folder / name):
                value["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        unsealed = {key: item for key, item in value.items() if key != "seal"}
        text = json.dumps(unsealed, sort_keys=True, separators=(",", ":"))
        value["seal"] = hashlib.sha256(text.encode()).hexdigest()
        write_manifest(folder, value)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False
    return True


# ---------------------------------------------------------------- one bundle in use


class WrongError(Exception):
    """An answer that cannot be right."""


def check(condition: Any, claim: str) -> None:
    if not condition:
        raise WrongError(claim)


def check_answer(session: Session, images: NDArray[np.uint8], answer: Prediction, point: str) -> None:
    """``answer`` has the right shapes and follows from the manifest and the logits of the stages."""
    manifest, count = session.manifest, len(images)
    exits, classes = len(manifest.stages), len(manifest.classes)
    check(answer.probabilities.shape == (count, classes), "shape of probabilities")
    for name in ("labels", "exits", "scores", "macs", "first_scores"):
        check(getattr(answer, name).shape == (count,), f"shape of {name}")
    check(np.isfinite(answer.scores).all(), "scores are not finite")
    check(np.allclose(answer.probabilities.sum(axis=1), 1), "probabilities do not sum to 1")
    check(((answer.exits >= 0) & (answer.exits < exits)).all(), "exits out of range")
    check(((answer.labels >= 0) & (answer.labels < classes)).all(), "labels out of range")
    # An image may be carried along with its batch, past the exit that answered.
    macs = [stage.macs for stage in manifest.stages]
    check(all(used in macs[taken:] for used, taken in zip(answer.macs, answer.exits, strict=True)), "MACs")
    if not count:
        return
    logits = session.all_logits(images)
    check(logits.shape == (exits, count, classes), "shape of logits")
    alone = np.concatenate([session.all_logits(images[row : row + 1]) for row in range(count)], axis=1)
    if not np.allclose(alone, logits, atol=1e-4):
        return  # a graph whose answer for an image depends on the others of the batch
    answers, scores = session.rule.apply(logits)
    thresholds = manifest.point(point).thresholds
    sure = ~(in_band(scores, thresholds) | near_tie(answers))
    expected = decide(scores, thresholds)
    labels = take_exit(answers, expected).argmax(axis=-1)
    check((answer.exits == expected)[sure].all(), "exits are not those of the policy")
    check((answer.labels == labels)[sure].all(), "labels are not those of the exits")


def use(session: Session, images: NDArray[np.uint8]) -> list[Prediction]:
    """Ask a bundle for all that it offers; the answers at its points."""
    manifest = session.manifest
    shape = manifest.input_shape
    if images.shape[1:] != shape:
        check(min(shape) >= 0 and np.prod(shape) < 2**20, f"accepted input shape {shape}")
        images = np.random.default_rng(0).integers(0, 256, (len(images), *shape), dtype=np.uint8)
    answers = []
    for point in [None, *(point.name for point in manifest.operating_points[:5])]:
        for count in (0, 1, len(images)):
            answer = session.predict(images[:count], operating_point=point)
            check_answer(session, images[:count], answer, point or manifest.default_operating_point)
        answers.append(answer)
    check((session.predict(images, max_exit=0).exits == 0).all(), "max_exit")
    streamed = sum(len(answer.exits) for answer in session.predict_stream(images, batch_size=2))
    check(streamed == len(images), "a stream of another length")
    # Refused where too few MACs are left for any exit, or without a good profile.
    for limits in ({"max_macs": manifest.no_exit_macs}, {"deadline_ms": 1000.0}):
        with suppress(UserError):
            session.predict(images, **limits)
    with suppress(UserError):
        session.cost(timed=True)
    with suppress(UserError):  # not calibrated, or by numbers that do not go together
        monitor = session.monitor()
        monitor.add(answers[0])
        check(len(monitor.report().message.splitlines()) == 1, "a message of several lines")
    check(len(model_card(manifest)) < 10**8, "a huge card")
    again = Manifest.model_validate(manifest.model_dump(mode="json"))
    check(differences(manifest, again) == {}, "a round trip")
    return answers


def same(answers: Sequence[Prediction], expected: Sequence[Prediction]) -> bool:
    names = ("labels", "exits", "probabilities", "scores")
    return len(answers) == len(expected) and all(
        np.array_equal(getattr(answer, name), getattr(other, name))
        for answer, other in zip(answers, expected, strict=True)
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
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            real = os.path.realpath(os.fsdecode(arguments[0]))
            mode, flags = arguments[1], arguments[2] or 0
            changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            writing = (isinstance(mode, str) and set(mode) & set("wax+")) or flags & changes
            outside = real.startswith(f"{self.scratch}{os.sep}") and not real.startswith(
                self.allowed + os.sep
            )
            if writing or outside or real.startswith(("/dev/zero", "/dev/std", "/etc/hostname")):
                self.seen.append(f"{'wrote' if writing else 'read outside'}: {real}")
        elif event not in HARMLESS and event.startswith(CHANGES):
            self.seen.append(f"{event}{arguments!r:.200}")

    @contextlib.contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        self.seen.clear()
        self.allowed = os.path.realpath(folder)
        try:
            yield
        finally:
            self.allowed = None


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything below ``folder``."""
    states = {str(path): path.lstat() for path in folder.rglob("*")}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


def examine(folder: Path, expected: Sequence[Prediction] | None, watch: Watch) -> tuple[str, str]:
    """Outcome and detail for the bundle at ``folder``; ``expected`` where it has to answer so or not at all."""
    before = snapshot(watch.scratch)
    outcome, detail = "answered", ""
    with watch.over(folder):
        try:
            answers = use(Session(folder, threads=1), IMAGES)
            if expected is not None and not same(answers, expected):
                outcome, detail = "WRONG ANSWER", "the seal is old and the answers are new"
        except UserError as error:
            outcome, detail = "refused", str(error)
            if not detail.isprintable():
                outcome = "NOT ONE LINE"
            elif len(detail) > LONGEST:
                outcome = "LONG ERROR"
            elif any(word in detail for word in ("bad_alloc", "allocate memory", "MemoryError")):
                outcome = "refused for memory"
        except WrongError as error:
            outcome, detail = "WRONG ANSWER", str(error)
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            outcome, detail = "RAISED", f"{type(error).__name__} at {frame.filename}:{frame.lineno}: {error}"
    if watch.seen:
        return "TOUCHED FILES", "; ".join(watch.seen)
    changed = {name for name, _ in before.items() ^ snapshot(watch.scratch).items()}
    return ("WROTE FILES", ", ".join(sorted(changed))) if changed else (outcome, detail)


# ---------------------------------------------------------------- the process that may die


class Examiner:
    """Opens bundles below ``scratch`` in a process that is replaced where it dies, hangs or grows.

    ``command`` runs :func:`main` there. Under its old seal a bundle must answer as ``scratch / original`` does.
    """

    def __init__(self, scratch: Path, seconds: float = 60, command: str | None = None) -> None:
        self.scratch, self.seconds = scratch, seconds
        self.command = command or "from tests.helpers.fuzz_bundles import main; main()"
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, folder: Path, resealed: bool) -> tuple[str, str]:
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        print(json.dumps([str(folder), resealed]), file=process.stdin, flush=True)
        try:
            line = self._lines.get(timeout=self.seconds)
        except queue.Empty:
            self.close()
            return "HUNG", f"no result after {self.seconds:g} seconds"
        if line is None:
            code = process.wait()
            self._noise.seek(0)
            detail = f"exit code {code}: {self._noise.read()[-1500:]}"
            self.close()
            return "CRASHED", detail
        outcome, detail = json.loads(line)
        return outcome, detail

    def _start(self) -> None:
        home = self.scratch.parent / "home"
        home.mkdir(exist_ok=True)
        self._noise = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the process
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        environment |= dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(home))
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", self.command, str(self.scratch)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._noise, text=True, env=environment,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()

        def read(stream: Any, lines: queue.Queue[str | None]) -> None:
            for line in stream:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, args=(self._process.stdout, self._lines), daemon=True).start()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._noise.close()
            self._process = None


def main() -> None:
    """Answer a line ``[folder, resealed]`` with a line ``[outcome, detail]``, with no more than MEMORY to use."""
    scratch = Path(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever ONNX Runtime prints is no result
    expected = use(Session(scratch / "original", threads=1), IMAGES)
    watch = Watch(scratch)
    size = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        folder, resealed = json.loads(line)
        outcome, detail = examine(Path(folder), None if resealed else expected, watch)
        print(json.dumps([outcome, detail.replace(folder, "BUNDLE")[:LONGEST]]), file=out, flush=True)
