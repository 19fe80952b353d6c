"""Bundles that are calibrated and sealed anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from erde import bundle
from erde.bundle.hub import on_hub
from erde.bundle.manifest import Manifest
from erde.bundle.profile import PROFILE
from erde.bundle.sealing import CARD, read_manifest
from erde.bundle.shipped import bundle_folder
from erde.calibration.checks import Request, check_reuse
from erde.calibration.logits import calibrate_logits
from erde.calibration.policy_file import CalibratedPolicy
from erde.calibration.settings import Settings
from erde.common.errors import UserError
from erde.common.files import make_folder
from erde.common.splits import CertifyLogits, CertifySplit, TuneLogits, TuneSplit
from erde.policy.points import OperatingPoint
from erde.recipe.validation import validate
from erde.runtime.session import Session


def apply(
    manifest: Manifest, calibrated: CalibratedPolicy, points: list[OperatingPoint] | None = None
) -> Manifest:
    """``manifest`` with a calibrated policy; ``points`` in place of its own, for example with test results."""
    # Validated anew: what is sealed must be readable.
    return Manifest.model_validate(
        {
            **dict(manifest),
            "score": calibrated.rule.score,
            "sharpness": calibrated.rule.sharpness,
            "ensemble": calibrated.rule.ensemble,
            "score_parameters": None if calibrated.rule.harm is None else list(calibrated.rule.harm),
            "temperatures": calibrated.temperatures,
            "operating_points": points or calibrated.points,
            "default_operating_point": calibrated.default,
            "left_out": calibrated.left_out,
            "calibration": calibrated.calibration,
        }
    )


class _TuneAndCertify(Protocol):
    """The part of a data set that :func:`calibrate` needs: no test split."""

    @property
    def tune(self) -> TuneSplit: ...

    @property
    def certify(self) -> CertifySplit: ...


def calibrate(
    path: str | Path,
    data: _TuneAndCertify,
    *,
    max_risk: float | Sequence[float] | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> CalibratedPolicy:
    """Calibrate the bundle at ``path`` on ``data.tune`` and ``data.certify``, and seal it anew.

    Sealed in place, where all else in the folder stays, or into ``out``, a new place or that of a bundle, not above
    the working directory: a folder is replaced as a whole. ``max_risk`` is one target or several (the first is the
    default operating point). ``settings``: further ones, such as ``confidence=0.95``, ``budgets=[0.7]``,
    ``score="margin"``; all are the recipe's, and ``latency_budgets`` in milliseconds, for which the bundle needs a
    ``profile.json``. The reference is the bundle's own final exit.
    """
    if max_risk is not None:
        settings["max_risks"] = [max_risk] if isinstance(max_risk, int | float | str) else list(max_risk)
    request = validate(Settings, settings)
    if request.reference != "final_exit":
        raise UserError(
            f"reference is '{request.reference}': a bundle has its own final exit only; calibrate its run instead"
        )
    if on_hub(out or path) or (out is None and bundle_folder(path) != Path(path)):
        raise UserError(f"'{out or path}' is no folder to write to: give out=, the place of the new bundle")
    # Resolved, to be compared: a link to this bundle is this bundle.
    target = Path(out or path).resolve()
    if _working_directory_is_in(target):
        raise UserError(
            f"the working directory lies in {target}, which is replaced as a whole: change to another directory, or give "
            "another place for the new bundle, out="
        )
    session = Session(path)
    if target.exists() and target != session.folder.resolve() and not _is_only_a_bundle(target):
        raise UserError(
            f"{target} is there already and is no bundle, or more than that: give another place for the new one"
        )
    return calibrate_bundle(session, data, request, target)


def _working_directory_is_in(folder: Path) -> bool:
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:  # it was removed
        return False


def _is_only_a_bundle(folder: Path) -> bool:
    """Whether nothing but a bundle is in ``folder``, which is going to be removed."""
    try:
        own = _sealed_files(read_manifest(folder))
    except UserError:
        return False
    return {path.name for path in folder.iterdir()} <= {PROFILE, *own}


def _sealed_files(manifest: Manifest) -> set[str]:
    return {bundle.MANIFEST, CARD, *manifest.files}


def calibrate_bundle(
    session: Session, data: _TuneAndCertify, settings: Settings, out: Path, sources: Sequence[str] = ()
) -> CalibratedPolicy:
    """Calibrate the bundle of ``session`` and seal it into ``out``; see :func:`calibrate`."""
    manifest = session.manifest
    check_exits(manifest)
    # A profile that does not fit must not stand in the way of who asks for no milliseconds.
    cost = session.cost(timed=bool(settings.latency_budgets))
    tune = TuneLogits(session.all_logits(data.tune.images), data.tune.labels)
    certify_logits = CertifyLogits(session.all_logits(data.certify.images), data.certify.labels)
    check_reuse(manifest.calibration, Request(tune, certify_logits, cost, settings, tuple(sources)))
    calibrated = calibrate_logits(tune, certify_logits, cost, settings, sources=sources)
    seal_calibrated(session, calibrated, out)
    return calibrated


def check_exits(manifest: Manifest) -> None:
    """:class:`UserError` where a bundle has one exit only."""
    if len(manifest.stages) == 1:
        raise UserError("this bundle has one exit: there is nothing to calibrate")


def seal_calibrated(session: Session, calibrated: CalibratedPolicy, out: Path) -> None:
    """Seal the bundle of ``session`` with another policy into ``out``."""
    folder, manifest = session.folder.resolve(), session.manifest
    if out == folder:  # others may keep their own files there
        sealed = _sealed_files(manifest)
        beside_seal = [path for path in folder.iterdir() if path.name not in sealed]
    else:  # the stages stay, so their times do
        beside_seal = [folder / PROFILE] if (folder / PROFILE).is_file() else []
    make_folder(out.parent)
    files = [folder / name for name in manifest.files if name != CARD]
    bundle.write(out, apply(manifest, calibrated), files, beside_seal)
