"""A server on one core and loads of requests, for ``benchmarks/serving.py``."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

import numpy as np
import uvloop
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Result = TypeVar("Result")


# ---------------------------------------------------------------- the server


@dataclass
class Served:
    """A server that runs; ``model`` is its name in URLs."""

    process: subprocess.Popen[str]
    port: int
    grpc_port: int
    model: str


@contextlib.contextmanager
def serving(bundle: Path, core: int, *options: str, log: TextIO | None = None) -> Iterator[Served]:
    """``erde serve`` on one core."""
    ports = ["--http-port", "0", "--grpc-port", "0"]
    command = [sys.executable, "-m", "erde", "serve", f"a={bundle}", *ports, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        os.sched_setaffinity(process.pid, {core})
        assert process.stdout is not None
        match = re.search(r"http://[\d.]+:(\d+), gRPC [\d.]+:(\d+)", process.stdout.readline())
        assert match is not None, "the server did not start"
        # Threads that were there before the line above.
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})
        yield Served(process, int(match[1]), int(match[2]), "a")
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def children(pid: int) -> list[int]:
    """The processes that answer for a server."""
    ids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid and b"spawn_main" in folder.joinpath("cmdline").read_bytes():
                ids.append(int(folder.name))
    return sorted(ids)


# ---------------------------------------------------------------- the load


@dataclass(frozen=True)
class Reply:
    """A request that has ended: when it was due, how long it took, and what came (label and point of status 200)."""

    due: float
    seconds: float
    status: int
    image: int
    label: int
    point: str
    version: str


class _Connection(asyncio.Protocol):
    """A connection that stays open, with one request at a time."""

    transport: asyncio.Transport
    _reply: asyncio.Future[bytes]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes) -> asyncio.Future[bytes]:
        """Send a request; its reply, empty if the connection breaks."""
        self._reply, self._received = asyncio.get_running_loop().create_future(), b""
        self.transport.write(request)
        return self._reply

    def data_received(self, data: bytes) -> None:
        """A reply, or a part of it."""
        self._received += data
        head, _, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if length is not None and len(body) >= int(length[1]):
            self._reply.set_result(self._received)

    def connection_lost(self, exception: Exception | None) -> None:
        """The server closed it."""
        if not self._reply.done():
            self._reply.set_result(b"")


_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)


class Client:
    """Requests of one image in binary. ``late`` are the seconds by which each of an open loop was sent too late."""

    def __init__(self, served: Served, images: NDArray[np.uint8], point: str | None = None) -> None:
        self._served, self._pixels = served, [image.tobytes() for image in images]
        self._free: list[_Connection] = []
        self.late: list[float] = []
        size = images[0].nbytes
        tensor = {
            "name": "images", "datatype": "UINT8", "shape": [1, *images.shape[1:]],
            "parameters": {"binary_data_size": size},
        }  # fmt: skip
        request: dict[str, Any] = {
            "inputs": [tensor],
            "outputs": [{"name": "labels", "parameters": {"binary_data": True}}],
        }
        if point is not None:
            request["parameters"] = {"operating_point": point}
        head = json.dumps(request).encode()
        self._head = (
            f"POST /v2/models/{served.model}/infer HTTP/1.1\r\nHost: localhost\r\n"
            f"Inference-Header-Content-Length: {len(head)}\r\nContent-Length: {len(head) + size}\r\n\r\n"
        ).encode() + head

    async def _ask(self, image: int, due: float) -> tuple[float, float, int, bytes]:
        """Send one image: when it was due, how long it took from then on, the image, and what came."""
        try:
            if self._free:
                connection = self._free.pop()
            else:
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(_Connection, "127.0.0.1", self._served.port)
            self.late.append(time.perf_counter() - due)
            received = await connection.ask(self._head + self._pixels[image])
        except OSError:
            received = b""
        ended = time.perf_counter()
        if received:
            self._free.append(connection)
        return due, ended - due, image, received

    async def ask(self, image: int) -> Reply:
        """Send one image now."""
        return _reply(*await self._ask(image, time.perf_counter()))

    async def at(self, arrivals: Floats, order: NDArray[np.int64]) -> list[Reply]:
        """Open loop: a request at each of ``arrivals``, in seconds from now."""
        # A collection would hold up what is due, and then send it all at once.
        gc.collect()
        gc.disable()
        start, tasks = time.perf_counter() + 0.1, []
        for number, arrival in enumerate(arrivals):
            due = start + arrival
            while (wait := due - time.perf_counter()) > 0:
                # Timers are too coarse for the end, and the core is ours.
                await asyncio.sleep(wait - 0.002 if wait > 0.003 else 0)
            tasks.append(asyncio.create_task(self._ask(int(order[number % len(order)]), due)))
        ended = await asyncio.gather(*tasks)
        gc.enable()
        # Parsed when all have come: the load is to take little time.
        return [_reply(due - start, seconds, image, received) for due, seconds, image, received in ended]

    async def busy(self, seconds: float, connections: int, order: NDArray[np.int64]) -> list[Reply]:
        """Closed loop: so many connections ask one request after the other."""
        end, replies = time.perf_counter() + seconds, list[tuple[float, float, int, bytes]]()

        async def one_after_the_other(first: int) -> None:
            number = first
            while (now := time.perf_counter()) < end:
                replies.append(await self._ask(int(order[number % len(order)]), now))
                number += connections

        await asyncio.gather(*(one_after_the_other(first) for first in range(connections)))
        return [_reply(*reply) for reply in replies]


def _reply(due: float, seconds: float, image: int, received: bytes) -> Reply:
    """What a response says; a connection that broke is a reply of status 0."""
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    status = int(lines[0].split()[1]) if received else 0
    if status != 200:
        return Reply(due, seconds, status, image, -1, "", "")
    length = int(dict(line.split(": ", 1) for line in lines[1:])["inference-header-content-length"])
    about = json.loads(body[:length])
    label = int(np.frombuffer(body[length:], dtype="<i8")[0])
    return Reply(
        due, seconds, status, image, label, about["parameters"]["operating_point"], about["model_version"]
    )


def together(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a load, in the loop that costs least."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


def poisson(rate: float, seconds: float, generator: np.random.Generator) -> Floats:
    """Arrivals of a Poisson process."""
    gaps = generator.exponential(1 / rate, int(rate * seconds * 1.5) + 100)
    times = np.cumsum(gaps)
    return times[times < seconds]


def bursts(rate: float, seconds: float, generator: np.random.Generator) -> Floats:
    """The rate in two seconds of five; between them a third of it."""
    times = poisson(rate, seconds, generator)
    return times[(times % 5 < 2) | (generator.random(len(times)) < 1 / 3)]
