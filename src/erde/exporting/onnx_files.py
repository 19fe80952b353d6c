"""Networks to ONNX: one file per stage with the preprocessing in the first, or one plain graph; float or int8."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from erde import bundle
from erde.bundle.graph_check import refusal
from erde.common.environment import erde_version
from erde.common.errors import UserError, nearest
from erde.common.files import make_folder, replacing_file, replacing_folder, write_json
from erde.common.splits import ImageSource, TrainSplit, TuneSplit
from erde.data.load import DataSplits
from erde.exporting.graphs import block_input, strip_metadata
from erde.exporting.quantisation import Quantisation, quantise, quantise_stages, range_images
from erde.networks.cost import NetworkCost, network_cost
from erde.networks.network import EarlyExitNetwork
from erde.networks.shapes import Handed
from erde.policy.points import OperatingPoint, Precision
from erde.runtime.stages import StageRunner

STAGES = "stages.json"
FEATURES_IN = "features_in"
PRECISIONS = ("fp32", "int8")
# Two images first: where they agree and one alone does not, the network looks at the size of the batch.
PARITY_BATCHES = (2, 0, 1, 7, 32)
# float32 kernels of two libraries differ in the last bits; relative to the spread of an exit's logits,
PARITY_TOLERANCE = 1e-4
# and to their size, of which float32 holds seven digits.
_OF_THE_LARGEST = 1e-5
# Torch's own rounding, float32 against float64, may be this many times as large in another library, which adds in
# another order; it is measured on so many images.
_TIMES_OWN_ROUNDING = 10.0
_ROUNDING_IMAGES = 8
# Beyond this share of the spread a comparison says nothing.
_MOST_ROUNDING = 0.05
# Of int8 stages on another machine: a last bit that differs may tip a rounding. Switching off every optimisation
# of ONNX Runtime, which computes in float then, moves logits by 0.3 % of the largest; rounding itself, by 3 % and more.
INT8_TOLERANCE = bundle.MAX_TOLERANCE
REFERENCE_IMAGES = 2


@dataclass(frozen=True)
class ImageFormat:
    """What a bundle says of its images, for a network that was trained without ``erde.load_data``.

    Args:
        classes: the names, in the order of the logits.
        image_shape: (H, W, C) of the uint8 images that the runtime is given.
        mean, std: per channel, of pixels between 0 and 1, as in training: the network gets ``(pixel / 255 - mean) / std``.

    Raises:
        UserError: another number of channels in ``mean`` or ``std``, a standard deviation that is not above 0, no classes.
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
        if not all(value > 0 for value in self.std):
            raise UserError(f"std={tuple(self.std)}: expected values above 0, for pixels between 0 and 1")
        if (
            isinstance(self.classes, str)
            or not self.classes
            or not all(isinstance(one, str) for one in self.classes)
        ):
            raise UserError(f"classes={self.classes!r}: expected a list of names, in the order of the logits")


@dataclass(frozen=True)
class ExportedStages:
    """What stands in a folder of stages, apart from the graphs."""

    files: tuple[str, ...]
    cost: NetworkCost
    opset: int
    input_shape: tuple[int, int, int]  # H, W, C
    mean: tuple[float, ...]
    std: tuple[float, ...]
    quantisation: Quantisation | None = None  # of int8 stages

    @property
    def precision(self) -> Precision:
        """What the stages compute in."""
        return "fp32" if self.quantisation is None else "int8"

    @classmethod
    def read(cls, folder: Path) -> ExportedStages:
        """Read ``stages.json``; :class:`UserError` where it is damaged."""
        path = folder / STAGES
        try:
            return cls._from_json(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged: remove the folder {folder} and run erde export again"
            ) from error

    @classmethod
    def _from_json(cls, value: Any) -> ExportedStages:
        cost = value["cost"]
        height, width, channels = value["input_shape"]
        quantisation = value.get("quantisation")
        return cls(
            files=tuple(value["files"]),
            cost=NetworkCost(
                exit_names=tuple(cost["exit_names"]),
                macs=tuple(cost["macs"]),
                parameters=tuple(cost["parameters"]),
                no_exit_macs=cost["no_exit_macs"],
                no_exit_parameters=cost["no_exit_parameters"],
            ),
            opset=value["opset"],
            input_shape=(height, width, channels),
            mean=tuple(value["mean"]),
            std=tuple(value["std"]),
            quantisation=None if quantisation is None else Quantisation.from_json(quantisation),
        )

    def paths(self, folder: Path) -> list[Path]:
        """The stages' files in order."""
        return [folder / name for name in self.files]


class _Preprocess(nn.Module):
    """uint8 (B, H, W, C) to normalised float32 (B, C, H, W), as the training batches are."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        column = (-1, 1, 1)
        self.register_buffer("scale", torch.tensor([1 / (255 * value) for value in std]).reshape(column))
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
        self.register_buffer("shift", torch.tensor(shift).reshape(column))

    def forward(self, images: Tensor) -> Tensor:
        # Channels first: a factor per plane is many times faster than one per neighbouring number.
        return images.permute(0, 3, 1, 2).to(torch.float32) * self.scale + self.shift


class _WholeMapAverage(nn.Module):
    """``AdaptiveAvgPool2d(1)`` as a pooling of fixed size, which ONNX Runtime keeps in its blocked layout."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, x.shape[-2:])


def _for_export(network: EarlyExitNetwork) -> EarlyExitNetwork:
    """A copy whose modules export to plain graphs; the numbers are the same."""
    if not isinstance(network, EarlyExitNetwork):
        raise UserError(
            f"the network is a {type(network).__name__}: put exits on it first (erde.attach_exits)"
        )
    for name, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"the network has parameters of {dtype} ('{name}'), expected float32: call network.float() first"
            )
    network = copy.deepcopy(network).to("cpu").eval()
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size in (1, (1, 1)):
                setattr(module, name, _WholeMapAverage())
    return network


class _Pack(nn.Module):
    """Several tensors side by side as one (B, N), since a stage's file hands over one tensor; one stays as it is."""

    def forward(self, handed: Handed) -> Tensor:
        if isinstance(handed, Tensor):
            return handed
        return torch.cat([one.flatten(1) for one in handed], dim=1)


class _Unpack(nn.Module):
    """The tensors that :class:`_Pack` put side by side; ``shapes`` are those of one image."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.shapes = [tuple(shape) for shape in shapes]

    def forward(self, packed: Tensor) -> tuple[Tensor, ...]:
        parts = torch.split(packed, [math.prod(shape) for shape in self.shapes], dim=1)
        return tuple(
            part if len(shape) == 1 else torch.unflatten(part, 1, shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        )


class _Stage(nn.Module):
    def __init__(self, enter: nn.Module, network: EarlyExitNetwork, index: int) -> None:
        super().__init__()
        self.enter, self.stage, self.head = enter, network.stages[index], network.heads[index]
        self.pack, self.looks_at = _Pack(), network.looks_at[index]
        self.is_last = index == len(network.stages) - 1

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        handed = self.stage(self.enter(x))
        logits: Tensor = self.head(handed if self.looks_at is None else handed[self.looks_at])
        return logits if self.is_last else (self.pack(handed), logits)

    def handed_over(self, x: Tensor) -> Handed:
        """What the stage gives before it is packed."""
        handed: Handed = self.stage(self.enter(x))
        return handed


class _Plain(nn.Module):
    def __init__(self, preprocess: nn.Module, network: EarlyExitNetwork) -> None:
        super().__init__()
        self.preprocess, self.network = preprocess, network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.forward_final(self.preprocess(images))


def export_stages(
    network: EarlyExitNetwork,
    input_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    folder: Path,
    opset: int = 18,
    images: ImageSource | None = None,
) -> ExportedStages:
    """Write ``stage_<k>.onnx`` and ``stages.json`` to ``folder``, in one step, after a parity check.

    Stage 0 takes uint8 (B, H, W, C); every stage gives ``features`` and raw ``logits`` (B, K), the last
    ``logits`` only. The batch axis is dynamic.

    Args:
        images: what torch and ONNX Runtime are compared on, uint8 (N, H, W, C), of which the first 32 are used; without
            them smooth random images with the mean and standard deviation that the network is made for.

    Raises:
        UserError: where ONNX Runtime and torch disagree at any exit, or an image's logits depend on the other images
            of its batch; then nothing is written.
    """
    network = _for_export(network)
    height, width, channels = input_shape
    preprocess = _Preprocess(mean, std)
    exits = len(network.stages)
    files = tuple(f"stage_{index}.onnx" for index in range(exits))
    exported = ExportedStages(
        files, network_cost(network, (channels, height, width)), opset, input_shape, mean, std
    )
    probes = _probe_images(max(PARITY_BATCHES), input_shape, mean, std, images)
    with replacing_folder(folder) as beside:
        x = probes[:2]
        enter: nn.Module = preprocess
        for index, name in enumerate(files):
            module = _Stage(enter, network, index).eval()
            outputs = ["logits"] if module.is_last else ["features", "logits"]
            _export_graph(module, x, beside / name, ["images" if index == 0 else FEATURES_IN], outputs, opset)
            reason = refusal(beside / name)
            if reason is not None:
                raise UserError(
                    f"this network cannot be a bundle: its graph {reason} (docs/formats.md: what is verified)"
                )
            with torch.no_grad():
                handed = module.handed_over(x)
            x = module.pack(handed)
            tensors = () if isinstance(handed, Tensor) else handed
            enter = _Unpack([one.shape[1:] for one in tensors]) if tensors else nn.Identity()
        _check_parity(network, preprocess, exported, beside, probes)
        write_json(beside / STAGES, asdict(exported))
    return exported


def export_int8_stages(
    source: Path, folder: Path, train: TrainSplit, tune: TuneSplit, seed: int = 0
) -> ExportedStages:
    """Write the float stages in the folder ``source`` in int8 to ``folder``, in one step.

    Ranges come from train images; how much stays in float is decided on tune. See quantisation.py.

    Raises:
        UserError: where shapes are wrong, or an image's logits depend on its batch; then nothing is written.
    """
    exported = ExportedStages.read(source)
    with replacing_folder(folder) as beside:
        quantisation = quantise_stages(exported.paths(source), beside, train, tune, seed)
        exported = replace(exported, quantisation=quantisation)
        probes = _probe_images(
            max(PARITY_BATCHES), exported.input_shape, exported.mean, exported.std, train.images
        )
        _check_batches(exported, beside, probes)
        write_json(beside / STAGES, asdict(exported))
    return exported


def export_int8_plain(
    source: Path, path: Path, train: TrainSplit, kept_in_float: Sequence[str], seed: int = 0
) -> None:
    """Write the plain float graph ``source`` in int8 to ``path``, with the ranges and choices of the stages."""
    make_folder(path.parent)
    quantise(source, path, range_images(train, seed), kept_in_float)


def export_plain(
    network: EarlyExitNetwork,
    input_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    path: Path,
    opset: int = 18,
    images: ImageSource | None = None,
) -> None:
    """Write the network without exits as one ordinary ONNX file: uint8 ``images`` to raw ``logits``.

    It is compared with torch as :func:`export_stages` does.
    """
    preprocess = _Preprocess(mean, std)
    network = _for_export(network)
    module = _Plain(preprocess, network).eval()
    make_folder(path.parent)
    probes = _probe_images(max(PARITY_BATCHES), input_shape, mean, std, images)
    with replacing_file(path) as beside:
        _export_graph(module, probes[:2], beside, ["images"], ["logits"], opset)
        runner = StageRunner([beside], threads=1)
        allowed = _allowed_differences(network, preprocess, probes, ["final"])
        for batch in PARITY_BATCHES:
            with torch.no_grad():
                expected = module(probes[: max(1, batch)]).numpy()[:batch]
            logits = runner.run(0, probes[:batch].numpy())[1]
            _check_equal(logits, expected, "final", batch, allowed[0])


def _probe_images(
    count: int,
    input_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    images: ImageSource | None = None,
) -> Tensor:
    """``count`` images, uint8 (N, H, W, C): those that are given, else random ones that are smooth as photographs are.

    White noise will not do: networks are ill-conditioned on what is so far from what they were trained on, and two
    libraries then differ without an error in either. No one's picture is shipped.
    """
    if images is not None and len(images) >= count:
        return torch.from_numpy(np.array(images[:count]))
    height, width, channels = input_shape
    generator = torch.Generator().manual_seed(20)
    smooth = torch.zeros(count, channels, height, width)
    side = 2
    while side <= 2 * max(height, width):
        # Each octave half as strong as the one before, about as in photographs.
        noise = torch.randn(count, channels, min(side, height), min(side, width), generator=generator)
        smooth += nn.functional.interpolate(noise, (height, width), mode="bilinear") / side
        side *= 2
    smooth = (smooth - smooth.mean()) / smooth.std()
    column = (-1, 1, 1)
    pixels = smooth * torch.tensor(std).reshape(column) + torch.tensor(mean).reshape(column)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _export_graph(
    module: nn.Module, x: Tensor, path: Path, inputs: list[str], outputs: list[str], opset: int
) -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # The exporter prints and warns about its own internals.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (x,),
                dynamo=True,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=opset,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        # The innermost reason says what; the exporter's own texts are about its steps.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise UserError(f"torch cannot write {path.name} as ONNX: {text.strip()}") from error
    finally:
        logger.setLevel(level)
    assert program is not None
    model = program.model_proto
    strip_metadata(model)
    if inputs == [FEATURES_IN]:
        block_input(model)
    model.producer_name, model.producer_version = "erde", erde_version()
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _check_parity(
    network: EarlyExitNetwork, preprocess: nn.Module, exported: ExportedStages, folder: Path, probes: Tensor
) -> None:
    runner = StageRunner(exported.paths(folder), threads=1)
    names = exported.cost.exit_names
    allowed = _allowed_differences(network, preprocess, probes, names)
    for batch in PARITY_BATCHES:
        with torch.no_grad():
            # Some networks take no empty batch; the runtime never gives them one.
            expected = network(preprocess(probes[: max(1, batch)])).numpy()[:, :batch]
        x: NDArray[Any] | None = probes[:batch].numpy()
        for index, name in enumerate(names):
            assert x is not None
            x, logits = runner.run(index, x)
            _check_equal(logits, expected[index], name, batch, allowed[index])
    _check_batches(exported, folder, probes, allowed)


def _allowed_differences(
    network: EarlyExitNetwork, preprocess: nn.Module, probes: Tensor, names: Sequence[str]
) -> list[float]:
    """How far logits of ONNX Runtime may be from torch's, for each exit in ``names`` (the last ones of the network)."""
    with torch.no_grad():
        x = preprocess(probes)
        logits = network(x)[-len(names) :].double()
        some = x[:_ROUNDING_IMAGES]
        try:
            exact = copy.deepcopy(network).double()(some.double())[-len(names) :]
            roundings = (network(some)[-len(names) :] - exact).abs().flatten(1).amax(dim=1).tolist()
        except RuntimeError:  # a network that asks for float32 in its own code
            roundings = [0.0] * len(names)
    allowed = []
    for name, rows, own_rounding in zip(names, logits, roundings, strict=True):
        spread, largest = float(rows.std()), float(rows.abs().max())
        rounding = _TIMES_OWN_ROUNDING * own_rounding
        plain = max(PARITY_TOLERANCE * spread, _OF_THE_LARGEST * largest)
        if rounding > max(plain, _MOST_ROUNDING * spread):
            raise UserError(
                f"exit '{name}' cannot be checked: torch's own logits in float32 are off by {own_rounding:.2g} where they "
                f"spread by {spread:.2g}, so no comparison with the exported network says anything; give real images (data), or "
                "train the network further"
            )
        allowed.append(max(plain, rounding))
    return allowed


def _check_batches(
    exported: ExportedStages, folder: Path, probes: Tensor, allowed: Sequence[float] | None = None
) -> None:
    """Shapes, and the same logits for an image whatever its batch: which images come together is decided by exits.

    ``allowed``: a difference for each exit; by default of the spread and the largest of its logits.
    """
    runner = StageRunner(exported.paths(folder), threads=1)
    images = probes.numpy()
    alone = runner.all_logits(images, batch_size=1)
    for batch in PARITY_BATCHES:
        together = runner.all_logits(images[:batch])
        for index, name in enumerate(exported.cost.exit_names):
            rows = alone[index]
            limit = (
                allowed[index]
                if allowed is not None
                else PARITY_TOLERANCE * max(float(rows.std()), 0.1 * float(np.abs(rows).max()))
            )
            _check_equal(together[index], rows[:batch], name, batch, limit, "itself for single images")


def _check_equal(
    logits: NDArray[Any],
    expected: NDArray[Any],
    exit_name: str,
    batch: int,
    allowed: float,
    other: str = "torch",
) -> None:
    if logits.shape != expected.shape:
        raise UserError(
            f"the exported network gives shape {logits.shape} at exit '{exit_name}' for a batch of {batch}, "
            f"{other} gives {expected.shape}: nothing was written"
        )
    if not expected.size:
        return
    difference = float(np.abs(logits - expected).max())
    if not difference <= allowed:
        if other != "torch":
            advice = "an image's answer may not depend on the other images of its batch"
        elif batch == PARITY_BATCHES[0]:
            advice = "please report it with the recipe"
        else:
            advice = "a batch of 2 agrees, so a part of the network looks at the size of the batch, which ONNX cannot follow"
        raise UserError(
            f"the exported network differs from {other} by {difference:.2g} at exit '{exit_name}' for a batch of {batch}, "
            f"{allowed:.2g} is allowed (the logits spread by {float(expected.std()):.2g}): nothing was written; {advice}"
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
    images = _probe_images(REFERENCE_IMAGES, exported.input_shape, exported.mean, exported.std).numpy()
    logits = StageRunner(exported.paths(stages_folder), threads=1).all_logits(images)
    return bundle.Manifest(
        format_version=bundle.FORMAT_VERSION,
        name=name,
        classes=list(classes),
        input_shape=exported.input_shape,
        mean=list(exported.mean),
        std=list(exported.std),
        resize="shorter side, then centre crop; bilinear",
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
        score="entropy",
        sharpness=1.0,
        ensemble="none",
        score_parameters=None,
        temperatures=[1.0] * len(exported.files),
        operating_points=[
            OperatingPoint(
                name="no-exit",
                kind="no-exit",
                target=None,
                thresholds=[None] * (len(exported.files) - 1),
                certificate=None,
                note="not calibrated: no image leaves early",
            )
        ],
        default_operating_point="no-exit",
        left_out=[],
        calibration=None,
        reference_sample=bundle.ReferenceSample(
            images=bundle.ReferenceSample.encode(images),
            count=len(images),
            logits=logits.astype(float).tolist(),
            tolerance=tolerance * max(1.0, float(np.abs(logits).max())),
        ),
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

    ``data`` is what ``erde.load_data`` gives, or an :class:`ImageFormat`: it has the classes, the image shape and the
    normalisation; for ``precision="int8"`` also train images, for ranges, and tune images, which decide how much stays
    in float. Torch and the exported stages are compared on train images, if there are any.
    """
    folder = Path(path)
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision '{precision}'{nearest(precision, PRECISIONS)}")
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
    make_folder(folder.parent)
    floats, int8 = (folder.with_name(f".{folder.name}.{one}.partial") for one in PRECISIONS)
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
