"""Progress: a bar on a terminal, plain lines elsewhere; and the run's log file."""

from __future__ import annotations

import datetime
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from erde.common.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# Seconds between plain lines, which are for log files.
PLAIN_INTERVAL = 10.0
# Seconds between updates of a bar; each update synchronises the device.
BAR_INTERVAL = 1.0
# Set in all but the first of several processes that share a training.
quiet = False
# Before each line of a process that works beside others, which has no bar.
prefix = ""


class Task(Protocol):
    """One piece of work under way."""

    def due(self) -> bool:
        """Whether it is time to call :meth:`update` (and so to compute the text for it)."""

    def update(self, completed: int, text: str = "") -> None:
        """Report that ``completed`` of the total are done."""


class _PlainTask:
    def __init__(self, name: str, total: int, completed: int) -> None:
        self._name, self._total, self._last = name, total, time.monotonic()
        self._began, self._at_first = self._last, completed

    def due(self) -> bool:
        return time.monotonic() - self._last >= PLAIN_INTERVAL

    def update(self, completed: int, text: str = "") -> None:
        self._last = time.monotonic()
        done = completed - self._at_first
        left = (self._last - self._began) / done * (self._total - completed) if done > 0 else 0
        remaining = f"  {datetime.timedelta(seconds=round(left))} left" if round(left) else ""
        say(f"{self._name}: {completed}/{self._total} {text}".rstrip() + remaining)


class _BarTask:
    def __init__(self, bar: Any, task_id: Any) -> None:
        self._bar, self._id, self._last = bar, task_id, 0.0

    def due(self) -> bool:
        return time.monotonic() - self._last >= BAR_INTERVAL

    def update(self, completed: int, text: str = "") -> None:
        self._last = time.monotonic()
        self._bar.update(self._id, completed=completed, text=text)


@contextmanager
def task(name: str, total: int, completed: int = 0) -> Iterator[Task]:
    """A bar with the time left on a terminal; elsewhere a plain line now and then. On stderr."""
    if quiet or prefix or not sys.stderr.isatty():
        yield _PlainTask(name, total, completed)
        return
    from rich.console import Console

    with _bar(Console(stderr=True)) as bar:
        yield _BarTask(bar, bar.add_task(name, total=total, completed=completed, text=""))
        bar.update(bar.task_ids[0], completed=total)


def _bar(console: Console) -> Progress:
    """A bar of one line on any terminal: a long text loses its end."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=24 if console.width >= 120 else 8),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        TextColumn("left"),
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=console,
        expand=True,
    )


def say(text: str) -> None:
    """Print one plain line on stderr."""
    if not quiet:
        print(f"{prefix}{text}", file=sys.stderr, flush=True)


class RunLog:
    """``log.jsonl``: one JSON object a line, with the time. Opening it drops a last line that a kill cut short."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None and path.exists():
            content = path.read_bytes()
            complete = content.rfind(b"\n") + 1
            if complete != len(content):
                os.truncate(path, complete)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event."""
        if self._path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"no space left on the disk while writing {self._path}: free some, then continue with --resume"
                ) from error
            raise
