"""``erde calibrate`` of a sealed bundle on an operator's own images; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from erde import progress
from erde.calibration import CalibratedPolicy, calibrate_bundle
from erde.errors import UserError
from erde.files import check_folder
from erde.labelled_images import load_tune_and_certify
from erde.runtime import Session
from erde.settings import LADDER, Settings


def parse_share(text: str, option: str) -> float:
    """``0.5%`` or ``0.005`` as 0.005."""
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError as error:
        raise UserError(f"{option} is '{text}': expected a share such as 0.5% or 0.005") from error
    share = value / 100 if text.strip().endswith("%") else value
    if not 0 < share < 1:
        raise UserError(
            f"{option} is '{text}': expected more than 0 % and less than 100 %, such as 0.5% or 0.005"
        )
    return share


def parse_milliseconds(text: str, option: str) -> float:
    """``2ms`` or ``2`` as 2.0."""
    try:
        value = float(text.strip().removesuffix("ms"))
    except ValueError as error:
        raise UserError(f"{option} is '{text}': expected milliseconds such as 2ms") from error
    return value


def settings_of(
    *,
    max_risks: Sequence[str] | None,
    confidence: str,
    budgets: Sequence[str] | None,
    latency_budgets: Sequence[str] | None,
    **others: Any,
) -> Settings:
    """The settings that the command line's words mean."""
    return Settings(
        max_risks=tuple(parse_share(one, "--max-risk") for one in max_risks) if max_risks else LADDER,
        confidence=parse_share(confidence, "--confidence"),
        budgets=tuple(parse_share(one, "--budget") for one in budgets or ()),
        latency_budgets=tuple(parse_milliseconds(one, "--latency-budget") for one in latency_budgets or ()),
        **others,
    )


def recalibrate_bundle(
    bundle: Path, data: Path, out: Path, settings: Settings, tune_share: float = 0.5, seed: int = 0
) -> CalibratedPolicy:
    """Calibrate the bundle on labelled images below ``data`` and seal a new one at ``out``; the old one stays."""
    if out.exists():
        raise UserError(f"{out} is there already: give another place with --out, or remove it")
    check_folder(out.parent)
    session = Session(bundle)
    images = load_tune_and_certify(data, session.classes, session.manifest.input_shape, tune_share, seed)
    copies = f"; {images.copies:,} copies left out" if images.copies else ""
    progress.say(f"data: {len(images.tune):,} images to tune, {len(images.certify):,} to certify{copies}")
    return calibrate_bundle(session, images, settings, out, [images.fingerprint])


def describe(calibrated: CalibratedPolicy) -> Iterator[str]:
    """What was chosen, certified and left out, a line each."""
    yield f"score: {calibrated.rule.in_words()}"
    for point in calibrated.points:
        default = " (default)" if point.name == calibrated.default else ""
        saved = f"{point.tune.macs_saved:.1%} of MACs saved on tune" if point.tune else ""
        said = (
            point.certificate.sentence()
            if point.certificate
            else point.note or "every image takes the final exit"
        )
        yield f"{point.name}{default}: {saved}. {said}"
    for left_out in calibrated.left_out:
        yield f"{left_out.name}: left out, {left_out.note}"
