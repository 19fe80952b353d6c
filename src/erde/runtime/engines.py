"""The engines that run a bundle's stages, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from erde.common.errors import UserError, nearest
from erde.runtime.stages import Providers, StageRunner, Stages

Engine = Literal["onnxruntime", "openvino"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


def check_engine(name: str) -> Engine:
    """``name`` as an engine; :class:`UserError` where there is none of that name."""
    for engine in ENGINES:
        if engine == name:
            return engine
    raise UserError(f"no engine '{name}'{nearest(name, ENGINES)}: expected {' or '.join(ENGINES)}")


def open_stages(
    engine: str,
    paths: Sequence[Path],
    threads: int | None = None,
    providers: Providers | None = None,
    spinning: bool = True,
    takes_image: Sequence[bool] | None = None,
) -> Stages:
    """The graphs at ``paths`` in an engine; the arguments are those of :class:`erde.runtime.stages.StageRunner`.

    Raises:
        UserError: no such engine, one that is not installed or does not take a graph; providers for OpenVINO.
    """
    if check_engine(engine) == "onnxruntime":
        return StageRunner(paths, threads, providers, spinning, takes_image)
    if providers is not None:
        raise UserError(
            "providers are ONNX Runtime's: leave them out with engine='openvino', which uses the CPU"
        )
    from erde.runtime.openvino_stages import OpenVinoStages

    return OpenVinoStages(paths, threads, takes_image)
