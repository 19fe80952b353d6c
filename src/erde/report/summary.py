"""A run in a few sentences for somebody who knows none of the terms; every one of them is made from the results."""

from __future__ import annotations

from erde.evaluation.results import Arm, Results
from erde.policy.points import Certificate, Measured
from erde.report.numbers import percent, points
from erde.report.rendering import promised_on

# Classes that are called by their names; of more, these are examples.
NAMED_CLASSES = 4
# Shares below this are printed as zero.
NOTHING = 0.0005
NOT_PROMISED = (
    "Not promised: that it does as well on other images (another camera, other light, things that are none of its classes), "
    "on each class by itself, or as fast on another machine."
)


def sentences(results: Results, doubtful: bool) -> list[str]:
    """What the exported network does, saves and promises, what it was measured on, and what is not promised.

    ``doubtful``: the full network is so poor that a promise against it says little.
    """
    arm = results.arms[results.exported_arm]
    measured = arm.default_point().test
    told = [_purpose(results, arm)]
    if measured is None:
        told.append("It was not measured on test images, so nothing is known of what it saves.")
    else:
        told.append(_saving(arm, measured))
    told.append(_promise(arm, doubtful))
    if measured is not None:
        told.append(_outcome(results, arm, measured))
    return [*told, NOT_PROMISED]


def _purpose(results: Results, arm: Arm) -> str:
    names = results.data.classes
    if len(names) > NAMED_CLASSES:
        shown = f"{', '.join(names[: NAMED_CLASSES - 1])} and {len(names) - NAMED_CLASSES + 1:,} more"
    else:
        shown = ", ".join(names)
    how = (
        "gives its answer early, after part of the computation, where it is sure enough"
        if len(arm.exits) > 1
        else "computes every image to the end"
    )
    return f"This network sorts images into {len(names):,} classes ({shown}) and {how}."


def _saving(arm: Arm, measured: Measured) -> str:
    right = f"{_of_hundred(measured.accuracy)} of 100 answers are right"
    early = 1 - measured.exit_rates[-1]
    if early <= 0:
        kept = "it has no early answers" if len(arm.exits) == 1 else "no image is answered early"
        return f"At the default setting {kept}, so nothing is saved; {right}."
    alone = _of_hundred(arm.exits[-1].accuracy)
    return (
        f"At the default setting {_of_hundred(early)} of 100 images are answered early, which "
        f"{_change(measured.macs_saved, 'computation')}{_time(arm, measured)}; {right}, "
        f"against {alone} when every image is computed to the end."
    )


def _change(saved: float, of: str) -> str:
    if abs(saved) < NOTHING:
        return f"saves no {of}"
    if saved < 0:
        return f"takes {percent(-saved)} more {of}"
    return f"saves {percent(saved)} of the {of}"


def _time(arm: Arm, measured: Measured) -> str:
    """The time, where a machine was timed, against that of computing every image to the end."""
    full = next((point.test for point in arm.operating_points if point.kind == "no-exit"), None)
    if full is None or not full.milliseconds or measured.milliseconds is None:
        return ""
    saved = 1 - measured.milliseconds / full.milliseconds
    return (
        f" and {_change(saved, 'time')} ({measured.milliseconds:.3g} instead of {full.milliseconds:.3g} ms "
        "for an image on the machine that was timed)"
    )


def _promise(arm: Arm, doubtful: bool) -> str:
    proof = arm.default_point().certificate
    if proof is None:
        # Where one of them failed for another reason, more images might not have helped.
        needed = [missing.images_needed for missing in arm.left_out if missing.images_needed is not None]
        why = ""
        if needed and len(needed) == len(arm.left_out):
            why = f": proving what was asked for takes at least {min(needed):,} images set aside for it"
        return f"At this setting nothing is promised about wrong answers{why}."
    fails = (
        "that holds on average over many such checks"
        if proof.confidence is None
        else f"of 100 promises made in this way at most {_number(100 * (1 - proof.confidence))} fail"
    )
    poor = "; but that is itself so often wrong that this says little" if doubtful else ""
    return f"Promised: {_promised(proof, arm)} ({fails}){poor}."


def _promised(proof: Certificate, arm: Arm) -> str:
    count, base = _whole(proof.max_risk)
    images = f"of {base:,} images at most {_number(count)}"
    # The sentence before this one has said "computed to the end".
    who = (
        "computing to the end" if proof.reference == "final_exit" else proof.reference_in_words(arm.precision)
    )
    gets = "gets" if count == 1 else "get"
    if proof.guarantee == "net_drop":
        return f"{images} fewer {'is' if count == 1 else 'are'} answered right than by {who}"
    if proof.guarantee == "disagreement":
        return f"{images} {gets} another answer than from {who}"
    return f"{images} {gets} a wrong answer where {who} gives the right one"


def _outcome(results: Results, arm: Arm, measured: Measured) -> str:
    proof = arm.default_point().certificate
    where = (
        f"the {measured.images:,} test images of {results.data.name}, "
        "which had no part in training or in choosing the setting"
    )
    seen = None if proof is None else promised_on(proof, measured)
    if proof is None or seen is None:
        return f"All this was measured on {where}."
    kept = "within the promise" if seen <= proof.max_risk else "more than promised"
    return f"Measured on {where}, it was {points(seen, 2)} of 100: {kept}."


def _of_hundred(share: float) -> str:
    return points(share).removesuffix(".0")


def _number(value: float) -> str:
    return f"{value:.6g}"


def _whole(share: float) -> tuple[float, int]:
    """A share as a whole number of so many: 0.0025 is 25 of 10,000. Where none is whole, of 100."""
    for base in (100, 1_000, 10_000):
        if abs(share * base - round(share * base)) < 1e-9 and round(share * base) >= 1:
            return round(share * base), base
    return 100 * share, 100
