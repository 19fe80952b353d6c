"""What ``erde bench`` runs in a fresh process: load, answer one image, then a batch, and say when and how large."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.typing import NDArray


def main(path: str, batch: str) -> None:
    """Answer with the bundle or the plain graph at ``path``; ``batch`` is an ``.npy`` of uint8 images."""
    import numpy as np

    images = np.load(batch, mmap_mode="r")
    first = np.array(images[:1])
    answer: Callable[[NDArray[np.uint8]], object]
    if Path(path).is_dir():
        from erde.runtime.session import Session

        answer = Session(path, threads=1).predict
    else:
        from erde.runtime.stages import StageRunner

        answer = partial(StageRunner([Path(path)], threads=1).run, 0)
    answer(first)
    answered = time.time()
    answer(np.array(images))
    print(json.dumps({"answered": answered, "peak_mib": _peak_mib()}))


def _peak_mib() -> float | None:
    # Linux lets a new process start with its parent's peak in getrusage; this file starts anew.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
