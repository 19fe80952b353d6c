"""Weights of images by the exits that they would reach."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from erde.data.load import DataSplits
from erde.losses.base import reach_weights
from erde.training.learner import _Step
from tests.helpers.checks import user_error
from tests.helpers.networks import plain_network
from tests.training.test_loop import make_criterion, make_job

torch.set_num_threads(1)


def expected_weights(logits: Any) -> Any:
    """The formula in plain numpy, image by image."""
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    entropy = -(probabilities * np.log(probabilities)).sum(axis=-1)
    exits, images = entropy.shape
    here, weights = list(range(images)), np.ones((exits, images))
    for index in range(exits):
        weights[index, here] = 2
        here = sorted(here, key=lambda image: entropy[index, image])[images // exits :]
    return weights / weights.mean(axis=1, keepdims=True)


@pytest.mark.parametrize(("exits", "images"), [(3, 12), (4, 10), (1, 5), (3, 2)])
def test_weights_by_hand(exits: int, images: int) -> None:
    logits = torch.randn(exits, images, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = reach_weights(2 * logits)
    np.testing.assert_allclose(weights.numpy(), expected_weights(2 * logits.numpy()))
    assert weights.mean(dim=1).tolist() == pytest.approx([1.0] * exits)
    assert weights.min() >= 0.5
    assert weights[0].eq(1).all()


@pytest.mark.parametrize("loss", ["ce", "kd"])
def test_a_weight_on_the_gradient_is_a_weight_of_the_images_loss(loss: str, digits: DataSplits) -> None:
    network, teacher = plain_network(exits=3), plain_network(seed=7, exits=3)
    x, labels = torch.randn(12, 1, 8, 8), torch.arange(12) % 10
    teacher_logits = teacher(x).detach()
    job = make_job(digits, make_criterion(digits, loss, network, teacher), network=network)
    plain, logits = _Step(job, "joint")(x, labels, teacher_logits, {})
    job = dataclasses.replace(job, config=job.config.model_copy(update={"image_weights": "reached"}))
    parts, weighed_logits = _Step(job, "joint")(x, labels, teacher_logits, {})
    # What is recorded stays as it is.
    assert torch.equal(logits, weighed_logits)
    assert torch.equal(parts["loss"], plain["loss"])
    weights = torch.from_numpy(expected_weights(logits.detach().double().numpy())).float()
    ce = torch.stack([nn.functional.cross_entropy(rows, labels, reduction="none") for rows in logits])
    total = ce
    if loss == "kd":
        log, target = (logits / 4).log_softmax(-1), (teacher_logits / 4).softmax(-1)
        kl = nn.functional.kl_div(log, target, reduction="none").sum(-1)
        alpha = job.criterion.alpha.unsqueeze(1)
        total = (1 - alpha) * ce + alpha * 16 * kl
    expected = (weights * total).mean(dim=1).sum()
    parameters = list(network.parameters())
    for result, wanted in zip(
        torch.autograd.grad(parts["loss"], parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-6)


def test_losses_that_compare_features_are_refused(digits: DataSplits) -> None:
    job = dataclasses.replace(make_job(digits, image_weights="reached"), extras=("student_features",))
    with user_error("train.image_weights=reached weighs images by their logits"):
        job.check()
