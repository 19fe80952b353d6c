"""A classifier that is a torch module, as the ONNX file that a chain takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erde.chains.preprocessing import UNSET, Preprocessing, timm_preprocessing
from erde.common.errors import UserError
from erde.exporting.modules import prepared_copy, write_graph
from erde.networks.network import EarlyExitNetwork

OPSET = 18


class _Logits(nn.Module):
    """The tensor (B, K) of what a model gives: Hugging Face's give an object with ``logits``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(x)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits


@contextmanager
def as_onnx_file(
    model: nn.Module, preprocessing: Preprocessing | None
) -> Iterator[tuple[Path, Preprocessing]]:
    """``model`` as an ONNX file that is there inside ``with``, and the preprocessing of its images.

    ``model`` takes normalised float32 images (B, C, H, W), with as many channels as ``preprocessing.mean`` has numbers.
    Without ``preprocessing`` that of a model from timm.

    Raises:
        UserError: no preprocessing, or a model that torch cannot write as ONNX.
    """
    name = type(model).__name__
    if isinstance(model, EarlyExitNetwork):
        raise UserError(
            "the model has exits already: write it with erde.export, and chain the bundle with erde.cascade"
        )
    if preprocessing is None:
        config: Any = getattr(model, "pretrained_cfg", None)
        if not isinstance(config, dict) or "input_size" not in config:
            raise UserError(
                f"the model, a {name}, does not say what images it takes: give preprocessing=erde.Preprocessing("
                "size=(H, W), mean=..., std=...)"
            )
        preprocessing = timm_preprocessing(config, f"{name}.pretrained_cfg")
    if preprocessing.size == UNSET or not preprocessing.mean:
        raise UserError(f"preprocessing={preprocessing}: expected size, mean and std for a torch module")
    if preprocessing.layout == "NHWC":
        raise UserError("layout is 'NHWC', expected NCHW for a torch module")
    x = torch.zeros(2, len(preprocessing.mean), *preprocessing.size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.onnx"
        module = _Logits(prepared_copy(model)).eval()
        write_graph(module, x, path, ["x"], ["logits"], OPSET)
        yield path, preprocessing
