"""erde: early-exit image classifiers, distilled exit by exit, certified, and run without torch.

The names below load what they need when first used, so that ``import erde`` stays light.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erde.backbones import build_backbone as build_backbone
    from erde.calibration import calibrate as calibrate
    from erde.config import load_config as load_config
    from erde.data import load_data as load_data
    from erde.exits import EarlyExitNetwork as EarlyExitNetwork
    from erde.exits import attach_exits as attach_exits
    from erde.export import ImageFormat as ImageFormat
    from erde.export import export as export
    from erde.fit import distill as distill
    from erde.fit import train as train
    from erde.pipeline import run as run
    from erde.recalibration import ask_for_labels as ask_for_labels
    from erde.recalibration import recalibrate_with_labels as recalibrate_with_labels

    __version__: str

# ONNX Runtime 1.29 and later would keep a file below the home folder and report its use to its makers. It looks at
# this when it is imported; whoever sets it to 0 is asked.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "ask_for_labels": "erde.recalibration",
    "attach_exits": "erde.exits",
    "build_backbone": "erde.backbones",
    "calibrate": "erde.calibration",
    "distill": "erde.fit",
    "EarlyExitNetwork": "erde.exits",
    "export": "erde.export",
    "ImageFormat": "erde.export",
    "load_config": "erde.config",
    "load_data": "erde.data",
    "recalibrate_with_labels": "erde.recalibration",
    "run": "erde.pipeline",
    "train": "erde.fit",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("erde")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'erde' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
