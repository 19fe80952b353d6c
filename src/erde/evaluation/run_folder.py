"""Reading run folders without torch: logits, policies, results, and runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from erde.bundle.sealing import file_hash
from erde.calibration.exit_choice import ExitChoice
from erde.calibration.policy_file import NO_POLICY, CalibratedPolicy, UnreadablePolicyError
from erde.common.array_file import ArrayFileError, read_npz
from erde.common.errors import UserError
from erde.common.splits import CertifyLogits, TestLogits, TuneLogits
from erde.evaluation.comparison import PLACES, Answers, compare
from erde.evaluation.results import Arm, Comparison, Results
from erde.policy.cost import Cost

RESULTS = "results.json"
POLICY = "policy.json"
EXITS = "exits.json"
LOGITS = "logits.npz"
# In it: the SHA-256 of the stages that gave the logits.
STAGES_HASHES = "stages_sha256"


def arm_folder(run: Path, arm: str) -> Path:
    """``arms/<arm>``."""
    return run / "arms" / arm


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that erde wrote into a run folder; :class:`UserError` where it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not JSON; bring it back, or start a new run") from error
    raise UserError(f"{path} is damaged: it holds no JSON object; bring it back, or start a new run")


def read_logits(run: Path, arm: str) -> tuple[TuneLogits, CertifyLogits, TestLogits]:
    """An arm's logits on the three splits; :class:`UserError` where it has none yet."""
    path = arm_folder(run, arm) / LOGITS
    if not path.exists():
        raise UserError(f"arm '{arm}' of {run} has no logits yet: run erde export first")
    arrays = _arrays(path)
    try:
        return (
            TuneLogits(arrays["tune_logits"], arrays["tune_labels"]),
            CertifyLogits(arrays["certify_logits"], arrays["certify_labels"]),
            TestLogits(arrays["test_logits"], arrays["test_labels"]),
        )
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged: remove it and run erde export again") from error


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        return read_npz(path)
    except (OSError, ArrayFileError) as error:
        raise UserError(f"{path} is damaged: remove it and run erde export again ({error})") from error


def check_stages(run: Path, arm: str, stages: Sequence[Path]) -> None:
    """:class:`UserError` unless an arm's logits came from these very stages."""
    path = arm_folder(run, arm) / LOGITS
    hashes = [str(value) for value in _arrays(path).get(STAGES_HASHES, np.empty(0)).ravel()]
    for stage, expected in zip_longest(stages, hashes):
        if stage is None or expected is None or file_hash(stage) != expected:
            raise UserError(
                f"{stage or path} is not the file that {path} came from: remove {path} and the folder "
                f"{path.parent / 'stages'}, and run erde export again"
            )


def read_policy(run: Path, arm: str) -> CalibratedPolicy:
    """An arm's calibrated policy; :class:`UserError` where it has none yet."""
    path = arm_folder(run, arm) / POLICY
    if not path.exists():
        raise UserError(f"arm '{arm}' of {run} is not calibrated yet: run erde calibrate first")
    try:
        return CalibratedPolicy.from_json(json.loads(path.read_text(encoding="utf-8")))
    except NO_POLICY as error:
        raise UnreadablePolicyError(
            f"{path} is not a policy of this erde: run erde calibrate again"
        ) from error


def read_exit_choice(run: Path, arm: str) -> ExitChoice | None:
    """The exits that an arm with ``exits: auto`` keeps; None where none were chosen."""
    path = arm_folder(run, arm) / EXITS
    try:
        return ExitChoice.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UserError(
            f"{path} is damaged: remove it, {LOGITS} and the folder stages there, and run erde export again"
        ) from error


def read_results(runs: Sequence[Path]) -> dict[str, Results]:
    """The results of run folders, or of ``results.json`` files, by the shortest names that tell them apart."""
    # A file is called like its run: results.json by its folder, any other by its own name.
    paths = [(run / RESULTS if run.is_dir() else run).resolve() for run in runs]
    places = [path.parent if path.name == RESULTS else path.with_suffix("") for path in paths]
    if len(set(places)) < len(places):
        twice = next(run for run, place in zip(runs, places, strict=True) if places.count(place) > 1)
        raise UserError(f"{twice} is given twice: give each run once")
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    names = ["/".join(place.parts[-depth:]) for place in places]
    return {name: Results.read(path) for name, path in zip(names, paths, strict=True)}


def compare_runs(runs: Sequence[Path], results: Mapping[str, Results]) -> list[Comparison]:
    """Paired comparisons of the exported arms of every two runs that were tested on the same images.

    Arms are called ``run/arm``. Runs without their logits (a lone ``results.json``) take no part.
    """
    folders = {
        name: run
        for name, run in zip(results, runs, strict=True)
        if (arm_folder(run, results[name].exported_arm) / LOGITS).is_file()
    }
    comparisons = []
    for first, second in combinations(folders, 2):
        arms = {run: results[run].exported_arm for run in (first, second)}
        if len({results[run].data.splits["test"].fingerprint for run in arms}) > 1:
            continue
        for at in PLACES[::-1]:
            answers = {
                f"{run}/{arm}": Answers.of(
                    read_logits(folders[run], arm)[2],
                    read_policy(folders[run], arm),
                    cost_of(results[run].arms[arm]),
                    at,
                )
                for run, arm in arms.items()
            }
            (first_name, first_answers), (second_name, second_answers) = answers.items()
            comparisons.append(compare(first_name, first_answers, second_name, second_answers, at))
    return comparisons


def cost_of(arm: Arm) -> Cost:
    """The cost of an arm's exits."""
    return Cost(tuple(cost.macs for cost in arm.cost), arm.no_exit_macs)
