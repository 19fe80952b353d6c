"""erde: early-exit image classifiers, distilled exit by exit, certified, and run without torch.

The names below load what they need when first used, so that ``import erde`` stays light.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erde.acceleration.work import accelerate as accelerate
    from erde.calibration.bundles import calibrate as calibrate
    from erde.calibration.recalibration import ask_for_labels as ask_for_labels
    from erde.calibration.recalibration import recalibrate_with_labels as recalibrate_with_labels
    from erde.chains.cascading import cascade as cascade
    from erde.chains.preprocessing import Preprocessing as Preprocessing
    from erde.chains.single_file import write_single_file as write_single_file
    from erde.common.errors import UserError as UserError
    from erde.data.load import load_data as load_data
    from erde.exporting.api import ImageFormat as ImageFormat
    from erde.exporting.api import export as export
    from erde.networks.attach import attach_exits as attach_exits
    from erde.networks.backbones import build_backbone as build_backbone
    from erde.networks.foreign_weights import adapt_teacher as adapt_teacher
    from erde.networks.foreign_weights import load_teacher_weights as load_teacher_weights
    from erde.networks.network import EarlyExitNetwork as EarlyExitNetwork
    from erde.networks.network import keep_exits as keep_exits
    from erde.recipe.load import load_config as load_config
    from erde.runs.chain import run as run
    from erde.runtime.batch import Predictor as Predictor
    from erde.runtime.session import load as load
    from erde.training.api import distill as distill
    from erde.training.api import train as train

    __version__: str

# ONNX Runtime 1.29 and later would keep a file below the home folder and report its use to its makers. It looks at
# this when it is imported; whoever sets it to 0 is asked.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "accelerate": "erde.acceleration.work",
    "adapt_teacher": "erde.networks.foreign_weights",
    "ask_for_labels": "erde.calibration.recalibration",
    "attach_exits": "erde.networks.attach",
    "build_backbone": "erde.networks.backbones",
    "calibrate": "erde.calibration.bundles",
    "cascade": "erde.chains.cascading",
    "distill": "erde.training.api",
    "EarlyExitNetwork": "erde.networks.network",
    "export": "erde.exporting.api",
    "ImageFormat": "erde.exporting.api",
    "keep_exits": "erde.networks.network",
    "load": "erde.runtime.session",
    "load_config": "erde.recipe.load",
    "load_data": "erde.data.load",
    "load_teacher_weights": "erde.networks.foreign_weights",
    "Predictor": "erde.runtime.batch",
    "Preprocessing": "erde.chains.preprocessing",
    "recalibrate_with_labels": "erde.calibration.recalibration",
    "run": "erde.runs.chain",
    "train": "erde.training.api",
    "UserError": "erde.common.errors",
    "write_single_file": "erde.chains.single_file",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from erde.common.environment import erde_version

        return erde_version()
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'erde' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
