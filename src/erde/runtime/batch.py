"""A bundle as a function from columns to columns, which bulk engines (Ray Data, Spark, Dask) carry to their workers."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde.bundle.manifest import MANIFEST
from erde.bundle.shipped import bundle_folder
from erde.common.errors import UserError, in_one_line, nearest
from erde.runtime.inputs import read_rows
from erde.runtime.session import Session

# Columns of the answers and their types. Where ``error`` is not "", the others have the values of ``UNANSWERED``.
ANSWERS: dict[str, type] = {
    "label": np.int64, "class": str, "probability": np.float64, "exit": np.int64, "operating_point": str,
    "macs": np.int64, "error": str,
}  # fmt: skip
UNANSWERED: tuple[Any, ...] = (-1, "", float("nan"), -1, "", 0)

# The sessions of this process: (process, bundle, threads, engine) -> (state of the manifest, session). A forked worker
# has a copy of the table, and no threads of ONNX Runtime: the process's id keeps it from using one, or closing it.
_sessions: dict[tuple[Any, ...], tuple[tuple[int, ...], Session]] = {}
# By process: a fork may copy a lock that is held, and nobody would release the copy.
_opening: dict[int, threading.Lock] = {}


class Predictor:
    """Answer the images of a column; for ``map_batches`` and the like.

    It is pickled as its arguments. The worker opens the bundle at the first call, once per process; several threads
    may share it.

    Args:
        bundle: the bundle's folder as the worker sees it, ``digits-demo``, or ``hf://OWNER/NAME@REVISION``.
        column: the column of images: encoded bytes, paths, uint8 arrays, or Hugging Face's ``{"bytes", "path"}``.
        keep: names of columns that are passed through.
        operating_point, max_exit, max_macs: as of :meth:`Session.predict`.
        batch_size: images that are decoded and answered at a time, however many a call brings.
        threads: of the engine within one call: engines start a worker per core.
        engine: as of :class:`Session`.

    Raises:
        UserError: a wrong ``batch_size``, ``column`` or ``keep``; all else at the first call.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        column: str = "image",
        keep: Iterable[str] = (),
        operating_point: str | None = None,
        max_exit: int | None = None,
        max_macs: float | None = None,
        batch_size: int = 64,
        threads: int | None = 1,
        engine: str = "onnxruntime",
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, expected 1 or more")
        if isinstance(keep, str):
            raise UserError(f"keep is '{keep}', expected a list of names: give keep=['{keep}']")
        keep = tuple(keep)
        for index, name in enumerate(keep):
            if name in keep[:index]:
                raise UserError(f"keep has '{name}' twice: give each name once")
            if name in ANSWERS:
                raise UserError(f"keep has '{name}', which is a column of the answers: rename it first")
        self.bundle, self.column, self.keep = str(bundle), column, keep
        self._limits: dict[str, Any] = {
            "operating_point": operating_point, "max_exit": max_exit, "max_macs": max_macs,
        }  # fmt: skip
        self.threads = threads
        self._batch_size, self._engine = batch_size, engine
        self._opened: dict[int, Session] = {}  # by process, as above

    def __getstate__(self) -> dict[str, Any]:
        # A session cannot be pickled, and is large.
        return {**self.__dict__, "_opened": {}}

    @property
    def session(self) -> Session:
        """The session of this process, opened if there is none.

        Raises:
            UserError: no bundle there, a damaged one, or an operating point or a limit that it does not have.
        """
        session = self._opened.get(os.getpid())
        if session is None:
            session = _session_at(self.bundle, self.threads, self._engine)
            session.plan(1, **self._limits)
            self._opened[os.getpid()] = session
        return session

    def __call__(self, columns: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Answer N images: the columns ``ANSWERS`` and those of ``keep``, N values each.

        ``label`` and ``exit`` int64, ``macs`` int64, ``probability`` float64, ``class``, ``operating_point`` and ``error``
        text. An image that cannot be answered has its reason in ``error``, label and exit -1, and probability NaN.

        Args:
            columns: by name; arrays, lists, or a table of pandas.

        Raises:
            UserError: a column that is not there, or one that holds no images; what ``session`` raises.
        """
        names = list(columns)
        for name in (self.column, *self.keep):
            if name not in names:
                raise UserError(
                    f"no column '{name}'{nearest(name, map(str, names))}: name the images' in column=, others in keep="
                )
        images = columns[self.column]
        if not isinstance(images, list | tuple):
            images = np.asarray(images)
            # Text, bytes and objects are looked at one by one; NumPy's arrays of images are all alike.
            if images.dtype.kind not in "OSU" and (images.dtype != np.uint8 or images.ndim < 3):
                raise UserError(
                    f"column '{self.column}' holds {images.dtype} of shape {images.shape}, expected encoded images, paths "
                    "or uint8 images (N, H, W, C): name the column of images in column="
                )
        rows: list[tuple[Any, ...]] = []
        for start in range(0, len(images), self._batch_size):
            rows += self._answer(images[start : start + self._batch_size])
        # Text keeps its type where there is none: an empty column of objects has no type in Arrow.
        answers: dict[str, NDArray[Any]] = {
            name: np.array([row[place] for row in rows], dtype=kind)
            for place, (name, kind) in enumerate(ANSWERS.items())
        }
        return {name: np.asarray(columns[name]) for name in self.keep} | answers

    def _answer(self, images: Iterable[Any]) -> list[tuple[Any, ...]]:
        """A row of ``ANSWERS`` for each image."""
        session = self.session
        batch, reasons = read_rows(images, session.manifest.input_shape)
        answered = iter(self._predict(session, batch))
        return [next(answered) if not reason else (*UNANSWERED, reason) for reason in reasons]

    def _predict(self, session: Session, batch: NDArray[np.uint8]) -> list[tuple[Any, ...]]:
        try:
            answer = session.predict(batch, **self._limits)
        except UserError as error:  # the limits were checked before: it is the images
            if len(batch) > 1:  # which of them?
                return [row for index in range(len(batch)) for row in self._predict(session, batch[[index]])]
            return [(*UNANSWERED, in_one_line(str(error)))]
        probabilities = answer.probabilities[np.arange(len(batch)), answer.labels]
        point = answer.operating_point
        return [
            (label, name, probability, exit, point, macs, "")
            for label, name, probability, exit, macs in zip(
                answer.labels, answer.names, probabilities, answer.exits, answer.macs, strict=True
            )
        ]


def _session_at(bundle: str, threads: int | None, engine: str) -> Session:
    """This process's session of a bundle; a new one where another bundle has taken its place."""
    folder = bundle_folder(bundle).absolute()
    try:
        about = (folder / MANIFEST).stat()
    except OSError as error:
        raise UserError(
            f"no bundle at {folder} on the machine {socket.gethostname()}: every worker opens it there; copy it to the same "
            "place on all machines, or to a folder that they share, and give its absolute path"
        ) from error
    state = (about.st_mtime_ns, about.st_size, about.st_ino)
    key = (os.getpid(), str(folder), threads, engine)
    with _opening.setdefault(os.getpid(), threading.Lock()):
        kept = _sessions.get(key)
        if kept is None or kept[0] != state:
            kept = state, Session(folder, threads=threads, spinning=False, engine=engine)
            _sessions[key] = kept
        return kept[1]
