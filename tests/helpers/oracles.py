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
    return [float(value)] * exits if np.ndim(value) == 0 else [float(each) for each in value]


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
    distillation_form: str = "kl",
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
    scale: Any = 1.0,
    held_out_logits: NDArray[Any] | None = None,
) -> dict[str, Any]:
    """METHODS.md section 1, image by image: the loss, and its unweighted parts per exit."""
    exits, images, classes = student.shape
    pairs = range(exits) if pairs is None else pairs
    alpha, beta, weights = per_exit(alpha, exits), per_exit(beta, exits), per_exit(exit_weights, exits)
    parts = {
        name: np.zeros(exits) for name in ("ce", distillation_form, "entropy", "teacher_wrong", "doubted")
    }
    scaled = scale * student
    loss = 0.0
    for i in range(exits):
        for b in range(images):
            s, t, y = student[i, b], teacher[pairs[i], b], labels[b]
            p = softmax(s)
            teacher_wrong = wrong = np.argmax(t) != y
            if wrong_test == "final":
                wrong = np.argmax(teacher[-1, b]) != y
            elif wrong_test == "held_out":
                assert held_out_logits is not None
                wrong = np.argmax(held_out_logits[pairs[i], b]) != y
            elif wrong_test == "uncertain":
                wrong = wrong or softmax(t).max() < uncertainty
            elif wrong_test == "harm":
                wrong = np.argmax(s) != y and np.argmax(student[-1, b]) == y
            ce = -np.log(p[y])
            if wrong and not ce_on_wrong and i < exits - 1:
                ce = 0.0
            divergence: Any = 0.0
            if not wrong or kl_on_wrong:
                divergence = temperature**2 * kl(t, scaled[i, b], temperature)
                if distillation_form == "dkd":
                    target, others = decoupled(scaled[i, b], t, y, temperature)
                    divergence = temperature**2 * (target_weight * target + non_target_weight * others)
            penalty: Any = 0.0
            if wrong and (i < exits - 1 or entropy_exits == "all"):
                if entropy_form == "negentropy":
                    penalty = np.log(classes) - entropy(s)
                elif entropy_form == "uniform_kl":
                    penalty = np.sum(1 / classes * np.log(1 / classes / p))
                else:
                    penalty = (entropy(t) - entropy(s)) ** 2
            for name, value in zip(
                parts, (ce, divergence, penalty, float(teacher_wrong), float(wrong)), strict=True
            ):
                parts[name][i] += value / images
            loss += weights[i] * ((1 - alpha[i]) * ce + alpha[i] * divergence + beta[i] * penalty) / images
    if wrong_test == "exit":
        del parts["doubted"]
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
    standardise: bool = False,
    weight: float = 1.0,
    scale: Any = 1.0,
) -> dict[str, Any]:
    """``sum_i w_i [(1-a_i) CE + a_i v T² KL]``, averaged over images; the KL sees ``scale`` times the student."""
    exits = len(student)
    paired = teacher if pairs is None else teacher[list(pairs)]
    ce = cross_entropy(student, labels).mean(axis=1)
    sides = paired, scale * student
    if standardise:
        sides = standardised(sides[0]), standardised(sides[1])
    divergence = temperature**2 * kl(*sides, temperature).mean(axis=1)
    alpha, weights = per_exit(alpha, exits), per_exit(exit_weights, exits)
    loss = sum(
        weights[i] * ((1 - alpha[i]) * ce[i] + alpha[i] * weight * divergence[i]) for i in range(exits)
    )
    return {
        "loss": loss,
        "ce": ce,
        "kl": divergence,
        "teacher_wrong": (paired.argmax(-1) != labels).mean(axis=1),
    }


def standardised(logits: NDArray[Any]) -> Array:
    """arXiv 2403.01427: z-scores over classes."""
    return (logits - logits.mean(-1, keepdims=True)) / (logits.std(-1, ddof=1, keepdims=True) + 1e-7)


def decoupled(s: Array, t: Array, y: int, temperature: float) -> tuple[float, float]:
    """arXiv 2203.08679, equations 4 to 6, for one image: (TCKD, NCKD) without T²."""
    p, q = softmax(s, temperature), softmax(t, temperature)
    binary = q[y] * np.log(q[y] / p[y]) + (1 - q[y]) * np.log((1 - q[y]) / (1 - p[y]))
    p_hat, q_hat = np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y])
    return float(binary), float(np.sum(q_hat * np.log(q_hat / p_hat)))


def dkd_parts(
    student: NDArray[Any],
    teacher: NDArray[Any],
    labels: NDArray[np.int64],
    *,
    alpha: Any = 0.9,
    temperature: float = 4.0,
    exit_weights: Any = 1.0,
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
    standardise: bool = False,
    strength: float = 1.0,
) -> dict[str, Any]:
    """``sum_i w_i [(1-a_i) CE + a_i r T² (v TCKD + u NCKD)]``, image by image."""
    exits, images, _ = student.shape
    parts = {name: np.zeros(exits) for name in ("ce", "tckd", "nckd", "teacher_wrong")}
    for i in range(exits):
        for b in range(images):
            s, t, y = student[i, b], teacher[i, b], labels[b]
            read = standardised if standardise else np.asarray
            first, second = decoupled(read(s), read(t), y, temperature)
            terms = (
                -np.log(softmax(s)[y]),
                temperature**2 * first,
                temperature**2 * second,
                np.argmax(t) != y,
            )
            for name, value in zip(parts, terms, strict=True):
                parts[name][i] += value / images
    loss = 0.0
    for i, (a, w) in enumerate(zip(per_exit(alpha, exits), per_exit(exit_weights, exits), strict=True)):
        distilled = target_weight * parts["tckd"][i] + non_target_weight * parts["nckd"][i]
        loss += w * ((1 - a) * parts["ce"][i] + a * strength * distilled)
    return {"loss": loss, **parts}


def soft_cross_entropy(student: NDArray[Any], teacher: NDArray[Any], temperature: float) -> Array:
    return -np.sum(softmax(teacher, temperature) * np.log(softmax(student, temperature)), axis=-1)


def phuong_parts(
    student: NDArray[Any],
    labels: NDArray[np.int64],
    *,
    temperature: float = 1.0,
    soft_share: float = 0.5,
    exit_weights: Any = 1.0,
) -> dict[str, Any]:
    """Phuong and Lampert 2019, equations 2 to 4: the last exit teaches the earlier ones."""
    exits = len(student)
    ce = cross_entropy(student, labels).mean(axis=1)
    soft = np.zeros(exits)
    for i in range(exits - 1):
        soft[i] = temperature**2 * soft_cross_entropy(student[i], student[-1], temperature).mean()
    weights = per_exit(exit_weights, exits)
    loss = sum(weights[i] * ((1 - soft_share) * ce[i] + soft_share * soft[i]) for i in range(exits))
    return {"loss": loss, "ce": ce, "soft": soft}


def byot_parts(
    student: NDArray[Any],
    labels: NDArray[np.int64],
    *,
    soft_share: float = 0.3,
    temperature: float = 3.0,
    exit_weights: Any = 1.0,
    features: NDArray[Any] | None = None,
    feature_weight: float = 0.0,
) -> dict[str, Any]:
    """arXiv 1905.08094: labels for the deepest exit; labels, its soft answers and its features for the others."""
    exits, images, _ = student.shape
    ce = cross_entropy(student, labels).mean(axis=1)
    soft, distance, loss = np.zeros(exits), np.zeros(exits), 0.0
    for i, w in enumerate(per_exit(exit_weights, exits)):
        if i == exits - 1:
            loss += w * ce[i]
            continue
        soft[i] = soft_cross_entropy(student[i], student[-1], temperature).mean()
        if features is not None:
            distance[i] = (
                sum(np.linalg.norm(features[i, b] - features[-1, b]) ** 2 for b in range(images)) / images
            )
        loss += w * ((1 - soft_share) * ce[i] + soft_share * soft[i] + feature_weight * distance[i])
    parts = {"loss": loss, "ce": ce, "soft": soft}
    return parts if features is None else {**parts, "feature": distance}


def exit_ensemble_parts(
    student: NDArray[Any],
    labels: NDArray[np.int64],
    *,
    weight: float = 1.0,
    exit_weights: Any = 1.0,
    features: NDArray[Any] | None = None,
    feature_weight: float = 0.0,
) -> dict[str, Any]:
    """arXiv 2104.00299: labels, and the mean of all exits, for every exit."""
    exits = len(student)
    ce = cross_entropy(student, labels).mean(axis=1)
    ensemble = np.array([np.mean((logits - sum(student) / exits) ** 2) for logits in student])
    distance = np.zeros(exits)
    if features is not None:
        distance = np.array([np.mean((feature - sum(features) / exits) ** 2) for feature in features])
    per_loss = ce + weight * ensemble + feature_weight * distance
    loss = sum(w * part for w, part in zip(per_exit(exit_weights, exits), per_loss, strict=True))
    parts = {"loss": loss, "ce": ce, "ensemble": ensemble}
    return parts if features is None else {**parts, "feature": distance}


class CRD:
    """arXiv 1910.10699, equations 17 to 19, and the memory of its section 3.2, image by image."""

    def __init__(
        self, projections: list[tuple[Array, Array]], memories: Array, temperature: float, momentum: float
    ):
        self.projections, self.memories = projections, [memory.copy() for memory in memories]
        self.temperature, self.momentum = temperature, momentum
        self.constants: list[float] | None = None

    def step(
        self, features: list[Array], indices: NDArray[np.int64], negatives: list[NDArray[np.int64]]
    ) -> float:
        """The loss, a mean over images; Z is set in the first step and the memories change after it."""
        embeddings = []
        for (weight, bias), feature in zip(self.projections, features, strict=True):
            rows = feature @ weight.T + bias
            embeddings.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        images = len(self.memories[0])
        agreements = [
            [
                np.exp(self.memories[1 - side][[index, *others]] @ row / self.temperature)
                for row, index, others in zip(embeddings[side], indices, negatives, strict=True)
            ]
            for side in (0, 1)
        ]
        if self.constants is None:
            self.constants = [float(np.mean(np.concatenate(agreement)) * images) for agreement in agreements]
        loss = 0.0
        for side in (0, 1):
            for values in agreements[side]:
                probability = values / self.constants[side]
                noise = (len(values) - 1) / images
                loss -= np.log(probability[0] / (probability[0] + noise + 1e-7))
                loss -= np.sum(np.log(noise / (probability[1:] + noise + 1e-7)))
            for row, index in zip(embeddings[side], indices, strict=True):
                mixed = self.momentum * self.memories[side][index] + (1 - self.momentum) * row
                self.memories[side][index] = mixed / np.linalg.norm(mixed)
        return float(loss / len(indices))


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

    hooks = [child.register_forward_hook(count) for child in module.modules()]
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
