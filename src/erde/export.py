"""Networks to ONNX: one file per stage with the preprocessing in the first, or one plain graph; float or int8."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
import shutil
import sys
import types
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

from erde import __version__, bundle
from erde.cost import Handed, NetworkCost, network_cost
from erde.data import DataSplits
from erde.errors import UserError, nearest
from erde.exits import EarlyExitNetwork
from erde.files import make_folder, replacing_file, replacing_folder, write_json
from erde.graph_files import refusal
from erde.graphs import block_input, strip_metadata
from erde.progress import say
from erde.quantisation import Quantisation, quantise, quantise_stages, range_images
from erde.splits import TrainSplit, TuneSplit
from erde.stages import StageRunner

STAGES = "stages.json"
FEATURES_IN = "features_in"
PRECISIONS = ("fp32", "int8")
PARITY_BATCHES = (0, 1, 2, 7, 32)
# float32 kernels of two libraries differ in the last bits; relative to the largest logit.
PARITY_TOLERANCE = 1e-4
# Of int8 stages on another machine: a last bit that differs may tip a rounding. Switching off every optimisation
# of ONNX Runtime, which computes in float then, moves logits by 0.3 % of the largest; rounding itself, by 3 % and more.
INT8_TOLERANCE = bundle.MAX_TOLERANCE
REFERENCE_IMAGES = 2


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
    def precision(self) -> bundle.Precision:
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
) -> ExportedStages:
    """Write ``stage_<k>.onnx`` and ``stages.json`` to ``folder``, in one step, after a parity check.

    Stage 0 takes uint8 (B, H, W, C); every stage gives ``features`` and raw ``logits`` (B, K), the last
    ``logits`` only. The batch axis is dynamic, zero included.

    Raises:
        UserError: where ONNX Runtime and torch disagree at any exit; then nothing is written.
    """
    network = _for_export(network)
    height, width, channels = input_shape
    preprocess = _Preprocess(mean, std)
    exits = len(network.stages)
    files = tuple(f"stage_{index}.onnx" for index in range(exits))
    exported = ExportedStages(
        files, network_cost(network, (channels, height, width)), opset, input_shape, mean, std
    )
    with replacing_folder(folder) as beside:
        x = _random_images(2, input_shape)
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
        _check_parity(network, preprocess, exported, beside)
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
        _check_batches(exported, beside)
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
) -> None:
    """Write the network without exits as one ordinary ONNX file: uint8 ``images`` to raw ``logits``."""
    preprocess = _Preprocess(mean, std)
    module = _Plain(preprocess, _for_export(network)).eval()
    make_folder(path.parent)
    with replacing_file(path) as beside:
        _export_graph(module, _random_images(2, input_shape), beside, ["images"], ["logits"], opset)
        runner = StageRunner([beside], threads=1)
        for batch in PARITY_BATCHES:
            images = _random_images(batch, input_shape)
            with torch.no_grad():
                _check_equal(runner.run(0, images.numpy())[1], module(images).numpy(), "final", batch)


def _random_images(count: int, input_shape: tuple[int, int, int]) -> Tensor:
    # Noise stands in for images where only shapes or agreement matter: no one's picture is shipped.
    generator = np.random.default_rng(20)
    return torch.from_numpy(generator.integers(0, 256, (count, *input_shape), dtype=np.uint8))


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
        cause = error.__cause__ or error
        text = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise UserError(f"torch cannot write {path.name} as ONNX: {text.strip()}") from error
    finally:
        logger.setLevel(level)
    assert program is not None
    model = program.model_proto
    strip_metadata(model)
    if inputs == [FEATURES_IN]:
        block_input(model)
    model.producer_name, model.producer_version = "erde", __version__
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _check_parity(
    network: EarlyExitNetwork, preprocess: nn.Module, exported: ExportedStages, folder: Path
) -> None:
    runner = StageRunner(exported.paths(folder), threads=1)
    for batch in (
        PARITY_BATCHES if _takes_no_images(runner, network, preprocess, exported) else PARITY_BATCHES[1:]
    ):
        images = _random_images(batch, exported.input_shape)
        with torch.no_grad():
            expected = network(preprocess(images)).numpy()
        x: NDArray[Any] | None = images.numpy()
        for index, name in enumerate(exported.cost.exit_names):
            assert x is not None
            x, logits = runner.run(index, x)
            _check_equal(logits, expected[index], name, batch)


def _takes_no_images(
    runner: StageRunner, network: EarlyExitNetwork, preprocess: nn.Module, exported: ExportedStages
) -> bool:
    """Whether a batch of no images passes; some models of others refuse one, which is said and no reason to stop."""
    images = _random_images(0, exported.input_shape)
    try:
        # torch.fx writes about an error to the terminal besides raising it.
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            network(preprocess(images))
        runner.all_logits(images.numpy())
    except (RuntimeError, IndexError, ZeroDivisionError, UserError):
        say("this network takes no empty batch, its stages neither: every batch needs an image")
        return False
    return True


def _check_batches(exported: ExportedStages, folder: Path) -> None:
    """Shapes, and the same logits for an image whatever its batch."""
    runner = StageRunner(exported.paths(folder), threads=1)
    images = _random_images(max(PARITY_BATCHES), exported.input_shape).numpy()
    alone = runner.all_logits(images, batch_size=1)
    for batch in PARITY_BATCHES:
        try:
            together = runner.all_logits(images[:batch])
        except UserError:
            if batch == 0:  # some models of others refuse it; their float stages have said so
                continue
            raise
        for index, name in enumerate(exported.cost.exit_names):
            _check_equal(together[index], alone[index, :batch], name, batch, "itself for single images")


def _check_equal(
    found: NDArray[Any], expected: NDArray[Any], exit_name: str, batch: int, other: str = "torch"
) -> None:
    if found.shape != expected.shape:
        raise UserError(
            f"the exported network gives shape {found.shape} at exit '{exit_name}' for a batch of {batch}, "
            f"{other} gives {expected.shape}: nothing was written"
        )
    if not expected.size:
        return
    difference = float(np.abs(found - expected).max())
    if not difference <= PARITY_TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise UserError(
            f"the exported network differs from {other} by {difference:.2g} at exit '{exit_name}' for a batch of {batch}: "
            "nothing was written; please report it with the recipe"
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
    images = _random_images(REFERENCE_IMAGES, exported.input_shape).numpy()
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
            bundle.OperatingPoint(
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
    data: DataSplits,
    path: str | Path,
    *,
    name: str = "network",
    opset: int = 18,
    precision: str = "fp32",
) -> Path:
    """Write ``network`` as a sealed bundle that is not calibrated yet; :func:`erde.calibrate` comes next.

    ``data`` gives the classes, the image shape and the normalisation; for ``precision="int8"`` also train images,
    for ranges, and tune images, which decide how much stays in float. With ``"fp32"`` no image is looked at.
    """
    folder = Path(path)
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision '{precision}'{nearest(precision, PRECISIONS)}")
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another path, or remove it first")
    make_folder(folder.parent)
    floats, int8 = (folder.with_name(f".{folder.name}.{one}.partial") for one in PRECISIONS)
    try:
        stages = floats
        exported = export_stages(network, data.image_shape, data.mean, data.std, floats, opset)
        if precision == "int8":
            stages, exported = int8, export_int8_stages(floats, int8, data.train, data.tune)
        provenance = {"erde": __version__, "torch": torch.__version__}
        manifest = build_manifest(stages, name=name, classes=data.classes, provenance=provenance)
        bundle.write(folder, manifest, exported.paths(stages))
    finally:
        for leftover in (floats, int8):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


class _CallableModule(types.ModuleType):
    """Lets ``erde.export(network, ...)`` work although ``erde.export`` is also this module's name.

    Importing a submodule sets it as an attribute of its package, so the function of the same name in
    ``erde/__init__.py`` would be shadowed by whoever imports this module first.
    """

    def __call__(self, *arguments: Any, **keywords: Any) -> Path:
        return export(*arguments, **keywords)


sys.modules[__name__].__class__ = _CallableModule
