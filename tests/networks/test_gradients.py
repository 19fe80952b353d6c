"""Gradient equilibrium: the same answers, and the published share of each exit's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import erde
from erde.networks.gradients import scale_gradient
from erde.networks.network import EarlyExitNetwork
from tests.helpers.networks import plain_network

torch.set_num_threads(1)


class Pair(nn.Module):
    """A stage that hands over two tensors, both of which the next one reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 6), nn.Linear(width, 6)

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        flat = torch.cat(x, dim=1) if isinstance(x, tuple) else x.flatten(1)
        return self.first(flat).tanh(), self.second(flat).sin()


def make(kind: str) -> EarlyExitNetwork:
    torch.manual_seed(0)
    if kind == "tensors":
        return plain_network(exits=4)
    if kind == "tuples":
        stages = [Pair(64), Pair(12), Pair(12)]
        return EarlyExitNetwork(stages, [nn.Linear(6, 10) for _ in range(3)], ["0", "1", "final"], [1, 0, 1])
    backbone = erde.build_backbone("resnet8x0.25", classes=10, channels=1)
    return erde.attach_exits(backbone, 3, input_size=(1, 8, 8), dropout=0.0)


@pytest.mark.parametrize("kind", ["tensors", "tuples", "resnet"])
def test_equilibrium_changes_no_answer_and_the_gradients_as_published(kind: str) -> None:
    network = make(kind).train()
    x = torch.randn(7, 1, 8, 8)
    labels = torch.arange(7)
    # Each exit's loss, weighted, and its gradients by themselves.
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0])[: len(network.stages)]
    logits = network(x)
    losses = [
        weight * nn.functional.cross_entropy(rows, labels)
        for weight, rows in zip(weights, logits, strict=True)
    ]
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    parameters = [network.get_parameter(name) for name in names]
    alone = [
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in losses
    ]

    result, features = network.forward_with_features(x, equilibrium=True)
    assert torch.equal(result, logits)
    assert len(features) == len(network.stages)
    balanced = sum(
        weight * nn.functional.cross_entropy(rows, labels)
        for weight, rows in zip(weights, result, strict=True)
    )
    assert isinstance(balanced, Tensor)
    computed = torch.autograd.grad(balanced, parameters, materialize_grads=True)

    exits = len(network.stages)
    for index, (name, gradient) in enumerate(zip(names, computed, strict=True)):
        part, number = name.split(".")[:2]
        # Counted from 1, as in the paper: exit i has the share 1/(k-i+1), those behind it (k-i)/(k-i+1) on the way through
        # each place.
        expected = torch.zeros_like(gradient)
        for exit, gradients in enumerate(alone, start=1):
            share = 1.0
            if part == "stages":
                for place in range(int(number) + 1, exit + 1):
                    own, behind = 1 / (exits - place + 1), (exits - place) / (exits - place + 1)
                    share *= own if place == exit else behind
            expected += share * gradients[index]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)
    # By hand: the gradient of the first stage is the mean over exits; as a sum it is larger.
    first = next(index for index, name in enumerate(names) if name.startswith("stages.0."))
    mean = torch.stack([gradients[first] for gradients in alone]).mean(dim=0)
    torch.testing.assert_close(computed[first], mean, rtol=1e-4, atol=1e-6)


def test_a_scaled_gradient_leaves_the_layout_and_may_be_written_into() -> None:
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    y = scale_gradient(x, 0.25)
    assert torch.equal(x, y)
    assert y.is_contiguous(memory_format=torch.channels_last)
    nn.functional.relu(y, inplace=True).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 0.25 * (x > 0))
