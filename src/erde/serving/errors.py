"""Why a request is not answered: the same reasons for HTTP and gRPC."""

from __future__ import annotations

import enum

from erde.common.errors import UserError, in_one_line


class Reason(enum.Enum):
    """A reason: HTTP status, name of the gRPC status, and the outcome under which it is counted."""

    BAD = (400, "INVALID_ARGUMENT", "refused")
    UNKNOWN = (404, "NOT_FOUND", "refused")
    SLOW = (408, "DEADLINE_EXCEEDED", "refused")
    LARGE = (413, "RESOURCE_EXHAUSTED", "refused")
    FAILED = (500, "INTERNAL", "failed")
    BUSY = (503, "RESOURCE_EXHAUSTED", "overloaded")

    @property
    def http_status(self) -> int:
        """The status of the HTTP response."""
        return self.value[0]

    @property
    def grpc_status(self) -> str:
        """The name of the status in ``grpc.StatusCode``."""
        return self.value[1]

    @property
    def outcome(self) -> str:
        """The label in the metrics."""
        return self.value[2]


class RequestError(Exception):
    """A request that is not answered; the message is one line for the client."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(in_one_line(message))
        self.reason = reason

    def __reduce__(self) -> tuple[type[RequestError], tuple[Reason, str]]:
        # It may come from another process.
        return RequestError, (self.reason, str(self))


def bad(message: str) -> RequestError:
    """A request that says something wrong."""
    return RequestError(Reason.BAD, message)


def as_request_error(error: Exception) -> RequestError:
    """``error`` as the client may see it: without a traceback, and a bug as what it is."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UserError):
        return bad(str(error))
    return RequestError(
        Reason.FAILED, f"an error of the server: {type(error).__name__}: {in_one_line(str(error))}"
    )
