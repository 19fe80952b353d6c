"""MACs and parameters, heads included: the price of an image that leaves at an exit.

MACs are counted by running the network once, on one image of zeros, with the formulas of torch's own
:mod:`torch.utils.flop_counter`, for every convolution and matrix product that is computed, functional ones and fused
attention included; they report 2 FLOPs per multiply-accumulate. Batch norm, activations and pooling are not counted,
as is the custom of the field. torch has no formulas for ``bilinear``, ``cdist``, ``mv`` and ``addmv``, which count 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from erde.networks.network import EarlyExitNetwork
from erde.networks.shapes import Handed, InputSize, example_input, mode


@dataclass(frozen=True)
class NetworkCost:
    """Per exit the cumulative MACs and parameters (E,), heads so far included; and without early exits.

    Without early exits the final head is the only one; boosted exits need all heads for the final answer too.
    """

    exit_names: tuple[str, ...]
    macs: tuple[int, ...]
    parameters: tuple[int, ...]
    no_exit_macs: int
    no_exit_parameters: int


def count_parameters(*modules: nn.Module) -> int:
    """Trainable and frozen parameters; buffers (running means) do not count."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def count_macs(module: Callable[[Any], Any], x: Handed) -> tuple[int, Any]:
    """MACs of ``module(x)`` for the whole batch, and its output."""
    with torch.no_grad(), MacCounter() as counter:
        output = module(x)
    return counter.macs, output


class MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the MACs of all that is computed while it is on, by torch's own formulas for convolutions and products.

    Fused encoder layers, which torch's formulas do not know, are switched off meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self._fused: list[bool] = []  # it enters itself again

    @property
    def macs(self) -> int:
        """Multiply-accumulates so far: torch counts each as two operations."""
        return self.flops // 2

    def __enter__(self) -> MacCounter:
        self._fused.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        torch.backends.mha.set_fastpath_enabled(self._fused.pop())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and count."""
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if (
            formula is None and func is not torch.ops.prim.device.default
        ):  # a question about a tensor, no step
            # In inference mode a layer arrives as a whole, and its products only in its parts.
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=output)
        elif func._schema.name.startswith("aten::_scaled_dot_product"):
            self.flops += 2 * _attention_macs(*args[:3])
        elif func._schema.name == "aten::mkldnn_rnn_layer":
            steps, batch = args[0].shape[:2]
            self.flops += 2 * steps * batch * (args[1].numel() + args[2].numel())
        return output


def _attention_macs(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Both products of ``softmax(Q K^T) V``, for (B, heads, N, D). torch's formulas lack the CPU's fused kernel."""
    batch, heads, queries, width = query.shape
    return batch * heads * queries * key.shape[-2] * (width + value.shape[-1])


def head_macs(network: EarlyExitNetwork, input_size: InputSize) -> tuple[int, ...]:
    """MACs of each exit's head alone, the final one's included, for one image of ``input_size`` (C, H, W)."""
    return tuple(_macs_of_parts(network, input_size)[1])


def _macs_of_parts(network: EarlyExitNetwork, input_size: InputSize) -> tuple[list[int], list[int]]:
    stage_macs: list[int] = []
    heads: list[int] = []
    with mode(network, False):  # batch norm must not learn from zeros
        x: Handed = example_input(network, input_size)
        for index, stage in enumerate(network.stages):
            macs, x = count_macs(stage, x)
            stage_macs.append(macs)
            heads.append(count_macs(partial(network.logits_of, index), x)[0])
    return stage_macs, heads


def network_cost(network: EarlyExitNetwork, input_size: InputSize) -> NetworkCost:
    """Cost per exit for one image of ``input_size`` (C, H, W)."""
    stage_macs, exit_macs = _macs_of_parts(network, input_size)
    stages, heads = list(network.stages), list(network.heads)

    def parameters(*parts: nn.Module) -> int:
        # A block that is called in several stages counts once.
        return count_parameters(nn.ModuleList(parts))

    ends = range(1, len(stages) + 1)
    # Of the final exit alone: as ``forward_final`` computes it.
    needed = 0 if network.boosted else -1
    return NetworkCost(
        exit_names=tuple(network.exit_names),
        macs=tuple(sum(stage_macs[:end]) + sum(exit_macs[:end]) for end in ends),
        parameters=tuple(parameters(*stages[:end], *heads[:end]) for end in ends),
        no_exit_macs=sum(stage_macs) + sum(exit_macs[needed:]),
        no_exit_parameters=parameters(*stages, *heads[needed:]),
    )
