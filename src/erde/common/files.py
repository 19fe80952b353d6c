"""Writing so that a reader sees the old file or the new one, never half of one; and locks for writers."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from erde.common.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Of linux/fcntl.h and linux/fs.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# Half written by a process, whose id the name bears (names of erde 0.1.0 before its release have none).
_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?:(?P<pid>\d+)-)?[0-9a-f]{8}\.partial")
# The older folder, while a newer one takes its name.
_ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-[0-9a-f]{8}\.aside")
# What this process is writing: its id may have been that of a killed one, whose files go.
_under_way: set[Path] = set()


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path``; when the block ends well it becomes ``path``, else it is removed."""
    with _beside(path) as beside:
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
    """Like :func:`replacing_file` for a whole folder; an older folder at ``path`` is replaced.

    On Linux the two change names in one step. Elsewhere the older one steps aside first; after a kill at that very
    moment :func:`sweep_leftovers` gives it its name back.
    """
    with _beside(path) as beside:
        try:
            beside.mkdir()
            yield beside
            if not path.exists():
                os.replace(beside, path)
            elif not _exchange(beside, path):
                aside = beside.with_suffix(".aside")
                os.replace(path, aside)
                try:
                    os.replace(beside, path)
                except OSError:
                    os.replace(aside, path)
                    raise
                shutil.rmtree(aside, ignore_errors=True)
        except OSError as error:
            explain_full_disk(error, path)
            raise
        finally:
            # The new one where something failed, else the old one.
            shutil.rmtree(beside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change names in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library older than 2018
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


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
    """Remove what dead processes left half written below ``folder``; what living ones are writing stays.

    A folder that stepped aside for a newer one gets its name back, unless the newer one has it.
    """
    for leftover in sorted(folder.rglob("*.aside")):
        match = _ASIDE.fullmatch(leftover.name)
        if match is None or _is_being_written(leftover.with_suffix(".partial"), match["pid"]):
            continue
        if leftover.with_name(match["name"]).exists():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            os.replace(leftover, leftover.with_name(match["name"]))
    for leftover in sorted(folder.rglob("*.partial")):
        match = _PARTIAL.fullmatch(leftover.name)
        if match is None or _is_being_written(leftover, match["pid"]):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _is_being_written(path: Path, pid: str | None) -> bool:
    if pid is None:
        return False
    return path in _under_way if int(pid) == os.getpid() else _is_alive(int(pid))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A hidden name beside ``path`` that says which process writes it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    _under_way.add(beside)
    try:
        yield beside
    finally:
        _under_way.discard(beside)


def explain_full_disk(error: OSError, path: Path) -> None:
    """Turn an error about a full disk into a :class:`UserError`; do nothing about others."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise UserError(
            f"no space left on the disk while writing {path}: free some space, then give the command again (a run "
            "continues with --resume)"
        ) from error


# ---------------------------------------------------------------- locks


class Lock:
    """The right to write somewhere, of one process at a time: an open file ``path`` with a lock of the system on it.

    The system lets go of it when the process ends, however it ends; the file that a kill leaves is no obstacle. A
    process that has the lock gets it again. Use it as a context manager, or :meth:`release` it.

    Args:
        path: the lock's own file; it is there while the lock is held.
        subject: what it guards, for the message to the others.

    Raises:
        UserError: another process has it: which one, where, since when, and what to do.
    """

    # POSIX locks, unlike flock, are not handed down to forked workers, who may outlive a killed process by seconds.
    # The process would lose them with any other handle on the file that it closes: so there is one handle. By the
    # process's id too, since a forked worker has a copy of this table, and no lock.
    _held: dict[tuple[int, Path], tuple[BinaryIO, int]] = {}  # noqa: RUF012  # of the process

    def __init__(self, path: Path, subject: str) -> None:
        self._key: tuple[int, Path] | None = None
        if fcntl is None:
            return
        key = os.getpid(), path.resolve()
        file, times = self._held[key] if key in self._held else (_acquire(key[1], subject), 0)
        self._held[key] = file, times + 1
        self._key = key

    def release(self) -> None:
        """Let others write; a second call does nothing."""
        if self._key is None or self._key[0] != os.getpid():
            return
        key, self._key = self._key, None
        file, times = self._held.pop(key)
        if times > 1:
            self._held[key] = file, times - 1
            return
        # Before others can have it: whoever opened the file in between sees that it has no name any more.
        key[1].unlink(missing_ok=True)
        file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def _acquire(path: Path, subject: str) -> BinaryIO:
    while True:
        file = path.open("a+b")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read(4096)
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(_who_holds(holder, subject)) from error
            raise UserError(
                f"{path} cannot be locked ({error.strerror}): choose a place whose file system knows locks"
            ) from error
        try:
            same = os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:
            same = False
        if same:
            break
        file.close()  # its last holder has just removed it
    file.truncate(0)
    # Some arguments may be long, and the message is one line.
    command = " ".join(sys.argv)[:200]
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "command": command}
    file.write(json.dumps(about).encode())
    file.flush()
    return file


def _who_holds(holder: bytes, subject: str) -> str:
    try:
        about = json.loads(holder)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(about["since"])))
        who = f"process {int(about['pid'])} on {about['host']} since {since} ({about['command']})"
    except (ValueError, TypeError, KeyError, OverflowError, OSError):
        who = "another process"
    return (
        f"{subject} is being written by {' '.join(who.split())}: wait until it has ended, or stop it, and give this "
        "command again"
    )
