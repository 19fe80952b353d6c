"""The one exception that means "the input is wrong", as opposed to "erde is wrong"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

# Names that an error lists: a bundle may have a thousand classes.
MOST_LISTED = 40

MAX_ERROR = 500


class UserError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do, in one line.

    The command line prints the message and exits with code 2. Everything else that is raised is a bug.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint ``" (did you mean 'x'?)"`` for a misspelt ``word``, or the choices where none is near."""
    choices = sorted(choices)
    matches = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if matches:
        return f" (did you mean '{matches[0]}'?)"
    return f" (choose from: {listed(choices)})" if choices else ""


def listed(names: Sequence[str]) -> str:
    """``names`` in a line; of a thousand the first ``MOST_LISTED``."""
    rest = len(names) - MOST_LISTED
    return ", ".join(names) if rest <= 0 else f"{', '.join(names[:MOST_LISTED])} and {rest:,} more"


def printable(text: str) -> str:
    """``text`` that somebody else wrote, for a terminal: control characters and line breaks as escapes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def in_one_line(text: str) -> str:
    """The same for an error message: not longer than ``MAX_ERROR`` characters."""
    line = printable(text[: MAX_ERROR + 1])
    return line if len(line) <= MAX_ERROR else f"{line[:MAX_ERROR]}..."
