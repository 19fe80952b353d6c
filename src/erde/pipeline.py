"""The whole chain in phases, each of which leaves its result in the run folder and is skipped when it is there.

    train -> distill -> export -> calibrate -> evaluate

Every file appears in one step, so a run that was killed at any moment continues with ``resume``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from erde import (
    calibration,
    checkpoint,
    cross_fitting,
    environment,
    parallel,
    progress,
    run_evaluation,
    run_folder,
)
from erde.backbones import build_backbone
from erde.bundle import read as read_bundle
from erde.bundle import stages_hash
from erde.calibration_checks import Request, check_budget, check_classes, check_reuse
from erde.config import Config, DistillationConfig, NetworkConfig, TeacherConfig, load_config
from erde.cost import network_cost
from erde.data import DataSplits, load_splits
from erde.errors import UserError
from erde.exits import EarlyExitNetwork, attach_exits
from erde.export import (
    STAGES,
    ExportedStages,
    export_int8_plain,
    export_int8_stages,
    export_plain,
    export_stages,
)
from erde.files import check_folder, make_folder, replacing_file, sweep_leftovers, write_json, write_text
from erde.fit import build_criterion
from erde.learner import FINAL, Job, Outcome
from erde.losses import LOSSES
from erde.profile import PROFILE, Profile
from erde.report import write_report
from erde.results import Results
from erde.run_evaluation import TEACHER
from erde.settings import Settings
from erde.stages import StageRunner
from erde.teacher_answers import check_cache
from erde.teachers import WeightsReport, adapt_teacher, load_teacher_weights, measure_accuracy
from erde.thresholds import Cost
from erde.training import choose_device, train_together

PHASES = ("train", "distill", "export", "calibrate", "evaluate")
# Keys that leave the results as they are: a run may go on with others.
FREE_TO_CHANGE = (
    ("train", "together"),
    ("train", "checkpoint_seconds"),
    ("train", "tensorboard"),
    ("teacher", "cache"),
    ("data", "workers"),
    ("data", "memory_limit_gib"),
)
# What several processes can share; the first one does the rest alone.
TRAINING = ("train", "distill")


def run(
    config: Config, folder: str | Path, *, resume: bool = False, until: str = "evaluate"
) -> Results | None:
    """Run the chain into ``folder``, up to and including the phase ``until``; the results if it is the last.

    Raises:
        UserError: bad input; a folder that holds another run, or a run and no ``resume``.
    """
    job = Run.open(config, Path(folder), resume)
    for phase in PHASES[: PHASES.index(until) + 1]:
        if phase not in TRAINING and not job.goes_on():
            return None
        with job.timed(phase):
            getattr(job, phase)()
    results = job.folder / run_folder.RESULTS
    return Results.read(results) if until == "evaluate" else None


class Run:
    """One run folder and its recipe."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.log = progress.RunLog(folder / "log.jsonl" if parallel.is_first() else None)
        self.device = choose_device(config.device)
        self.threads = config.threads or environment.available_cpus()
        torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.seconds: dict[str, float] = {}
        self.teacher_report: WeightsReport | None = None

    @classmethod
    def open(cls, config: Config, folder: Path, resume: bool) -> Run:
        """Start a run in a new folder, or continue the one that is there.

        Nothing is written before the data is loaded and every network and loss of the recipe is built once.
        """
        parallel.start(config.device)
        found: list[Run] = []
        parallel.first_only(lambda: found.append(cls._open(config, folder, resume)))
        return found[0] if found else cls(config, folder)

    @classmethod
    def _open(cls, config: Config, folder: Path, resume: bool) -> Run:
        saved = folder / "config.yaml"
        if resume:
            if not saved.is_file():
                raise UserError(
                    f"nothing to resume in {folder}: it has no config.yaml; start without --resume"
                )
            _check_same_recipe(config, saved)
            sweep_leftovers(folder)
            write_text(saved, config.to_yaml())
        elif folder.is_dir() and any(folder.iterdir()):
            advice = "continue it with --resume" if saved.is_file() else "it holds other files"
            raise UserError(f"{folder} is not empty: {advice}, or choose another folder with --out")
        check_folder(folder)
        one = cls(config, folder)
        one.check()
        make_folder(folder)
        if not resume:
            write_text(saved, config.to_yaml())
        if not (folder / "splits.json").exists():
            write_json(folder / "splits.json", one.data.fingerprints())
        one.log.write("resume" if resume else "start", recipe=config.name, seed=config.seed)
        return one

    @classmethod
    def existing(cls, folder: Path) -> Run:
        """The run in ``folder``, by its own saved recipe."""
        saved = folder / "config.yaml"
        if not saved.is_file():
            raise UserError(f"{folder} is no run folder: it has no config.yaml (erde run writes one)")
        config = load_config(saved)
        parallel.start(config.device)
        parallel.first_only(lambda: sweep_leftovers(folder))
        return cls(config, folder)

    # ------------------------------------------------------------ what the phases share

    def goes_on(self) -> bool:
        """Whether this process has more to do than to train."""
        is_first = parallel.is_first()
        parallel.finish()
        return is_first

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Log the phase and its seconds."""
        started = time.perf_counter()
        self.log.write("phase", name=phase)
        yield
        self.seconds[phase] = round(time.perf_counter() - started, 2)

    @cached_property
    def data(self) -> DataSplits:
        """The four splits; once the run has a ``splits.json`` they are held against it."""
        progress.say(f"data: {self.config.data.name}")
        data = load_splits(self.config.data, self.config.seed)
        path = self.folder / "splits.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != data.fingerprints():
            raise UserError(
                f"the data set '{self.config.data.name}' is not the one that this run started with (see "
                f"{path}): bring the old data back, or start a new run"
            )
        return data

    @cached_property
    def needs_teacher(self) -> bool:
        """Whether an arm learns from a teacher, or is held against it."""
        learns = any(LOSSES[arm.loss.name].needs_teacher for arm in self.config.arms.values())
        return learns or self.config.calibration.reference == TEACHER

    @property
    def arms(self) -> list[str]:
        """All arms that are trained, the teacher first."""
        return [*([TEACHER] if self.needs_teacher else []), *self.config.arms]

    @property
    def measured_arms(self) -> list[str]:
        """All arms with logits of their own: the exported one in int8, if it is asked for, stands behind itself in float."""
        int8, exported = self.config.export.int8_arm, self.config.export.arm
        found = []
        for arm in self.arms:
            found += [arm, int8] if arm == exported and int8 is not None else [arm]
        return found

    def trained_as(self, arm: str) -> str:
        """The arm whose training made ``arm``: another one for int8 only."""
        return self.config.export.arm if arm == self.config.export.int8_arm else arm

    def bundle_folder(self, arm: str) -> Path:
        """Where the bundle of the exported arm lies, in float or int8."""
        return self.folder / ("bundle-int8" if arm == self.config.export.int8_arm else "bundle")

    def arm_folder(self, arm: str) -> Path:
        """``arms/<arm>``."""
        return run_folder.arm_folder(self.folder, arm)

    def network_config(self, arm: str) -> NetworkConfig:
        """The network of an arm."""
        return self.config.teacher if arm == TEACHER else self.config.student_of(self.trained_as(arm))

    def new_network(self, arm: str, *, load: bool = True) -> EarlyExitNetwork:
        """A fresh network: arms with the same architecture start from the same weights.

        Without ``load`` the file of ``weights`` is not looked at: what was saved replaces it.
        """
        network_config = self.network_config(arm)
        torch.manual_seed(self.config.seed)
        channels = self.data.image_shape[2]
        backbone = build_backbone(
            network_config.backbone,
            classes=len(self.data.classes),
            channels=channels,
            image_size=self.data.input_size[1:],
            # What was saved replaces them.
            pretrained=network_config.pretrained and network_config.weights is None,
        )
        network = attach_exits(
            backbone,
            network_config.exits,
            input_size=self.data.input_size,
            head=network_config.head,
            dropout=network_config.dropout,
        )
        trained = isinstance(network_config, TeacherConfig) and network_config.trained
        # A teacher that the run took as it was is the run's own from then on.
        taken = trained and (self.arm_folder(arm) / "checkpoints" / FINAL).exists()
        if load and not taken and network_config.weights is not None:
            path = Path(network_config.weights)
            if isinstance(network_config, TeacherConfig) and trained:
                self.teacher_report = load_teacher_weights(network, path, network_config.match)
            else:
                checkpoint.load_weights(network, path)
        if isinstance(network_config, TeacherConfig):
            adapt_teacher(
                network,
                mean=self.data.mean,
                std=self.data.std,
                classes=self.data.classes,
                teacher_mean=network_config.mean,
                teacher_std=network_config.std,
                teacher_classes=network_config.classes,
            )
        return network

    def trained_network(self, arm: str) -> EarlyExitNetwork:
        """The network of an arm that was trained."""
        path = self.arm_folder(arm) / "checkpoints" / FINAL
        if not path.exists():
            command = "erde train" if arm == TEACHER else "erde distill"
            raise UserError(f"arm '{arm}' of {self.folder} is not trained yet: run {command} first")
        network = self.new_network(arm, load=False)
        checkpoint.load_weights(network, path)
        return network

    # ------------------------------------------------------------ phases

    def train(self) -> None:
        """Train the teacher, if an arm needs one."""
        if parallel.is_first():
            write_json(self.folder / "environment.json", environment.describe(self.device, self.threads))
        if self.needs_teacher and self.config.teacher.trained:
            parallel.first_only(self._take_teacher)
        elif self.needs_teacher:
            self._train_arms([TEACHER])

    def _take_teacher(self) -> None:
        """Keep a teacher that was trained elsewhere as the run's own, and say how good it is, on tune."""
        folder = self.arm_folder(TEACHER)
        if (folder / "checkpoints" / FINAL).exists():
            return
        network, data = self.new_network(TEACHER), self.data
        assert self.teacher_report is not None
        accuracy = measure_accuracy(network, data.tune, data.mean, data.std, self.device)
        progress.say(f"teacher: {self.teacher_report.line()}")
        shown = " / ".join(f"{100 * one:.2f}" for one in accuracy)
        # Who trained it may well have used what tune and certify are cut from.
        progress.say(
            f"teacher: {shown} % right of {len(data.tune):,} tune images, which it may have been trained on; "
            "it is not trained here"
        )
        if accuracy[-1] < 2 / len(data.classes):
            progress.say(
                "teacher: that is little better than guessing: see teacher.mean, teacher.std and teacher.classes"
            )
        make_folder(folder / "checkpoints")
        write_json(folder / "weights.json", {**self.teacher_report.as_json(), "tune_accuracy": accuracy})
        write_json(folder / "history.json", [])
        write_json(folder / "timing.json", {"seconds": 0.0, "images_per_second": 0.0})
        # Last: it says that the teacher is there.
        tensors = checkpoint.with_prefix("network", network.state_dict())
        checkpoint.save(folder / "checkpoints" / FINAL, tensors, {})
        self.log.write("teacher", file=self.teacher_report.file, tune_accuracy=accuracy)

    def distill(self, only: str | None = None) -> None:
        """Train every arm, or the one that is named."""
        if only is not None and only not in self.config.arms:
            raise UserError(f"no arm '{only}' in this run; it has: {', '.join(self.config.arms)}")
        arms = [only] if only else list(self.config.arms)
        for together in [arms] if self.config.train.together else [[arm] for arm in arms]:
            self._train_arms(together)

    def check(self) -> None:
        """Build every job of the recipe once: what does not fit together is said before anything is written."""
        check_classes(self.data.tune.labels, len(self.data.classes))
        teacher = self.new_network(TEACHER) if self.needs_teacher else None
        if self.config.teacher.disjoint and self.config.data.train_subset is None:
            raise UserError(
                "teacher.disjoint asks for images that the students do not see, but they see all of train: "
                "set data.train_subset, or teacher.disjoint=false"
            )
        for arm in self.arms:
            network = self.new_network(arm)
            job = self._job(arm, network, teacher)
            job.check()
            if "held_out_logits" in job.extras:
                cross_fitting.check(self)
            if job.teacher_cache is not None:
                logits = len(job.teacher.heads) * len(self.data.classes) if job.teacher is not None else 0
                check_cache(job.teacher_cache, job.augmentation, len(job.train), logits)
            cost = network_cost(network, self.data.input_size)
            if len(cost.macs) > 1:
                for budget in self.config.calibration.budgets:
                    check_budget(budget, Cost(cost.macs, cost.no_exit_macs))

    def _job(self, arm: str, network: EarlyExitNetwork, teacher: EarlyExitNetwork | None) -> Job:
        config = self.config
        if arm == TEACHER:
            skip = (config.data.train_subset or 0) if config.teacher.disjoint else 0
            train = self.data.train_share(config.teacher.train_subset, skip)
            settings, loss, distillation = (
                config.teacher_train,
                LOSSES["ce"].config(name="ce"),
                DistillationConfig(),
            )
        else:
            train = self.data.train_share(config.data.train_subset)
            settings, loss, distillation = config.train, config.arms[arm].loss, config.distillation_of(arm)
        if not LOSSES[loss.name].needs_teacher:
            teacher = None
        if len(network.stages) == 1:
            # A network without exits has no heads to train on a frozen backbone: it is trained whole.
            settings = settings.model_copy(update={"freeze_backbone": False})
        return Job(
            name=arm,
            network=network,
            criterion=build_criterion(
                loss,
                distillation,
                network,
                teacher,
                self.data,
                label_smoothing=settings.label_smoothing,
                train_images=len(train),
                seed=config.seed,
            ),
            teacher=teacher,
            train=train,
            config=settings,
            augmentation=config.data.augmentation,
            mean=self.data.mean,
            std=self.data.std,
            seed=config.seed,
            device=self.device,
            workers=config.data.workers,
            extras=tuple(LOSSES[loss.name].extras(loss)),
            teacher_cache=self.teacher_cache if teacher is not None else None,
            scalars=self.arm_folder(arm) / "tensorboard" if settings.tensorboard else None,
        )

    @property
    def teacher_cache(self) -> Path | None:
        """Where the teacher's answers are kept, if they are."""
        cache = self.config.teacher.cache
        if isinstance(cache, bool):
            return self.folder / "teacher-cache" if cache else None
        return Path(cache)

    def _train_arms(self, arms: list[str]) -> None:
        """Train some arms, in one go where there are several."""
        learn = any(arm != TEACHER and LOSSES[self.config.arms[arm].loss.name].needs_teacher for arm in arms)
        teacher = self.trained_network(TEACHER) if learn else None
        jobs = [self._job(arm, self.new_network(arm), teacher) for arm in arms]
        if any("held_out_logits" in job.extras for job in jobs):
            held_out = cross_fitting.held_out_logits(
                self, self._job(TEACHER, self.new_network(TEACHER), None)
            )
            jobs = [
                dataclasses.replace(job, held_out_logits=held_out) if "held_out_logits" in job.extras else job
                for job in jobs
            ]
        folders = [self.arm_folder(arm) / "checkpoints" for arm in arms]
        for arm, outcome in zip(arms, train_together(jobs, folders, self.log), strict=True):
            if parallel.is_first():
                self._write_training(arm, outcome)

    def _write_training(self, arm: str, outcome: Outcome) -> None:
        history = [entry.model_dump() for entry in outcome.history]
        write_json(self.arm_folder(arm) / "history.json", history)
        timing = {
            "seconds": round(outcome.seconds, 2),
            "images_per_second": round(outcome.images_per_second, 1),
        }
        write_json(self.arm_folder(arm) / "timing.json", timing)
        final = outcome.history[-1].parts["loss"]
        progress.say(f"{arm}: trained, loss {final:.4f}, {outcome.images_per_second:,.0f} images/s")

    def export(self) -> None:
        """Write every arm's stages and its logits on tune, certify and test; and the plain baselines; int8 last."""
        for arm in self.arms:
            folder = self.arm_folder(arm)
            if not (folder / "stages" / STAGES).exists():
                progress.say(f"{arm}: export")
                export_stages(
                    self.trained_network(arm),
                    self.data.image_shape,
                    self.data.mean,
                    self.data.std,
                    folder / "stages",
                    self.config.export.opset,
                    self.data.train.images,
                )
            if not (folder / run_folder.LOGITS).exists():
                self._write_logits(arm)
        for arm in self.arms:
            is_plain = len(self.stages(arm).files) == 1
            name = "no-exit" if arm == self.config.export.arm else arm
            path = self.folder / "baselines" / f"{name}.onnx"
            if (is_plain or arm == self.config.export.arm) and not path.exists():
                self.export_plain(arm, path)
        if self.config.export.int8_arm is not None:
            self._export_int8(self.config.export.int8_arm)

    def _export_int8(self, arm: str) -> None:
        """The exported arm's stages, logits and plain baseline in int8, with ranges from what students are trained on."""
        folder, source = make_folder(self.arm_folder(arm)), self.arm_folder(self.config.export.arm)
        train, seed = self.data.train_share(self.config.data.train_subset), self.config.seed
        if not (folder / "stages" / STAGES).exists():
            progress.say(f"{arm}: quantise")
            export_int8_stages(source / "stages", folder / "stages", train, self.data.tune, seed)
        quantisation = self.stages(arm).quantisation
        assert quantisation is not None
        if not (folder / run_folder.LOGITS).exists():
            self._write_logits(arm)
            self.log.write("quantised", arm=arm, **dataclasses.asdict(quantisation))
        baselines = self.folder / "baselines"
        path = baselines / "no-exit-int8.onnx"
        if not path.exists():
            export_int8_plain(baselines / "no-exit.onnx", path, train, quantisation.kept_in_float, seed)

    def export_plain(self, arm: str, path: Path) -> None:
        """An arm's network without exits as one ordinary ONNX file."""
        data = self.data
        network = self.trained_network(arm)
        opset = self.config.export.opset
        export_plain(network, data.image_shape, data.mean, data.std, path, opset, data.train.images)

    def stages(self, arm: str) -> ExportedStages:
        """The exported stages of an arm."""
        folder = self.arm_folder(arm) / "stages"
        if not (folder / STAGES).exists():
            raise UserError(f"arm '{arm}' of {self.folder} is not exported yet: run erde export first")
        return ExportedStages.read(folder)

    def cost(self, arm: str) -> Cost:
        """What the exits of an arm cost; with milliseconds where its bundle was profiled."""
        cost = self.stages(arm).cost
        milliseconds = None
        path = self.profile(arm)
        if self.trained_as(arm) == self.config.export.arm and path.is_file():
            manifest = read_bundle(path.parent)
            profile = Profile.read(path, stages_hash(manifest), len(cost.macs))
            milliseconds = profile.exit_milliseconds()
        return Cost(cost.macs, cost.no_exit_macs, milliseconds)

    def profile(self, arm: str) -> Path:
        """Where ``Session.profile()`` leaves the times of an exported arm's bundle."""
        return self.bundle_folder(arm) / PROFILE

    def _write_logits(self, arm: str) -> None:
        folder = self.arm_folder(arm)
        runner = StageRunner(self.stages(arm).paths(folder / "stages"), self.threads)
        cost = self.cost(arm)
        arrays: dict[str, NDArray[Any]] = {
            "exit_macs": np.asarray(cost.exit_macs),
            "no_exit_macs": np.asarray(cost.no_exit_macs),
        }
        for split in (self.data.tune, self.data.certify, self.data.test):
            arrays[f"{split.name}_logits"] = runner.all_logits(split.images)
            arrays[f"{split.name}_labels"] = split.labels
        with replacing_file(folder / run_folder.LOGITS) as beside, beside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes allow_pickle for an array

    def reference_right(self) -> tuple[NDArray[np.bool_], ...] | tuple[None, None, None]:
        """Where the reference is right, on tune, certify and test; None where each arm is its own reference."""
        reference = self.config.calibration.reference
        if reference == "final_exit":
            return None, None, None
        arm = TEACHER if reference == TEACHER else self.config.no_exit_arm()
        logits = run_folder.read_logits(self.folder, arm)
        return tuple(one.logits[-1].argmax(axis=-1) == one.labels for one in logits)

    def calibrate(self) -> None:
        """Fit every arm's policy on tune and certify it on certify."""
        tune_right, certify_right, _ = self.reference_right()
        config = self.config.calibration
        settings = Settings(
            max_risks=tuple(config.max_risks),
            confidence=config.confidence,
            budgets=tuple(config.budgets),
            reference=config.reference,
            guarantee=config.guarantee,
            score=config.score,
            sharpness=config.sharpness,
            ensemble=config.ensemble,
        )
        for arm in self.measured_arms:
            tune, certify, _ = run_folder.read_logits(self.folder, arm)
            path = self.arm_folder(arm) / run_folder.POLICY
            # Milliseconds may come and go with a profile; they choose nothing here.
            cost = dataclasses.replace(self.cost(arm), exit_milliseconds=None)
            with contextlib.suppress(run_folder.UnreadablePolicyError):
                # One that this version cannot read is as good as none: it is written anew.
                if path.exists():
                    request = Request(tune, certify, cost, settings)
                    check_reuse(run_folder.read_policy(self.folder, arm).calibration, request)
            calibrated = calibration.calibrate_logits(
                tune,
                certify,
                cost,
                settings,
                tune_reference_right=tune_right,
                certify_reference_right=certify_right,
            )
            write_json(path, calibrated.to_json())

    def evaluate(self, again: bool = False) -> None:
        """Measure every arm on test, seal the bundles, check the runtime against it all, write results and report.

        What is there already stays, unless ``again`` asks for it anew.
        """
        path, report = self.folder / run_folder.RESULTS, self.folder / "report.html"
        if again or not path.exists():
            run_evaluation.evaluate(self).write(path)
        elif report.exists():
            return
        write_report(Results.read(path), report, run_evaluation.gather_evidence(self))


def _check_same_recipe(config: Config, saved: Path) -> None:
    old, new = yaml.safe_load(saved.read_text(encoding="utf-8")), yaml.safe_load(config.to_yaml())
    for group, key in FREE_TO_CHANGE:
        # A recipe of an earlier version may lack the key.
        old.setdefault(group, {})[key] = new[group][key]
    difference = _first_difference(old, new)
    if difference is not None:
        key, before, now = difference
        raise UserError(
            f"{saved.parent} belongs to another recipe: there {key} is {before!r}, now it is {now!r}; "
            "give the same recipe and overrides, or another folder"
        )


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(one for one in new if one not in old)]:
            found = _first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
            if found is not None:
                return found
        return None
    return None if old == new else (key, old, new)
