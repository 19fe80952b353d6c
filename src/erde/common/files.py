"""Atomic writing: a reader sees the old file or the new one, never a part; and locks for writers."""

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
# A file that a process is writing; its name holds the process's id.
_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-[0-9a-f]{8}\.partial")
# The old folder while a new one takes its name.
_ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-[0-9a-f]{8}\.aside")
# What the file of a lock begins with, unless its process was killed before it wrote anything.
_LOCK = b'{"pid": '
# Files that this process is writing. A killed process may have had the same id: its files are removed.
_under_way: set[Path] = set()


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` that becomes ``path`` when the block succeeds, and is removed otherwise."""
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

    Where ``path`` is a link it stays one: the folder that it names is replaced, and the new one is written beside that.
    On Linux the two swap names in one step. Elsewhere the old one is renamed first; after a kill at that moment
    :func:`sweep_leftovers` renames it back.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    with _beside(path) as beside:
        try:
            beside.mkdir()
            yield beside
            if not (_take_free_name(beside, path) or _exchange(beside, path)):
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


def _take_free_name(folder: Path, path: Path) -> bool:
    """Rename ``folder`` to ``path``; False if there is a folder, which another writer may have finished just now."""
    if path.exists():
        return False
    try:
        os.replace(folder, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two paths in one step; False if the system or the file system cannot."""
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
    """Raise if ``path`` or one of its parents is a regular file."""
    parent = next(folder for folder in (path, *path.parents) if folder.exists())
    if not parent.is_dir():
        raise UserError(f"cannot create the folder {path}: {parent} is a file; choose another folder")


def check_new(path: Path, advice: str = "give another place with --out") -> None:
    """Raise if ``path`` is there, or if one of its parents is a regular file."""
    if path.exists():
        raise UserError(f"{path} is there already: {advice}, or remove it")
    check_folder(path.parent)


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


def is_leftover(path: Path) -> bool:
    """Whether this is the name of a file or folder that a process was writing when it was killed, or still writes."""
    return _PARTIAL.fullmatch(path.name) is not None


def sweep_leftovers(folder: Path) -> None:
    """Remove unfinished files of dead processes below ``folder``; those of living processes stay.

    A folder that was renamed for a new one gets its name back, unless the new one has it.
    """
    for leftover in sorted(folder.rglob("*.aside")):
        match = _ASIDE.fullmatch(leftover.name)
        if match is None or _is_being_written(leftover.with_suffix(".partial"), match["pid"]):
            continue
        if leftover.with_name(match["name"]).exists():
            _remove(leftover)
        else:
            os.replace(leftover, leftover.with_name(match["name"]))
    for leftover in sorted(folder.rglob("*.partial")):
        match = _PARTIAL.fullmatch(leftover.name)
        if match is None or _is_being_written(leftover, match["pid"]):
            continue
        _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_being_written(path: Path, pid: str) -> bool:
    return path in _under_way if int(pid) == os.getpid() else _is_alive(int(pid))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    try:
        # A process that was killed stays listed until its parent asks, which in a container may be never.
        return Path(f"/proc/{pid}/stat").read_bytes().rsplit(b") ", 1)[1][:1] != b"Z"
    except (OSError, IndexError):  # no Linux, or gone meanwhile
        return True


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a hidden name beside ``path`` that holds the id of the writing process."""
    if path.name in ("", ".."):
        raise UserError(f"{path} has no name that a new file or folder could take: give one, such as ./new")
    beside = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    _under_way.add(beside)
    try:
        yield beside
    finally:
        _under_way.discard(beside)


def explain_full_disk(error: OSError, path: Path) -> None:
    """Raise a :class:`UserError` if the error is about a full disk; do nothing otherwise."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise UserError(
            f"no space left on the disk while writing {path}: free some space, then repeat the command (a run "
            "continues with --resume)"
        ) from error


# ---------------------------------------------------------------- locks


class Lock:
    """A lock that one process at a time can hold: an open file ``path`` with a lock of the system on it.

    The system releases it when the process ends, however it ends; the file that a kill leaves is no obstacle. A
    process may take a lock that it holds again. Use it as a context manager, or :meth:`release` it.

    Args:
        path: the lock's own file; it is there while the lock is held.
        subject: the name of the guarded thing, for the message to other processes.

    Raises:
        UserError: another process holds it; the message names it, its host and since when. A file at ``path`` that is no
            lock, which stays as it is.
    """

    # POSIX locks, unlike flock, are not inherited by forked workers, which may outlive a killed process by seconds.
    # Closing any handle on the file drops them, so each file has one handle. The key holds the process's id because
    # a forked worker has a copy of this table, but no lock.
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
        # Unlink before unlocking: a process that opened the file in between sees that it has lost its name.
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
        file.close()  # its last holder removed it meanwhile
    file.seek(0)
    if not _LOCK.startswith(file.read(len(_LOCK))):
        file.close()
        raise UserError(
            f"{path} is there already and is no lock of erde's: move it away, or choose another place"
        )
    file.truncate(0)
    # Arguments may be long, and the message is one line.
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
        f"{subject} is being written by {' '.join(who.split())}: wait until it has ended, or stop it, then repeat "
        "this command"
    )
