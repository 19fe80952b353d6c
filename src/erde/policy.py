"""Exit rules: the one place where it is decided which exit answers.

Calibration, evaluation, runtime and server all call :func:`leaves`, so what was promised is what runs.
Numpy only. Scores are float64 and oriented so that higher is surer; an exit is taken if
``score > threshold``; a disabled exit has the threshold ``None``; the final exit always answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Thresholds = Sequence[float | None]


def log_softmax(logits: NDArray[Any], temperature: float = 1.0) -> Array:
    """``log softmax(logits / temperature)`` over the last axis, in float64."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    return np.asarray(scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True)))


def softmax(logits: NDArray[Any], temperature: float = 1.0) -> Array:
    """``softmax(logits / temperature)`` over the last axis, in float64."""
    return np.exp(log_softmax(logits, temperature))


def entropy_score(logits: NDArray[Any], sharpness: float = 1.0) -> Array:
    """``1 - H(softmax(logits / sharpness)) / ln K``, in [0, 1]; ERDE's own rule at sharpness 1."""
    log_probabilities = log_softmax(logits, sharpness)
    entropy = -(np.exp(log_probabilities) * log_probabilities).sum(axis=-1)
    return np.asarray(1.0 - entropy / np.log(log_probabilities.shape[-1]))


def max_probability_score(logits: NDArray[Any], sharpness: float = 1.0) -> Array:
    """The largest probability of ``softmax(logits / sharpness)``, in [1/K, 1]."""
    return np.asarray(softmax(logits, sharpness).max(axis=-1))


def margin_score(logits: NDArray[Any], sharpness: float = 1.0) -> Array:
    """The difference of the two largest probabilities of ``softmax(logits / sharpness)``, in [0, 1]."""
    top = np.partition(softmax(logits, sharpness), -2, axis=-1)
    return np.asarray(top[..., -1] - top[..., -2])


SCORES: dict[str, Callable[[NDArray[Any], float], Array]] = {
    "entropy": entropy_score,
    "max_probability": max_probability_score,
    "margin": margin_score,
}


def score(logits: NDArray[Any], name: str, sharpness: float) -> Array:
    """The score ``name`` of ``logits`` (..., K) at a sharpness: float64 (...)."""
    return SCORES[name](logits, sharpness)


def leaves(scores: Array, threshold: float | None) -> NDArray[np.bool_]:
    """Which images leave at an intermediate exit: those with ``score > threshold``; none where disabled."""
    if threshold is None:
        return np.zeros(scores.shape, dtype=np.bool_)
    return np.asarray(scores > threshold)


def decide(scores: Array, thresholds: Thresholds) -> NDArray[np.int64]:
    """The exit (N,) that answers each image, given the scores of the intermediate exits.

    ``scores`` is (E-1, N) or more rows (the final exit's is not looked at); ``thresholds`` has E-1 entries.
    """
    exits = np.full(scores.shape[-1], len(thresholds), dtype=np.int64)
    for index in range(len(thresholds) - 1, -1, -1):
        exits[leaves(scores[index], thresholds[index])] = index
    return exits


def take_exit(values: NDArray[Any], exits: NDArray[np.int64]) -> NDArray[Any]:
    """From ``values`` (E, N, ...) the row of the exit that answers each image: (N, ...)."""
    return np.asarray(values[exits, np.arange(len(exits))])


def answer_probabilities(
    logits: NDArray[Any], exits: NDArray[np.int64], temperatures: Sequence[float]
) -> Array:
    """What an answer reports: the tempered softmax (N, K) of the exit that answered, ``logits`` (N, K)."""
    return softmax(np.asarray(logits, dtype=np.float64) / np.asarray(temperatures)[exits][:, None])
