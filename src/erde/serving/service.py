"""The server's state, whatever protocol a request came by: load, counts, log, and who answers."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from erde.bundle.manifest import Manifest
from erde.common.environment import erde_version
from erde.common.errors import UserError
from erde.serving.answering import Answer, Answering, Encoded, Exchange
from erde.serving.control import Controller, ladder
from erde.serving.errors import Reason, RequestError, as_request_error
from erde.serving.log import Log
from erde.serving.metrics import Metrics, Recent
from erde.serving.models import Model
from erde.serving.tensors import INPUT, OUTPUTS
from erde.serving.workers import Processes, Workers


class Load:
    """Load control of a model: what its requests take tells the controller, which sets the model's default point."""

    def __init__(self, model: Model, floor: str, objective: float, parallel: int) -> None:
        self.model, self._floor, self._objective, self._parallel = model, floor, objective, parallel
        self.controller = Controller(ladder(self._manifest, floor), objective, parallel)

    @property
    def _manifest(self) -> Manifest:
        return self.model.loaded.session.manifest

    def renew(self) -> None:
        """Begin anew after the bundle was exchanged; without the floor in the new one its default alone is left."""
        try:
            rungs = ladder(self._manifest, self._floor)
        except UserError as error:
            self.model.log.event("floor_missing", self.model.name, f"load: {error}; the default stays")
            rungs = ladder(self._manifest, self._manifest.default_operating_point)
        self.controller = Controller(rungs, self._objective, self._parallel)
        self.model.default_point = None

    def admits(self, now: float, inside: int) -> bool:
        """See :meth:`Controller.admits`."""
        admitted = self.controller.admits(now, inside)
        self._follow(inside)
        return admitted

    def look(self, now: float, inside: int, late: float = 0.0) -> None:
        """See :meth:`Controller.look`."""
        self.controller.look(now, inside, late)
        self._follow(inside)

    def answered(self, now: float, point: str, latency: float, computing: float, inside: int) -> None:
        """See :meth:`Controller.answered`; a request that named another point tells nothing of the ladder's."""
        names = [rung.name for rung in self.controller.rungs]
        if point in names:
            self.controller.answered(now, names.index(point), latency, computing, inside)

    def _follow(self, inside: int) -> None:
        new, old = self.controller.rung.name, self.model.current_default(self.model.loaded)
        if new != old:
            self.model.default_point = new
            message = f"load: {old} -> {new}, {max(0, inside - self._parallel)} requests wait"
            self.model.log.event("operating_point", self.model.name, message)


class Service:
    """The models, the threads that run them or wait for ``processes`` to do so, and the counts; the same for both protocols."""

    def __init__(
        self,
        models: dict[str, Model],
        workers: Workers,
        max_batch: int,
        max_body: int,
        load: Load | None = None,
        log: Log | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.models, self.workers, self.load = models, workers, load
        self.answering, self.processes = Answering(models, max_batch), processes
        self.max_body = max_body
        self.metrics, self._log = Metrics(), log or Log()
        self.started = time.perf_counter()
        # Requests for which no model is known are kept under "".
        self.recent = {name: Recent(self.started) for name in ("", *models)}
        self.stopping = False

    @property
    def ready(self) -> bool:
        """Whether requests are answered: the server is not about to stop, and has processes if it needs any."""
        return not self.stopping and (self.processes is None or self.processes.alive)

    def model(self, name: str, version: str = "") -> Model:
        """See :meth:`Answering.model`."""
        return self.answering.model(name, version)

    async def infer(self, exchange: Exchange[Encoded], body: Callable[[], Awaitable[bytes]]) -> Encoded:
        """Read, answer and count one request.

        Raises:
            RequestError: whatever the reason, in one line. Nothing else.
        """
        started = time.perf_counter()
        outcome, error_line = "cancelled", None
        answer: Answer | None = None
        try:
            if exchange.name:
                exchange.model = self.model(exchange.name, exchange.version).name
            inside = self.workers.inside
            if self.load is not None and not self.load.admits(started, inside):
                raise RequestError(
                    Reason.BUSY, "the server cannot answer in time, even at its floor; try again later"
                )
            with self.workers.place():
                content = await body()
                encoded, done, computing = await self.workers.run(lambda: self._respond(exchange, content))
            self._count(done)
            outcome, answer = "answered", done
            if self.load is not None:
                ended = time.perf_counter()
                self.load.answered(ended, done.point, ended - started, computing, inside)
            return encoded
        except Exception as error:  # not where it was cancelled
            refusal = as_request_error(error)
            outcome, error_line = refusal.reason.outcome, str(refusal)
            raise refusal from error
        finally:
            self._note(exchange, outcome, started, answer, error_line)

    def _note(
        self, exchange: Exchange[Any], outcome: str, started: float, answer: Answer | None, error: str | None
    ) -> None:
        """A request has ended: in the metrics, for the page, and in the log."""
        ended = time.perf_counter()
        point, exits = ("", []) if answer is None else (answer.point, answer.exits)
        self.metrics.request(exchange.model, outcome, ended - started, point, exits)
        self.recent[exchange.model].add(ended, outcome, ended - started, exits)
        self._log.request(
            exchange.model, outcome, error, request_id=exchange.request_id, id=exchange.id, protocol=exchange.protocol,
            milliseconds=round(1000 * (ended - started), 3), operating_point=point,
            certified=None if answer is None else answer.parameters["certified"], exits=exits or None,
        )  # fmt: skip

    def _respond(self, exchange: Exchange[Encoded], content: bytes) -> tuple[Encoded, Answer, float]:
        """In a thread: :meth:`Answering.respond`, here or in another process."""
        if self.processes is None:
            return self.answering.respond(exchange, content)
        points = {name: model.default_point for name, model in self.models.items()}
        return self.processes.respond(exchange, content, points)

    def _count(self, answer: Answer) -> None:
        """Images were answered: in the metrics, and for the drift watch."""
        self.metrics.images(answer.model, answer.prediction)
        loaded = self.models[answer.model].loaded
        # The bundle may have been exchanged meanwhile.
        if loaded.monitor is not None and loaded.version == answer.version:
            loaded.monitor.add(answer.prediction)

    def server_metadata(self) -> dict[str, Any]:
        """Name, version and extensions of the server."""
        return {"name": "erde", "version": erde_version(), "extensions": ["binary_tensor_data"]}

    def model_metadata(self, model: Model) -> dict[str, Any]:
        """Inputs, outputs and properties of a model."""
        loaded = model.loaded
        manifest = loaded.session.manifest
        outputs = []
        for name, (datatype, _) in OUTPUTS.items():
            shape = [-1, len(manifest.classes)] if name == "probabilities" else [-1]
            outputs.append({"name": name, "datatype": datatype, "shape": shape})
        return {
            "name": model.name,
            "versions": [loaded.version],
            "platform": "erde_onnxv1",
            "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, *manifest.input_shape]}],
            "outputs": outputs,
            "properties": model.properties(loaded),
        }

    def metrics_text(self) -> str:
        """All metrics, in the text format of Prometheus."""
        defaults = {name: model.current_default(model.loaded) for name, model in self.models.items()}
        drift = {
            name: model.loaded.monitor.report()
            for name, model in self.models.items()
            if model.loaded.monitor is not None
        }
        load = self.load
        objectives = {} if load is None else {load.model.name: load.controller.objective}
        return self.metrics.text(self.workers.queue_length, defaults, drift, objectives)
