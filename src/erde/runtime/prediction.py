"""The answer of a bundle to a batch of images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from erde.policy import rule as policy


@dataclass(frozen=True)
class Prediction:
    """Answers for N images, in the order given.

    ``logits`` (N, K) are those of the exit that answered (for an ensemble score: the ensemble's), ``probabilities``
    (N, K) their softmax at that exit's temperature, computed when first asked for; ``scores`` (N,) what that
    exit decided on; ``macs`` (N,) what was computed, heads included: up to the exit that answered, or further for
    an image that was carried along with its batch because that was quicker (:meth:`Session.profile`).

    ``capped`` is a matter of what was asked, not of the images: True if thresholds were given, if a limit (``max_exit``,
    ``max_macs``, ``deadline_ms``) left the final exit out, or if int8 stages ran in another engine than the one that
    they were certified in. Then no certificate speaks of these answers. Otherwise each is what the operating point
    alone decides, and its certificate, if it has one, does.

    ``milliseconds`` are measured: one number per stage that ran, for the whole batch, decision included.

    ``first_scores`` (N,) are the scores of exit 0, wherever the image left (of the final exit, where a chain runs its last
    network only); ``operating_point`` is the one that decided, None where thresholds were given.
    """

    labels: NDArray[np.int64]
    logits: NDArray[np.float64]
    exits: NDArray[np.int64]
    scores: NDArray[np.float64]
    macs: NDArray[np.int64]
    capped: bool
    milliseconds: tuple[float, ...]
    first_scores: NDArray[np.float64]
    operating_point: str | None
    temperatures: NDArray[np.float64]  # (E,), of the bundle's exits

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """The tempered softmax (N, K) of the exit that answered."""
        return policy.answer_probabilities(self.logits, self.exits, self.temperatures)
