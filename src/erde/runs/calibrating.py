"""The phase ``calibrate``: every arm's policy, fitted on tune and certified on certify."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde.calibration.checks import Request, check_reuse
from erde.calibration.logits import calibrate_logits
from erde.calibration.policy_file import UnreadablePolicyError
from erde.calibration.settings import Settings
from erde.common.files import write_json
from erde.evaluation import run_folder
from erde.policy.cost import Cost
from erde.recipe.schema import TEACHER, Config
from erde.runs.folder import REPORT, Run


def calibrate(run: Run) -> None:
    """Fit every arm's policy on tune and certify it on certify."""
    settings = Settings(**dict(run.config.calibration))
    tune_right, certify_right, _ = reference_right(run.config, run.folder)
    for arm in run.config.measured_arms:
        run_folder.check_stages(run.folder, arm, run.stage_files(arm))
        tune, certify, _ = run_folder.read_logits(run.folder, arm)
        path = run.arm_folder(arm) / run_folder.POLICY
        # Without milliseconds: a recipe has no latency budgets.
        network = run.stages(arm).cost
        cost = Cost(network.macs, network.no_exit_macs)
        # A policy that this version cannot read is as good as none: it is written anew.
        with contextlib.suppress(UnreadablePolicyError):
            if path.exists():
                request = Request(tune, certify, cost, settings, (), tune_right, certify_right)
                check_reuse(run_folder.read_policy(run.folder, arm).calibration, request)
        calibrated = calibrate_logits(
            tune,
            certify,
            cost,
            settings,
            tune_reference_right=tune_right,
            certify_reference_right=certify_right,
            name=arm,
        )
        _write_policy(run.folder, path, calibrated.to_json())


def reference_right(config: Config, folder: Path) -> tuple[NDArray[np.bool_], ...] | tuple[None, None, None]:
    """Whether the reference is right on each image of tune, certify and test; None if each arm is its own reference."""
    reference = config.calibration.reference
    if reference == "final_exit":
        return None, None, None
    arm = TEACHER if reference == TEACHER else config.no_exit_arm()
    splits = run_folder.read_logits(folder, arm)
    return tuple(split.logits[-1].argmax(axis=-1) == split.labels for split in splits)


def _write_policy(folder: Path, path: Path, value: dict[str, Any]) -> None:
    """Write a policy; results of another policy go first, so that the folder never contradicts itself."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(value)):
            return
    for outdated in (run_folder.RESULTS, REPORT):
        (folder / outdated).unlink(missing_ok=True)
    write_json(path, value)
