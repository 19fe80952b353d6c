"""Checkpoints: one safetensors file each, written in one step, no pickle anywhere.

Tensors stand under dotted names (``network.``, ``optimizer.<parameter>.``, ``criterion.``,
``meter``); everything else is JSON in the file's own metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from erde.common.errors import UserError
from erde.common.files import replacing_file

FORMAT_VERSION = 1


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able ``state`` to ``path``; a reader sees the old file or the new one."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # A module that two stages share stands under both names; the format wants memory of its own for each.
    seen: set[int] = set()
    for name, tensor in contiguous.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            contiguous[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    # In the order given: a file written again after a resume must be the same to the byte.
    metadata = {"erde": json.dumps({"format_version": FORMAT_VERSION, **state})}
    # Not safetensors' own save_file: a full disk is an OSError here, and a kill leaves only a partial file, which is swept.
    with replacing_file(path) as partial:
        partial.write_bytes(serialize(contiguous, metadata=metadata))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU and the state of a file that :func:`save` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        state = json.loads(metadata.get("erde", "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its metadata is not JSON; remove it") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is damaged: its metadata is not a JSON object; remove it")
    if state and state.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} is a checkpoint of format version {state.get('format_version')!r}, this erde reads {FORMAT_VERSION}: "
            "use the erde that wrote it, or train anew in another folder"
        )
    return tensors, state


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``prefix.name``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``prefix``, by their names without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as ``<parameter index>.<name>``; learning rates follow from the step."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state that :func:`optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    # Plain SGD has none; with any other, training without it would go on to other numbers.
    has_state = isinstance(optimizer, torch.optim.AdamW) or any(
        group.get("momentum") for group in optimizer.param_groups
    )
    if has_state and not state:
        raise UserError(
            "the checkpoint has nothing of the optimiser: it was changed, or is of another training; remove it to start anew"
        )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """:class:`UserError` for weights that are no numbers: training would look as if it had gone wrong."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise UserError(f"{path}: '{name}' has values that are not finite: give another file of weights")


def is_boosted(network: nn.Module) -> bool:
    """Whether exits add to the answers of those before them: names and shapes of the weights do not tell."""
    return bool(getattr(network, "boosted", False)) and len(getattr(network, "stages", ())) > 1


def check_boosted(path: Path, network: nn.Module, state: Mapping[str, Any]) -> None:
    """:class:`UserError` for weights that are known to be boosted where the network is not, or the reverse."""
    boosted = state.get("boosted")
    if boosted is not None and boosted != is_boosted(network):
        raise UserError(
            f"{path} is of a network {'with' if boosted else 'without'} boosted exits, and this one is "
            f"{'not ' if boosted else ''}boosted: set boosted={str(boosted).lower()} for it, or give other weights"
        )


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a network's weights from a checkpoint of erde's or a plain safetensors state dict."""
    tensors, state = load(path)
    weights = under_prefix("network", tensors) or tensors
    expected = network.state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise UserError(f"{path} does not fit the network: it has no '{name}'")
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{path} does not fit the network: '{name}' has shape {tuple(weights[name].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
        check_finite(path, name, weights[name])
    check_boosted(path, network, state)
    network.load_state_dict({name: weights[name] for name in expected})
