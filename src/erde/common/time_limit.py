"""Work that ends after a given time, wherever it is."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class TimeIsUpError(BaseException):
    """No error, as an interrupt from the keyboard is none; unfinished files are removed on its way."""


@contextlib.contextmanager
def time_limit(minutes: float | None) -> Iterator[None]:
    """Raise :class:`TimeIsUpError` in the block after so many minutes; None is no limit. For the main thread only."""
    if minutes is None:
        yield
        return

    def end(*_: object) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
