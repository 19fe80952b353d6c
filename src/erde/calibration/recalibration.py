"""``erde calibrate`` of a sealed bundle on an operator's own images; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from erde.bundle.manifest import Manifest
from erde.calibration.bundles import calibrate_bundle, check_exits, seal_calibrated
from erde.calibration.certificates import check_enough
from erde.calibration.checks import Request, check_reuse
from erde.calibration.few_labels import LABELS_ADVICE, UNKNOWN, FewLabels, read_label_file, write_label_file
from erde.calibration.labelled_images import Unlabelled, load_tune_and_certify, load_unlabelled, say_sizes
from erde.calibration.policy_file import CalibratedPolicy
from erde.calibration.settings import Settings
from erde.common import progress
from erde.common.errors import UserError
from erde.common.files import check_new, make_folder
from erde.common.splits import Labels
from erde.policy.points import Precision
from erde.runtime.session import Session


def recalibrate_bundle(
    bundle: Path, data: Path, out: Path, settings: Settings, tune_share: float = 0.5, seed: int = 0
) -> CalibratedPolicy:
    """Calibrate the bundle on labelled images below ``data`` and seal a new one at ``out``; the old one stays."""
    check_new(out)
    session = Session(bundle)
    shape = session.manifest.input_shape
    if settings.guarantee == "disagreement":
        images = load_unlabelled(data, shape, tune_share, seed).without_labels()
    else:
        images = load_tune_and_certify(data, session.classes, shape, tune_share, seed)
    say_sizes(images)
    return calibrate_bundle(session, images, settings, out, [images.fingerprint])


# A label costs somebody's time: no ladder of risks unless it is asked for.
FEW = Settings(max_risks=(0.01,))


def _promised_disagreement(manifest: Manifest, few: FewLabels) -> bool:
    """True if the same tune images chose the rule of ``manifest``, and all that it promises needed no label."""
    seen, certificates = manifest.calibration, [point.certificate for point in manifest.operating_points]
    kinds = {certificate.guarantee for certificate in certificates if certificate is not None}
    return seen is not None and seen.tune_fingerprint == few.tune.fingerprint() and kinds == {"disagreement"}


@dataclass(frozen=True)
class _Waiting:
    """A bundle with unlabelled images: what is asked, and how images and labels are named."""

    session: Session
    images: Unlabelled
    few: FewLabels

    @classmethod
    def of(cls, bundle: Path, data: Path, settings: Settings, tune_share: float, seed: int) -> _Waiting:
        session = Session(bundle)
        check_exits(session.manifest)
        images = load_unlabelled(data, session.manifest.input_shape, tune_share, seed)
        say_sizes(images, ", no labels")
        # No label could help, and scoring the images may take long.
        check_enough(len(images.certify), settings.max_risks, settings.confidence, settings.guarantee)
        few = FewLabels.of(
            session.all_logits(images.tune),
            session.all_logits(images.certify),
            session.manifest.rule(),
            session.manifest.temperatures,
            session.cost(timed=bool(settings.latency_budgets)),
            settings,
        )
        # Labels may follow a promise of disagreement on the same images: tune alone fixed the path of both.
        if not _promised_disagreement(session.manifest, few):
            request = Request(few.tune, few.certify, few.cost, settings, (images.fingerprint,))
            check_reuse(session.manifest.calibration, request)
        return cls(session, images, few)

    def read(self, labels: Path | None) -> Labels:
        """The labels of a filled file, by row of certify; every row that is asked for must be in it."""
        known = np.full(len(self.few.certify), UNKNOWN)
        if labels is None:
            return known
        by_digest = read_label_file(labels, self.session.classes, self.images.digests)
        digests = [self.images.digests[name] for name in self.images.certify_names]
        missing = [row for row in self.few.asked() if digests[row] not in by_digest]
        if missing:
            raise UserError(
                f"{labels} has no row for {len(missing):,} of the images whose label is needed (first: "
                f"{self.images.certify_names[missing[0]]}): rows were deleted, or the images, the bundle or an option have "
                "changed since; ask again with --labels-out"
            )
        return np.asarray([by_digest.get(digest, UNKNOWN) for digest in digests], dtype=np.int64)


def ask_for_labels(
    bundle: str | Path,
    data: str | Path,
    labels_out: str | Path,
    settings: Settings = FEW,
    tune_share: float = 0.5,
    seed: int = 0,
    labels: str | Path | None = None,
) -> tuple[int, int]:
    """Write to ``labels_out`` which of the unlabelled images below ``data`` need a label, to certify ``settings`` with few.

    ``labels``: a filled file of before, all of whose labels are taken over. Returned: how many images are listed, and
    how many certify images there are.
    """
    bundle, data, labels_out = Path(bundle), Path(data), Path(labels_out)
    check_new(labels_out, LABELS_ADVICE)
    make_folder(labels_out.parent)
    waiting = _Waiting.of(bundle, data, settings, tune_share, seed)
    known = waiting.read(None if labels is None else Path(labels))
    classes = waiting.session.classes
    names = waiting.images.certify_names
    # Some labels show that others are not needed; but all that were asked for must be there on reading, and none is lost.
    rows = list(
        dict.fromkeys([*waiting.few.asked(known), *waiting.few.asked(), *np.flatnonzero(known != UNKNOWN)])
    )
    write_label_file(
        labels_out,
        [
            (
                names[row],
                waiting.images.digests[names[row]],
                "" if known[row] == UNKNOWN else classes[known[row]],
            )
            for row in rows
        ],
    )
    return len(rows), len(known)


def recalibrate_with_labels(
    bundle: str | Path,
    data: str | Path,
    labels: str | Path,
    out: str | Path,
    settings: Settings = FEW,
    tune_share: float = 0.5,
    seed: int = 0,
) -> CalibratedPolicy:
    """Certify the bundle on all images below ``data`` with the ``labels`` of those that were asked for; seal it at ``out``.

    Rule and temperatures stay those of the bundle; ``settings`` as they were for :func:`ask_for_labels`.
    """
    bundle, data, labels, out = Path(bundle), Path(data), Path(labels), Path(out)
    check_new(out)
    waiting = _Waiting.of(bundle, data, settings, tune_share, seed)
    known = waiting.read(labels)
    asked = waiting.few.asked()
    empty = int((known[asked] == UNKNOWN).sum())
    if empty:
        progress.say(
            f"warning: {empty:,} images in {labels} have no label: they count as harmed, so less is certified"
        )
    calibrated = waiting.few.certified(known, [waiting.images.fingerprint])
    more = len(np.setdiff1d(waiting.few.more_labels(known), asked))
    if more:
        progress.say(
            f"{more:,} more labels might certify more: list them with --labels {labels} --labels-out MORE.csv"
        )
    seal_calibrated(waiting.session, calibrated, out)
    return calibrated


def describe(calibrated: CalibratedPolicy, precision: Precision = "fp32") -> Iterator[str]:
    """Say what was chosen, certified and left out, a line each."""
    yield f"score: {calibrated.rule.in_words()}"
    for point in calibrated.points:
        default = " (default)" if point.name == calibrated.default else ""
        saved = None if point.macs_saved is None else f"{100 * point.macs_saved:.1f} % of MACs saved on tune"
        said = None if point.note else "every image takes the final exit"
        if point.certificate:
            said = point.certificate.sentence(precision)
        yield f"{point.name}{default}: {'. '.join(part for part in (saved, point.note, said) if part)}"
    for left_out in calibrated.left_out:
        yield f"{left_out.name}: left out, {left_out.note}"
