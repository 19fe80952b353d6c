"""What the server says on stderr: plain lines for people, or JSON objects, one a line and one for each request."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
import uuid
from typing import Any

from erde.common.progress import say

# Others go into no log and no header.
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,100}")
# A full disk or a closed pipe is no reason to answer nothing.
_UNWRITTEN = contextlib.suppress(OSError, ValueError)


def request_id(given: str | None) -> str:
    """The id under which a request is logged: the one that came with it (``X-Request-Id``), or a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


class Log:
    """Events, and with ``as_json`` requests too; several threads may share one. A line that cannot be written is lost."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json

    def event(self, event: str, model: str, message: str) -> None:
        """Something that happened to a model."""
        if self.as_json:
            self._write(event, model=model, message=message)
        else:
            _say(f"{model}: {message}")

    def request(self, model: str, outcome: str, error: str | None, **fields: Any) -> None:
        """A request has ended; in plain lines only if it failed."""
        if self.as_json:
            self._write("request", model=model, outcome=outcome, error=error, **fields)
        elif outcome == "failed":
            _say(f"{model or 'a request'}: {error}")

    def _write(self, event: str, **fields: Any) -> None:
        known = {name: value for name, value in fields.items() if value not in (None, "")}
        line = json.dumps({"time": round(time.time(), 3), "event": event, **known})
        with _UNWRITTEN:
            # One call, so that lines of two threads do not mix.
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def _say(text: str) -> None:
    with _UNWRITTEN:
        say(text)
