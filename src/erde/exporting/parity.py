"""Checks of exported graphs: the same logits as torch, and for an image the same whatever batch it comes in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from erde.common.errors import UserError
from erde.common.splits import ImageSource
from erde.networks.network import EarlyExitNetwork
from erde.runtime.stages import StageRunner

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


def probe_images(
    input_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    images: ImageSource | None = None,
    count: int = max(PARITY_BATCHES),
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


def check_parity(
    torch_logits: Callable[[Tensor], Tensor],
    runner: StageRunner,
    names: Sequence[str],
    probes: Tensor,
    allowed: Sequence[float],
) -> None:
    """Raise where ``runner`` differs from ``torch_logits``, images to logits (E, B, K), by more than ``allowed`` per exit."""
    for batch in PARITY_BATCHES:
        with torch.no_grad():
            # Some networks take no empty batch; the runtime never gives them one.
            expected = torch_logits(probes[: max(1, batch)]).numpy()[:, :batch]
        x: NDArray[Any] | None = probes[:batch].numpy()
        for index, name in enumerate(names):
            assert x is not None
            x, logits = runner.run(index, x)
            check_equal(logits, expected[index], name, batch, allowed[index])


def allowed_differences(
    network: EarlyExitNetwork, preprocess: nn.Module, probes: Tensor, names: Sequence[str]
) -> list[float]:
    """Largest difference of ONNX Runtime's logits from torch's that is allowed at each exit in ``names`` (the network's last)."""
    with torch.no_grad():
        x = preprocess(probes)
        logits = network(x)[-len(names) :].double()
        few = x[:_ROUNDING_IMAGES]
        try:
            exact = copy.deepcopy(network).double()(few.double())[-len(names) :]
            roundings = (network(few)[-len(names) :] - exact).abs().flatten(1).amax(dim=1).tolist()
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


def check_batches(
    runner: StageRunner, names: Sequence[str], probes: Tensor, allowed: Sequence[float] | None = None
) -> None:
    """Raise where an image's logits depend on its batch: exits decide which images come together.

    ``allowed``: a difference for each exit; by default of the spread and the largest of its logits.
    """
    images = probes.numpy()
    alone = runner.all_logits(images, batch_size=1)
    for batch in PARITY_BATCHES:
        together = runner.all_logits(images[:batch])
        for index, name in enumerate(names):
            rows = alone[index]
            limit = (
                allowed[index]
                if allowed is not None
                else PARITY_TOLERANCE * max(float(rows.std()), 0.1 * float(np.abs(rows).max()))
            )
            check_equal(together[index], rows[:batch], name, batch, limit, "itself for single images")


def check_equal(
    logits: NDArray[Any],
    expected: NDArray[Any],
    exit_name: str,
    batch: int,
    allowed: float,
    other: str = "torch",
) -> None:
    """:class:`UserError` unless shapes agree and no logit differs by more than ``allowed``."""
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
