"""``erde predict``: image files through a bundle, to CSV or JSON lines. No torch.

Rows grow in ``<out>.unfinished``. Beside it ``<out>.journal`` has a line for every batch whose rows are there, so
that a command that was killed can go on behind the last whole batch: the batch, not the row, is what is
computed at once, and in other batches the last bits of the numbers would differ.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from erde.bundle.profile import PROFILE
from erde.bundle.sealing import file_hash, seal_of
from erde.common import progress
from erde.common.errors import UserError, printable
from erde.common.files import Lock, explain_full_disk, make_folder, replacing_file
from erde.common.images import SUFFIXES, load_image
from erde.runtime.prediction import Prediction
from erde.runtime.session import Session

# What a cell begins with that spreadsheets compute (OWASP, "CSV Injection").
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
COLUMNS = ("path", "label", "class", "probability", "exit", "score", "macs")


def find_images(paths: Iterable[Path]) -> Iterator[Path]:
    """Files as given, and the images below folders, sorted; the names of one folder are held at a time."""
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
    """Image files at any depth, in the order of their paths; links to folders are not followed."""
    try:
        with os.scandir(folder) as found:
            names = sorted(
                (one.name, deeper)
                for one in found
                if (deeper := one.is_dir(follow_symlinks=False))
                or os.path.splitext(one.name)[1].lower() in SUFFIXES
            )
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from error
    for name, deeper in names:
        path = folder / name
        if deeper:
            yield from images_below(path)
        else:  # a dangling link or a pipe too: what cannot be read is said
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
    resume: bool = False,
) -> dict[str, Any]:
    """Answer every image that can be read; rows go to ``out`` (.csv or .jsonl) or as JSON lines to stdout.

    Images that cannot be read have no row. They are listed on stderr at the end, and in ``<out>.skipped.txt``.
    ``resume`` goes on where an earlier call with the same bundle, images and settings was stopped, if there
    was one; the file is then the same, byte for byte, as without the stop.

    Returns a summary: images answered, images skipped, exit rates, mean MACs.

    Raises:
        UserError: nothing to read or nothing readable, an output that cannot be, a begun output of something
            else, and what :class:`Session` and its ``predict`` raise.
    """
    _check_out(out, resume)
    session = Session(bundle, threads=threads)
    limits: dict[str, Any] = {"max_exit": max_exit, "max_macs": max_macs, "deadline_ms": deadline_ms}
    point = session.manifest.point(operating_point).name
    count, list_hash = _hash_of(find_images(images))
    profile = bundle / PROFILE
    identity = {
        "format_version": 1,
        "bundle_seal": seal_of(session.manifest),
        "operating_point": point,
        **limits,
        # It decides about deadlines, and about images that are carried along, whose MACs are written.
        "profile": file_hash(profile) if profile.is_file() else None,
        "batch_size": batch_size,
        "threads": threads,
        "images": list_hash,
    }
    with (
        _sink(out, identity, len(session.manifest.stages), resume) as sink,
        progress.task("predict", count, sink.totals.images) as task,
    ):
        waiting = islice(find_images(images), sink.totals.images, None)
        while some := list(islice(waiting, batch_size)):
            paths, batch, reasons = _load(some, session.manifest.input_shape)
            answer = session.predict(batch, operating_point=point, **limits) if paths else None
            rows = [] if answer is None else list(_rows(paths, answer, session.classes))
            sink.add(rows, reasons)
            if task.due():
                task.update(sink.totals.images)
    totals = sink.totals
    return {
        "images": totals.answered,
        "skipped": totals.skipped,
        "exit_rates": [exits / totals.answered for exits in totals.exits],
        "mean_macs": totals.macs / totals.answered,
        "out": str(out) if out else None,
    }


def _check_out(out: Path | None, resume: bool) -> None:
    if out is None:
        if resume:
            raise UserError("--resume goes with --out: rows on the terminal are not kept")
        return
    if out.suffix not in (".csv", ".jsonl"):
        raise UserError(f"--out is {out}: expected a name ending in .csv or .jsonl")
    if out.is_dir():
        raise UserError(f"--out is {out}, which is a folder: expected the name of a file")


def _hash_of(paths: Iterable[Path]) -> tuple[int, str]:
    """How many paths there are, and a hash of them in their order."""
    found, count = hashlib.sha256(), 0
    for path in paths:
        found.update(os.fsencode(path) + b"\0")
        count += 1
    return count, found.hexdigest()


def _load(
    paths: Sequence[Path], shape: tuple[int, int, int]
) -> tuple[list[Path], NDArray[np.uint8], list[str]]:
    """The files of ``paths`` that can be read, what is in them (N, H, W, C), and what is wrong with the others."""
    readable, arrays, reasons = [], [np.empty((0, *shape), dtype=np.uint8)], []
    for path in paths:
        try:
            arrays.append(load_image(path, shape)[None])
            readable.append(path)
        except UserError as error:
            reasons.append(_line(str(error)))
        except Exception as error:  # a decoder may raise anything; one bad file must not end hours of work
            reasons.append(_line(f"{path} cannot be decoded: {type(error).__name__}: {error}"))
    return readable, np.concatenate(arrays), reasons


def _line(text: str) -> str:
    """``text`` without control characters: a file's name may hold any. Bytes that are no UTF-8 stay as they are."""
    return "".join(one if "\udc80" <= one <= "\udcff" else printable(one) for one in text)


def _rows(paths: Sequence[Path], answer: Prediction, classes: Sequence[str]) -> Iterator[dict[str, Any]]:
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
class _Totals:
    """What is done so far: ``images`` of the list, ``skipped`` of them, and ``bytes`` of rows written."""

    images: int
    skipped: int
    exits: list[int]
    macs: int
    bytes: int = 0

    @property
    def answered(self) -> int:
        return self.images - self.skipped


class _Sink:
    """Takes rows batch by batch, and notes each batch in the journal once its rows are written.

    ``write`` writes the text of rows and returns where the output then ends, in bytes.
    """

    def __init__(
        self, write: Callable[[list[dict[str, Any]]], int], journal: BinaryIO, totals: _Totals
    ) -> None:
        self._write, self._journal, self.totals = write, journal, totals

    def add(self, rows: list[dict[str, Any]], reasons: list[str]) -> None:
        """The rows of one batch, and why its other images have none."""
        totals = self.totals
        totals.images += len(rows) + len(reasons)
        totals.skipped += len(reasons)
        totals.macs += sum(row["macs"] for row in rows)
        for row in rows:
            totals.exits[row["exit"]] += 1
        totals.bytes = self._write(rows)
        self._journal.write(_json_line({"totals": asdict(totals), "skipped": reasons}).encode())
        self._journal.flush()

    def reasons(self) -> Iterator[str]:
        """What was wrong with each image that was skipped, in order."""
        self._journal.seek(0)
        for line in self._journal:
            yield from json.loads(line).get("skipped", ())

    def finish(self) -> None:
        """List what was skipped; :class:`UserError` where that was everything."""
        if not self.totals.answered:
            reason = next(self.reasons())
            others = f" ({self.totals.skipped:,} in all)" if self.totals.skipped > 1 else ""
            raise UserError(f"no image can be read{others}: {reason}")
        for reason in self.reasons():
            progress.say(f"skipped: {printable(reason)}")


@contextmanager
def _sink(out: Path | None, identity: dict[str, Any], exits: int, resume: bool) -> Iterator[_Sink]:
    """Where rows go: the terminal, or a file that appears as ``out`` when the block ends well."""
    none = _Totals(0, 0, [0] * exits, 0)
    if out is None:
        with tempfile.TemporaryFile() as noted:
            sink = _Sink(_write_to_terminal, noted, none)
            yield sink
            sink.finish()
        return
    make_folder(out.parent)
    with Lock(_beside(out, "lock"), str(out)):
        yield from _file_sink(out, identity, none, resume)


def _file_sink(out: Path, identity: dict[str, Any], none: _Totals, resume: bool) -> Iterator[_Sink]:
    unfinished, journal = _beside(out, "unfinished"), _beside(out, "journal")
    begun = _read_journal(journal, identity, unfinished) if unfinished.exists() else None
    if begun is not None and not resume:
        raise UserError(
            f"{unfinished} has {begun[0].images:,} images of a command that was stopped: continue it with --resume, "
            "or delete the file to start anew"
        )
    totals, end = begun or (none, 0)
    try:
        with journal.open("ab+") as notes, unfinished.open("ab+") as rows:
            notes.truncate(end)
            rows.truncate(totals.bytes)
            if begun is None:
                notes.write(_json_line(identity).encode())
                rows.write(_heading(out))
                notes.flush()
                rows.flush()
            sink = _Sink(_file_writer(rows, out.suffix), notes, totals)
            yield sink
            sink.finish()
            os.fsync(rows.fileno())
            _write_skipped(_beside(out, "skipped.txt"), sink)
        os.replace(unfinished, out)
    except PermissionError as error:
        raise UserError(f"{out} cannot be written: permission denied; choose another place") from error
    except OSError as error:
        explain_full_disk(error, out)
        raise
    finally:
        # What was begun is kept for --resume, unless it holds nothing.
        if not totals.answered or not unfinished.exists():
            unfinished.unlink(missing_ok=True)
            journal.unlink(missing_ok=True)


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(f"{out.name}.{ending}")


def _read_journal(path: Path, identity: dict[str, Any], unfinished: Path) -> tuple[_Totals, int] | None:
    """The last batch whose rows are all there, and where its line ends; None if there is no such batch.

    :class:`UserError` if the journal is of something else.
    """
    found: tuple[_Totals, int] | None = None
    size = unfinished.stat().st_size
    for number, (value, end) in enumerate(_journal_lines(path)):
        if number == 0:
            _check_identity(value, identity, unfinished)
            continue
        try:
            totals = _Totals(**value["totals"])
        except (TypeError, KeyError):
            break
        if totals.bytes > size:
            break
        found = totals, end
    return found


def _journal_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Objects of a journal and where their lines end; a torn or damaged line ends it."""
    end = 0
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                end += len(line)
                try:
                    value = json.loads(line)
                except ValueError:
                    return
                if not line.endswith(b"\n") or not isinstance(value, dict):
                    return
                yield value, end


def _check_identity(begun: dict[str, Any], now: dict[str, Any], unfinished: Path) -> None:
    for key, value in now.items():
        if begun.get(key) != value:
            what = {
                "format_version": "by another version of erde",
                "bundle_seal": "with another bundle",
                "profile": f"with another {PROFILE}",
                "images": "for another list of images",
            }.get(key, f"with {key} {begun.get(key)}, not {value}")
            raise UserError(
                f"{unfinished} was begun {what}: give what was given then and --resume, or delete the file to start anew"
            )


def _write_skipped(path: Path, sink: _Sink) -> None:
    """One line per image that was skipped; no file where there is none, nor one of an earlier command."""
    if not sink.totals.skipped:
        path.unlink(missing_ok=True)
        return
    with replacing_file(path) as beside, beside.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(f"{reason}\n" for reason in sink.reasons())


def _json_line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"


def _write_to_terminal(rows: list[dict[str, Any]]) -> int:
    sys.stdout.writelines(map(_json_line, rows))
    sys.stdout.flush()
    return 0


def _heading(out: Path) -> bytes:
    return (",".join(COLUMNS) + "\r\n").encode() if out.suffix == ".csv" else b""


def _for_spreadsheets(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose text no spreadsheet takes for a formula; file and class names are anybody's."""
    path, name = row["path"], row["class"]
    # "./" leaves the path what it is.
    safe_path = f"./{path}" if path.startswith(FORMULA) else path
    return {**row, "path": safe_path, "class": f"'{name}" if name.startswith(FORMULA) else name}


def _file_writer(file: BinaryIO, suffix: str) -> Callable[[list[dict[str, Any]]], int]:
    def write(rows: list[dict[str, Any]]) -> int:
        text = io.StringIO(newline="")
        if suffix == ".csv":
            csv.DictWriter(text, COLUMNS).writerows(map(_for_spreadsheets, rows))
        else:
            text.writelines(map(_json_line, rows))
        # A file's name need not be UTF-8: its bytes go through as they are.
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
        file.flush()
        return file.seek(0, os.SEEK_END)

    return write
