"""What a request means, whatever protocol it came by: model, images, parameters, outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from erde.bundle.manifest import Manifest
from erde.common.environment import erde_version
from erde.common.errors import UserError, in_one_line, nearest
from erde.serving.control import Controller, ladder
from erde.serving.errors import Reason, RequestError, bad
from erde.serving.log import Log, request_id
from erde.serving.metrics import Metrics
from erde.serving.models import Model
from erde.serving.recent import Recent
from erde.serving.tensors import INPUT, OUTPUTS, Tensor, outputs_of, read_images
from erde.serving.workers import Workers

PARAMETERS = ("operating_point", "max_risk", "max_macs", "deadline_ms", "max_exit")
Encoded = TypeVar("Encoded")


@dataclass(frozen=True)
class Asked:
    """A request, its tensors not looked at yet; no ``outputs`` means all."""

    model: str
    version: str
    id: str
    parameters: Mapping[str, Any]
    inputs: Sequence[Tensor]
    outputs: Sequence[str]


@dataclass(frozen=True)
class Answer:
    """A response: outputs by name, and what is said of them."""

    model: str
    version: str
    id: str
    parameters: dict[str, str | bool]
    outputs: dict[str, NDArray[Any]]
    exits: list[int]  # images by the exit that answered

    @property
    def point(self) -> str:
        """The operating point that decided."""
        return str(self.parameters["operating_point"])


@dataclass
class Exchange(Generic[Encoded]):
    """How a protocol reads and writes: bytes to a request, and an answer to what is sent."""

    decode: Callable[[bytes], Asked]
    encode: Callable[[Asked, Answer], Encoded]
    name: str = ""  # of the model and its version, where the protocol says them ahead of the request
    version: str = ""
    protocol: str = ""
    request_id: str = field(default_factory=lambda: request_id(None))
    id: str = field(default="", init=False)  # the client's own, which the protocol sends back
    model: str = field(default="", init=False)  # the same once it is known to exist: a label of the metrics


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

    def admits(self, now: float, waiting: int) -> bool:
        """See :meth:`Controller.admits`."""
        admitted = self.controller.admits(now, waiting)
        self._follow(waiting)
        return admitted

    def look(self, now: float, waiting: int) -> None:
        """See :meth:`Controller.look`."""
        self.controller.look(now, waiting)
        self._follow(waiting)

    def answered(self, now: float, point: str, latency: float, computing: float) -> None:
        """See :meth:`Controller.answered`; a request that named another point tells nothing of the ladder's."""
        names = [rung.name for rung in self.controller.rungs]
        if point in names:
            self.controller.answered(now, names.index(point), latency, computing)

    def _follow(self, waiting: int) -> None:
        new, old = self.controller.rung.name, self.model.current_default(self.model.loaded)
        if new != old:
            self.model.default_point = new
            message = f"load: {old} -> {new}, {waiting} requests wait"
            self.model.log.event("operating_point", self.model.name, message)


class Service:
    """The models, the threads that run them, and the counts; the same for both protocols."""

    def __init__(
        self,
        models: dict[str, Model],
        workers: Workers,
        max_batch: int,
        max_body: int,
        load: Load | None = None,
        log: Log | None = None,
    ) -> None:
        self.models, self.workers, self.load = models, workers, load
        self.max_batch, self.max_body = max_batch, max_body
        self.metrics, self._log = Metrics(), log or Log()
        self.started = time.perf_counter()
        # Requests for which no model is known are kept under "".
        self.recent = {name: Recent(self.started) for name in ("", *models)}
        self.ready = True

    def model(self, name: str, version: str = "") -> Model:
        """The model of this name and version; :class:`RequestError` without one."""
        if name not in self.models:
            raise RequestError(Reason.UNKNOWN, f"no model '{name}'{nearest(name[:100], self.models)}")
        model = self.models[name]
        model.check_version(version)
        return model

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
            if self.load is not None and not self.load.admits(started, self.workers.queue_length):
                raise RequestError(
                    Reason.BUSY, "the server cannot answer in time, even at its floor; try again later"
                )
            with self.workers.place():
                content = await body()
                encoded, done, computing = await self.workers.run(lambda: self._work(exchange, content))
            outcome, answer = "answered", done
            if self.load is not None:
                ended = time.perf_counter()
                self.load.answered(ended, done.point, ended - started, computing)
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

    def _work(self, exchange: Exchange[Encoded], content: bytes) -> tuple[Encoded, Answer, float]:
        """In a thread: the response as it is sent and as it was made, and the seconds that it took."""
        started = time.perf_counter()
        asked = exchange.decode(content)
        exchange.id = asked.id[:100]
        model = self.model(asked.model, asked.version)
        exchange.model = model.name
        answer = self.answer(model, asked)
        encoded = exchange.encode(asked, answer)
        return encoded, answer, time.perf_counter() - started

    def answer(self, model: Model, asked: Asked) -> Answer:
        """Answer a request.

        Raises:
            RequestError: what is wrong with it.
            UserError: the same, in the words of the runtime.
        """
        loaded = model.loaded  # once: it may be exchanged meanwhile
        session = loaded.session
        for name in asked.outputs:
            if name not in OUTPUTS:
                raise bad(f"there is no output '{name}'{nearest(name[:100], OUTPUTS)}")
        limits = _limits(asked.parameters)
        point = model.point_for(loaded, limits.pop("operating_point", None), limits.pop("max_risk", None))
        if len(asked.inputs) != 1:
            raise bad(f"the request has {len(asked.inputs)} inputs, expected one, '{INPUT}'")
        images = read_images(asked.inputs[0], session.manifest.input_shape, self.max_batch)
        session.plan(len(images), operating_point=point.name, **limits)
        try:
            prediction = session.predict(images, operating_point=point.name, **limits)
        except UserError as error:  # no matter of the request any more
            raise RequestError(Reason.FAILED, str(error)) from error
        self.metrics.images(model.name, prediction)
        if loaded.monitor is not None:
            loaded.monitor.add(prediction)
        return Answer(
            model=model.name,
            version=loaded.version,
            id=asked.id,
            parameters={
                "operating_point": point.name,
                "certified": point.certificate is not None and not prediction.capped,
                "capped": prediction.capped,
            },
            outputs=outputs_of(prediction, asked.outputs or list(OUTPUTS)),
            exits=np.bincount(prediction.exits, minlength=len(session.manifest.stages)).tolist(),
        )

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


def as_request_error(error: Exception) -> RequestError:
    """``error`` as the client may see it: without a traceback, and a bug as what it is."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UserError):
        return bad(str(error))
    return RequestError(
        Reason.FAILED, f"an error of the server: {type(error).__name__}: {in_one_line(str(error))}"
    )


def _limits(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a request, checked for their type."""
    limits: dict[str, Any] = {}
    for name, value in parameters.items():
        if name == "operating_point":
            if not isinstance(value, str):
                raise bad("the parameter operating_point is not a text")
            limits[name] = value
        elif name == "max_exit":
            if isinstance(value, bool) or not isinstance(value, int):
                raise bad("the parameter max_exit is not a whole number")
            limits[name] = value
        elif name in PARAMETERS:
            limits[name] = _number(name, value)
        else:
            raise bad(f"unknown parameter '{name[:100]}'{nearest(name[:100], PARAMETERS)}")
    return limits


def _number(name: str, value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise bad(f"the parameter {name} is not a finite number")


def little_endian(output: NDArray[Any]) -> bytes:
    """The raw content of an output."""
    return np.ascontiguousarray(output).tobytes()
