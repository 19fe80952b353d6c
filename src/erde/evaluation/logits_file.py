"""Logits that any program saved, as an ``.npz`` file: calibrate them, and evaluate a policy on them.

Arrays of the file: ``tune_logits`` (E, N, K) and ``tune_labels`` (N,), the same for ``certify`` and, to evaluate,
``test``; or only ``logits`` and ``labels``, which calibration splits at random. ``exit_macs`` (E,), cumulative,
and ``no_exit_macs`` say what exits cost; ``<split>_reference_right`` (N,) is where another reference than the
final exit is right. docs/formats.md has an example.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from erde.calibration.checks import Request, check_logits, check_reuse
from erde.calibration.labelled_images import halves
from erde.calibration.logits import calibrate_logits
from erde.calibration.policy_file import NO_POLICY, CalibratedPolicy, UnreadablePolicyError
from erde.calibration.settings import Settings
from erde.common.array_file import ArrayFileError, read_npz
from erde.common.errors import UserError
from erde.common.files import make_folder, write_json
from erde.common.splits import CertifyLogits, Logits, TestLogits, TuneLogits
from erde.evaluation import measures
from erde.evaluation.results import ExitMeasures
from erde.policy.cost import Cost
from erde.policy.points import Measured, OperatingPoint
from erde.policy.rule import ENSEMBLES, SCORES

FORMAT_VERSION = 1
Right = NDArray[np.bool_]
Kind = TypeVar("Kind", bound=Logits)


@dataclass(frozen=True)
class Saved:
    """One split of a file, and where the reference is right: None for the final exit."""

    logits: Logits
    reference_right: Right | None

    def part(self, rows: NDArray[np.int64]) -> Saved:
        """Some of its images."""
        right = None if self.reference_right is None else self.reference_right[rows]
        return Saved(Logits(self.logits.logits[:, rows], self.logits.labels[rows]), right)


class LogitsFile:
    """An ``.npz`` of logits, opened; every array is checked when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # No pickle: an array of objects is refused by numpy itself.
            self.arrays = read_npz(path)
        except FileNotFoundError as error:
            raise UserError(
                f"no file at {path}: expected an .npz of logits (see erde calibrate --help)"
            ) from error
        except (OSError, ArrayFileError) as error:
            raise UserError(
                f"{path} is not an .npz file of plain arrays: write it with numpy.savez(path, logits=..., labels=...) "
                f"({error})"
            ) from error

    def has(self, split: str) -> bool:
        """Whether there is an array of logits of this split; "" is the one without a name."""
        return _key(split, "logits") in self.arrays

    def split(self, name: str) -> Saved:
        """The split ``name``; :class:`UserError` where an array is missing or has a wrong shape."""
        logits, labels = self._array(_key(name, "logits")), self._array(_key(name, "labels"))
        where = f"{self.path}: {_key(name, 'logits')}"
        if logits.ndim != 3 or logits.dtype.kind != "f":
            raise UserError(
                f"{where} is {logits.dtype} of shape {logits.shape}: expected floats (E, N, K), exits x images x classes"
            )
        if logits.shape[0] < 2:
            raise UserError(
                f"{where} has {logits.shape[0]} exit: thresholds need two exits or more, (E, N, K)"
            )
        if logits.shape[2] < 2:
            raise UserError(f"{where} has {logits.shape[2]} class: expected two or more, (E, N, K)")
        if labels.shape != logits.shape[1:2] or labels.dtype.kind not in "iu":
            raise UserError(
                f"{self.path}: {_key(name, 'labels')} is {labels.dtype} of shape {labels.shape}: expected "
                f"{logits.shape[1]:,} whole numbers, one per image of {_key(name, 'logits')} {logits.shape}"
            )
        right = None
        if _key(name, "reference_right") in self.arrays:
            right = self.arrays[_key(name, "reference_right")]
            if right.shape != labels.shape or right.dtype != np.bool_:
                raise UserError(
                    f"{self.path}: {_key(name, 'reference_right')} is {right.dtype} of shape {right.shape}: expected "
                    f"bool ({len(labels)},)"
                )
        with np.errstate(over="ignore"):  # beyond float32 is infinite, which is refused below
            logits = logits.astype(np.float32, copy=False)
        saved = Saved(Logits(logits, labels.astype(np.int64)), right)
        check_logits(saved.logits, name or "file's")
        return saved

    def tune_and_certify(self, tune_share: float, seed: int) -> tuple[Saved, Saved, list[str]]:
        """The two splits that calibration needs, and the fingerprints of the sets of logits that they come from.

        The last of them is that of the set that certify comes from.
        """
        if self.has("tune") or self.has("certify"):
            tune, certify = self.split("tune"), self.split("certify")
            sources = [tune.logits.fingerprint(), certify.logits.fingerprint()]
        else:
            whole = self.split("")
            first, second = halves(whole.logits.labels, tune_share, seed)
            tune, certify, sources = whole.part(first), whole.part(second), [whole.logits.fingerprint()]
        if (tune.reference_right is None) != (certify.reference_right is None):
            raise UserError(f"{self.path}: give reference_right for both tune and certify, or for neither")
        return tune, certify, sources

    def cost(self, exits: int, macs: Sequence[float] | None, no_exit_macs: float | None) -> Cost:
        """The cost of exits: as given, else as the file says."""
        given = np.asarray(macs) if macs is not None else self.arrays.get("exit_macs")
        if given is None:
            raise UserError(
                f"{self.path} has no exit_macs: give the cumulative MACs of the {exits} exits with --macs"
            )
        given = np.atleast_1d(given)
        whole = np.asarray(
            no_exit_macs if no_exit_macs is not None else self.arrays.get("no_exit_macs", given[-1:])
        )
        whole = whole.reshape(-1)
        for name, values, size in (("exit MACs", given, exits), ("no_exit_macs", whole, 1)):
            if (
                values.shape != (size,)
                or values.dtype.kind not in "iuf"
                or not bool(np.isfinite(values).all())
            ):
                raise UserError(
                    f"{name} must be {size} number{'s' if size > 1 else ''}, got {values.tolist()}"
                )
        counts = [round(float(count)) for count in given]
        if counts[0] < 1 or sorted(set(counts)) != counts:
            raise UserError(
                f"exit MACs must rise from exit to exit and be 1 or more, as counts and not as shares, got {given.tolist()}"
            )
        if not whole[0] >= 1:
            raise UserError(f"no_exit_macs must be 1 or more, got {whole[0]:g}")
        return Cost(tuple(counts), round(float(whole[0])))

    def _array(self, key: str) -> NDArray[Any]:
        if key not in self.arrays:
            raise UserError(
                f"{self.path} has no array '{key}'; it has: {', '.join(sorted(self.arrays)) or 'none'}"
            )
        array: NDArray[Any] = self.arrays[key]
        return array


def _key(split: str, part: str) -> str:
    return f"{split}_{part}" if split else part


def default_policy_path(path: Path) -> Path:
    """The place of the policy of ``path`` by default: ``logits.policy.json`` beside it."""
    return path.with_name(f"{path.stem}.policy.json")


def calibrate_file(
    path: Path,
    settings: Settings,
    out: Path,
    *,
    macs: Sequence[float] | None = None,
    no_exit_macs: float | None = None,
    tune_share: float = 0.5,
    seed: int = 0,
) -> CalibratedPolicy:
    """Calibrate saved logits and write the policy to ``out`` as JSON."""
    opened = LogitsFile(path)
    tune, certify, sources = opened.tune_and_certify(tune_share, seed)
    certify_logits = _as(CertifyLogits, certify)
    cost = opened.cost(len(tune.logits.logits), macs, no_exit_macs)
    if tune.reference_right is not None:
        settings = settings.against_given()
    tune_logits = _as(TuneLogits, tune)
    request = Request(
        tune_logits,
        certify_logits,
        cost,
        settings,
        # New certify images may certify what images of before have chosen.
        tuple(sources[-1:]),
        tune.reference_right,
        certify.reference_right,
    )
    if out.exists():
        try:
            earlier = read_policy(out).policy.calibration
        except UserError as error:
            raise UserError(
                f"{out} is there and is not a policy of this erde: remove it, or give another --out"
            ) from error
        check_reuse(earlier, request)
    # Another --out is no new set of images. What lies there under this name and is no policy says nothing.
    with contextlib.suppress(UnreadablePolicyError):
        check_reuse(read_policy(default_policy_path(path)).policy.calibration, request)
    calibrated = calibrate_logits(
        tune_logits,
        certify_logits,
        cost,
        settings,
        tune_reference_right=tune.reference_right,
        certify_reference_right=certify.reference_right,
        sources=sources,
    )
    make_folder(out.parent)
    write_json(
        out,
        {
            "format_version": FORMAT_VERSION,
            "exit_macs": list(cost.exit_macs),
            "no_exit_macs": cost.no_exit_macs,
            "classes": tune_logits.logits.shape[-1],
            **calibrated.to_json(),
        },
    )
    return calibrated


@dataclass(frozen=True)
class SavedPolicy:
    """A policy file: the policy, what its exits cost, and for how many classes it is."""

    policy: CalibratedPolicy
    cost: Cost
    classes: int

    def check(self) -> None:
        """``ValueError`` where the parts do not fit one another."""
        calibrated, exits = self.policy, len(self.cost.exit_macs)
        vectors = (
            [point.thresholds for point in calibrated.points]
            + list(calibrated.path.thresholds)
            + list(calibrated.paper_path.thresholds)
        )
        harm = calibrated.rule.harm
        fits = (
            exits >= 2
            and all(
                type(macs) is int and float(macs) >= 1
                for macs in (*self.cost.exit_macs, self.cost.no_exit_macs)
            )
            and type(self.classes) is int
            and len(calibrated.temperatures) == exits
            and all(len(vector) == exits - 1 for vector in vectors)
            and calibrated.default in [point.name for point in calibrated.points]
            and calibrated.rule.score in SCORES
            and calibrated.rule.ensemble in ENSEMBLES
            and (harm is not None) == (calibrated.rule.score == "harm")
            and len(harm or ()) in (0, exits - 1)
            and all(len(part.class_weights) == self.classes for part in harm or ())
        )
        if not fits:
            raise ValueError("its parts do not fit one another")


def read_policy(path: Path) -> SavedPolicy:
    """The policy that :func:`calibrate_file` wrote; :class:`UserError` where ``path`` is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.pop("format_version") != FORMAT_VERSION:
            raise ValueError("another format version")
        cost = Cost(tuple(value.pop("exit_macs")), value.pop("no_exit_macs"))
        classes = value.pop("classes")
        saved = SavedPolicy(CalibratedPolicy.from_json(value), cost, classes)
        saved.check()
    except OSError as error:
        raise UnreadablePolicyError(f"no policy at {path}: erde calibrate LOGITS.npz writes one") from error
    except NO_POLICY as error:
        raise UnreadablePolicyError(
            f"{path} is not a policy that erde calibrate LOGITS.npz wrote: calibrate again"
        ) from error
    return saved


@dataclass(frozen=True)
class Evaluated:
    """A policy on the test logits of a file."""

    exits: list[ExitMeasures]
    points: list[OperatingPoint]

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``erde evaluate --out`` writes."""
        return {
            "exits": [exit.model_dump(mode="json") for exit in self.exits],
            "operating_points": [point.model_dump(mode="json") for point in self.points],
        }

    def measured(self) -> list[tuple[OperatingPoint, Measured]]:
        """Each operating point with its measures."""
        return [(point, point.test) for point in self.points if point.test is not None]


def evaluate_file(path: Path, policy_path: Path, out: Path | None = None) -> Evaluated:
    """Measure a policy on the ``test`` logits of a file, or on its only ones if it was not calibrated on them."""
    opened = LogitsFile(path)
    read = read_policy(policy_path)
    calibrated, cost = read.policy, read.cost
    saved = opened.split("test" if opened.has("test") else "")
    exits = len(cost.exit_macs)
    shape = (len(saved.logits.logits), saved.logits.logits.shape[-1])
    if shape != (exits, read.classes):
        raise UserError(
            f"{path} has logits of {shape[0]} exits and {shape[1]} classes, the policy {policy_path} is for {exits} exits and "
            f"{read.classes} classes"
        )
    test = _as(TestLogits, saved)
    references = {point.certificate.reference for point in calibrated.points if point.certificate is not None}
    if ("given" in references) != (saved.reference_right is not None) and references:
        raise UserError(
            f"{policy_path} was certified against {'a given reference' if 'given' in references else 'the final exit'}, and "
            f"{path} {'has no' if 'given' in references else 'gives another:'} reference_right of the test images: risks "
            "would not mean the same"
        )
    earlier = calibrated.calibration
    if test.fingerprint() in {*earlier.sources, earlier.tune_fingerprint, earlier.certify_fingerprint}:
        raise UserError(
            f"{path} holds the logits that {policy_path} was calibrated on: evaluate on others, as test_logits"
        )
    evaluated = Evaluated(
        measures.measure_exits(test, calibrated, saved.reference_right),
        measures.measure_points(test, calibrated, cost, saved.reference_right),
    )
    if out is not None:
        make_folder(out.parent)
        write_json(out, evaluated.to_json())
    return evaluated


def _as(kind: type[Kind], saved: Saved) -> Kind:
    return kind(saved.logits.logits, saved.logits.labels)
