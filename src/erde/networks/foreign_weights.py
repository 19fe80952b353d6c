"""Teachers that were trained elsewhere: their weights by name, their normalisation, their order of classes.

An adapted teacher is an ordinary :class:`~erde.networks.network.EarlyExitNetwork`: training, cache, export and evaluation
know nothing of it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from erde.common.array_file import ArrayFileError, read_npz
from erde.common.errors import UserError
from erde.networks import checkpoint
from erde.networks.network import EarlyExitNetwork

# Training scripts and wrappers put these before every name.
PREFIXES = ("module.", "_orig_mod.", "network.", "backbone.", "model.", "net.")
# Names of ResNets in most public code, and ours.
_RESNET = (
    (r"^conv1\.", "stem.conv."),
    (r"^bn1\.", "stem.norm."),
    (r"^layer(\d+)\.(\d+)\.", lambda match: f"group{match[1]}_block{int(match[2]) + 1}."),
    (r"(?<=\.)bn(\d)\.", r"norm\1."),
    (r"(?<=\.)downsample\.", "shortcut."),
    (r"^fc\.", "linear."),
)


@dataclass(frozen=True)
class WeightsReport:
    """A file's tensors compared with a network's.

    ``matched`` has (name in the network, name in the file) of every tensor that was loaded; ``missing`` the network's
    other tensors, left as they were (counters of batch norm only); ``unexpected`` the file's other tensors.
    """

    file: str
    match: str
    matched: list[tuple[str, str]]
    missing: list[str]
    unexpected: list[str]

    def line(self) -> str:
        """One line for a reader."""
        missing = f", {len(self.missing)} counters missing" if self.missing else ""
        rest = f", {len(self.unexpected)} left over ('{self.unexpected[0]}', ...)" if self.unexpected else ""
        return f"{self.file}: {len(self.matched)} tensors matched by {self.match}{missing}{rest}"

    def as_json(self) -> dict[str, Any]:
        """For the run folder."""
        return asdict(self)


def load_teacher_weights(
    network: EarlyExitNetwork, path: Path, match: Literal["name", "order"] = "name"
) -> WeightsReport:
    """Load all of a trained network's tensors from a safetensors or an npz file.

    By name: a checkpoint of erde's; a state dict of the network, or of its backbone; with a prefix of
    ``PREFIXES``; of ResNets also with the names of most public code (``layer1.0.bn1``). By order: the
    file's tensors one after another, each with the shape that is next; npz only, a safetensors file has no order.

    Raises:
        UserError: no such file or not one of these, no name that matches, a tensor that is missing or has another shape,
            weights of boosted exits for others, or the reverse.
    """
    if match == "order" and path.suffix == ".safetensors":
        raise UserError(
            f"teacher.match is 'order', and {path} has none: safetensors files are sorted; use an .npz or 'name'"
        )
    tensors, state = _read(path)
    pairs = (_by_order if match == "order" else _by_name)(network, tensors, path)
    own = network.state_dict()
    for name, source in pairs.items():
        if own[name].shape != tensors[source].shape:
            raise UserError(
                f"{path} does not fit the network: '{source}' has shape {tuple(tensors[source].shape)}, "
                f"'{name}' needs {tuple(own[name].shape)}{_class_hint(name, own[name], tensors[source])}"
            )
        checkpoint.check_finite(path, source, tensors[source])
    checkpoint.check_boosted(path, network, state)
    # A network that was half replaced would be worse than none: all is checked first.
    network.load_state_dict({**own, **{name: tensors[source] for name, source in pairs.items()}})
    loaded = set(pairs.values())
    return WeightsReport(
        str(path),
        match,
        sorted(pairs.items()),
        sorted(name for name in own if name not in pairs),
        sorted(name for name in tensors if name not in loaded),
    )


def _class_hint(name: str, own: Tensor, loaded: Tensor) -> str:
    differ = own.ndim == loaded.ndim and own.shape[1:] == loaded.shape[1:]
    last = differ and name.startswith("heads.")
    return f" (a network for {len(loaded)} classes, the data has {len(own)})" if last else ""


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and the state of a checkpoint of erde's."""
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".tar", ".pkl"):
        raise UserError(
            f"{path} is a pickle, which can run code when it is read: convert it once with "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors')"
        )
    if path.suffix != ".npz":
        tensors, state = checkpoint.load(path)
        return checkpoint.under_prefix("network", tensors) or tensors, state
    try:
        arrays = read_npz(path)
    except FileNotFoundError as error:
        raise UserError(f"no weights at {path}") from error
    except (OSError, ArrayFileError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a readable .npz file of plain arrays: {reason}") from error
    numbers = {name: array for name, array in arrays.items() if array.dtype.kind in "fiu"}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in numbers.items()}, {}


def _by_name(network: EarlyExitNetwork, tensors: dict[str, Tensor], path: Path) -> dict[str, str]:
    """Name in the network -> name in the file."""
    aliases = {name: name for name in tensors}  # an exact name is never another's
    for name in tensors:
        plain = _without_prefixes(name)
        for alias in (plain, plain.removeprefix("blocks."), plain.removeprefix("classifier.")):
            aliases.setdefault(alias, name)
        aliases.setdefault(_renamed(plain), name)
    last = f"heads.{len(network.heads) - 1}."
    pairs, missing = {}, []
    for name in network.state_dict():
        plain = re.sub(r"^stages\.\d+\.", "", name).removeprefix(last)
        match = aliases.get(name, aliases.get(plain))
        if match is not None:
            pairs[name] = match
        elif not name.endswith("num_batches_tracked"):
            missing.append(name)
    if not any(tensors[match].ndim for match in pairs.values()):
        raise UserError(
            f"{path} is of another network: no name of its {len(tensors)} tensors matches, it has "
            f"'{next(iter(tensors), '')}', ..., the network '{next(iter(network.state_dict()))}', ...; "
            "set teacher.backbone to the network that it is of"
        )
    if missing:
        heads = [name for name in missing if name.startswith("heads.") and not name.startswith(last)]
        advice = "; weights without early exits need teacher.exits=1" if heads == missing else ""
        raise UserError(
            f"{path} does not fit the network: {len(missing)} of its tensors are missing, the first is "
            f"'{missing[0]}'{advice}"
        )
    return pairs


def _without_prefixes(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def _renamed(name: str) -> str:
    for pattern, replacement in _RESNET:
        name = re.sub(pattern, replacement, name)
    return name


def _by_order(network: EarlyExitNetwork, tensors: dict[str, Tensor], path: Path) -> dict[str, str]:
    own = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    given = [name for name in tensors if not name.endswith("num_batches_tracked")]
    if len(own) != len(given):
        raise UserError(
            f"{path} does not fit the network: it has {len(given)} tensors, the network {len(own)}: "
            "teacher.match=order needs the same ones in the same order"
        )
    return dict(zip(own, given, strict=True))


# ---------------------------------------------------------------- normalisation and classes


class Renormalise(nn.Module):
    """Images from the data's normalisation to the teacher's: ``(x std + mean - mean_t) / std_t``, per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        teacher_mean: Sequence[float],
        teacher_std: Sequence[float],
    ) -> None:
        super().__init__()
        ours, theirs = np.array([mean, std]), np.array([teacher_mean, teacher_std])
        scale, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
        # They follow from the recipe: no part of the teacher's weights.
        for name, value in (("scale", scale), ("shift", shift)):
            tensor = torch.tensor(value, dtype=torch.float32)[:, None, None]
            self.register_buffer(name, tensor, persistent=False)

    def extra_repr(self) -> str:
        """The numbers: a network's hash is of its state dict and of how it is printed."""
        return f"scale={self.scale.flatten().tolist()}, shift={self.shift.flatten().tolist()}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return x * self.scale + self.shift


class ReorderClasses(nn.Module):
    """Logits (B, K) in the teacher's order of classes to the data's."""

    order: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def extra_repr(self) -> str:
        """The order, as for :class:`Renormalise`."""
        return str(self.order.tolist())

    def forward(self, logits: Tensor) -> Tensor:
        """``logits[:, order]``."""
        return logits.index_select(-1, self.order)


def adapt_teacher(
    network: EarlyExitNetwork,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str],
    teacher_mean: Sequence[float] | None = None,
    teacher_std: Sequence[float] | None = None,
    teacher_classes: Sequence[str] | None = None,
) -> EarlyExitNetwork:
    """Let ``network`` take images normalised by ``mean`` and ``std``, and give logits in the order of ``classes``.

    It was trained with ``teacher_mean``, ``teacher_std`` and ``teacher_classes``; None stands for the data's own.
    Changes the network in place; the names and values in its state dict stay, where stages are ``nn.Sequential``.

    Raises:
        UserError: mean or std for other channels, or one without the other; other classes.
    """
    if (teacher_mean is None) != (teacher_std is None):
        raise UserError("teacher.mean and teacher.std belong together: give both, or none of them")
    if teacher_mean is not None and teacher_std is not None:
        for key, values in (("mean", teacher_mean), ("std", teacher_std)):
            if len(values) != len(mean):
                raise UserError(f"teacher.{key} has {len(values)} values for {len(mean)} channels")
        if (tuple(teacher_mean), tuple(teacher_std)) != (tuple(mean), tuple(std)):
            renormalise = Renormalise(mean, std, teacher_mean, teacher_std)
            network.stages[0] = _join(network.stages[0], "renormalise", renormalise, first=True)
    if teacher_classes is not None and list(teacher_classes) != list(classes):
        order = _class_order(classes, teacher_classes)
        for index, head in enumerate(network.heads):
            network.heads[index] = _join(head, "reorder", ReorderClasses(order), first=False)
    return network


def _join(module: nn.Module, name: str, other: nn.Module, *, first: bool) -> nn.Module:
    # Within a plain Sequential the children keep their names, and checkpoints their keys.
    plain = type(module).forward is nn.Sequential.forward
    children = list(module.named_children()) if plain else [("inner", module)]
    joined = [(name, other), *children] if first else [*children, (name, other)]
    return nn.Sequential(OrderedDict(joined)).train(module.training)


def _class_order(classes: Sequence[str], teacher_classes: Sequence[str]) -> list[int]:
    if len(set(teacher_classes)) != len(teacher_classes):
        raise UserError("teacher.classes names a class twice: give each once, in the order of its outputs")
    lacking = [name for name in classes if name not in teacher_classes]
    others = [name for name in teacher_classes if name not in classes]
    if lacking or others:
        reasons = [f"does not have '{lacking[0]}'"] if lacking else []
        reasons += [f"has '{others[0]}', which is none of the data's"] if others else []
        raise UserError(
            f"teacher.classes {' and '.join(reasons)}: a teacher must have the {len(classes)} classes of the data, "
            f"in any order ({', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''})"
        )
    return [teacher_classes.index(name) for name in classes]
