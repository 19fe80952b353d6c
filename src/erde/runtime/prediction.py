"""The answer of a bundle to a batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from erde.common.errors import UserError
from erde.policy import rule as policy
from erde.runtime import display


@dataclass(frozen=True, repr=False)
class Prediction:
    """Answers for N images, in the order given.

    ``logits`` (N, K) are those of the exit that answered (for an ensemble score: the ensemble's), ``probabilities``
    (N, K) their softmax at that exit's temperature, computed when first asked for; ``scores`` (N,) what that
    exit decided on; ``macs`` (N,) what was computed, heads included: up to the exit that answered, or further for
    an image that was carried along with its batch because that was quicker (:meth:`Session.profile`).

    ``capped`` is a matter of what was asked, not of the images: True if thresholds were given, if a limit (``max_exit``,
    ``max_macs``, ``deadline_ms``) left the final exit out, or if int8 stages ran elsewhere than where they are
    certified, which is in ONNX Runtime's CPU provider. Then no certificate speaks of these answers. Otherwise each is
    what the operating point alone decides, and its certificate, if it has one, does.

    ``milliseconds`` are measured: one number per stage that ran, for the whole batch, decision included.

    ``first_scores`` (N,) are the scores of exit 0, wherever the image left (of the final exit, where a chain runs its last
    network only); ``operating_point`` is the one that decided, None where thresholds were given.

    ``classes`` are the names of all K classes. Where the images were decoded by :meth:`Session.predict`, ``files`` has
    their names ("" for what came from no file), and ``thumbnails`` the first few, uint8 (n, H, W, C), as the network
    saw them. ``print(answer)`` shows a table, and so does a notebook, with these images.
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
    classes: Sequence[str] = ()
    files: Sequence[str] = ()
    thumbnails: NDArray[np.uint8] | None = None

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """The tempered softmax (N, K) of the exit that answered."""
        return policy.answer_probabilities(self.logits, self.exits, self.temperatures)

    @property
    def names(self) -> list[str]:
        """The name of the class of each image."""
        return [self.name_of(label) for label in self.labels]

    def top(self, count: int = 5) -> list[list[tuple[str, float]]]:
        """For each image its ``count`` likeliest classes (all, if there are fewer), as (name, probability)."""
        if count < 1:
            raise UserError(f"count is {count}, expected 1 or more")
        return display.likeliest(self, count)

    def name_of(self, label: int) -> str:
        """The name of class ``label``; its number, where no names are known."""
        return self.classes[label] if self.classes else str(label)

    def __repr__(self) -> str:
        return display.text(self)

    def _repr_html_(self) -> str:
        return display.html(self)
