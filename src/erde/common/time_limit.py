"""Work that ends after a given time, wherever it is."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from erde.common.errors import UserError


class TimeIsUpError(BaseException):
    """No error, as an interrupt from the keyboard is none; unfinished files are removed on its way."""


# Nineteen years: far beyond it a timer of the system takes no number.
MAX_MINUTES = 10_000_000


def check_minutes(minutes: float) -> None:
    """Raise a :class:`UserError` unless 0 < ``minutes`` <= ``MAX_MINUTES``."""
    if not 0 < minutes <= MAX_MINUTES:
        raise UserError(f"{minutes} minutes: expected more than 0, at most {MAX_MINUTES:,}")


@contextlib.contextmanager
def time_limit(minutes: float | None) -> Iterator[None]:
    """Raise :class:`TimeIsUpError` in the block after so many minutes; None is no limit. For the main thread only.

    Raises:
        UserError: as :func:`check_minutes`.
    """
    if minutes is None:
        yield
        return
    check_minutes(minutes)

    def end(*_: object) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
