"""The threads that answer, the bounded queue before them, and processes that may answer in their place."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from erde.common.errors import UserError, in_one_line
from erde.common.tasks import no_interrupts
from erde.serving.answering import Answer, Answering, Encoded, Exchange
from erde.serving.errors import Reason, RequestError, as_request_error
from erde.serving.log import Log
from erde.serving.models import Model, open_models

Result = TypeVar("Result")
# Its bundles are verified and warmed.
_START_SECONDS = 120.0
_STOP_SECONDS = 5.0
# Between two attempts to start a process in the place of a dead one: at first, and twice as long each time up to the most.
_RETRY_SECONDS, _MOST_RETRY_SECONDS = 1.0, 10.0
# Between two looks of a request that waits for a process at whether there will be one.
_LOOK_SECONDS = 0.2
_READY = "ready"


class Workers:
    """``parallel`` threads, and at most ``max_queue`` requests that wait for one. Belongs to one event loop.

    ``inside`` are the requests that have a place: they are answered, wait, or send their body.
    """

    def __init__(self, parallel: int, max_queue: int) -> None:
        self._parallel, self.max_queue = parallel, max_queue
        self.inside = 0
        self._free = asyncio.Semaphore(parallel)
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="erde-serve")

    @property
    def queue_length(self) -> int:
        """Requests that wait, or whose body is still being read, beyond those that are answered."""
        return max(0, self.inside - self._parallel)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue, for as long as the request takes; :class:`RequestError` at once if there is none."""
        if self.inside >= self._parallel + self.max_queue:
            raise RequestError(
                Reason.BUSY, f"the server is busy: {self.queue_length} requests wait; try again later"
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def run(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` in a thread, as soon as one is free."""
        # Waiting takes place here and not in the pool: it would keep what was cancelled, bodies too.
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Result] = loop.create_future()

        def end(finished: Future[Result]) -> None:
            self._free.release()
            if ended.cancelled():
                return
            error = finished.exception()
            if error is None:
                ended.set_result(finished.result())
            else:
                ended.set_exception(error)

        # Not asyncio.wrap_future: to wake the loop costs time, and once is enough.
        self._pool.submit(function).add_done_callback(lambda it: loop.call_soon_threadsafe(end, it))
        return await ended

    def close(self) -> None:
        """Wait until the last function has returned."""
        self._pool.shutdown(wait=True)


# ---------------------------------------------------------------- processes


@dataclass(frozen=True)
class _Settings:
    bundles: Sequence[str]
    threads: int
    max_batch: int
    poll: float
    log_json: bool


class Processes:
    """``count`` processes that answer, each with its own sessions. One that dies is replaced at once.

    Args:
        bundles: ``PATH`` or ``NAME=PATH`` each, as :func:`open_models` takes them.
        threads: CPU threads of ONNX Runtime for a request.
        max_batch: images in a request.
        count: processes, and the threads that may call :meth:`respond` at once.
        poll: seconds between two looks at whether a bundle has changed.
        log: where deaths are told.

    Raises:
        UserError: a process does not start.
    """

    def __init__(
        self, bundles: Sequence[str], threads: int, max_batch: int, count: int, poll: float, log: Log
    ) -> None:
        self._settings = _Settings(bundles, threads, max_batch, poll, log.as_json)
        self._log, self._closed = log, threading.Event()
        # Of each process that died: whether another one could not be started in its place.
        self._missing = [False] * count
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        # Each is exchanged for the one in its place.
        self._current: list[_Process] = []
        try:
            for _ in range(count):
                self._current.append(_Process(self._settings))
            for process in self._current:
                process.wait_until_ready()
        except BaseException as error:
            for process in self._current:
                process.close(patience=0)
            if isinstance(error, OSError):
                raise UserError(f"a process of the server did not start: {error}") from error
            raise
        for number, process in enumerate(self._current):
            threading.Thread(target=self._keep, args=(number, process), daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether a process answers, or will soon: false once all have died and none could be started in their place."""
        return not all(self._missing)

    def respond(
        self, exchange: Exchange[Encoded], content: bytes, points: Mapping[str, str | None]
    ) -> tuple[Encoded, Answer, float]:
        """:meth:`Answering.respond` in a process; ``points`` are the models' :attr:`Model.default_point`.

        A process that dies may have been killed by somebody: another one is asked.

        Raises:
            RequestError: as there, or two processes died, or none is :attr:`alive`.
        """
        for _ in range(2):
            process = self._next()
            try:
                result, exchange.id, exchange.model = process.ask(exchange, content, dict(points))
            except OSError:
                continue
            except BaseException:
                # Nobody knows what it was told: another one takes its place.
                process.close(patience=0)
                raise
            self._idle.put(process)
            if isinstance(result, RequestError):
                raise result
            encoded, answer, seconds = result
            return encoded, answer, seconds
        raise RequestError(Reason.FAILED, "two processes died while they answered this request")

    def _next(self) -> _Process:
        """A process that has nothing to do, once there is one; :class:`RequestError` if none will come."""
        while self.alive and not self._closed.is_set():
            with suppress(queue.Empty):
                process = self._idle.get(timeout=_LOOK_SECONDS)
                if not process.is_dead():
                    return process
        raise RequestError(
            Reason.BUSY, "the processes that answer have died, and none can be started; try again later"
        )

    def kill(self) -> None:
        """Kill all processes, also one that answers, hangs or starts, and start none in their place."""
        self._closed.set()
        for process in self._current:
            process.kill()

    def close(self) -> None:
        """End all processes, none of which may be asked any more."""
        self._closed.set()
        while not self._idle.empty():
            self._idle.get().close()

    def _keep(self, number: int, process: _Process) -> None:
        """Offer a process until it dies, then another one in its place."""
        while not self._closed.is_set():
            self._missing[number] = False
            self._idle.put(process)
            process.wait()
            process.close()
            if not self._closed.is_set():
                self._log.event(
                    "process_died", "the server", "a process that answers died: another one starts"
                )
            said, pause = "", _RETRY_SECONDS
            while not self._closed.is_set():
                try:
                    process = self._current[number] = _Process(self._settings)
                    if self._closed.is_set():  # kill may have come before it was there
                        process.kill()
                    process.wait_until_ready()
                    self._log.event("process_started", "the server", "a new process answers")
                    break
                except Exception as error:
                    self._missing[number] = True
                    if str(error) != said and not self._closed.is_set():
                        said = str(error)
                        message = f"no process starts in its place, it is tried again: {in_one_line(said)}"
                        self._log.event("process_missing", "the server", message)
                    self._closed.wait(pause)
                    pause = min(2 * pause, _MOST_RETRY_SECONDS)
        # It may have started while the server stopped.
        process.close()


class _Process:
    """A process that answers, once it is ready."""

    def __init__(self, settings: _Settings) -> None:
        # Threads, such as ONNX Runtime's, do not survive a fork.
        context = multiprocessing.get_context("spawn")
        # Who uses the connection, or closes it: a file closed under another thread's hands could be another one by now.
        self._in_use = threading.Lock()
        self._connection, its_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(its_end, settings), daemon=True)
        try:
            with no_interrupts():
                self._process.start()
        except KeyboardInterrupt:  # nobody else knows it yet
            if self._process.pid is not None:
                self._process.kill()
                self._process.join()
            raise
        # Open here, it would never read as ended.
        its_end.close()

    def wait_until_ready(self) -> None:
        """Wait until it can be asked; it is ended, with :class:`OSError` in one line, if it does not get there."""
        try:
            if not self._connection.poll(_START_SECONDS):
                raise TimeoutError(f"it was not ready within {_START_SECONDS:g} seconds")
            said = self._receive()
            if said != _READY:
                raise OSError(said)
        except OSError:
            self.close(patience=0)
            raise

    def ask(self, *job: Any) -> Any:
        """Send a job and wait for its result; :class:`OSError` if the process dies."""
        with self._in_use:
            self._connection.send(job)
            return self._receive()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError as error:
            raise ConnectionResetError("it ended") from error

    def is_dead(self) -> bool:
        """Whether it died while it had nothing to do."""
        with self._in_use:
            return self._connection.closed or self._connection.poll()

    def wait(self) -> None:
        """Return when it has died."""
        wait([self._process.sentinel])

    def kill(self) -> None:
        """End it at once; who waits for its result gets :class:`OSError`."""
        self._process.kill()

    def close(self, patience: float = _STOP_SECONDS) -> None:
        """End it, once it is not asked any more: it reads the end of the connection, or is killed."""
        with self._in_use:
            self._connection.close()
            self._process.join(patience)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()


class _Quiet(Log):
    """For a process: what happens to a bundle, the server says itself, but not that this process could not open it."""

    def event(self, event: str, model: str, message: str) -> None:
        """Say nothing else."""
        if event == "bundle_refused":
            super().event(event, model, f"process {os.getpid()}: {message}")


def _serve(connection: Connection, settings: _Settings) -> None:
    """The process: answer one job after the other, until the server closes the connection or dies."""
    # Who stops a server may signal its whole group; the server decides when this ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Now, and not with the first request: what is needed to read it.
    from erde.serving import grpc_api, http_api  # noqa: F401

    try:
        models = open_models(settings.bundles, settings.threads, _Quiet(settings.log_json))
    except Exception as error:  # the server says it, in a line
        connection.send(str(as_request_error(error)))
        return
    threading.Thread(target=_watch, args=(list(models.values()), settings.poll), daemon=True).start()
    answering = Answering(models, settings.max_batch)
    gc.collect()
    gc.freeze()  # as the server does
    connection.send(_READY)
    while True:
        try:
            exchange, content, points = connection.recv()
        except (EOFError, OSError):
            return
        for name, point in points.items():
            models[name].default_point = point
        try:
            encoded, answer, seconds = _respond(answering, exchange, content)
            answer.outputs.clear()  # the response has them
            result: Any = encoded, answer, seconds
        except Exception as error:
            result = as_request_error(error)
        connection.send((result, exchange.id, exchange.model))


def _respond(
    answering: Answering, exchange: Exchange[Encoded], content: bytes
) -> tuple[Encoded, Answer, float]:
    """:meth:`Answering.respond`, where the server may know a version that was not looked for here yet."""
    try:
        return answering.respond(exchange, content)
    except RequestError as error:
        if error.reason is not Reason.UNKNOWN:
            raise
    for model in answering.models.values():
        model.refresh()
    return answering.respond(exchange, content)


def _watch(models: Sequence[Model], poll: float) -> None:
    """Exchange bundles that change, as the server does for itself."""
    while True:
        time.sleep(poll)
        for model in models:
            model.refresh()
