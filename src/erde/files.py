"""Writing so that a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from erde.errors import UserError


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path``; when the block ends well it becomes ``path``, else it is removed."""
    beside = _beside(path)
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        explain_full_disk(error, path)
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Like :func:`replacing_file` for a whole folder; an older folder at ``path`` is replaced."""
    beside = _beside(path)
    try:
        beside.mkdir()
        yield beside
        if path.exists():
            # A rename cannot replace a folder that is not empty: the old one steps aside first.
            aside = _beside(path)
            os.replace(path, aside)
            try:
                os.replace(beside, path)
            except OSError:
                os.replace(aside, path)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(beside, path)
    except OSError as error:
        explain_full_disk(error, path)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step."""
    with replacing_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON (no NaN) in one step."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def check_folder(path: Path) -> None:
    """A regular file in the way of the folder ``path`` is the user's to move: say so."""
    parent = next(one for one in (path, *path.parents) if one.exists())
    if not parent.is_dir():
        raise UserError(f"cannot create the folder {path}: {parent} is a file; choose another folder")


def make_folder(path: Path) -> Path:
    """Create ``path`` and its parents."""
    check_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except PermissionError as error:
        raise UserError(
            f"cannot create the folder {path}: permission denied; choose a folder that you may write to"
        ) from error
    except OSError as error:
        explain_full_disk(error, path)
        raise
    return path


def sweep_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written below ``folder`` (names ending in ``.partial``)."""
    for leftover in sorted(folder.rglob("*.partial")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def explain_full_disk(error: OSError, path: Path) -> None:
    """Turn an error about a full disk into a :class:`UserError`; do nothing about others."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise UserError(
            f"no space left on the disk while writing {path}: free some space, then continue with --resume"
        ) from error
