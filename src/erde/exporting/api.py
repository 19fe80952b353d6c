"""The public :func:`export`: a network as a sealed bundle, and the manifest of a bundle before calibration."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from erde import bundle
from erde.common.environment import erde_version
from erde.common.errors import UserError, nearest
from erde.common.files import make_folder
from erde.data.load import DataSplits
from erde.exporting.modules import prepare
from erde.exporting.onnx_files import ExportedStages, export_int8_stages, export_stages
from erde.exporting.parity import PARITY_TOLERANCE, probe_images
from erde.networks.network import EarlyExitNetwork
from erde.networks.shapes import example_input
from erde.recipe.schema import OPSETS
from erde.runtime.stages import StageRunner

PRECISIONS = ("fp32", "int8")
# Of int8 stages on another machine: a last bit that differs may tip a rounding. Switching off every optimisation
# of ONNX Runtime, which computes in float then, moves logits by 0.3 % of the largest; rounding itself, by 3 % and more.
INT8_TOLERANCE = bundle.MAX_TOLERANCE
REFERENCE_IMAGES = 2


@dataclass(frozen=True)
class ImageFormat:
    """The images of a bundle, for a network that was trained without ``erde.load_data``.

    Args:
        classes: two names or more, in the order of the logits.
        image_shape: (H, W, C) of the uint8 images that the runtime is given.
        mean, std: per channel, of pixels between 0 and 1, as in training: the network gets ``(pixel / 255 - mean) / std``.

    Raises:
        UserError: another number of channels in ``mean`` or ``std``, values that are not finite, a standard deviation that
            is not above 0, fewer than two classes.
    """

    classes: Sequence[str]
    image_shape: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.image_shape) != 3 or not all(
            isinstance(side, int) and side >= 1 for side in self.image_shape
        ):
            raise UserError(
                f"image_shape={self.image_shape!r}: expected (H, W, C), three whole numbers of 1 or more"
            )
        channels = self.image_shape[2]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise UserError(f"{name} has {len(values)} values, expected {channels}, one for each channel")
        if not all(math.isfinite(value) for value in self.mean):
            raise UserError(f"mean={tuple(self.mean)}: expected finite values, for pixels between 0 and 1")
        if not all(value > 0 and math.isfinite(value) for value in self.std):
            raise UserError(
                f"std={tuple(self.std)}: expected finite values above 0, for pixels between 0 and 1"
            )
        if (
            isinstance(self.classes, str)
            or len(self.classes) < 2
            or not all(isinstance(name, str) for name in self.classes)
        ):
            raise UserError(
                f"classes={self.classes!r}: expected a list of names, two or more, in the order of the logits"
            )


def build_manifest(
    stages_folder: Path, *, name: str, classes: tuple[str, ...], provenance: dict[str, Any]
) -> bundle.Manifest:
    """The manifest of exported stages before calibration: no image exits early."""
    exported = ExportedStages.read(stages_folder)
    cost = exported.cost
    if exported.quantisation is not None:
        provenance = {**provenance, "quantisation": json.loads(json.dumps(asdict(exported.quantisation)))}
    tolerance = PARITY_TOLERANCE if exported.precision == "fp32" else INT8_TOLERANCE
    images = probe_images(exported.input_shape, exported.mean, exported.std, count=REFERENCE_IMAGES).numpy()
    logits = StageRunner(exported.paths(stages_folder), threads=1).all_logits(images)
    return bundle.uncalibrated(
        sample=images,
        logits=logits,
        tolerance=tolerance,
        note="not calibrated: no image leaves early",
        name=name,
        classes=list(classes),
        mean=list(exported.mean),
        std=list(exported.std),
        precision=exported.precision,
        opset=exported.opset,
        stages=[
            bundle.Stage(file=file, exit_name=exit_name, macs=macs, parameters=parameters)
            for file, exit_name, macs, parameters in zip(
                exported.files, cost.exit_names, cost.macs, cost.parameters, strict=True
            )
        ],
        no_exit_macs=cost.no_exit_macs,
        no_exit_parameters=cost.no_exit_parameters,
        provenance=provenance,
        files={file: bundle.file_hash(stages_folder / file) for file in exported.files},
    )


def export(
    network: EarlyExitNetwork,
    data: DataSplits | ImageFormat,
    path: str | Path,
    *,
    name: str = "network",
    opset: int = 18,
    precision: str = "fp32",
) -> Path:
    """Write ``network`` as a sealed bundle that is not calibrated yet; :func:`erde.calibrate` comes next.

    ``data``, from ``erde.load_data`` or an :class:`ImageFormat`, has the classes, the image shape and the
    normalisation; for ``precision="int8"`` also train images, for ranges, and tune images, which decide how much stays
    in float. Torch and the exported stages are compared on train images, if there are any. ``opset``: of ONNX, 18 to 23.
    """
    folder = Path(path)
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision '{precision}'{nearest(precision, PRECISIONS)}")
    if opset not in range(OPSETS[0], OPSETS[1] + 1):
        raise UserError(f"opset is {opset}, expected {OPSETS[0]} to {OPSETS[1]}")
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another path, or remove it first")
    if not isinstance(data, DataSplits | ImageFormat):
        raise UserError(
            f"the data are a {type(data).__name__}, expected what erde.load_data gives, or an erde.ImageFormat(classes, "
            "image_shape, mean, std)"
        )
    train = data.train if isinstance(data, DataSplits) else None
    if precision == "int8" and train is None:
        raise UserError("precision='int8' needs images for its ranges: pass what erde.load_data gives")
    network = prepare(network)
    height, width, channels = data.image_shape
    with torch.no_grad():
        count = network.forward_final(example_input(network, (channels, height, width))).shape[-1]
    if count != len(data.classes):
        raise UserError(
            f"{len(data.classes)} class names for a network of {count} logits: give a name for each logit, in their order"
        )
    make_folder(folder.parent)
    floats, int8 = (folder.with_name(f".{folder.name}.{known}.partial") for known in PRECISIONS)
    try:
        stages = floats
        images = None if train is None else train.images
        mean, std = tuple(data.mean), tuple(data.std)
        exported = export_stages(network, data.image_shape, mean, std, floats, opset, images)
        if precision == "int8" and isinstance(data, DataSplits):
            stages, exported = int8, export_int8_stages(floats, int8, data.train, data.tune)
        provenance = {"erde": erde_version(), "torch": torch.__version__}
        manifest = build_manifest(stages, name=name, classes=tuple(data.classes), provenance=provenance)
        bundle.write(folder, manifest, exported.paths(stages))
    finally:
        for leftover in (floats, int8):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder
