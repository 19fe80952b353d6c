"""What a request means, whatever protocol it came by, and its answer: model, images, parameters, outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from erde.common.errors import UserError, nearest
from erde.runtime.prediction import Prediction
from erde.serving.errors import Reason, RequestError, bad
from erde.serving.log import request_id
from erde.serving.models import Model
from erde.serving.tensors import INPUT, OUTPUTS, Tensor, outputs_of, read_images

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
    prediction: Prediction  # of the runtime, from which the outputs were taken
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


class Answering:
    """Bytes of a request to those of its response. It counts nothing: it may run in a process of its own."""

    def __init__(self, models: Mapping[str, Model], max_batch: int) -> None:
        self.models, self.max_batch = models, max_batch

    def model(self, name: str, version: str = "") -> Model:
        """The model of this name and version; :class:`RequestError` without one."""
        if name not in self.models:
            raise RequestError(Reason.UNKNOWN, f"no model '{name}'{nearest(name[:100], self.models)}")
        model = self.models[name]
        model.check_version(version)
        return model

    def respond(self, exchange: Exchange[Encoded], content: bytes) -> tuple[Encoded, Answer, float]:
        """The response as it is sent and as it was made, and the seconds that it took.

        The exchange is told the request's own id and the model's name, also where it fails.

        Raises:
            RequestError: what is wrong with the request.
            UserError: the same, in the words of the runtime.
        """
        started = time.perf_counter()
        asked = exchange.decode(content)
        exchange.id = asked.id[:100]
        model = self.model(asked.model, asked.version)
        exchange.model = model.name
        answer = self._answer(model, asked)
        encoded = exchange.encode(asked, answer)
        return encoded, answer, time.perf_counter() - started

    def _answer(self, model: Model, asked: Asked) -> Answer:
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
            prediction=prediction,
            exits=np.bincount(prediction.exits, minlength=len(session.manifest.stages)).tolist(),
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
