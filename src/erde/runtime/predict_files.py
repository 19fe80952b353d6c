"""``erde predict``: image files through a bundle, to CSV or JSON lines. No torch.

Rows grow in ``<out>.<options>.unfinished``, which becomes ``<out>`` at the end. ``--resume`` reads the rows that are there
and skips their images.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from erde.bundle.sealing import seal_of
from erde.common import progress
from erde.common.errors import UserError, printable
from erde.common.files import Lock, explain_full_disk, make_folder, replacing_file
from erde.common.images import SUFFIXES, load_image
from erde.runtime.prediction import Prediction
from erde.runtime.session import Session

# Spreadsheets compute a cell that begins with one of these (OWASP, "CSV Injection").
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
COLUMNS = ("path", "label", "class", "probability", "exit", "score", "macs")
Row = dict[str, Any]


def find_images(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield files as given, and the images below folders, sorted; one folder's names are held at a time."""
    for path in paths:
        if path.is_dir():
            inside = images_below(path)
            first = next(inside, None)
            if first is None:
                raise UserError(
                    f"no image below the folder {path}: expected files ending in {', '.join(SUFFIXES)}"
                )
            yield from chain([first], inside)
        elif path.is_file():
            yield path
        else:
            raise UserError(f"no image at {path}: expected a file or a folder")


def images_below(folder: Path) -> Iterator[Path]:
    """Yield image files at any depth in the order of their paths; links to folders are not followed."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                (entry.name, is_folder)
                for entry in entries
                if (is_folder := entry.is_dir(follow_symlinks=False))
                or os.path.splitext(entry.name)[1].lower() in SUFFIXES
            )
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from error
    for name, is_folder in names:
        path = folder / name
        if is_folder:
            yield from images_below(path)
        else:  # dangling links and pipes too: they are named as skipped
            yield path


def predict_files(
    bundle: Path,
    images: Sequence[Path],
    out: Path | None = None,
    *,
    operating_point: str | None = None,
    max_exit: int | None = None,
    max_macs: float | None = None,
    deadline_ms: float | None = None,
    batch_size: int = 32,
    threads: int | None = None,
    engine: str = "onnxruntime",
    resume: bool = False,
) -> dict[str, Any]:
    """Answer every image that can be read; rows go to ``out`` (.csv or .jsonl) or as JSON lines to stdout.

    Images that cannot be read or answered have no row. They are named on stderr, and in ``<out>.skipped.txt``. ``resume``
    goes on where an earlier call was stopped, if there was one: images that have a row are not answered again.

    Returns a summary: images answered, images skipped, exit rates, mean MACs.

    Raises:
        UserError: nothing to read or nothing readable, an output that cannot be written, an output begun with another
            bundle or other limits, and whatever :class:`Session` and its ``predict`` raise.
    """
    _check_out(out, resume)
    session = Session(bundle, threads=threads, engine=engine)
    limits: dict[str, Any] = {"max_exit": max_exit, "max_macs": max_macs, "deadline_ms": deadline_ms}
    point = session.manifest.point(operating_point).name
    count = sum(1 for _ in find_images(images))
    # Before the images: whatever is wrong with a limit is wrong for all of them. For the largest batch: after a stop an
    # image may be in another one, and must go as far.
    largest = max(1, min(batch_size, count))
    last = session.plan(largest, operating_point=point, **limits)[1]
    # How far a deadline lets an image go depends on the size of the batch, and on the profile.
    of_deadline = [] if deadline_ms is None else [last]
    options = json.dumps([seal_of(session.manifest), point, limits, engine, *of_deadline])
    tally = _Tally([0] * len(session.manifest.stages))
    with (
        _open_output(out, options, tally, resume) as output,
        progress.task("predict", count, tally.answered) as task,
    ):
        waiting = (path for path in find_images(images) if not output.has(path))
        while paths := list(islice(waiting, batch_size)):
            readable, batch, reasons = _load(paths, session.manifest.input_shape)
            rows, failed = _answer(session, readable, batch, point, last)
            output.add(rows, reasons + failed)
            if task.due():
                task.update(tally.answered + tally.skipped)
        output.name_skipped()
    return {
        "images": tally.answered,
        "skipped": tally.skipped,
        "exit_rates": [exits / tally.answered for exits in tally.exits],
        "mean_macs": tally.macs / tally.answered,
        "out": str(out) if out else None,
    }


def _check_out(out: Path | None, resume: bool) -> None:
    if out is None:
        if resume:
            raise UserError("--resume goes with --out: rows on the terminal are not kept")
        return
    if out.suffix not in (".csv", ".jsonl"):
        raise UserError(
            f"--out is {out}: expected a name ending in .csv or .jsonl; with --workers, a folder for Parquet shards"
        )
    if out.is_dir():
        raise UserError(f"--out is {out}, which is a folder: expected the name of a file")
    if (skipped := _beside(out, "skipped.txt")).is_dir():
        raise UserError(
            f"{skipped} is a folder: images that cannot be read are listed there; remove it, or choose another name"
        )


def _load(
    paths: Sequence[Path], shape: tuple[int, int, int]
) -> tuple[list[Path], NDArray[np.uint8], list[str]]:
    """Decode the readable files of ``paths`` into (N, H, W, C); a reason for each of the others."""
    readable, arrays, reasons = [], [np.empty((0, *shape), dtype=np.uint8)], []
    for path in paths:
        try:
            arrays.append(load_image(path, shape)[None])
            readable.append(path)
        except UserError as error:
            reasons.append(_without_controls(str(error)))
        except Exception as error:  # a decoder may raise anything; a bad file must not end hours of work
            reasons.append(_without_controls(f"{path} cannot be decoded: {type(error).__name__}: {error}"))
    return readable, np.concatenate(arrays), reasons


def _answer(
    session: Session, paths: Sequence[Path], batch: NDArray[np.uint8], point: str, last: int
) -> tuple[list[Row], list[str]]:
    """The rows of images that go as far as exit ``last``; a reason for each on which a stage fails."""
    if not paths:
        return [], []
    try:
        answer = session.predict(batch, operating_point=point, max_exit=last)
    except UserError as error:
        if len(paths) == 1:
            return [], [_without_controls(f"{paths[0]}: {error}")]
        # Which of them? A bad image must not end hours of work.
        alone = [_answer(session, [path], batch[[row]], point, last) for row, path in enumerate(paths)]
        return [row for rows, _ in alone for row in rows], [
            reason for _, failed in alone for reason in failed
        ]
    return list(_rows(paths, answer, session.classes)), []


def _without_controls(text: str) -> str:
    """Escape control characters, which a file's name may hold; bytes that are no UTF-8 stay as they are."""
    return "".join(letter if "\udc80" <= letter <= "\udcff" else printable(letter) for letter in text)


def _rows(paths: Sequence[Path], answer: Prediction, classes: Sequence[str]) -> Iterator[Row]:
    for index, path in enumerate(paths):
        label = int(answer.labels[index])
        values = (
            str(path),
            label,
            classes[label],
            round(float(answer.probabilities[index, label]), 6),
            int(answer.exits[index]),
            round(float(answer.scores[index]), 6),
            int(answer.macs[index]),
        )
        yield dict(zip(COLUMNS, values, strict=True))


# ---------------------------------------------------------------- where rows go


@dataclass
class _Tally:
    """Counts so far: images per exit, MACs, and images that cannot be read."""

    exits: list[int]
    macs: int = 0
    skipped: int = 0

    @property
    def answered(self) -> int:
        return sum(self.exits)

    def add(self, row: Row) -> None:
        self.exits[int(row["exit"])] += 1
        self.macs += int(row["macs"])


@dataclass
class _Output:
    """Takes rows and reasons batch by batch; ``done`` counts the paths of rows that are there already."""

    write_rows: Callable[[list[Row]], object]
    reasons: BinaryIO
    tally: _Tally
    suffix: str = ".jsonl"
    done: Counter[str] = field(default_factory=Counter)

    def has(self, path: Path) -> bool:
        """True if this image has a row; each row stands for one mention of the path."""
        name = _cell(str(path), "./") if self.suffix == ".csv" else str(path)
        there = self.done[name] > 0
        if there:
            self.done[name] -= 1
        return there

    def add(self, rows: list[Row], reasons: list[str]) -> None:
        """Write the rows of one batch, and why its other images have none."""
        self.write_rows(rows)
        for row in rows:
            self.tally.add(row)
        self.tally.skipped += len(reasons)
        self.reasons.writelines(f"{reason}\n".encode("utf-8", "surrogateescape") for reason in reasons)

    def name_skipped(self) -> None:
        """Name the images without a row on stderr; :class:`UserError` where that is all of them."""
        self.reasons.seek(0)
        lines = (line.decode("utf-8", "surrogateescape").rstrip("\n") for line in self.reasons)
        if not self.tally.answered:
            others = f" ({self.tally.skipped:,} in all)" if self.tally.skipped > 1 else ""
            raise UserError(f"no image can be read{others}: {next(lines)}")
        for line in lines:
            progress.say(f"skipped: {printable(line)}")


@contextmanager
def _open_output(out: Path | None, options: str, tally: _Tally, resume: bool) -> Iterator[_Output]:
    """The terminal, or a file that appears as ``out`` when the block ends well."""
    if out is None:
        with tempfile.TemporaryFile() as reasons:
            yield _Output(_print_rows, reasons, tally)
        return
    make_folder(out.parent)
    with Lock(_beside(out, "lock"), str(out)):
        yield from _write_file(out, options, tally, resume)


def _write_file(out: Path, options: str, tally: _Tally, resume: bool) -> Iterator[_Output]:
    # The name holds a hash of the options: rows of two bundles must not meet in a file.
    unfinished = _beside(out, f"{hashlib.sha256(options.encode()).hexdigest()[:8]}.unfinished")
    skipped = _beside(out, "skipped.txt")
    for begun in out.parent.glob(f"{glob.escape(out.name)}.*.unfinished"):
        if begun != unfinished:
            raise UserError(
                f"{begun} was begun with another bundle or other options: give what was given then and --resume, or delete "
                "the file to start anew"
            )
    empty = False
    try:
        # The reasons have no name until all is done: an older ``out`` keeps its own, and --resume gathers them anew.
        with tempfile.TemporaryFile(dir=out.parent) as reasons, unfinished.open("ab+") as rows:
            done, end = _read_rows(rows, out.suffix, tally)
            empty = not done
            if done and not resume:
                raise UserError(
                    f"{unfinished} has {tally.answered:,} images of a command that was stopped: continue it with --resume, "
                    "or delete the file to start anew"
                )
            rows.truncate(end)
            if out.suffix == ".csv" and not end:
                rows.write((",".join(COLUMNS) + "\r\n").encode())
            yield _Output(_row_writer(rows, out.suffix), reasons, tally, out.suffix, done)
            rows.flush()
            os.fsync(rows.fileno())
            # Before the rows: after a kill in between --resume sets it right.
            if tally.skipped:
                reasons.seek(0)
                with replacing_file(skipped) as beside, beside.open("wb") as file:
                    shutil.copyfileobj(reasons, file)
            else:
                skipped.unlink(missing_ok=True)
        os.replace(unfinished, out)
    except PermissionError as error:
        raise UserError(f"{out} cannot be written: permission denied; choose another place") from error
    except OSError as error:
        explain_full_disk(error, out)
        raise
    finally:
        # What was begun is kept for --resume, unless it was read and holds nothing.
        if empty and not tally.answered:
            unfinished.unlink(missing_ok=True)


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(f"{out.name}.{ending}")


def _read_rows(file: BinaryIO, suffix: str, tally: _Tally) -> tuple[Counter[str], int]:
    """Count the whole rows of ``file`` into ``tally``; their paths, and where the last of them ends.

    A kill may have torn the last row, anywhere.
    """
    done: Counter[str] = Counter()
    end = position = 0

    def lines() -> Iterator[str]:
        nonlocal position
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            yield line.decode("utf-8", "surrogateescape")

    table: Iterable[Any] = csv.reader(lines()) if suffix == ".csv" else map(json.loads, lines())
    try:
        for cells in table:
            if suffix == ".csv":
                if len(cells) != len(COLUMNS):
                    break  # torn within a quoted name that holds a line break
                if end == 0:
                    end = position  # the heading
                    continue
                cells = dict(zip(COLUMNS, cells, strict=True))
            tally.add(cells)
            done[cells["path"]] += 1
            end = position
    except (csv.Error, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file.name} is damaged: delete it to start anew") from error
    return done, end


def _print_rows(rows: list[Row]) -> None:
    sys.stdout.writelines(json.dumps(row) + "\n" for row in rows)
    sys.stdout.flush()


def _cell(text: str, prefix: str) -> str:
    """``text`` as no spreadsheet takes it for a formula; file and class names are anybody's."""
    return f"{prefix}{text}" if text.startswith(FORMULA) else text


def _row_writer(file: BinaryIO, suffix: str) -> Callable[[list[Row]], object]:
    def write(rows: list[Row]) -> None:
        text = io.StringIO(newline="")
        if suffix == ".csv":
            # "./" leaves the path what it is.
            safe = (
                {**row, "path": _cell(row["path"], "./"), "class": _cell(row["class"], "'")} for row in rows
            )
            csv.DictWriter(text, COLUMNS).writerows(safe)
        else:
            text.writelines(json.dumps(row) + "\n" for row in rows)
        # A file's name need not be UTF-8: its bytes go through as they are.
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
        file.flush()

    return write
