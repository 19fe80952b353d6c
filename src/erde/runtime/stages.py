"""The ONNX stages of a network in an engine, and in ONNX Runtime: run plainly, or bound to buffers that each thread keeps."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from erde.common.errors import UserError, in_one_line
from erde.common.splits import ImageSource

Providers = Sequence[str | tuple[str, dict[str, Any]]]
CPU = "CPUExecutionProvider"
# Each thread keeps buffers up to this size a stage; a larger batch gains nothing from them.
KEPT_BYTES = 16 * 2**20
# Of the outputs: logits are floats, features those or, between int8 stages, integers.
_TYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}


class Stages(ABC):
    """The stages of a network in an engine; several threads may share one.

    ``takes_image`` says per stage whether it takes the image and not what the stage before gave.
    """

    version: str  # the engine's name and version
    _single: list[
        bool
    ]  # per stage, whether it takes one image at a time only, as of a network of another program
    _gives_features: list[bool]

    def __init__(
        self,
        count: int,
        takes_image: Sequence[bool] | None,
        gives_features: Sequence[bool] | None = None,
    ) -> None:
        self.takes_image = list(takes_image or [index == 0 for index in range(count)])
        self._gives_features = list(gives_features or [not taken for taken in [*self.takes_image[1:], True]])

    def __len__(self) -> int:
        return len(self.takes_image)

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, ...]:
        """The shape (H, W, C) of an image, as the first stage's graph tells it."""

    @abstractmethod
    def _outputs(self, index: int, x: NDArray[Any]) -> list[NDArray[Any]]:
        """What stage ``index`` gives for a batch, features before logits; the arrays are the caller's."""

    @abstractmethod
    def _empty_outputs(self, index: int, x: NDArray[Any]) -> list[NDArray[Any]] | None:
        """The same for no images, without running it on them: some operators refuse an empty batch. None: it has to run."""

    def run(self, index: int, x: NDArray[Any]) -> tuple[NDArray[Any] | None, NDArray[np.float32]]:
        """Stage ``index`` on a batch: its feature map (None at a network's last stage) and its raw logits (B, K)."""
        if self._single[index] and len(x) > 1:
            return None, np.concatenate([self.run(index, x[row : row + 1])[1] for row in range(len(x))])
        try:
            outputs = self._empty_outputs(index, x) if len(x) == 0 else None
            if outputs is None:
                outputs = self._outputs(index, x)
        except Exception as error:
            raise failed(index, x, str(error)) from error
        if any(np.shape(output)[:1] != x.shape[:1] for output in outputs):
            raise failed(index, x, "it does not give one row for each image")
        return (outputs[0], outputs[1]) if self._gives_features[index] else (None, outputs[-1])

    def run_bound(self, index: int, x: NDArray[Any]) -> tuple[NDArray[Any] | None, NDArray[np.float32]]:
        """Run a stage as :meth:`run` does, into buffers of this thread, which its next call overwrites.

        ``x`` is C-contiguous and of the type that the stage takes: nothing is checked or copied.
        """
        return self.run(index, x)

    def gather(self, index: int, features: NDArray[Any], keep: NDArray[np.intp]) -> NDArray[Any]:
        """The rows ``keep`` of ``features`` (of the images), side by side as the input of stage ``index``; gone as above."""
        return features[keep]

    def all_logits(self, images: ImageSource, batch_size: int = 256) -> NDArray[np.float32]:
        """Raw logits (E, N, K) of every exit for uint8 images (N, H, W, C); nothing leaves early."""
        parts = []
        for start in range(0, max(1, len(images)), batch_size):  # once for no images: shapes stay right
            batch: NDArray[Any] = images[start : start + batch_size]
            x: NDArray[Any] | None = None
            rows = []
            for index in range(len(self)):
                taken = batch if self.takes_image[index] else x
                assert taken is not None
                x, logits = self.run(index, taken)
                rows.append(logits)
            parts.append(np.stack(rows))
        return np.concatenate(parts, axis=1)


class StageRunner(Stages):
    """The stages, each an ONNX Runtime session.

    Args:
        paths: the graphs in order; each gives ``features`` and ``logits``, but where the next one takes the image: those
            and the last give ``logits`` only.
        threads: of ONNX Runtime within a stage; None leaves the choice to it.
        providers: ONNX Runtime's execution providers; the CPU by default.
        spinning: whether idle threads of ONNX Runtime wait actively: quicker where the machine is this
            program's own, at the cost of a busy core. With one thread there is none that could.
        takes_image: per stage, whether it takes the image and not what the stage before gave; the first one only
            without it.
        gives_features: per graph, whether it gives features beside logits, where the graphs are no chain.

    Raises:
        UserError: a graph that ONNX Runtime does not take, or a provider that it does not have.
    """

    version = f"onnxruntime {onnxruntime.__version__}"

    def __init__(
        self,
        paths: Sequence[Path],
        threads: int | None = None,
        providers: Providers | None = None,
        spinning: bool = True,
        takes_image: Sequence[bool] | None = None,
        gives_features: Sequence[bool] | None = None,
    ) -> None:
        super().__init__(len(paths), takes_image, gives_features)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, and need not stand on the terminal besides
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        if not spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Every stage has threads of its own: those of one must not wait actively while the next one works.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Not by the file's name or content: bundle.sealing has looked at ONNX files, and at no others.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        chosen = list(providers or [CPU])
        _check_available(chosen)
        self._sessions = []
        for path, gives_both in zip(paths, self._gives_features, strict=True):
            try:
                session = onnxruntime.InferenceSession(str(path), options, providers=chosen)
            except Exception as error:  # ONNX Runtime raises types of its own for each kind of bad model
                raise UserError(f"ONNX Runtime cannot load {path}: {in_one_line(str(error))}") from error
            self._sessions.append(session)
            outputs = [output.name for output in session.get_outputs()]
            check_names(path, len(session.get_inputs()), outputs, gives_both)
        self._inputs = [session.get_inputs()[0].name for session in self._sessions]
        self._empty = [_empty_of(session) for session in self._sessions]
        self._single = [session.get_inputs()[0].shape[:1] == [1] for session in self._sessions]
        # On another device ONNX Runtime places what it computes by itself.
        self._binds = chosen == [CPU]
        self._local = threading.local()

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape (H, W, C) of an image, as the first stage's graph tells it."""
        return tuple(self._sessions[0].get_inputs()[0].shape[1:])

    def _outputs(self, index: int, x: NDArray[Any]) -> list[NDArray[Any]]:
        outputs: list[NDArray[Any]] = self._sessions[index].run(None, {self._inputs[index]: x})
        return outputs

    def _empty_outputs(self, index: int, x: NDArray[Any]) -> list[NDArray[Any]] | None:
        return self._empty[index]

    def run_bound(self, index: int, x: NDArray[Any]) -> tuple[NDArray[Any] | None, NDArray[np.float32]]:
        """Run a stage as :meth:`run` does, into buffers of this thread, which its next call overwrites.

        ``x`` is C-contiguous and of the type that the stage takes: nothing is checked or copied.
        """
        slot = self._slots()[index] if self._binds and not self._single[index] else None
        try:
            if slot is None or not slot.bind(x, ours=not self.takes_image[index]):
                return self.run(index, x)
            slot.run()
        except UserError:
            raise
        except Exception as error:
            raise failed(index, x, str(error)) from error
        return slot.features, slot.logits

    def gather(self, index: int, features: NDArray[Any], keep: NDArray[np.intp]) -> NDArray[Any]:
        """The rows ``keep`` of ``features`` (of the images), side by side as the input of stage ``index``; gone as above."""
        slot = self._slots()[index]
        if slot is None or features.nbytes > KEPT_BYTES:
            return features[keep]
        if slot.gathered is None or len(slot.gathered) < len(keep):
            slot.gathered = np.empty_like(features)
        taken = slot.gathered[: len(keep)]
        # "clip" since "raise" writes by way of a second buffer; the rows are there.
        np.take(features, keep, axis=0, out=taken, mode="clip")
        return taken

    def _slots(self) -> list[_Slot | None]:
        slots: list[_Slot | None] | None = getattr(self._local, "slots", None)
        if slots is None:
            slots = self._local.slots = [_Slot.of(session) for session in self._sessions]
        return slots


def _empty_of(session: onnxruntime.InferenceSession) -> list[NDArray[Any]] | None:
    """The outputs of a stage for no images, where the graph tells its shapes: some operators refuse an empty batch.

    ONNX Runtime's LSTM even ends the process.
    """
    known = _known_outputs(session)
    return None if known is None else [np.empty((0, *shape), kind) for shape, kind in known.values()]


def _known_outputs(
    session: onnxruntime.InferenceSession,
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]] | None:
    """Shape for each image and type of every output; None where the graph does not tell all."""
    known = {}
    for output in session.get_outputs():
        # A rank that the graph does not tell is no shape.
        is_known = len(output.shape) >= 2 and all(isinstance(side, int) for side in output.shape[1:])
        if output.type not in _TYPES or not is_known:
            return None
        known[output.name] = (tuple(output.shape[1:]), _TYPES[output.type])
    return known


def _check_available(providers: Providers) -> None:
    # ONNX Runtime by itself would say so on the terminal, and quietly go on with the CPU.
    available = onnxruntime.get_available_providers()
    for provider in providers:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            raise UserError(
                f"this ONNX Runtime has no provider '{name}', only {', '.join(available)}: choose one of these, or "
                "install the onnxruntime package that has it"
            )


def check_names(path: Path, inputs: int, outputs: Sequence[str], gives_features: bool) -> None:
    """Refuse a graph whose inputs and outputs are not those of a stage."""
    # What comes alone is taken for logits, whatever its name: plain graphs of other programs run too.
    if inputs != 1 or (list(outputs) != ["features", "logits"] if gives_features else len(outputs) != 1):
        expected = "the outputs features and logits" if gives_features else "one output"
        raise UserError(
            f"{path} cannot be run as a stage: it has {inputs} inputs and the outputs {in_one_line(repr(list(outputs)))}, "
            f"expected one input and {expected}"
        )


def failed(index: int, x: NDArray[Any], reason: str) -> UserError:
    """Why stage ``index`` gave nothing for ``x``."""
    return UserError(
        f"stage {index} fails on a batch of {len(x)}: {in_one_line(reason)}: copy the bundle again, or export it again"
    )


class _Slot:
    """The buffers of one stage for one thread: its outputs, and the address of its input.

    ONNX Runtime holds addresses, so the buffers live as long as the slot; the input is the caller's.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        outputs: dict[str, tuple[tuple[int, ...], type[np.generic]]],
    ) -> None:
        self._session, self._binding = session, session.io_binding()
        self._input = session.get_inputs()[0].name
        self._outputs = outputs
        self._kept: dict[str, NDArray[Any]] = {}
        self._rows = self._address = -1
        self._bound: NDArray[Any] | None = None
        self._bytes_per_row = max(np.empty(shape, kind).nbytes for shape, kind in outputs.values())
        self.features: NDArray[Any] | None = None
        self.logits: NDArray[np.float32] = np.empty(0, dtype=np.float32)
        self.gathered: NDArray[Any] | None = None

    @classmethod
    def of(cls, session: onnxruntime.InferenceSession) -> _Slot | None:
        """A slot for a stage whose outputs have a known type and shape for each image; else None."""
        outputs = _known_outputs(session)
        return None if outputs is None else cls(session, outputs)

    def bind(self, x: NDArray[Any], ours: bool) -> bool:
        """Make ``x`` the input; False where the batch is empty or too large for buffers that stay.

        ``ours``: what a stage before gave, which keeps its place and shape, so that the same array needs no second look.
        """
        if x is self._bound:
            return True
        rows = len(x)
        if rows == 0 or rows * self._bytes_per_row > KEPT_BYTES:
            return False
        address = x.__array_interface__["data"][0]
        if rows == self._rows and address == self._address:
            return True
        self._bound = None
        if rows != self._rows:
            self._rows = -1  # until all is bound
            self._bind_outputs(rows)
        self._binding.bind_input(self._input, "cpu", 0, x.dtype.type, x.shape, address)
        self._rows, self._address = rows, address
        # Known again by itself, and so kept: no more than a buffer would be.
        self._bound = x if ours and x.nbytes <= KEPT_BYTES else None
        return True

    def _bind_outputs(self, rows: int) -> None:
        for name, (shape, kind) in self._outputs.items():
            kept = self._kept.get(name)
            if kept is None or len(kept) < rows:
                kept = self._kept[name] = np.empty((rows, *shape), kind)
            view = kept[:rows]
            self._binding.bind_output(name, "cpu", 0, kind, view.shape, kept.ctypes.data)
            if name == "features":
                self.features = view
            else:
                self.logits = view

    def run(self) -> None:
        """Compute the outputs."""
        # Without RunOptions: ONNX Runtime's wrapper would look one up in them, at the price of a whole stage.
        self._session.run_with_iobinding(self._binding)
