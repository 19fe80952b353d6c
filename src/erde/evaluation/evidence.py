"""Data that a report embeds beside the results: every image's way through the exits, and images to look at.

The page moves an operating point along the path of thresholds and counts anew, so it needs each image's
scores. It gets them as ranks among the thresholds of the path: whole numbers, small, and exact.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from erde.calibration.policy_file import CalibratedPolicy
from erde.calibration.thresholds import ScoredSplit, ThresholdPath
from erde.common.splits import ImageSource, TestLogits
from erde.evaluation.confusion import Confusion
from erde.policy import rule as policy
from erde.policy.cost import Cost

# More test images than this are sampled, and so are fewer where many arms and exits would make a large page.
MAX_IMAGES = 20_000
MAX_RANK_BYTES = 330_000
# Pixels of the longer side of a thumbnail; smaller images keep their size.
THUMBNAIL_SIDE = 64
PER_GROUP = 12
MAX_THUMBNAILS = 96
# Sharp pixels matter in small images, and lossless costs little there.
_LOSSLESS_SIDE = 40


@dataclass(frozen=True)
class ArmInput:
    """One arm on the test split; ``reference_right`` (N,) is None where the final exit is the reference."""

    test: TestLogits
    policy: CalibratedPolicy
    cost: Cost
    reference_right: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class ArmEvidence:
    """Where each of n embedded images would leave, for every point of an arm's path of thresholds.

    ``ranks`` (E-1, n): how many of the exit's distinct thresholds are below the image's score; ``levels``
    (P, E-1): the rank of each point's threshold, or the number of distinct ones where the exit is disabled.
    The image leaves at the exit if ``rank > level``, which is ``score > threshold``. ``thresholds`` are the
    distinct ones of each exit, rising. ``right`` (E, n) and ``reference_right`` (n,) are for accuracy and
    risk; ``named`` maps operating points to places on the path, ``start`` is the default one's.
    """

    ranks: NDArray[np.uint16]
    levels: NDArray[np.uint16]
    thresholds: tuple[tuple[float, ...], ...]
    right: NDArray[np.bool_]
    reference_right: NDArray[np.bool_]
    cost: Cost
    named: dict[str, int]
    start: int

    def embedded(self) -> dict[str, object]:
        """The data of the page, packed into base64: ranks by exit, then the bits of ``right`` and the reference."""
        width = 1 if max(self.ranks.max(initial=0), self.levels.max(initial=0)) < 256 else 2
        bits = np.packbits(np.vstack([self.right, self.reference_right]), axis=0, bitorder="little")
        return {
            "images": self.ranks.shape[1],
            "width": width,
            "ranks": _base64(self.ranks.astype(f"<u{width}").tobytes()),
            "levels": _base64(self.levels.astype(f"<u{width}").tobytes()),
            "bits": _base64(bits.tobytes()),
            "thresholds": self.thresholds,
            "exit_macs": list(self.cost.exit_macs),
            "no_exit_macs": self.cost.no_exit_macs,
            "exit_milliseconds": self.cost.exit_milliseconds,
            "named": self.named,
            "start": self.start,
        }


@dataclass(frozen=True)
class Thumbnail:
    """A test image and how it was answered at the default operating point; classes are indices."""

    address: str  # data:image/...
    true: int
    answer: int
    exit: int
    confidence: float


@dataclass(frozen=True)
class Gallery:
    """Images that have something in common; ``kind`` is surest, unsure, stayed or wrong."""

    kind: str
    exit: int | None
    total: int  # images that belong here, shown or not
    thumbnails: tuple[Thumbnail, ...]


@dataclass(frozen=True)
class Evidence:
    """Data that a report embeds beside the results. Arms with one exit have no path and are left out."""

    test_images: int
    arms: dict[str, ArmEvidence]
    galleries: tuple[Gallery, ...]
    confusion: Confusion  # of the exported arm, over all test images


def collect(
    arms: Mapping[str, ArmInput], exported: str, images: ImageSource | None = None, seed: int = 0
) -> Evidence:
    """Gather the evidence of a run: every arm's images along its path; galleries and mistakes of the exported arm.

    ``images`` is the test split's, in the order of the logits; without it there are no galleries. More than
    MAX_IMAGES test images, or more than fit the page, are sampled by ``seed``, the same ones for every arm.
    """
    several = {name: inputs for name, inputs in arms.items() if len(inputs.test.logits) > 1}
    total = max((len(inputs.test) for inputs in arms.values()), default=0)
    chosen = _sample(total, list(several.values()), seed)
    galleries: tuple[Gallery, ...] = ()
    if images is not None and exported in several:
        galleries = _galleries(several[exported], images)
    return Evidence(
        total,
        {name: _arm_evidence(inputs, chosen) for name, inputs in several.items()},
        galleries,
        Confusion.of(arms[exported].test, arms[exported].policy),
    )


def _sample(total: int, arms: Sequence[ArmInput], seed: int) -> NDArray[np.int64]:
    each = sum(_bytes_each(arm) for arm in arms)
    count = min(total, MAX_IMAGES, MAX_RANK_BYTES // max(1, each))
    if count == total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, count, replace=False))


def _bytes_each(arm: ArmInput) -> int:
    exits = len(arm.test.logits)
    most = max(len(_distinct(arm.policy.path, index)) for index in range(exits - 1))
    return (1 if most < 256 else 2) * (exits - 1) + (exits + 1 + 7) // 8


def _distinct(path: ThresholdPath, index: int) -> NDArray[np.float64]:
    """The thresholds of an exit along the path, rising, each once; where it is disabled there is none."""
    return np.unique([point[index] for point in path.thresholds if point[index] is not None]).astype(
        np.float64
    )


def _arm_evidence(arm: ArmInput, chosen: NDArray[np.int64]) -> ArmEvidence:
    scored = ScoredSplit.of(arm.test, arm.policy.rule, arm.reference_right)
    path = arm.policy.path
    thresholds = [_distinct(path, index) for index in range(len(scored.scores) - 1)]
    ranks, levels = [], []
    for index, distinct in enumerate(thresholds):
        # The number of thresholds strictly below the score: score > threshold.
        ranks.append(np.searchsorted(distinct, scored.scores[index, chosen], side="left"))
        levels.append([_level(distinct, point[index]) for point in path.thresholds])
    named = {
        point.name: path.thresholds.index(tuple(point.thresholds))
        for point in arm.policy.points
        if tuple(point.thresholds) in path.thresholds
    }
    return ArmEvidence(
        ranks=np.asarray(ranks, dtype=np.uint16),
        levels=np.asarray(levels, dtype=np.uint16).T,
        thresholds=tuple(tuple(distinct.tolist()) for distinct in thresholds),
        right=scored.right[:, chosen],
        reference_right=scored.reference_right[chosen],
        cost=arm.cost,
        named=named,
        start=named.get(arm.policy.default, 0),
    )


def _level(distinct: NDArray[np.float64], threshold: float | None) -> int:
    return len(distinct) if threshold is None else int(np.searchsorted(distinct, threshold))


# ---------------------------------------------------------------- images


def _galleries(arm: ArmInput, images: ImageSource) -> tuple[Gallery, ...]:
    """Of each exit the surest and the least sure that leave, who stays longest, and the confidently wrong."""
    answers, scores = arm.policy.rule.apply(arm.test.logits)
    exits = policy.decide(scores[:-1], arm.policy.default_point().thresholds)
    answered = policy.take_exit(answers, exits)
    labels = answered.argmax(axis=-1)
    confidence = policy.answer_probabilities(answered, exits, arm.policy.temperatures).max(axis=-1)
    final = len(scores) - 1
    asked: list[tuple[str, int | None, NDArray[np.bool_], NDArray[np.float64]]] = []
    for index in range(final):
        asked.append(("surest", index, exits == index, scores[index]))
        asked.append(("unsure", index, exits == index, scores[index]))
    asked.append(("stayed", final, exits == final, scores[final - 1]))
    # Scores of two exits need not mean the same; the confidence that is reported does.
    asked.append(("wrong", None, (exits < final) & (labels != arm.test.labels), confidence))
    size = max(4, min(PER_GROUP, MAX_THUMBNAILS // len(asked)))

    def thumbnail(row: int) -> Thumbnail:
        true = int(arm.test.labels[row])
        address = encode(images[np.array([row])][0])
        return Thumbnail(address, true, int(labels[row]), int(exits[row]), float(confidence[row]))

    galleries = []
    for kind, place, members, order in asked:
        rows = np.flatnonzero(members)
        # Scores saturate at 1: confidence parts them, and then the order of the test split.
        sign = -1 if kind in ("surest", "wrong") else 1
        best = rows[np.lexsort((rows, sign * confidence[rows], sign * order[rows]))[:size]]
        galleries.append(Gallery(kind, place, len(rows), tuple(thumbnail(int(row)) for row in best)))
    return tuple(galleries)


def encode(pixels: NDArray[np.uint8]) -> str:
    """An image, uint8 (H, W, C) with one or three channels, as a small ``data:`` address."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))

    def bytes_of(write: Callable[[io.BytesIO], None]) -> bytes:
        buffer = io.BytesIO()
        write(buffer)
        return buffer.getvalue()

    png = bytes_of(lambda buffer: picture.save(buffer, "PNG", optimize=True))
    lossless = max(picture.size) <= _LOSSLESS_SIDE
    webp = bytes_of(lambda buffer: picture.save(buffer, "WEBP", lossless=lossless, quality=80))
    kind, data = ("png", png) if len(png) <= len(webp) else ("webp", webp)
    return f"data:image/{kind};base64,{_base64(data)}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
