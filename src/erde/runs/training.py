"""The phases ``train`` and ``distill``: jobs of a recipe, checked and trained."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from erde.calibration.checks import check_budget
from erde.common import progress
from erde.common.errors import UserError
from erde.common.files import make_folder, write_json
from erde.networks import checkpoint
from erde.networks.cost import network_cost
from erde.networks.network import EarlyExitNetwork, split_logits
from erde.policy.cost import Cost
from erde.recipe.schema import TEACHER
from erde.runs import cross_fitting
from erde.runs.folder import Run
from erde.runs.networks import foreign_teacher, is_trained, new_network, trained_network
from erde.training import parallel
from erde.training.api import build_criterion
from erde.training.job import FINAL, Job, Outcome
from erde.training.loop import describe_machine, train_together
from erde.training.teacher_cache import check_cache


def train(run: Run) -> None:
    """Train the teacher, if an arm needs one."""
    if parallel.is_first():
        write_json(run.folder / "environment.json", describe_machine(run.device, run.threads))
    if run.config.needs_teacher and run.config.teacher.trained:
        parallel.first_only(lambda: _take_teacher(run))
    elif run.config.needs_teacher:
        _train_arms(run, [TEACHER])


def distill(run: Run, only: str | None = None) -> None:
    """Train every arm, or the one that is named."""
    if only is not None and only not in run.config.arms:
        raise UserError(f"no arm '{only}' in this run; it has: {', '.join(run.config.arms)}")
    arms = [only] if only else list(run.config.arms)
    for together in [arms] if run.config.train.together else [[arm] for arm in arms]:
        _train_arms(run, together)


def check(run: Run) -> None:
    """Build every job of the recipe once, so that a misfit is said before anything is written."""
    config = run.config
    teacher = None
    if config.needs_teacher:
        teacher = new_network(run, TEACHER, load=not is_trained(run, TEACHER))
    if config.teacher.disjoint and config.data.train_subset is None:
        raise UserError(
            "teacher.disjoint asks for images that the students do not see, but they see all of train: "
            "set data.train_subset, or teacher.disjoint=false"
        )
    for arm in config.trained_arms:
        network = new_network(run, arm, load=not is_trained(run, arm))
        job = make_job(run, arm, network, teacher)
        job.check()
        if "held_out_logits" in job.extras:
            assert teacher is not None
            cross_fitting.check(config.teacher, make_job(run, TEACHER, teacher, None))
        if job.teacher_cache is not None:
            logits = len(job.teacher.heads) * len(run.data.classes) if job.teacher is not None else 0
            check_cache(job.teacher_cache, job.augmentation, len(job.train), logits)
        cost = network_cost(network, run.data.input_size)
        if len(cost.macs) > 1:
            for budget in config.calibration.budgets:
                check_budget(budget, Cost(cost.macs, cost.no_exit_macs))


def make_job(run: Run, arm: str, network: EarlyExitNetwork, teacher: EarlyExitNetwork | None) -> Job:
    """The training of an arm, or of the teacher: its images, loss and settings."""
    config, data = run.config, run.data
    if arm == TEACHER:
        skip = (config.data.train_subset or 0) if config.teacher.disjoint else 0
        train = data.train_share(config.teacher.train_subset, skip)
    else:
        train = data.train_share(config.data.train_subset)
    settings, loss = config.train_of(arm), config.loss_of(arm)
    if not loss.needs_teacher:
        teacher = None
    if len(network.stages) == 1:
        # A network without exits has no heads to train on a frozen backbone: it is trained whole.
        settings = settings.model_copy(update={"freeze_backbone": False})
    return Job(
        name=arm,
        network=network,
        criterion=build_criterion(
            loss,
            config.distillation_of(arm),
            network,
            teacher,
            data,
            label_smoothing=settings.label_smoothing,
            train_images=len(train),
            seed=config.seed,
        ),
        teacher=teacher,
        train=train,
        config=settings,
        augmentation=config.data.augmentation,
        mean=data.mean,
        std=data.std,
        seed=config.seed,
        device=run.device,
        workers=config.data.workers,
        extras=loss.extras,
        teacher_cache=run.teacher_cache() if teacher is not None else None,
        scalars=run.arm_folder(arm) / "tensorboard" if settings.tensorboard else None,
    )


def _take_teacher(run: Run) -> None:
    """Keep a teacher that was trained elsewhere as the run's own, and say how good it is, on tune."""
    if is_trained(run, TEACHER):
        return
    data, folder = run.data, run.arm_folder(TEACHER)
    network, report = foreign_teacher(run)
    logits = split_logits(network, data.tune, data.mean, data.std, run.device)
    accuracy = (logits.argmax(axis=-1) == data.tune.labels).mean(axis=1).tolist()
    progress.say(f"teacher: {report.line()}")
    percents = " / ".join(f"{100 * share:.2f}" for share in accuracy)
    # Its makers may well have trained on the images that tune and certify are cut from.
    progress.say(
        f"teacher: {percents} % right of {len(data.tune):,} tune images, which it may have been trained on; "
        "it is not trained here"
    )
    if accuracy[-1] < 2 / len(data.classes):
        progress.say(
            "teacher: that is little better than guessing: see teacher.mean, teacher.std and teacher.classes"
        )
    make_folder(run.checkpoints(TEACHER))
    write_json(folder / "weights.json", {**report.as_json(), "tune_accuracy": accuracy})
    write_json(folder / "history.json", [])
    write_json(folder / "timing.json", {"seconds": 0.0, "images_per_second": 0.0})
    # Last: it says that the teacher is there.
    tensors = checkpoint.with_prefix("network", network.state_dict())
    checkpoint.save(run.checkpoints(TEACHER) / FINAL, tensors, {"boosted": checkpoint.is_boosted(network)})
    run.log.write("teacher", file=report.file, tune_accuracy=accuracy)


def _train_arms(run: Run, arms: list[str]) -> None:
    """Train some arms, in one go where there are several."""
    learns = any(arm != TEACHER and run.config.loss_of(arm).needs_teacher for arm in arms)
    teacher = trained_network(run, TEACHER) if learns else None
    jobs = [make_job(run, arm, new_network(run, arm, load=not is_trained(run, arm)), teacher) for arm in arms]
    if any("held_out_logits" in job.extras and not is_trained(run, job.name) for job in jobs):
        held_out = _held_out_logits(run)
        jobs = [
            dataclasses.replace(job, held_out_logits=held_out) if "held_out_logits" in job.extras else job
            for job in jobs
        ]
    folders = [run.checkpoints(arm) for arm in arms]
    for arm, outcome in zip(arms, train_together(jobs, folders, run.log, _place(run, arms)), strict=True):
        if parallel.is_first():
            _write_training(run, arm, outcome)


def _place(run: Run, arms: list[str]) -> str:
    """``arm 2 of 5``, for the progress line; empty where all are trained in one go."""
    ahead = [TEACHER] if run.config.needs_teacher and not run.config.teacher.trained else []
    in_order = [*ahead, *run.config.arms]
    return f"arm {in_order.index(arms[0]) + 1} of {len(in_order)}" if len(arms) == 1 < len(in_order) else ""


def _held_out_logits(run: Run) -> Tensor:
    folder, folds = run.arm_folder(TEACHER), run.config.teacher.cross_fit
    students = run.data.train_share(run.config.data.train_subset)

    def compute() -> Tensor:
        teacher_job = make_job(run, TEACHER, new_network(run, TEACHER, load=False), None)
        if run.config.teacher.disjoint:
            return cross_fitting.ask_teacher(trained_network(run, TEACHER), students, teacher_job)
        assert folds is not None
        return cross_fitting.cross_fit(
            folder, lambda load: new_network(run, TEACHER, load=load), teacher_job, students, folds, run.log
        )

    division = None if folds is None else cross_fitting.fold_of(students.labels, folds)
    return cross_fitting.keep_logits(folder, compute, division)


def _write_training(run: Run, arm: str, outcome: Outcome) -> None:
    history = [entry.model_dump() for entry in outcome.history]
    write_json(run.arm_folder(arm) / "history.json", history)
    timing = {
        "seconds": round(outcome.seconds, 2),
        "images_per_second": round(outcome.images_per_second, 1),
    }
    write_json(run.arm_folder(arm) / "timing.json", timing)
    final = outcome.history[-1].parts["loss"]
    progress.say(f"{arm}: trained, loss {final:.4f}, {outcome.images_per_second:,.0f} images/s")
