"""Independent formulas, in numpy and float64, written from the methods' papers and not from erde's code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]


def softmax(logits: NDArray[Any], temperature: float = 1.0) -> Array:
    exponentials = np.exp(np.asarray(logits, np.float64) / temperature)
    return exponentials / exponentials.sum(-1, keepdims=True)


def entropy(logits: NDArray[Any], temperature: float = 1.0) -> Array:
    p = softmax(logits, temperature)
    return -np.sum(p * np.log(p), axis=-1)


def cross_entropy(logits: NDArray[Any], labels: NDArray[np.int64]) -> Array:
    """(E, B, K), (B,) -> (E, B)."""
    p = softmax(logits)
    return np.array([[-np.log(p[i, b, labels[b]]) for b in range(p.shape[1])] for i in range(p.shape[0])])


def kl(teacher: NDArray[Any], student: NDArray[Any], temperature: float) -> Array:
    """``KL(teacher || student)`` of tempered softmaxes, without T²."""
    t, s = softmax(teacher, temperature), softmax(student, temperature)
    return np.sum(t * (np.log(t) - np.log(s)), axis=-1)


def per_exit(value: float | Sequence[float], exits: int) -> list[float]:
    return [float(value)] * exits if np.ndim(value) == 0 else [float(one) for one in value]


def ce_loss(logits: NDArray[Any], labels: NDArray[np.int64], exit_weights: Any = 1.0) -> float:
    parts = cross_entropy(logits, labels).mean(axis=1)
    return sum(w * part for w, part in zip(per_exit(exit_weights, len(parts)), parts, strict=True))


def erde_parts(
    student: NDArray[Any],
    teacher: NDArray[Any],
    labels: NDArray[np.int64],
    *,
    alpha: Any = 0.9,
    beta: Any = 0.2,
    temperature: float = 4.0,
    exit_weights: Any = 1.0,
    pairs: Sequence[int] | None = None,
    kl_on_wrong: bool = False,
    ce_on_wrong: bool = True,
    wrong_test: str = "exit",
    uncertainty: float = 0.5,
    entropy_form: str = "negentropy",
    entropy_exits: str = "intermediate",
) -> dict[str, Any]:
    """METHODS.md section 1, image by image: the loss, and its unweighted parts per exit."""
    exits, images, classes = student.shape
    pairs = range(exits) if pairs is None else pairs
    alpha, beta, weights = per_exit(alpha, exits), per_exit(beta, exits), per_exit(exit_weights, exits)
    parts = {name: np.zeros(exits) for name in ("ce", "kl", "entropy", "teacher_wrong")}
    loss = 0.0
    for i in range(exits):
        for b in range(images):
            s, t, y = student[i, b], teacher[pairs[i], b], labels[b]
            p = softmax(s)
            wrong = np.argmax(t) != y
            if wrong_test == "final":
                wrong = np.argmax(teacher[-1, b]) != y
            elif wrong_test == "uncertain":
                wrong = wrong or softmax(t).max() < uncertainty
            ce = -np.log(p[y])
            if wrong and not ce_on_wrong and i < exits - 1:
                ce = 0.0
            divergence = 0.0
            if not wrong or kl_on_wrong:
                divergence = temperature**2 * kl(t, s, temperature)
            penalty = 0.0
            if wrong and (i < exits - 1 or entropy_exits == "all"):
                if entropy_form == "negentropy":
                    penalty = np.log(classes) - entropy(s)
                elif entropy_form == "uniform_kl":
                    penalty = np.sum(1 / classes * np.log(1 / classes / p))
                else:
                    penalty = (entropy(t) - entropy(s)) ** 2
            for name, value in zip(parts, (ce, divergence, penalty, float(wrong)), strict=True):
                parts[name][i] += value / images
            loss += weights[i] * ((1 - alpha[i]) * ce + alpha[i] * divergence + beta[i] * penalty) / images
    return {"loss": loss, **parts}


def kd_parts(
    student: NDArray[Any],
    teacher: NDArray[Any],
    labels: NDArray[np.int64],
    *,
    alpha: Any = 0.9,
    temperature: float = 4.0,
    exit_weights: Any = 1.0,
    pairs: Sequence[int] | None = None,
) -> dict[str, Any]:
    """``sum_i w_i [(1-a_i) CE + a_i T² KL]``, averaged over images."""
    exits = len(student)
    paired = teacher if pairs is None else teacher[list(pairs)]
    ce = cross_entropy(student, labels).mean(axis=1)
    divergence = temperature**2 * kl(paired, student, temperature).mean(axis=1)
    alpha, weights = per_exit(alpha, exits), per_exit(exit_weights, exits)
    loss = sum(weights[i] * ((1 - alpha[i]) * ce[i] + alpha[i] * divergence[i]) for i in range(exits))
    return {
        "loss": loss,
        "ce": ce,
        "kl": divergence,
        "teacher_wrong": (paired.argmax(-1) != labels).mean(axis=1),
    }


def hooked_macs(module: nn.Module, *inputs: Tensor) -> tuple[int, Any]:
    """MACs of a call by forward hooks on convolutions and linear layers, and the call's output."""
    total = 0

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            height, width = layer.kernel_size
            total += output.numel() * height * width * layer.in_channels // layer.groups
        elif isinstance(layer, nn.Linear):
            total += output.numel() * layer.in_features

    hooks = [one.register_forward_hook(count) for one in module.modules()]
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            output = module(*inputs)
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    return total, output


def synthetic_logits(
    seed: int, images: int, signals: Sequence[float] = (1.4, 1.9, 2.4), classes: int = 5
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits (E, N, K) and labels (N,): deeper exits see more, and hard images are hard for all of them."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=images)
    ease = generator.gamma(2.0, 1.0, size=images)
    shared = generator.normal(size=(images, classes))
    logits = np.stack([shared + generator.normal(size=(images, classes)) for _ in signals])
    for index, signal in enumerate(signals):
        logits[index, np.arange(images), labels] += signal * ease
    return logits.astype(np.float32), labels
