"""Exit rules: the one place where it is decided which exit answers.

Calibration, evaluation and runtime all call :func:`leaves`, so what was promised is what runs.
Numpy only. Scores are float64 and oriented so that higher is surer; an exit is taken if
``score > threshold``; a disabled exit has the threshold ``None``; the final exit always answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Thresholds = Sequence[float | None]


def log_softmax(logits: NDArray[Any], temperature: float = 1.0) -> Array:
    """``log softmax(logits / temperature)`` over the last axis, in float64."""
    scaled = np.divide(logits, temperature, dtype=np.float64)
    scaled -= np.maximum.reduce(scaled, axis=-1, keepdims=True)
    return np.asarray(scaled - np.log(np.add.reduce(np.exp(scaled), axis=-1, keepdims=True)))


def softmax(logits: NDArray[Any], temperature: float = 1.0) -> Array:
    """``softmax(logits / temperature)`` over the last axis, in float64."""
    return np.exp(log_softmax(logits, temperature))


def _exponentials(logits: NDArray[Any], sharpness: float) -> tuple[Array, Array, Array]:
    """With ``z = logits / sharpness - max``: z, exp(z), and the sum of exp(z); a softmax without its division."""
    # Reductions as ufuncs: the methods go by way of Python, which counts where a single image is decided on.
    scaled = np.divide(logits, sharpness, dtype=np.float64)
    scaled -= np.maximum.reduce(scaled, axis=-1, keepdims=True)
    exponentials = np.exp(scaled)
    return scaled, exponentials, np.add.reduce(exponentials, axis=-1)


def entropy_score(logits: NDArray[Any], sharpness: float = 1.0) -> Array:
    """``1 - H(softmax(logits / sharpness)) / ln K``, in [0, 1]; ERDE's own rule at sharpness 1."""
    scaled, exponentials, total = _exponentials(logits, sharpness)
    # H = ln(sum of e^z) - sum of p z
    entropy = np.log(total) - np.add.reduce(exponentials * scaled, axis=-1) / total
    return np.asarray(1.0 - entropy / math.log(scaled.shape[-1]))


def max_probability_score(logits: NDArray[Any], sharpness: float = 1.0) -> Array:
    """The largest probability of ``softmax(logits / sharpness)``, in [1/K, 1]."""
    return np.asarray(1.0 / _exponentials(logits, sharpness)[2])


def margin_score(logits: NDArray[Any], sharpness: float = 1.0) -> Array:
    """The difference of the two largest probabilities of ``softmax(logits / sharpness)``, in [0, 1]."""
    _, exponentials, total = _exponentials(logits, sharpness)
    second = np.partition(exponentials, -2, axis=-1)[..., -2]
    return np.asarray((1.0 - second) / total)


def energy_score(logits: NDArray[Any], sharpness: float = 1.0) -> Array:
    """``s ln sum_k exp(z_k / s)``, the negative free energy of Liu et al. 2020 (arXiv 2010.03759); unbounded."""
    scaled = np.asarray(logits, dtype=np.float64) / sharpness
    highest = scaled.max(axis=-1)
    return np.asarray(sharpness * (highest + np.log(np.exp(scaled - highest[..., None]).sum(axis=-1))))


def agreement_run(labels: Sequence[NDArray[np.int64]]) -> Array:
    """The number of exits in a row, up to the last, that give its label: 1 or more.

    ``labels`` are (B,) for each exit up to the last. With the threshold k - 1/2 this is patience: leave once k exits in
    a row agree (Zhou et al. 2020, arXiv 2006.04152).
    """
    run = np.ones(labels[-1].shape)
    agreeing = np.ones(labels[-1].shape, dtype=np.bool_)
    for earlier in reversed(labels[:-1]):
        agreeing &= earlier == labels[-1]
        run += agreeing
    return run


# Scores of one exit's own logits; the others of SCORES look at earlier exits too, or were fitted.
OWN_SCORES: dict[str, Callable[[NDArray[Any], float], Array]] = {
    "entropy": entropy_score,
    "max_probability": max_probability_score,
    "margin": margin_score,
    "energy": energy_score,
}
SCORES = (*OWN_SCORES, "patience", "harm")
ENSEMBLES = ("none", "arithmetic", "geometric")
Ensemble = Literal["none", "arithmetic", "geometric"]
# The learned score looks at this many of the largest log-probabilities.
TOP = 4


def score(logits: NDArray[Any], name: str, sharpness: float) -> Array:
    """The score ``name`` (one of OWN_SCORES) of ``logits`` (..., K) at a sharpness: float64 (...)."""
    return OWN_SCORES[name](logits, sharpness)


def running_ensemble(so_far: Sequence[NDArray[Any]], ensemble: Ensemble) -> Array:
    """The joint answer of the exits so far, each (B, K), as log-probabilities (B, K).

    ``arithmetic``: ``ln mean_j softmax(z_j)``; ``geometric``: ``mean_j ln softmax(z_j)``, not normalised.
    """
    each = np.stack([log_softmax(logits) for logits in so_far])
    if ensemble == "geometric":
        return np.asarray(each.mean(axis=0))
    highest = each.max(axis=0)
    return np.asarray(highest + np.log(np.exp(each - highest).mean(axis=0)))


def harm_features(so_far: Sequence[NDArray[Any]]) -> tuple[Array, NDArray[np.int64]]:
    """The features of the learned score at the last exit of ``so_far``: numbers (B, F) and its label (B,).

    The numbers: normalised entropy, margin, the log-probabilities of the TOP (at most K) likeliest classes,
    and for each earlier exit the log-probability that it gives to this exit's label and whether it agrees.
    """
    logits = np.stack(so_far)
    exits, count, classes = logits.shape
    log_probabilities, labels = log_softmax(logits), logits.argmax(axis=-1)
    own, label = log_probabilities[-1], labels[-1]
    top = min(TOP, classes)
    highest = np.sort(np.partition(own, -top, axis=-1)[:, -top:], axis=-1)[:, ::-1]
    features = np.empty((count, harm_feature_count(exits - 1, classes)))
    features[:, 0] = -(np.exp(own) * own).sum(axis=-1) / np.log(classes)
    features[:, 1] = np.exp(highest[:, 0]) - np.exp(highest[:, 1])
    features[:, 2 : 2 + top] = highest
    if exits > 1:
        features[:, 2 + top :: 2] = log_probabilities[:-1, np.arange(count), label].T
        features[:, 3 + top :: 2] = (labels[:-1] == label).T
    return features, label


def harm_feature_count(index: int, classes: int) -> int:
    """The number of features that :func:`harm_features` gives at exit ``index``."""
    return 2 + min(TOP, classes) + 2 * index


@dataclass(frozen=True)
class HarmParameters:
    """The learned score of one intermediate exit: a logistic regression on :func:`harm_features`.

    ``weights`` has one number per feature, ``class_weights`` one per predicted class.
    """

    bias: float
    weights: tuple[float, ...]
    class_weights: tuple[float, ...]

    @cached_property
    def _arrays(self) -> tuple[Array, Array]:
        return np.asarray(self.weights), np.asarray(self.class_weights)

    def score(self, so_far: Sequence[NDArray[Any]]) -> Array:
        """``1 - P(harm)``: the chance that nothing is lost by leaving here, in [0, 1]."""
        features, labels = harm_features(so_far)
        weights, class_weights = self._arrays
        log_odds = self.bias + features @ weights + class_weights[labels]
        # Bounds as ufuncs: np.clip costs a small batch three times as much.
        return np.asarray(1.0 / (1.0 + np.exp(np.minimum(np.maximum(log_odds, -500.0), 500.0))))


@dataclass(frozen=True)
class ExitRule:
    """The answer and the score of an exit, as data; thresholds are kept apart.

    ``score`` is one of SCORES at ``sharpness`` (of the OWN_SCORES only). With an ``ensemble`` the exits so
    far answer together, but for the final exit, which answers alone: with every early exit disabled the
    network is what it was. ``harm`` holds the E-1 regressions of the learned score.
    """

    score: str = "entropy"
    sharpness: float = 1.0
    ensemble: Ensemble = "none"
    harm: tuple[HarmParameters, ...] | None = None

    def in_words(self) -> str:
        """Such as "margin at sharpness 0.5"."""
        words = f"{self.score} at sharpness {self.sharpness:g}" if self.score in OWN_SCORES else self.score
        return words if self.ensemble == "none" else f"{words}, {self.ensemble} ensemble of the exits so far"

    @property
    def looks_back(self) -> bool:
        """Whether an exit needs the logits of earlier exits."""
        return self.ensemble != "none" or self.score in ("patience", "harm")

    def answer(self, so_far: Sequence[NDArray[Any]], final: bool) -> NDArray[Any]:
        """Logits (B, K) with which the last exit of ``so_far``, each (B, K), answers."""
        if final or self.ensemble == "none" or len(so_far) == 1:
            return so_far[-1]
        return running_ensemble(so_far, self.ensemble)

    def decide_on(self, so_far: Sequence[NDArray[Any]], answer: NDArray[Any], final: bool) -> Array:
        """The score (B,) of the last exit of ``so_far``, whose :meth:`answer` is given.

        The learned score of the final exit is 1: an answer that nothing follows loses nothing.
        """
        if self.score == "patience":
            return agreement_run([np.asarray(logits).argmax(axis=-1) for logits in so_far])
        if self.score == "harm":
            assert self.harm is not None
            if final:
                return np.ones(len(answer))
            return self.harm[len(so_far) - 1].score(so_far)
        return score(answer, self.score, self.sharpness)

    def apply(self, logits: NDArray[Any]) -> tuple[NDArray[Any], Array]:
        """The answers (E, N, K) and the scores (E, N) of the logits (E, N, K) of all exits."""
        count = len(logits)
        answers, scores = [], []
        for index in range(count):
            so_far, final = list(logits[: index + 1]), index == count - 1
            answers.append(self.answer(so_far, final))
            scores.append(self.decide_on(so_far, answers[-1], final))
        return (np.stack(answers) if self.ensemble != "none" else logits), np.stack(scores)


# The exit rule of ERDE and of most of the field: the entropy of the exit's own softmax.
PAPER_RULE = ExitRule("entropy", 1.0)


def leaves(scores: Array, threshold: float | Array | None) -> NDArray[np.bool_]:
    """The images that leave at an intermediate exit: those with ``score > threshold``; none where disabled.

    Several thresholds at once broadcast against the scores.
    """
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


# torch, ONNX Runtime and batch sizes differ in the last bits: a score this near its threshold may tip over.
BAND = 1e-5


def in_band(scores: Array, thresholds: Thresholds) -> NDArray[np.bool_]:
    """Images (N,) with a score within ``BAND`` of the threshold of an enabled exit that they reach."""
    near = np.zeros(scores.shape[-1], dtype=np.bool_)
    exits = decide(scores, thresholds)
    for index, threshold in enumerate(thresholds):
        if threshold is not None:
            near |= (np.abs(scores[index] - threshold) <= BAND) & (exits >= index)
    return near


def near_tie(logits: NDArray[Any]) -> NDArray[np.bool_]:
    """Images (N,) whose two largest logits of some exit, (E, N, K), lie within ``BAND``: their label may tip over."""
    top = np.partition(logits, -2, axis=-1)[..., -2:]
    return np.asarray((top[..., 1] - top[..., 0] <= BAND).any(axis=0))


def take_exit(values: NDArray[Any], exits: NDArray[np.int64]) -> NDArray[Any]:
    """From ``values`` (E, N, ...) the row of the exit that answers each image: (N, ...)."""
    return np.asarray(values[exits, np.arange(len(exits))])


def answer_probabilities(
    logits: NDArray[Any], exits: NDArray[np.int64], temperatures: Sequence[float] | Array
) -> Array:
    """The reported probabilities: the tempered softmax (N, K) of the exit that answered, ``logits`` (N, K)."""
    return softmax(np.asarray(logits, dtype=np.float64) / np.asarray(temperatures)[exits][:, None])
