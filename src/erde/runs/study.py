"""``erde study``: a run for each seed, in folders of one study; what they show together, written after each of them.

``erde ledger`` runs the seeds of several studies, and keeps a small file for each arm of each run.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from erde.common import environment, progress
from erde.common.errors import UserError
from erde.common.files import check_folder, make_folder, write_text
from erde.common.tasks import import_ray, in_processes, in_ray
from erde.evaluation.ledger import Ledger, rows_of
from erde.evaluation.results import Results
from erde.evaluation.run_folder import RESULTS, arm_folder
from erde.evaluation.study import ArmSeed, Study, arm_seeds, summarise
from erde.recipe.schema import TEACHER, Config
from erde.recipe.study import StudyConfig
from erde.report.study_text import study_text
from erde.runs.chain import run
from erde.runs.folder import CONFIG
from erde.runs.opening import with_whole_paths
from erde.training import loop
from erde.training.job import FINAL

STUDY, TEXT = "study.json", "study.md"


@dataclass(frozen=True)
class Seed:
    """A seed's run: its recipe, its folder, and how many CPUs it takes if the recipe's ``threads`` does not say."""

    config: Config
    place: Path
    cpus: int


def run_study(
    study: StudyConfig,
    folder: str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    workers: int | None = None,
    ray: bool = False,
) -> Study:
    """Run every seed of ``study`` that is not finished in ``folder``, and compare the arms over the seeds.

    Args:
        overrides: ``KEY=VALUE`` for the recipe, after the study's own keys.
        resume: continue what was stopped; the study may have got more seeds meanwhile.
        workers: so many seeds at a time, each in a process of its own; one after the other in this process without it,
            and all at once with ``ray``.
        ray: run them as tasks of Ray, whose machines must see ``folder`` and the data at the same place.

    Raises:
        UserError: bad input, a folder that holds something and no ``resume``, runs that do not fit together, a process
            that was killed.
    """
    folder = Path(folder)
    _check_processes("study", ray)
    configs = {seed: study.config(seed, overrides) for seed in study.seeds}
    _check_place(study, folder, resume)
    make_folder(folder)
    measured: dict[int, dict[str, ArmSeed]] = {}
    with closing(_finish_seeds(study, configs, folder, workers, ray)) as finished:
        for seed in finished:
            place = run_place(folder, seed)
            measured[seed] = arm_seeds(place, Results.read(place / RESULTS))
            # In the study's order, whichever was first.
            in_order = {known: measured[known] for known in study.seeds if known in measured}
            summary = summarise(study.name, study.reference, in_order)
            summary.write(folder / STUDY)
            write_text(folder / TEXT, study_text(summary))
    return summary


def _check_place(study: StudyConfig, folder: Path, resume: bool) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    # A start that was killed may have left no more than the first seed's folder.
    begun = (folder / STUDY).is_file() or any(run_place(folder, seed).is_dir() for seed in study.seeds)
    if not begun:
        raise UserError(f"{folder} is not empty: it holds other files: choose another folder with --out")
    if not resume:
        raise UserError(f"{folder} is not empty: continue it with --resume, or choose another with --out")


def _finish_seeds(
    study: StudyConfig, configs: Mapping[int, Config], folder: Path, workers: int | None, ray: bool
) -> Generator[int, None, None]:
    """Run the seeds of ``configs``; the number of each when it is finished. A teacher of all is trained before them."""
    if ray:
        # Ray's processes have another working folder.
        folder = folder.absolute()
        configs = {seed: with_whole_paths(config) for seed, config in configs.items()}
    first = study.seeds[0]
    parts = [list(configs)]
    if study.one_teacher:
        parts = [[seed for seed in configs if seed == first], [seed for seed in configs if seed != first]]
    for part in filter(None, parts):
        # On this machine they share its CPUs.
        cpus = 1 if ray else max(1, environment.available_cpus() // min(workers or 1, len(part)))
        seeds = [
            Seed(_with_teacher(study, configs[seed], folder), run_place(folder, seed), cpus) for seed in part
        ]
        with closing(_finish(study, seeds, workers, ray)) as finished:
            yield from finished


def _finish(
    study: StudyConfig, seeds: Sequence[Seed], workers: int | None, ray: bool
) -> Generator[int, None, None]:
    """Run the seeds; the number of each when it is finished."""
    if ray:
        config, most = seeds[0].config, workers or len(seeds)
        gpus = int(config.device == "cuda")
        finished = in_ray(_run_beside_others, seeds, most, cpus=config.threads or 1, gpus=gpus)
    elif workers is not None and workers > 1:
        finished = in_processes(_run_beside_others, seeds, workers)
    else:
        for seed in seeds:
            number = study.seeds.index(seed.config.seed) + 1
            progress.say(f"study {study.name}: run {number} of {len(study.seeds)}, seed {seed.config.seed}")
            _run(seed.config, seed.place)
            yield seed.config.seed
        return
    with closing(finished):
        for done in finished:
            progress.say(f"study {study.name}: seed {done} is finished")
            yield done


def _run_beside_others(seed: Seed) -> int:
    """A seed in a process of its own."""
    environment.most_cpus = seed.cpus
    progress.prefix = f"seed {seed.config.seed}: "
    loop.keeps_memory = True
    _run(seed.config, seed.place)
    return seed.config.seed


def fill_ledger(
    ledger: Ledger, results: Path, runs: Path, *, workers: int | None = None, ray: bool = False
) -> None:
    """Run every seed that has unfilled rows, in the ledger's order, and write its rows as it finishes.

    Args:
        results: the folder of the rows.
        runs: where the run folders are, ``<study>/seed<seed>``; those that are there are continued.
        workers, ray: as of :func:`run_study`, for the seeds of each study.

    Raises:
        UserError: bad input, a run folder of another recipe, a teacher that is not here.
    """
    _check_processes("ledger", ray)
    check_folder(results)
    for study in ledger.config.studies:
        folder = runs / study.name
        configs = {seed: study.config(seed) for seed in ledger.seeds(study, filled=False)}
        with closing(_finish_seeds(study, configs, folder, workers, ray)) as finished:
            for seed in finished:
                place = run_place(folder, seed)
                make_folder(results)
                for row in rows_of(study, configs[seed], place, Results.read(place / RESULTS)):
                    row.write(results / row.file)


def run_place(folder: Path, seed: int) -> Path:
    """The run folder of a seed in a study's folder."""
    return folder / f"seed{seed}"


def _check_processes(command: str, ray: bool) -> None:
    if ray:
        import_ray()
    # Its runs would have to join and leave the other processes again.
    environment.check_one_process(command)


def _run(config: Config, place: Path) -> None:
    """Run a seed, or continue it."""
    run(config, place, resume=(place / CONFIG).is_file())


def _with_teacher(study: StudyConfig, config: Config, folder: Path) -> Config:
    """The recipe of a seed; with the first seed's teacher where it teaches all."""
    first = study.seeds[0]
    if not study.one_teacher or config.seed == first or not config.needs_teacher or config.teacher.trained:
        return config
    taught = taught_by(config, run_place(folder, first))
    if taught.teacher.weights is not None and not Path(taught.teacher.weights).is_file():
        raise UserError(
            f"study {study.name} has one teacher, that of seed {first}, and {run_place(folder, first)} does not hold it: copy "
            "that run folder here, or move the rows of that seed away, so that it is trained again"
        )
    return taught


def taught_by(config: Config, first: Path) -> Config:
    """The recipe with the teacher that another run trained."""
    network = config.teacher.model_dump(exclude={"train", "train_subset", "disjoint", "cross_fit"})
    weights = arm_folder(first, TEACHER) / "checkpoints" / FINAL
    return config.changed(teacher={**network, "weights": str(weights.resolve()), "trained": True})
