"""``erde predict``: image files through a bundle, to CSV or JSON lines. No torch."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from erde import progress
from erde.errors import UserError
from erde.files import make_folder, replacing_file
from erde.images import SUFFIXES, load_image
from erde.runtime import Prediction, Session

COLUMNS = ("path", "label", "class", "probability", "exit", "score", "macs")


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Files as given, and the images below folders, sorted."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file()
            )
            if not inside:
                raise UserError(
                    f"no image below the folder {path}: expected files ending in {', '.join(SUFFIXES)}"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"no image at {path}: expected a file or a folder")
    return found


def predict_files(
    bundle: Path,
    images: Sequence[Path],
    out: Path | None = None,
    *,
    operating_point: str | None = None,
    max_exit: int | None = None,
    max_macs: float | None = None,
    batch_size: int = 32,
    threads: int | None = None,
) -> dict[str, Any]:
    """Answer every image; rows go to ``out`` (.csv or .jsonl, in one step) or as JSON lines to stdout.

    Returns a summary: images, exit rates, mean MACs.
    """
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise UserError(f"--out is {out}: expected a name ending in .csv or .jsonl")
    if out is not None and out.is_dir():
        raise UserError(f"--out is {out}, which is a folder: expected the name of a file")
    session = Session(bundle, threads=threads)
    paths = find_images(images)
    exits = np.zeros(len(session.manifest.stages), dtype=int)
    macs = 0
    with _writer(out) as write, progress.task("predict", len(paths)) as task:
        for start in range(0, len(paths), batch_size):
            some = paths[start : start + batch_size]
            batch = np.stack([load_image(path, session.manifest.input_shape) for path in some])
            answer = session.predict(
                batch, operating_point=operating_point, max_exit=max_exit, max_macs=max_macs
            )
            for row in _rows(some, answer, session.classes):
                write(row)
            exits += np.bincount(answer.exits, minlength=len(exits))
            macs += int(answer.macs.sum())
            if task.due():
                task.update(start + len(some))
    return {
        "images": len(paths),
        "exit_rates": (exits / len(paths)).tolist(),
        "mean_macs": macs / len(paths),
        "out": str(out) if out else None,
    }


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


@contextmanager
def _writer(out: Path | None) -> Iterator[Any]:
    if out is None:
        yield lambda row: sys.stdout.write(json.dumps(row) + "\n")
        return
    make_folder(out.parent)
    with replacing_file(out) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        yield _csv_writer(file) if out.suffix == ".csv" else lambda row: file.write(json.dumps(row) + "\n")


def _csv_writer(file: TextIO) -> Any:
    table = csv.DictWriter(file, COLUMNS)
    table.writeheader()
    return table.writerow
