"""Run folders as studies read them, made without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from erde.common.splits import TestLogits
from erde.common.time_limit import TimeIsUpError
from erde.evaluation.results import Results, SplitInfo
from erde.evaluation.run_folder import RESULTS, arm_folder
from erde.recipe.schema import TEACHER, Config
from erde.runs.chain import run
from tests.helpers.hand_made import COST, hand_made_policy, hand_made_results
from tests.helpers.oracles import synthetic_logits


def hand_made_run(config: Config, folder: Path, images: int = 600) -> Results:
    """Finish the run of ``config`` at once: results, logits and the teacher's file of weights, not the rest."""
    policy, arms = hand_made_policy(), {}
    for place, arm in enumerate(config.trained_arms):
        # The same images for all arms, and another skill.
        signals = tuple(signal + 0.2 * place for signal in (0.9, 1.6, 2.2))
        draws = [synthetic_logits(10 * config.seed + split, images, signals=signals) for split in range(3)]
        arrays = {
            f"{split}_{kind}": value
            for split, (logits, labels) in zip(("tune", "certify", "test"), draws, strict=True)
            for kind, value in (("logits", logits), ("labels", labels))
        }
        (arm_folder(folder, arm) / "checkpoints").mkdir(parents=True)
        np.savez(arm_folder(folder, arm) / "logits.npz", **arrays)
        arms[arm] = (TestLogits(arrays["test_logits"], arrays["test_labels"]), policy, COST)
    if config.needs_teacher:
        (arm_folder(folder, TEACHER) / "checkpoints" / "final.safetensors").touch()
    made = hand_made_results(arms)
    roles = {arm: measured.model_copy(update={"role": "teacher"}) for arm, measured in made.arms.items()}
    results = made.model_copy(
        update={
            "seed": config.seed,
            "arms": {arm: roles[arm] if arm == TEACHER else made.arms[arm] for arm in arms},
            "data": made.data.model_copy(
                update={"splits": {"test": SplitInfo(size=images, fingerprint="f")}}
            ),
            "environment": {
                "versions": {"erde": "0.1.0"},
                "commit": "abc",
                "cpu": "a processor",
                "gpu": None,
            },
            "timings": {"training": {arm: {"seconds": 90.0, "images_per_second": 400.0} for arm in arms}},
        }
    )
    results.write(folder / RESULTS)
    return results


def cut_at(name: str) -> Callable[..., Any]:
    """:func:`run`, but time is up in the run folder ``name`` before its export."""

    def cut(config: Config, folder: Path, **keywords: Any) -> Any:
        if folder.name == name:
            run(config, folder, until="distill")
            raise TimeIsUpError
        return run(config, folder, **keywords)

    return cut
