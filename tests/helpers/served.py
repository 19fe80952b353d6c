"""``erde serve`` in a process of its own, and plain requests to it."""

from __future__ import annotations

import http.client
import json
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde import bundle
from erde.policy.points import Certificate, Measured, OperatingPoint
from tests.helpers.hand_made_bundle import convolution_bundle

# Requests whose first pixel is this take DELAY seconds, or until the gate is there, if the server was given one.
SLOW = 7
DELAY = 0.6
_PROGRAM = f"""
import os, sys, time
gate, grace = sys.argv.pop(1), float(sys.argv.pop(1))
from erde.runtime.session import Session
predict = Session.predict
def slow(self, images, **settings):
    if images.size and images.flat[0] == {SLOW}:
        if not gate:
            time.sleep({DELAY})
        while gate and not os.path.exists(gate):
            time.sleep(0.01)
    return predict(self, images, **settings)
Session.predict = slow
from erde.serving import http_api, server
http_api.BODY_SECONDS = 2.0
server.POLL_SECONDS, server.GRACE_SECONDS = 0.1, grace
from erde.cli.main import main
sys.argv = ["erde", "serve", *sys.argv[1:]]
main()
"""


@dataclass
class Reply:
    """A response of HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """A server that runs."""

    process: subprocess.Popen[str]
    http_port: int
    grpc_port: int
    log: Path

    @property
    def err(self) -> str:
        """What it has printed on stderr so far."""
        return self.log.read_text(encoding="utf-8")

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def request(
        self,
        method: str,
        path: str,
        body: bytes | dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=30)
        try:
            content = json.dumps(body) if isinstance(body, dict) else body
            connection.request(method, path, content, headers or {})
            response = connection.getresponse()
            return Reply(
                response.status, {key.lower(): text for key, text in response.getheaders()}, response.read()
            )
        finally:
            connection.close()

    def infer(
        self, body: bytes | dict[str, Any], headers: dict[str, str] | None = None, model: str = "a"
    ) -> Reply:
        return self.request("POST", f"/v2/models/{model}/infer", body, headers)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit code, and what was printed after the server was ready."""
        self.process.send_signal(number)
        return self.end()

    def end(self) -> tuple[int, str, str]:
        """The same of a server that was told to stop."""
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out, self.err


@contextmanager
def serving(
    bundles: Sequence[Path | str], *options: str, gate: Path | None = None, grace: float = 30
) -> Iterator[Served]:
    """A server on free ports, in its own process; it is killed at the end unless it was stopped.

    When it is stopped it waits ``grace`` seconds for requests.
    """
    command = [
        sys.executable,
        "-c",
        _PROGRAM,
        "" if gate is None else str(gate),
        str(grace),
        *map(str, bundles),
        "--http-port",
        "0",
        "--grpc-port",
        "0",
        *options,
    ]
    with tempfile.TemporaryDirectory() as folder:
        # A file and not a pipe: it can be read while the server runs.
        log = Path(folder) / "stderr.txt"
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], 60)
            line = process.stdout.readline() if ready else ""
            match = re.search(r"http://[\d.]+:(\d+), gRPC [\d.]+:(\d+)$", line.strip())
            assert match is not None, (line, log.read_text(encoding="utf-8"))
            yield Served(process, int(match[1]), int(match[2]), log)
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def certified_bundle(folder: Path, seed: int = 0) -> Path:
    """``convolution_bundle`` with invented certificates: risk-1 and the cheaper risk-5, early and no-exit without one."""
    manifest = bundle.read(convolution_bundle(folder, seed))
    early, _, no_exit = manifest.operating_points

    def point(name: str, max_risk: float, level: float, saved: float) -> OperatingPoint:
        certificate = Certificate(
            guarantee="risk", max_risk=max_risk, confidence=0.9, images=1000, lost=1, won=0, risk=0.001,
            upper_bound=0.004, reference="final_exit", method="invented", assumptions="none",
        )  # fmt: skip
        tune = Measured(
            images=100, accuracy=0.9, accuracy_interval=(0.8, 1.0), risk=0.0, net_drop=0.0, macs=200,
            macs_saved=saved, exit_rates=[0.5, 0.2, 0.3],
        )  # fmt: skip
        return OperatingPoint(
            name=name,
            kind="risk",
            target=max_risk,
            thresholds=[level, level],
            certificate=certificate,
            tune=tune,
        )

    points = [point("risk-1", 0.01, 0.8, 0.2), point("risk-5", 0.05, 0.5, 0.4), early, no_exit]
    bundle.seal(
        folder, manifest.model_copy(update={"operating_points": points, "default_operating_point": "risk-1"})
    )
    return folder


def some_images(count: int, seed: int = 1) -> NDArray[np.uint8]:
    images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = 0  # none is slow
    return images


def as_json(images: NDArray[np.uint8], **more: Any) -> dict[str, Any]:
    """A request with the images as numbers."""
    tensor = {
        "name": "images",
        "datatype": "UINT8",
        "shape": list(images.shape),
        "data": images.ravel().tolist(),
    }
    return {"inputs": [tensor], **more}


def until(condition: Any, seconds: float = 20.0) -> None:
    """Wait until ``condition()`` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
