"""The exception for wrong input, as opposed to a bug of erde; and texts for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from numbers import Integral

# Names that an error lists: a bundle may have a thousand classes.
MOST_LISTED = 40

MAX_ERROR = 500
# What every generator of random numbers takes.
MAX_SEED = 2**31 - 1


class UserError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do, in one line.

    The command line prints the message and exits with code 2. Everything else that is raised is a bug.
    """


def check_seed(seed: int) -> None:
    """Raise a :class:`UserError` unless ``seed`` is a whole number, Python's or numpy's, from 0 to ``MAX_SEED``."""
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    if not (whole and 0 <= seed <= MAX_SEED):
        raise UserError(
            f"the seed is {in_one_line(repr(seed))}, expected a whole number from 0 to {MAX_SEED:,}"
        )


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint ``" (did you mean 'x'?)"`` for a misspelt ``word``, or the choices if none is near."""
    choices = sorted(choices)
    matches = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if matches:
        return f" (did you mean '{matches[0]}'?)"
    return f" (choose from: {listed(choices)})" if choices else ""


def listed(names: Sequence[str]) -> str:
    """``names`` in a line, at most ``MOST_LISTED`` of them."""
    rest = len(names) - MOST_LISTED
    return ", ".join(names) if rest <= 0 else f"{', '.join(names[:MOST_LISTED])} and {rest:,} more"


def printable(text: str) -> str:
    """``text`` from an unknown source, for a terminal: control characters and line breaks as escapes."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def in_one_line(text: str) -> str:
    """``printable`` text for an error message, cut after ``MAX_ERROR`` characters."""
    line = printable(text[: MAX_ERROR + 1])
    return line if len(line) <= MAX_ERROR else f"{line[:MAX_ERROR]}..."
