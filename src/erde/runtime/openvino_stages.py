"""The ONNX stages of a network in OpenVINO. Nothing is imported from it before it is asked for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde.common.errors import UserError, in_one_line
from erde.runtime.stages import Stages, check_names, failed

# What OpenVINO's package reports to its maker over the network, as soon as it is imported.
TELEMETRY = "openvino_telemetry"


class OpenVinoStages(Stages):
    """The stages, each compiled for the CPU for the shortest answer, with a free number of images.

    Args:
        paths, takes_image: as of :class:`erde.runtime.stages.StageRunner`.
        threads: of OpenVINO within a stage; None leaves the choice to it.

    Raises:
        UserError: OpenVINO is not installed, or does not take a graph.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        threads: int | None = None,
        takes_image: Sequence[bool] | None = None,
    ) -> None:
        super().__init__(len(paths), takes_image)
        self._openvino = openvino = _import_openvino()
        self.version = f"openvino {openvino.__version__}"
        # The front end by name, not by the file's content: bundle.sealing has looked at ONNX files, and at no others.
        reader = openvino.frontend.FrontEndManager().load_by_framework("onnx")
        core = openvino.Core()
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            # Else the thread of every stage and of every session stays on the same core, and waits for what else is there.
            "ENABLE_CPU_PINNING": False,
            # Else bfloat16 where the processor has it, by which an answer would differ.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._compiled = []
        for path, gives_both in zip(paths, self._gives_features, strict=True):
            try:
                model = reader.convert(reader.load(str(path)))
                compiled = core.compile_model(model, "CPU", settings)
            except Exception as error:  # a bare RuntimeError, of many lines
                raise UserError(f"OpenVINO cannot load {path}: {in_one_line(str(error))}") from error
            outputs = [_name(output) for output in model.outputs]
            check_names(path, len(model.inputs), outputs, gives_both)
            self._compiled.append(compiled)
        shapes = [compiled.inputs[0].get_partial_shape() for compiled in self._compiled]
        self._single = [shape[0].is_static and shape[0].get_length() == 1 for shape in shapes]
        self._image_shape = tuple(side.get_length() if side.is_static else -1 for side in list(shapes[0])[1:])
        self._local = threading.local()

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape (H, W, C) of an image, as the first stage's graph tells it."""
        return self._image_shape

    def _outputs(self, index: int, x: NDArray[Any]) -> list[NDArray[Any]]:
        return [output.copy() for output in self._infer(index, x)]

    def _empty_outputs(self, index: int, x: NDArray[Any]) -> list[NDArray[Any]] | None:
        # OpenVINO keeps the last shapes for an empty batch, and later writes where nothing is: those of an image instead.
        return [output[:0].copy() for output in self._infer(index, np.zeros((1, *x.shape[1:]), x.dtype))]

    def run_bound(self, index: int, x: NDArray[Any]) -> tuple[NDArray[Any] | None, NDArray[np.float32]]:
        """Run a stage as :meth:`run` does, into buffers of this thread, which its next call overwrites."""
        if len(x) == 0 or self._single[index]:
            return self.run(index, x)
        try:
            outputs = self._infer(index, x)
        except Exception as error:
            raise failed(index, x, str(error)) from error
        if any(output.shape[0] != len(x) for output in outputs):
            raise failed(index, x, "it does not give one row for each image")
        return (outputs[0], outputs[1]) if self._gives_features[index] else (None, outputs[0])

    def _infer(self, index: int, x: NDArray[Any]) -> list[NDArray[Any]]:
        """The outputs of a stage in the memory of this thread's request."""
        requests = getattr(self._local, "requests", None)
        if requests is None:
            requests = self._local.requests = [compiled.create_infer_request() for compiled in self._compiled]
        request = requests[index]
        # Memory is shared with arrays that may be written to only, although nothing is written. Of another type they are
        # not cast: OpenVINO refuses them.
        x = np.require(x, None, ["C", "W"])
        request.set_input_tensor(self._openvino.Tensor(x, shared_memory=True))
        request.infer()
        return [tensor.data for tensor in request.output_tensors]


def _import_openvino() -> ModuleType:
    """OpenVINO without its telemetry: erde talks to nobody."""
    absent = TELEMETRY not in sys.modules
    if absent:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # so that importing it fails, and a stub takes its place
    try:
        import openvino
        import openvino.frontend
    except ImportError as error:
        raise UserError(
            "the engine 'openvino' needs the package openvino, which is not installed or does not load here: "
            "pip install 'erde[openvino]'"
        ) from error
    finally:
        if absent:
            del sys.modules[TELEMETRY]
    module: ModuleType = openvino
    return module


def _name(output: Any) -> str:
    """The name that ONNX gives an output; OpenVINO may know several for one tensor."""
    names = output.get_names()
    return next((name for name in ("features", "logits") if name in names), min(names, default=""))
