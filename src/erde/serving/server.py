"""The server: ports, both protocols on one event loop, a look at the bundles now and then, and a graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from erde.common.environment import available_cpus
from erde.common.errors import UserError
from erde.serving.errors import as_request_error
from erde.serving.grpc_api import SPARE_CALLS, grpc_server
from erde.serving.http_api import http_app
from erde.serving.log import Log
from erde.serving.models import Model, open_models
from erde.serving.service import Load, Service
from erde.serving.workers import Processes, Workers

POLL_SECONDS = 2.0
LOOK_SECONDS = 0.02
# For requests under way when the server is stopped.
GRACE_SECONDS = 30
# Longer than load balancers keep an idle connection, so that they close it and not the server.
KEEP_ALIVE_SECONDS = 75
# Of a request before its body: URL and headers; and between and after the parts of a chunked one. Larger than what is read
# at once, of which a part may be another request.
MOST_HEAD_BYTES = 2**20


@dataclass(frozen=True)
class Settings:
    """How to serve. Port 0 is a free one; ``threads`` are ONNX Runtime's for a request, ``parallel`` requests are answered
    at once (None: as many as there are CPUs for), ``max_body`` is in bytes. With an ``objective``, in seconds, the
    default operating point gives way under load, down to ``floor``. With ``log_json`` the log has every request. With
    ``processes`` requests are answered in ``parallel`` processes instead of threads."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    threads: int = 1
    parallel: int | None = None
    max_batch: int = 32
    max_queue: int = 64
    max_body: int = 32 * 2**20
    objective: float | None = None
    floor: str | None = None
    log_json: bool = False
    processes: bool = False

    @property
    def at_once(self) -> int:
        """Requests that are answered at once."""
        return self.parallel or max(1, available_cpus() // self.threads)


def serve(
    bundles: Sequence[str], settings: Settings, when_ready: Callable[[list[str], int, int], None]
) -> dict[str, int]:
    """Serve until SIGTERM or SIGINT; the number of requests by outcome.

    Args:
        bundles: ``PATH`` or ``NAME=PATH`` each.
        settings: how.
        when_ready: called with the models' names and the ports of HTTP and gRPC, once requests are answered.

    Raises:
        UserError: a bundle that cannot be used, or a port that is taken, before anything is served.
    """
    if (settings.objective is None) != (settings.floor is None):
        raise UserError(
            "an objective for the latency (--slo-ms) and the cheapest operating point that it may cost (--floor) belong "
            "together: give both or none"
        )
    if settings.objective is not None and len(bundles) > 1:
        raise UserError(f"--slo-ms is for one bundle, and {len(bundles)} are given: start a server for each")
    if settings.http_port == settings.grpc_port != 0:
        raise UserError(f"HTTP and gRPC are both to have port {settings.http_port}: give each its own")
    with _bound(settings.host, settings.grpc_port):
        pass  # free: grpc itself would print a line of its own besides
    with _bound(settings.host, settings.http_port) as port:
        # Before the port is listened on: who can connect is answered.
        log = Log(settings.log_json)
        models = open_models(bundles, settings.threads, log)
        with _processes(models, settings, log) as processes, asyncio.Runner(loop_factory=_new_loop) as runner:
            return runner.run(_serve(models, settings, port, when_ready, log, processes))


@contextlib.contextmanager
def _processes(models: dict[str, Model], settings: Settings, log: Log) -> Iterator[Processes | None]:
    if not settings.processes:
        yield None
        return
    # By their folders: a name on the hub may mean another commit by now.
    bundles = [f"{name}={model.path}" for name, model in models.items()]
    started = Processes(bundles, settings.threads, settings.max_batch, settings.at_once, POLL_SECONDS, log)
    try:
        yield started
    finally:
        started.close()


async def _serve(
    models: dict[str, Model],
    settings: Settings,
    port: socket.socket,
    when_ready: Callable[[list[str], int, int], None],
    log: Log,
    processes: Processes | None,
) -> dict[str, int]:
    parallel = settings.at_once
    workers = Workers(parallel, settings.max_queue)
    load = None
    if settings.objective is not None and settings.floor is not None:
        (model,) = models.values()
        load = Load(model, settings.floor, settings.objective, parallel)
    service = Service(models, workers, settings.max_batch, settings.max_body, load, log, processes)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    grpc = grpc_server(service, parallel + settings.max_queue + SPARE_CALLS)
    grpc_port = _add_port(grpc, settings.host, settings.grpc_port)
    http = _Http(
        uvicorn.Config(
            http_app(service),
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
    )
    running = asyncio.create_task(http.serve(sockets=[port]))
    await grpc.start()
    while not http.started and not running.done():
        await asyncio.sleep(0.005)
    if running.done():
        running.result()  # raises
    tasks = [asyncio.create_task(_watch(service))]
    if load is not None:
        tasks.append(asyncio.create_task(_control(load, workers)))
    # Else a full collection would hold up all requests while it walks over what imports and bundles keep.
    gc.collect()
    gc.freeze()
    when_ready(list(models), port.getsockname()[1], grpc_port)
    await asyncio.wait([running, asyncio.ensure_future(stopped.wait())], return_when=asyncio.FIRST_COMPLETED)
    service.stopping = True
    for task in tasks:
        task.cancel()
    http.should_exit = True
    # Both at once: each stops taking requests and waits for those under way.
    await asyncio.gather(running, grpc.stop(GRACE_SECONDS))
    if http.server_state.tasks:  # cancelled: they still say so to their clients
        await asyncio.wait(list(http.server_state.tasks), timeout=1)
    if processes is not None:
        processes.kill()
    workers.close()
    outcomes: dict[str, int] = {}
    for (_, outcome), count in service.metrics.requests.items():
        outcomes[outcome] = outcomes.get(outcome, 0) + count
    return outcomes


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # on Windows there is none
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class _Connection(HttpToolsProtocol):
    """uvicorn's, which would keep URL, headers and the trailers of a chunked body however long they are."""

    _head_bytes: int | None = None  # of a request that is incomplete, since its last bytes of body

    def data_received(self, data: bytes) -> None:
        """Parse what came, and refuse a head, or trailers, without an end."""
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(
                    f"URL and headers, or trailers, are longer than {MOST_HEAD_BYTES:,} bytes."
                )

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head_bytes = 0

    def on_body(self, body: bytes) -> None:
        """A part of the body came."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._head_bytes = None
        super().on_message_complete()


class _Http(uvicorn.Server):
    """uvicorn without handlers for signals: it would raise them again when it has stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the caller."""
        yield


async def _watch(service: Service) -> None:
    said: dict[str, str] = {}
    while True:
        await asyncio.sleep(POLL_SECONDS)
        for model in service.models.values():
            with _going_on(model, said):
                if await asyncio.to_thread(model.refresh):
                    points = model.loaded.session.manifest.operating_points
                    service.metrics.keep_only(model.name, {point.name for point in points})
                    if service.load is not None:
                        service.load.renew()
                model.look_for_drift()


async def _control(load: Load, workers: Workers) -> None:
    said: dict[str, str] = {}
    while True:
        due = time.perf_counter() + LOOK_SECONDS
        await asyncio.sleep(LOOK_SECONDS)
        now = time.perf_counter()
        with _going_on(load.model, said):
            load.look(now, workers.inside, max(0.0, now - due))


@contextlib.contextmanager
def _going_on(model: Model, said: dict[str, str]) -> Iterator[None]:
    """Log what is raised, unless it was ``said`` of the model last time: a loop that ends would be missed for ever."""
    try:
        yield
    except Exception as error:
        line = str(as_request_error(error))
        if said.get(model.name) != line:
            said[model.name] = line
            model.log.event("error", model.name, line)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket with this address, which does not listen yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named: asyncio turns Nagle's algorithm off for no other. It would hold the second part of an answer
    # back until the client has acknowledged the first, which takes 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    with bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
        except (OSError, OverflowError) as error:
            raise _taken(host, port, error) from error
        yield bound


def _add_port(server: Any, host: str, port: int) -> int:
    try:
        return int(server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}"))
    except RuntimeError as error:
        raise _taken(host, port, error) from error


def _taken(host: str, port: int, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError(f"{host}:{port} cannot be listened on ({reason}): choose another host or port")
