"""Drift watch: do the images still look to the exits as those of calibration did?

A certificate holds for images drawn like those it was certified on. Labels are rare where a bundle works, so the
watch looks at what every answer shows without them: the score of the first exit, and which exit answered.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from erde.bundle.manifest import Manifest
from erde.common.errors import UserError
from erde.policy.cost import first_stage

if TYPE_CHECKING:
    from erde.runtime.prediction import Prediction

Counts = NDArray[np.int64]

# Images of the smallest block that is tested: fewer cannot say much at the levels in question.
BLOCK = 100
# Of the level: what the scores may spend; the rest is for the exits.
SCORES_SHARE = 2 / 3
REMEDY = "calibrate again on labelled images of today: erde calibrate BUNDLE --data FOLDER"


def cut_p_values(calibration: Counts, stream: Counts) -> NDArray[np.float64]:
    """Fisher's exact test (two-sided, the smaller tail doubled) at every cut of two rows of counts (C,).

    The categories are ordered, and cut ``j`` asks whether as large a share of both samples lies in the first
    ``j + 1`` of them. If the two samples are exchangeable, the calibration's number there, given the number
    ``t`` of both together, is hypergeometric, whatever the distribution of the scores:

        P(a) = C(t, a) C(n + m - t, n - a) / C(n + m, n)        n calibration images, m of the stream

    Returns p-values (C - 1,), NaN at cuts that say nothing: no image on one side, or the same images as at the
    cut before. Which ones these are depends on both samples together only, so leaving them out is fair.
    Source: Fisher, The Design of Experiments, 1935.
    """
    n, m = int(calibration.sum()), int(stream.sum())
    below = np.cumsum(calibration)[:-1]
    both = below + np.cumsum(stream)[:-1]
    telling = (np.diff(both, prepend=0) > 0) & (both < n + m)
    p_values = np.full(len(both), np.nan)
    if m and telling.any():
        p_values[telling] = np.minimum(1.0, 2.0 * _smaller_tail(below[telling], both[telling], n, m))
    return p_values


def _smaller_tail(below: Counts, both: Counts, n: int, m: int) -> NDArray[np.float64]:
    """P(A <= a), or P(A >= a) where a lies above the mean; see :func:`cut_p_values`. Exact at any size of tail."""
    # The upper tail of what lies below a cut is the lower tail of what lies above it.
    turned = below * (n + m) > both * n
    a = np.where(turned, n - below, below)
    t = np.where(turned, n + m - both, both)
    log_probability = np.array(
        [
            _log_choose(one_t, one_a) + _log_choose(n + m - one_t, n - one_a) - _log_choose(n + m, n)
            for one_a, one_t in zip(a.tolist(), t.tolist(), strict=True)
        ]
    )
    # P(a - 1) / P(a), P(a - 2) / P(a - 1), ...: at most 1 on this side of the mean, and 0 from the end of the
    # support on. Ten standard deviations on, what is left out is below 1e-20 of the sum.
    share = t / (n + m)
    deviation = math.sqrt(float((n * share * (1 - share) * m / (n + m)).max()))
    steps = a[:, None] - np.arange(40 + int(10 * deviation), dtype=np.float64)
    up, down = steps * (m - t[:, None] + steps), (t[:, None] - steps + 1) * (n - steps + 1)
    terms = np.cumprod(up / down, axis=1)
    return np.asarray(np.exp(log_probability) * (1.0 + terms.sum(axis=1)))


def smallest_p_value(calibration: Counts, stream: Counts, smallest: float) -> float:
    """The chance, without a drift, that the smallest of :func:`cut_p_values` is at or below ``smallest``.

    Exact, given the counts of both samples together: the calibration's numbers below the cuts are then a Markov
    chain, and the chance that it leaves the range of larger p-values is summed bin by bin (as for the two-sample
    Kolmogorov-Smirnov test: Hodges, Arkiv för Matematik 3, 1958). Neighbouring cuts say nearly the same, so this is a
    third to a half of Bonferroni's bound, which is taken where ``smallest`` is above 0.05.
    """
    n, m = int(calibration.sum()), int(stream.sum())
    pooled = calibration + stream
    sizes = pooled[pooled > 0]
    both = np.cumsum(sizes)[:-1]
    bound = min(1.0, smallest * len(both))
    if smallest > 0.05 or len(both) < 2:
        return bound
    lows, highs = _telling_range(both, n, m, smallest)
    # Hypergeometric steps are binomial ones, given where the chain ends.
    share = n / (n + m)
    chances, lowest = np.ones(1), 0
    for size, low, high in zip(sizes.tolist(), [*lows, n], [*highs, n], strict=True):
        steps = range(max(0, low - lowest - len(chances) + 1), min(size, high - lowest) + 1)
        step_chances = np.array([_binomial(step, size, share) for step in steps])
        first = lowest + steps.start
        chances, lowest = np.convolve(chances, step_chances)[low - first : high - first + 1], low
    left = 1.0 - float(chances[0]) / _binomial(n, n + m, share)
    # The second term is more than rounding can take away, above all that of the logarithms of large factorials.
    return min(bound, left + 1e-14 * (n + m) * math.log(n + m))


def _telling_range(both: Counts, n: int, m: int, smallest: float) -> tuple[list[int], list[int]]:
    """The lowest and highest calibration count at each cut whose p-value is above ``smallest``, by bisection."""
    middle = both * n // (n + m)
    ends = []
    for outside in (np.maximum(0, both - m) - 1, np.minimum(n, both) + 1):
        inside = middle
        while (np.abs(outside - inside) > 1).any():
            halfway = np.where(np.abs(outside - inside) > 1, (outside + inside) // 2, inside)
            # What is only just above counts as a tie.
            extreme = 2.0 * _smaller_tail(halfway, both, n, m) <= smallest * (1 + 1e-6)
            outside, inside = np.where(extreme, halfway, outside), np.where(extreme, inside, halfway)
        ends.append(inside.tolist())
    return ends[0], ends[1]


def _binomial(k: int, n: int, share: float) -> float:
    return math.exp(_log_choose(n, k) + k * math.log(share) + (n - k) * math.log1p(-share))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@dataclass(frozen=True)
class DriftReport:
    """The findings of a :class:`Monitor` so far, held against calibration.

    ``images`` were counted, ``ignored`` were answered at something else than the default operating point.
    ``exit_rates`` (E,) are those of the counted images, NaN before the first, ``score_histogram`` their scores
    at the first exit; ``expected_`` is calibration's. ``p_value`` holds for the whole life of the monitor, all looks
    together: under no drift, the chance that it is ever ``<= x`` is at most ``x``. ``drifted_after`` is the
    number of images at which the alarm went off.
    """

    images: int
    ignored: int
    exit_rates: tuple[float, ...]
    expected_exit_rates: tuple[float, ...]
    score_histogram: tuple[int, ...]
    expected_score_histogram: tuple[int, ...]
    p_value: float
    false_alarm: float
    drifted: bool
    drifted_after: int | None
    message: str


class Monitor:
    """Compares a stream of answers with calibration; the chance that it ever alarms without a drift is bounded.

    What is compared: the scores of the first exit, which every image has (``Prediction.first_scores``), with
    calibration's histogram, and the exits that answered with calibration's exit rates. Scores of later exits
    are not: calibration knows them for all images, the stream only for those that stayed.

    Images come in blocks of 100, two neighbours make one of 200, two of these one of 400, and so on. Each
    block is tested once, when it is full, against calibration's certify images by :func:`cut_p_values` at all
    cuts of the histogram, and of the exits. The smallest one of each is corrected for the number of cuts
    (:func:`smallest_p_value`); the histogram may spend two thirds of what the block may, the exits one. So small
    blocks notice a large change soon, large ones a small change in the end, and a
    change late in life is not diluted by all that went before. Block k = 1, 2, ... of level l = 0, 1, ...
    (100 x 2^l images) may spend, of ``false_alarm``, the share

        w = 1 / ((l + 1)(l + 2)) x 1 / (k (k + 1))        which sums to 1 over all levels and blocks

    and the report's p-value is the least p / w so far. By the union bound it is ever at or below
    ``false_alarm`` with at most that chance, however long the monitor lives and however often it is asked
    (spending a level over looks: Lan and DeMets, Biometrika 70, 1983); blocks need not be independent, which
    they are not, as all are held against the same calibration images. These are finitely many, and the test
    is a two-sample one.

    Assumed under "no drift": images are independent draws from the distribution of the certify split. Frames of
    one video are not independent: add one now and then. A silent monitor does not prove that the promise
    holds: labels that change under unchanged images are not seen.

    An alarm stays; the new bundle of a new calibration has a new monitor. ``add`` and ``report`` may be called
    from several threads. Memory: 20 + E numbers per level, a level per doubling of the images.

    Args:
        manifest: of a calibrated bundle.
        false_alarm: the chance, in (0, 1), that a monitor whose images do not drift ever says so.

    Raises:
        UserError: a bundle without calibration, or ``false_alarm`` out of range.
    """

    def __init__(self, manifest: Manifest, *, false_alarm: float = 0.01) -> None:
        if not 0 < false_alarm < 1:
            raise UserError(f"false_alarm is {false_alarm}, expected a chance between 0 and 1, such as 0.01")
        calibration = manifest.calibration
        exits = len(manifest.stages)
        if calibration is None:
            raise UserError(
                f"bundle '{manifest.name}' is not calibrated, so there is nothing to watch against: "
                "erde calibrate BUNDLE --data FOLDER"
            )
        images = calibration.certify_images
        self._point = manifest.point(None)
        # A chain at a point without early exits runs its last network only.
        alone = first_stage(manifest.networks(), self._point.thresholds) > 0
        if alone and manifest.score == "patience":
            raise UserError(
                f"'{self._point.name}' of this chain runs the last network only, and 'patience' is no score of a single "
                "network: calibrate with another score to watch it"
            )
        self._first = first = exits - 1 if alone else 0
        self._exits = np.rint(np.asarray(calibration.exit_rates) * images).astype(np.int64)
        self._scores = np.asarray(
            calibration.score_histograms[first] if first < len(calibration.score_histograms) else [],
            dtype=np.int64,
        )
        if len(self._exits) != exits or not images == self._scores.sum() == self._exits.sum():
            raise UserError(
                f"bundle '{manifest.name}': its calibration lacks the exit rates or the score histogram of its "
                f"{images:,} certify images: erde calibrate BUNDLE --data FOLDER"
            )
        self._range = calibration.score_ranges[first]
        self._edges = np.histogram_bin_edges([], len(self._scores), self._range)
        self._classes = len(manifest.classes)
        cost = manifest.cost()
        macs = np.stack([cost.exit_macs, cost.macs_at([None] * (exits - 1))]).astype(np.int64)
        self._known_macs, self._least_macs = frozenset(macs.ravel().tolist()), macs.min(axis=0)
        self._expected_rates = tuple(calibration.exit_rates)
        self.false_alarm = false_alarm
        self._lock = threading.Lock()
        self._images = self._ignored = 0
        self._block = self._empty()  # of the images since the last full block of the smallest size
        self._seen = self._empty()
        self._waiting: list[Counts] = []  # per level, the block whose neighbour is not full yet
        self._p_value = 1.0
        self._alarm: tuple[int, str] | None = None

    def add(self, prediction: Prediction) -> None:
        """Count the answers of one ``Session.predict`` at the bundle's default operating point.

        Answers at another operating point, at thresholds of the caller's, or with a limit on exits or MACs are
        ignored and counted as such: the default point's certificate is not about them, and a server that
        lowers its exits under load need not take care.

        Raises:
            UserError: answers of another bundle.
        """
        self._check(prediction)
        exits = prediction.exits
        # As calibration counted; beyond its range lies the outermost bin, and what is no number is not sure.
        scores = np.fmin(np.fmax(prediction.first_scores, self._range[0]), self._range[1])
        with self._lock:
            if prediction.capped or prediction.operating_point != self._point.name:
                self._ignored += len(exits)
                return
            start = 0
            while start < len(exits):
                stop = start + BLOCK - self._images % BLOCK
                part = self._count(scores[start:stop], exits[start:stop])
                self._images += len(exits[start:stop])
                self._block += part
                self._seen += part
                start = stop
                if self._images % BLOCK == 0:
                    self._close(self._block)
                    self._block = self._empty()

    def report(self) -> DriftReport:
        """The findings so far; this costs next to nothing, ask as often as you like."""
        with self._lock:
            scores, exits = self._split(self._seen)
            rates = exits / self._images if self._images else np.full(len(exits), np.nan)
            return DriftReport(
                images=self._images,
                ignored=self._ignored,
                exit_rates=tuple(rates.tolist()),
                expected_exit_rates=self._expected_rates,
                score_histogram=tuple(scores.tolist()),
                expected_score_histogram=tuple(self._scores.tolist()),
                p_value=self._p_value,
                false_alarm=self.false_alarm,
                drifted=self._alarm is not None,
                drifted_after=None if self._alarm is None else self._alarm[0],
                message=self._message(),
            )

    def _check(self, prediction: Prediction) -> None:
        exits, count = prediction.exits, len(prediction.exits)
        classes = prediction.logits.shape[-1]
        if classes != self._classes:
            raise UserError(
                f"these answers have {classes} classes, the bundle of this monitor {self._classes}: "
                "add answers of its own session"
            )
        if prediction.first_scores.shape != (count,):
            raise UserError(
                f"{prediction.first_scores.shape} first scores for {count} answers: expected ({count},)"
            )
        # An image that was carried along has the MACs of a later exit.
        if count and (
            exits.max() >= len(self._least_macs)
            or not self._known_macs.issuperset(prediction.macs.tolist())
            or (prediction.macs < self._least_macs[exits]).any()
        ):
            raise UserError(
                "these answers are of another bundle (other exits or MACs): add answers of this monitor's session"
            )

    def _empty(self) -> Counts:
        return np.zeros(len(self._scores) + len(self._exits), dtype=np.int64)

    def _count(self, scores: NDArray[np.float64], exits: NDArray[np.int64]) -> Counts:
        # As np.histogram counts, in a tenth of its time: servers add image by image.
        bins = len(self._scores)
        places = np.minimum(np.searchsorted(self._edges, scores, side="right") - 1, bins - 1)
        return np.bincount(np.concatenate([places, exits + bins]), minlength=bins + len(self._exits))

    def _split(self, counts: Counts) -> tuple[Counts, Counts]:
        return counts[: len(self._scores)], counts[len(self._scores) :]

    def _close(self, block: Counts) -> None:
        """Test the block that just became full, and every larger one that it completes."""
        level, number = 0, self._images // BLOCK
        while True:
            self._look(block, level, number)
            if level == len(self._waiting):
                self._waiting.append(block)
            if number % 2:
                self._waiting[level] = block
                return
            block = self._waiting[level] + block
            level, number = level + 1, number // 2

    def _look(self, block: Counts, level: int, number: int) -> None:
        block_share = 1.0 / ((level + 1) * (level + 2) * number * (number + 1))
        families = zip(
            (self._scores, self._exits), self._split(block), (SCORES_SHARE, 1 - SCORES_SHARE), (0, len(self._scores) - 1),
            strict=True,
        )  # fmt: skip
        for expected, seen, family_share, first_cut in families:
            cuts = cut_p_values(expected, seen)
            share = block_share * family_share
            # All images in one bin or at one exit, as at calibration; or nothing that would change the report: the
            # corrected p-value is at least a half of the smallest one.
            if not np.isfinite(cuts).any() or np.nanmin(cuts) / 2 / share >= self._p_value:
                continue
            cut = int(np.nanargmin(cuts))
            self._p_value = min(self._p_value, smallest_p_value(expected, seen, float(cuts[cut])) / share)
            if self._alarm is None and self._p_value <= self.false_alarm:
                self._alarm = self._images, self._describe_shift(first_cut + cut, block)

    def _describe_shift(self, cut: int, block: Counts) -> str:
        scores, exits = self._split(block)
        bins = len(self._scores)
        if cut < bins - 1:
            low, high = self._range
            event = f"score below {low + (high - low) * (cut + 1) / bins:.3g} at exit {self._first}"
            seen, expected = scores[: cut + 1], self._scores[: cut + 1]
        else:
            cut -= bins - 1
            event = f"leave by exit {cut}"
            seen, expected = exits[: cut + 1], self._exits[: cut + 1]
        now, then = seen.sum() / exits.sum(), expected.sum() / self._exits.sum()
        return f"{now:.1%} of the last {exits.sum():,} images {event}, at calibration {then:.1%}"

    def _message(self) -> str:
        ignored = f" ({self._ignored:,} not at '{self._point.name}' ignored)" if self._ignored else ""
        if self._alarm is not None:
            after, event = self._alarm
            shaken = "its certificate" if self._point.certificate else "what was measured of it"
            return (
                f"drift after {after:,} images{ignored}: {event}; '{self._point.name}' and {shaken} no longer stand on "
                f"solid ground: {REMEDY}"
            )
        if self._images < BLOCK:
            return f"{self._images:,} images{ignored}: the first look is at {BLOCK}"
        return f"no sign of drift in {self._images:,} images{ignored}"
