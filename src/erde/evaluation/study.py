"""A study's runs in one table: each arm's measures over the seeds, and each arm against the reference, paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

from erde.calibration.logits import point_name
from erde.common.errors import UserError
from erde.common.files import write_json
from erde.common.model import Frozen
from erde.common.splits import CertifyLogits, TestLogits, TuneLogits
from erde.evaluation.results import Arm, Interval, Results, SplitInfo, mean_of_bins
from erde.evaluation.run_folder import read_logits
from erde.policy.rule import decide, entropy_score, take_exit

# Shares of the MACs of the network without exits at which curves are read.
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
# The most entropy, in parts of ln K, with which an exit may answer: the same at all exits and for all arms.
ENTROPIES = (0.1, 0.3, 0.5)
CONFIDENCE = 0.95
# Values are equal up to this.
ROUNDING = 1e-12


class Estimate(Frozen):
    """A mean over n seeds, with the 95 % interval of Student's t (n - 1 degrees of freedom).

    No interval for one seed, nor where all values are equal: accuracies are whole numbers of images, so equal ones come by
    chance, and say nothing of how far the next would lie.
    """

    mean: float
    interval: Interval | None


class Difference(Estimate):
    """An arm minus the reference, seed by seed: the paired t-test's two-sided p-value, and Holm's of all arms.

    None where there is no test: see :func:`paired_p_value`.
    """

    p_value: float | None
    holm_p_value: float | None


class ArmMeasure(Frozen):
    """A measure of an arm by seed; estimates where every seed has it."""

    values: list[float | None]
    estimate: Estimate | None
    difference: Difference | None = None


class ArmSeed(Frozen):
    """An arm of one run, as a study takes it: its measures, and the split that they are of."""

    role: Literal["teacher", "student", "fixed"]
    test: SplitInfo
    measures: dict[str, float | None]


class Study(Frozen):
    """``study.json``: nothing in it depends on when or how fast the study ran, but with ``exits: auto``."""

    format_version: Literal[1] = 1
    name: str
    reference: str
    seeds: list[int]
    test_images: int
    measures: dict[str, dict[str, ArmMeasure]]

    def write(self, path: Path) -> None:
        """Write as JSON, in one step."""
        write_json(path, self.model_dump(mode="json"))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's t interval."""
    mean = float(np.mean(values))
    if _all_equal(values):
        return Estimate(mean=mean, interval=None)
    half = float(stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Estimate(mean=mean, interval=(mean - half, mean + half))


def paired_p_value(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of the paired t-test; 1 where no seed differs.

    None for one seed, and for the same difference in all: without a scatter there is no test.
    """
    if len(differences) > 1 and np.max(np.abs(differences)) < ROUNDING:
        return 1.0
    return None if _all_equal(differences) else float(stats.ttest_1samp(differences, 0.0).pvalue)


def _all_equal(values: Sequence[float]) -> bool:
    return float(np.ptp(values)) < ROUNDING


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values (1979): with m tests in rising order, max over j <= i of (m - j + 1) p_j, at most 1."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted


def arm_seeds(run: Path, results: Results) -> dict[str, ArmSeed]:
    """What a study takes of a finished run: its arms in float."""
    return {
        name: ArmSeed(
            role=arm.role,
            test=results.data.splits["test"],
            measures=measures(results, name)
            | measures_of_logits(results.arms[name], *read_logits(run, name)),
        )
        for name, arm in results.arms.items()
        if arm.precision == "fp32"
    }


def summarise(name: str, reference: str, seeds: Mapping[int, Mapping[str, ArmSeed]]) -> Study:
    """The study of runs with several seeds, ``{seed: {arm: its measures}}``.

    The teacher is measured but not compared.

    Raises:
        UserError: seeds whose arms or test images differ.
    """
    began, first = next(iter(seeds.items()))
    test = next(iter(first.values())).test
    for seed, arms in seeds.items():
        if list(arms) != list(first):
            raise UserError(f"study {name}: seed {seed} has other arms than seed {began}: use a new folder")
        if any(arm.test != test for arm in arms.values()):
            raise UserError(
                f"study {name}: seed {seed} was tested on other images than seed {began}: set data.split_seed"
            )
    names = list(
        dict.fromkeys(key for arms in seeds.values() for arm in arms.values() for key in arm.measures)
    )
    compared = [arm for arm, about in first.items() if about.role != "teacher"]
    table = {}
    for measure in names:
        rows = {arm: [arms[arm].measures.get(measure) for arms in seeds.values()] for arm in first}
        table[measure] = _compared(rows, reference, compared)
    return Study(name=name, reference=reference, seeds=list(seeds), test_images=test.size, measures=table)


def _compared(
    rows: Mapping[str, list[float | None]], reference: str, compared: Sequence[str]
) -> dict[str, ArmMeasure]:
    """One measure's arms, with their differences from the reference."""
    whole = {arm: known for arm, values in rows.items() if (known := _known(values)) is not None}
    differences = {
        arm: [value - base for value, base in zip(whole[arm], whole[reference], strict=True)]
        for arm in compared
        if arm != reference and arm in whole and reference in whole
    }
    p_values = {arm: paired_p_value(values) for arm, values in differences.items()}
    # Arms without a p-value count too: which ones they are is not known before.
    adjusted = holm({arm: 1.0 if value is None else value for arm, value in p_values.items()})
    measured = {}
    for arm, values in rows.items():
        difference = None
        if arm in differences:
            difference = Difference(
                **estimate(differences[arm]).model_dump(),
                p_value=p_values[arm],
                holm_p_value=None if p_values[arm] is None else adjusted[arm],
            )
        measured[arm] = ArmMeasure(
            values=values, estimate=estimate(whole[arm]) if arm in whole else None, difference=difference
        )
    return measured


def _known(values: Sequence[float | None]) -> list[float] | None:
    """The values, if all are there."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def measures(results: Results, name: str) -> dict[str, float | None]:
    """An arm's measures on test, shares of one; a certified saving is 0 where the promise could not be given.

    With ``exits: auto`` seeds keep different exits: these are named by their places, not by number.
    """
    arm = results.arms[name]
    exits = dict(zip(exit_names(arm), arm.exits, strict=True))
    values: dict[str, float | None] = {
        f"accuracy of {exit}": measured.accuracy for exit, measured in exits.items()
    }
    values["accuracy of exits, mean"] = float(np.mean([measured.accuracy for measured in arm.exits]))
    if len(arm.exits) == 1:
        if arm.exit_choice is not None:
            max_risks = results.recipe.get("calibration", {}).get("max_risks", [])
            values |= {f"MACs saved at {point_name(max_risk)}": 0.0 for max_risk in max_risks}
        return values
    values["area under the curve"] = arm.curve.area
    values |= {f"accuracy at {100 * share:g} % of the MACs": at_macs(arm, share) for share in SHARES}
    for point in arm.operating_points:
        if point.certificate is not None and point.test is not None:
            values[f"MACs saved at {point.name}"] = point.test.macs_saved
            values[f"risk at {point.name}"] = point.test.risk
    values |= {f"MACs saved at {left_out.name}": 0.0 for left_out in arm.left_out}
    values |= {f"AUROC of {exit}": measured.auroc_correctness for exit, measured in exits.items()}
    if arm.teacher_wrong is not None:
        values["teacher wrong"] = arm.teacher_wrong[-1]
    if arm.entropies is not None:
        for kind, histograms in (
            ("right", arm.entropies.teacher_right),
            ("wrong", arm.entropies.teacher_wrong),
        ):
            for exit, histogram in zip(exits, histograms, strict=True):
                values[f"entropy of {exit}, teacher {kind}"] = mean_of_bins(histogram)
    if results.cascade is not None and name in results.cascade.fronts:
        front = results.cascade.fronts[name]
        for point in front.operating_points:
            if point.certificate is not None and point.test is not None:
                values[f"MACs saved at {point.name}, before the teacher"] = point.test.macs_saved
    return values


def exit_names(arm: Arm) -> list[str]:
    """``exit 0``, ``exit 1``; by their places where the arm chose its exits."""
    if arm.exit_choice is None:
        return [f"exit {number}" for number in range(len(arm.exits))]
    return [*(f"exit {cost.name}" for cost in arm.cost[:-1]), "the final exit"]


def measures_of_logits(
    arm: Arm, tune: TuneLogits, certify: CertifyLogits, test: TestLogits
) -> dict[str, float | None]:
    """What may be chosen by, the mean accuracy of the exits on tune; and the paper's rule on test, at equal thresholds.

    At ``entropy e`` each exit answers the images whose softmax has an entropy below ``e ln K``: no threshold is chosen, so
    that arms show how sure they are. Certify takes no part.
    """
    right = tune.logits.argmax(axis=-1) == tune.labels
    values: dict[str, float | None] = {"accuracy of exits on tune, mean": float(right.mean())}
    names, macs = exit_names(arm), np.array([cost.macs for cost in arm.cost])
    if len(names) == 1:
        return values
    scores, right = entropy_score(test.logits), test.logits.argmax(axis=-1) == test.labels
    for entropy in ENTROPIES:
        exits = decide(scores, (1 - entropy,) * (len(names) - 1))
        at = f"at entropy {entropy:g}"
        values[f"accuracy {at}"] = float(take_exit(right, exits).mean())
        values[f"MACs saved {at}"] = float(1 - macs[exits].mean() / arm.no_exit_macs)
        values |= {
            f"answers of {name} {at}": float((exits == index).mean()) for index, name in enumerate(names)
        }
    return values


def at_macs(arm: Arm, share: float) -> float | None:
    """Accuracy on the curve where it costs ``share`` of the MACs without exits, linear between its points."""
    macs, accuracy = np.asarray(arm.curve.macs), np.asarray(arm.curve.accuracy)
    order = np.argsort(macs, kind="stable")
    wanted = share * arm.no_exit_macs
    if not macs[order[0]] <= wanted <= macs[order[-1]]:
        return None
    return float(np.interp(wanted, macs[order], accuracy[order]))
