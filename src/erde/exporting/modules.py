"""A network's stages, or the network without exits, as torch modules that export to plain graphs; and the graphs' files."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import onnx
import torch
from torch import Tensor, nn

from erde.common.environment import erde_version
from erde.common.errors import UserError
from erde.exporting.graphs import block_input, strip_metadata
from erde.networks.network import EarlyExitNetwork, boost
from erde.networks.shapes import Handed

FEATURES_IN = "features_in"
Network = TypeVar("Network", bound=nn.Module)


class Preprocess(nn.Module):
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
        """(B, H, W, C) to (B, C, H, W)."""
        # Channels first: a factor per plane is many times faster than one per neighbouring number.
        return images.permute(0, 3, 1, 2).to(torch.float32) * self.scale + self.shift


class _WholeMapAverage(nn.Module):
    """``AdaptiveAvgPool2d(1)`` as a pooling of fixed size, which ONNX Runtime keeps in its blocked layout."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, x.shape[-2:])


def prepare(network: EarlyExitNetwork) -> EarlyExitNetwork:
    """A copy whose modules export to plain graphs; the numbers are the same."""
    if not isinstance(network, EarlyExitNetwork):
        raise UserError(
            f"the network is a {type(network).__name__}: put exits on it first (erde.attach_exits)"
        )
    return prepared_copy(network)


def prepared_copy(network: Network) -> Network:
    """As :func:`prepare`, of any network."""
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


class Pack(nn.Module):
    """Several tensors side by side as one (B, N), since a stage's file hands over one tensor; a single tensor as it is."""

    def forward(self, handed: Handed) -> Tensor:
        """Tensors (B, ...) to (B, N)."""
        if isinstance(handed, Tensor):
            return handed
        return torch.cat([tensor.flatten(1) for tensor in handed], dim=1)


class Unpack(nn.Module):
    """The tensors that :class:`Pack` put side by side; ``shapes`` are those of one image."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.shapes = [tuple(shape) for shape in shapes]

    def forward(self, packed: Tensor) -> tuple[Tensor, ...]:
        """(B, N) to one tensor (B, ...) for each shape."""
        parts = torch.split(packed, [math.prod(shape) for shape in self.shapes], dim=1)
        return tuple(
            part if len(shape) == 1 else torch.unflatten(part, 1, shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        )


class UnpackBoosted(nn.Module):
    """What a boosted stage handed on, as the next one takes it, and its logits, which were packed last."""

    def __init__(self, shapes: Sequence[Sequence[int]], single: bool) -> None:
        super().__init__()
        self.unpack, self.single = Unpack(shapes), single

    def forward(self, packed: Tensor) -> tuple[Handed, Tensor]:
        """(B, N) to the output of the stage before, a ``single`` tensor or a tuple, and its logits (B, K)."""
        *tensors, logits = self.unpack(packed)
        return (tensors[0] if self.single else tuple(tensors)), logits


class Stage(nn.Module):
    """Stage ``index`` with its exit's head: packed features and logits, the last stage logits alone.

    Boosted exits hand their logits on with the features, which the next exit adds to its own.
    """

    def __init__(self, enter: nn.Module, network: EarlyExitNetwork, index: int) -> None:
        super().__init__()
        self.enter, self.stage, self.head = enter, network.stages[index], network.heads[index]
        self.pack, self.looks_at = Pack(), network.looks_at[index]
        self.is_last = index == len(network.stages) - 1
        self.boosted = network.boosted

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images, or the packed features of the stage before, to features and logits (B, K)."""
        handed, logits = self.outputs(x)
        return logits if self.is_last else (self.pack(self.handed_on(handed, logits)), logits)

    def outputs(self, x: Tensor) -> tuple[Handed, Tensor]:
        """The stage's output before it is packed, and logits (B, K)."""
        entered, before = self.enter(x), None
        if isinstance(self.enter, UnpackBoosted):
            entered, before = entered
        handed: Handed = self.stage(entered)
        logits: Tensor = self.head(handed if self.looks_at is None else handed[self.looks_at])
        return handed, boost(logits, before)

    def handed_on(self, handed: Handed, logits: Tensor) -> Handed:
        """What the next stage gets."""
        if not self.boosted:
            return handed
        return (*(handed if isinstance(handed, tuple) else (handed,)), logits)

    def next_enter(self, x: Tensor) -> tuple[Tensor, nn.Module]:
        """The packed features of ``x``, and the module with which the next stage takes them apart."""
        handed, logits = self.outputs(x)
        given = self.handed_on(handed, logits)
        if isinstance(given, Tensor):
            return self.pack(given), nn.Identity()
        shapes = [tensor.shape[1:] for tensor in given]
        if self.boosted:
            return self.pack(given), UnpackBoosted(shapes, isinstance(handed, Tensor))
        return self.pack(given), Unpack(shapes)


class Plain(nn.Module):
    """The network without exits: uint8 images to logits."""

    def __init__(self, preprocess: nn.Module, network: EarlyExitNetwork) -> None:
        super().__init__()
        self.preprocess, self.network = preprocess, network

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W, C) to (B, K)."""
        return self.network.forward_final(self.preprocess(images))


def write_graph(
    module: nn.Module, x: Tensor, path: Path, inputs: list[str], outputs: list[str], opset: int
) -> None:
    """Export ``module``, called with ``x``, to ``path``, with a dynamic batch axis; :class:`UserError` where torch cannot."""
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
        # The innermost reason names the operation; the exporter's own texts are about its steps.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise UserError(f"torch cannot write {path.name} as ONNX: {text.strip()}") from error
    finally:
        logger.setLevel(level)
    assert program is not None
    model = program.model_proto
    # Where it cannot convert, torch says so on the terminal and keeps its own.
    written = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if written != opset:
        raise UserError(f"torch wrote opset {written}, not opset {opset}: ask for {written}")
    strip_metadata(model)
    if inputs == [FEATURES_IN]:
        block_input(model)
    model.producer_name, model.producer_version = "erde", erde_version()
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
