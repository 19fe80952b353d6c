"""``erde study``: a run for each seed, in folders of one study; what they show together, written after each of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from erde.common import progress
from erde.common.errors import UserError
from erde.common.files import make_folder, write_text
from erde.evaluation.results import Results
from erde.evaluation.run_folder import arm_folder
from erde.evaluation.study import Study, summarise
from erde.recipe.schema import TEACHER, Config
from erde.recipe.study import StudyConfig
from erde.report.study_text import study_text
from erde.runs.chain import run
from erde.runs.folder import CONFIG
from erde.training.job import FINAL

STUDY, TEXT = "study.json", "study.md"


def run_study(
    study: StudyConfig, folder: str | Path, overrides: Sequence[str] = (), *, resume: bool = False
) -> Study:
    """Run every seed of ``study`` that is not finished in ``folder``, and compare the arms over the seeds.

    Args:
        overrides: ``KEY=VALUE`` for the recipe, after the study's own keys.
        resume: continue what was stopped; the study may have got more seeds meanwhile.

    Raises:
        UserError: bad input, a folder that holds something and no ``resume``, runs that do not fit together.
    """
    folder = Path(folder)
    # Its runs would have to join and leave the other processes again.
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("erde study is one process: start it without torchrun; erde run takes several")
    configs = {seed: study.config(seed, overrides) for seed in study.seeds}
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: continue it with --resume, or choose another with --out")
    make_folder(folder)
    done: dict[int, Path] = {}
    results: dict[int, Results] = {}
    for number, (seed, config) in enumerate(configs.items(), 1):
        progress.say(f"study {study.name}: run {number} of {len(configs)}, seed {seed}")
        place = folder / f"seed{seed}"
        if study.one_teacher and done and config.needs_teacher and not config.teacher.trained:
            config = taught_by(config, done[study.seeds[0]])
        finished = run(config, place, resume=(place / CONFIG).is_file())
        assert finished is not None
        done[seed], results[seed] = place, finished
        summary = summarise(study.name, study.reference, done, results)
        summary.write(folder / STUDY)
        write_text(folder / TEXT, study_text(summary))
    return summary


def taught_by(config: Config, first: Path) -> Config:
    """The recipe with the teacher that another run trained."""
    network = config.teacher.model_dump(exclude={"train", "train_subset", "disjoint", "cross_fit"})
    weights = arm_folder(first, TEACHER) / "checkpoints" / FINAL
    return config.changed(teacher={**network, "weights": str(weights.resolve()), "trained": True})
