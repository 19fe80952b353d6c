"""Networks to ONNX files: a folder with one file per stage, or one plain graph; float or int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from erde.bundle.graph_check import refusal
from erde.common.errors import UserError
from erde.common.files import make_folder, replacing_file, replacing_folder, write_json
from erde.common.splits import ImageSource, TrainSplit, TuneSplit
from erde.exporting.modules import FEATURES_IN, Plain, Preprocess, Stage, prepare, write_graph
from erde.exporting.parity import allowed_differences, check_batches, check_parity, probe_images
from erde.exporting.quantisation import Quantisation, quantise, quantise_stages, range_images
from erde.networks.cost import NetworkCost, network_cost
from erde.networks.network import EarlyExitNetwork
from erde.policy.points import Precision
from erde.runtime.stages import StageRunner

STAGES = "stages.json"


@dataclass(frozen=True)
class ExportedStages:
    """The description of a folder of stages, beside the graphs."""

    files: tuple[str, ...]
    cost: NetworkCost
    opset: int
    input_shape: tuple[int, int, int]  # H, W, C
    mean: tuple[float, ...]
    std: tuple[float, ...]
    quantisation: Quantisation | None = None  # of int8 stages

    @property
    def precision(self) -> Precision:
        """The numbers that the stages compute in."""
        return "fp32" if self.quantisation is None else "int8"

    @classmethod
    def read(cls, folder: Path) -> ExportedStages:
        """Read ``stages.json``; :class:`UserError` where it is damaged."""
        path = folder / STAGES
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(
                f"{path} is damaged: remove the folder {folder} and run erde export again"
            ) from error

    def paths(self, folder: Path) -> list[Path]:
        """The stages' files in order."""
        return [folder / name for name in self.files]

    def runner(self, folder: Path) -> StageRunner:
        """The stages in ``folder`` in ONNX Runtime, on one thread."""
        return StageRunner(self.paths(folder), threads=1)


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
        images: uint8 (N, H, W, C); torch and ONNX Runtime are compared on the first 32. Without
            them smooth random images with the mean and standard deviation that the network is made for.

    Raises:
        UserError: where ONNX Runtime and torch disagree at any exit, or an image's logits depend on the other images
            of its batch; then nothing is written.
    """
    network = prepare(network)
    height, width, channels = input_shape
    preprocess = Preprocess(mean, std)
    exits = len(network.stages)
    files = tuple(f"stage_{index}.onnx" for index in range(exits))
    exported = ExportedStages(
        files, network_cost(network, (channels, height, width)), opset, input_shape, mean, std
    )
    probes = probe_images(input_shape, mean, std, images)
    with replacing_folder(folder) as partial:
        x = probes[:2]
        enter: nn.Module = preprocess
        for index, name in enumerate(files):
            module = Stage(enter, network, index).eval()
            outputs = ["logits"] if module.is_last else ["features", "logits"]
            write_graph(module, x, partial / name, ["images" if index == 0 else FEATURES_IN], outputs, opset)
            reason = refusal(partial / name)
            if reason is not None:
                raise UserError(
                    f"this network cannot be a bundle: its graph {reason} (docs/formats.md: what is verified)"
                )
            with torch.no_grad():
                x, enter = module.next_enter(x)
        runner, names = exported.runner(partial), exported.cost.exit_names
        allowed = allowed_differences(network, preprocess, probes, names)
        check_parity(lambda images: network(preprocess(images)), runner, names, probes, allowed)
        check_batches(runner, names, probes, allowed)
        write_json(partial / STAGES, asdict(exported))
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
    with replacing_folder(folder) as partial:
        quantisation = quantise_stages(exported.paths(source), partial, train, tune, seed)
        exported = replace(exported, quantisation=quantisation)
        probes = probe_images(exported.input_shape, exported.mean, exported.std, train.images)
        check_batches(exported.runner(partial), exported.cost.exit_names, probes)
        write_json(partial / STAGES, asdict(exported))
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
    preprocess = Preprocess(mean, std)
    network = prepare(network)
    module = Plain(preprocess, network).eval()
    make_folder(path.parent)
    probes = probe_images(input_shape, mean, std, images)
    with replacing_file(path) as partial:
        write_graph(module, probes[:2], partial, ["images"], ["logits"], opset)
        allowed = allowed_differences(network, preprocess, probes, ["final"])
        runner = StageRunner([partial], threads=1)
        check_parity(lambda images: module(images).unsqueeze(0), runner, ["final"], probes, allowed)
