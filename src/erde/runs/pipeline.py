"""The whole chain in phases, each of which leaves its result in the run folder and is skipped when it is there.

    train -> distill -> export -> calibrate -> evaluate

Every file appears in one step, so a run that was killed at any moment continues with ``resume``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from erde.bundle.profile import PROFILE, Profile
from erde.bundle.sealing import file_hash, stages_hash
from erde.bundle.sealing import read as read_bundle
from erde.calibration.checks import Request, check_budget, check_reuse
from erde.calibration.logits import calibrate_logits
from erde.calibration.settings import Settings
from erde.common import environment, progress
from erde.common.errors import UserError
from erde.common.files import (
    Lock,
    check_folder,
    make_folder,
    replacing_file,
    sweep_leftovers,
    write_json,
    write_text,
)
from erde.data.load import DataSplits, load_splits, load_splits_again
from erde.data.sources import SHIPPED
from erde.evaluation import run_folder
from erde.evaluation.results import Results
from erde.exporting.onnx_files import (
    STAGES,
    ExportedStages,
    export_int8_plain,
    export_int8_stages,
    export_plain,
    export_stages,
)
from erde.networks import checkpoint
from erde.networks.attach import attach_exits
from erde.networks.backbones import build_backbone
from erde.networks.cost import network_cost
from erde.networks.foreign_weights import WeightsReport, adapt_teacher, load_teacher_weights, measure_accuracy
from erde.networks.network import EarlyExitNetwork
from erde.policy.cost import Cost
from erde.recipe.load import load_saved_config
from erde.recipe.losses import CrossEntropyConfig, LossConfig
from erde.recipe.schema import Config, DistillationConfig, NetworkConfig, TeacherConfig
from erde.recipe.validation import validate
from erde.report.run_page import write_report
from erde.runs import cross_fitting, measure
from erde.runs.measure import TEACHER
from erde.runtime.stages import StageRunner
from erde.training import parallel
from erde.training.api import build_criterion
from erde.training.job import FINAL, Job, Outcome
from erde.training.loop import choose_device, describe_machine, train_together
from erde.training.teacher_cache import check_cache

LOCK = ".lock"
CONFIG, REPORT = "config.yaml", "report.html"
# Names of baselines: the exported arm without its exits, and in int8.
NO_EXIT, NO_EXIT_INT8 = "no-exit", "no-exit-int8"
PHASES = ("train", "distill", "export", "calibrate", "evaluate")
# What several processes can share; the first one does the rest alone.
TRAINING = ("train", "distill")


def run(
    config: Config, folder: str | Path, *, resume: bool = False, until: str = "evaluate"
) -> Results | None:
    """Run the chain into ``folder``, up to and including the phase ``until``; the results if it is the last.

    Raises:
        UserError: bad input; a folder that holds another run, or a run and no ``resume``.
    """
    with Run.open(config, Path(folder), resume) as job:
        for phase in PHASES[: PHASES.index(until) + 1]:
            if phase not in TRAINING and not job.goes_on():
                return None
            with job.timed(phase):
                getattr(job, phase)()
        results = job.folder / run_folder.RESULTS
        return Results.read(results) if until == "evaluate" else None


class Run:
    """One run folder and its recipe.

    As :meth:`open` and :meth:`existing` give it, it holds the lock of the folder until :meth:`close`, or the end of
    a ``with`` block; of several processes that train together the first one does.
    """

    def __init__(self, config: Config, folder: Path, lock: Lock | None = None) -> None:
        self.config, self.folder = config, folder
        self._lock: Lock | None = None
        # Whoever holds no lock does not touch what another process is appending to.
        self.log = progress.RunLog(None)
        if lock is not None:
            self._hold(lock)
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
        config = _with_whole_paths(config)
        opened: list[Run] = []
        parallel.first_only(lambda: opened.append(cls._open(config, folder, resume)))
        if opened:
            return opened[0]
        # What the first process made of the recipe, where the others see it.
        saved = folder / CONFIG
        return cls(load_saved_config(saved) if resume and saved.is_file() else config, folder)

    @classmethod
    def _open(cls, config: Config, folder: Path, resume: bool) -> Run:
        saved = folder / CONFIG
        if resume:
            if not saved.is_file():
                raise UserError(
                    f"nothing to resume in {folder}: it has no config.yaml; start without --resume"
                )
            lock = _lock(folder)
            try:
                sweep_leftovers(folder)
                run = cls(_resumed(config, saved), folder, lock)
                run.check()
                write_text(saved, run.config.to_yaml())
                run._start("resume")
            except BaseException:
                lock.release()
                raise
            return run
        _check_empty(folder)
        run = cls(config, folder)
        run.check()
        make_folder(folder)
        lock = _lock(folder)
        try:
            # Another process may have been quicker.
            _check_empty(folder)
            run._hold(lock)
            write_text(saved, config.to_yaml())
            run._start("start")
        except BaseException:
            lock.release()
            raise
        return run

    def _hold(self, lock: Lock) -> None:
        self._lock = lock
        self.log = progress.RunLog(self.folder / "log.jsonl")

    def _start(self, event: str) -> None:
        if not (self.folder / "splits.json").exists():
            write_json(self.folder / "splits.json", self.data.fingerprints())
        self.log.write(event, recipe=self.config.name, seed=self.config.seed)

    @classmethod
    def existing(cls, folder: Path, *, read_only: bool = False) -> Run:
        """The run in ``folder``, by its own saved recipe; what only reads it needs no lock."""
        saved = folder / CONFIG
        if not saved.is_file():
            raise UserError(f"{folder} is no run folder: it has no config.yaml (erde run writes one)")
        config = load_saved_config(saved)
        _check_cache_folder(config, saved)
        if read_only:
            return cls(config, folder)
        parallel.start(config.device)
        locks: list[Lock] = []
        parallel.first_only(lambda: locks.append(_lock(folder)))
        parallel.first_only(lambda: sweep_leftovers(folder))
        return cls(config, folder, locks[0] if locks else None)

    def close(self) -> None:
        """Let others write into the folder."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        path = self.folder / "splits.json"
        if not path.exists():
            return load_splits(self.config.data, self.config.seed)
        data = load_splits_again(self.config.data, self.config.seed, run_folder.read_json(path))
        if data is None:
            raise UserError(
                f"the data set '{self.config.data.name}' is not the one that this run started with (see "
                f"{path}): bring the old data back, or start a new run"
            )
        return data

    @cached_property
    def needs_teacher(self) -> bool:
        """Whether an arm learns from a teacher, or is held against it."""
        learns = any(arm.loss.needs_teacher for arm in self.config.arms.values())
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

        Without ``load`` neither the file of ``weights`` nor timm's own are looked at: what was saved replaces them.
        """
        network_config = self.network_config(arm)
        torch.manual_seed(self.config.seed)
        channels = self.data.image_shape[2]
        backbone = build_backbone(
            network_config.backbone,
            classes=len(self.data.classes),
            channels=channels,
            image_size=self.data.input_size[1:],
            pretrained=load and network_config.pretrained and network_config.weights is None,
        )
        network = attach_exits(
            backbone,
            network_config.exits,
            input_size=self.data.input_size,
            head=network_config.head,
            dropout=network_config.dropout,
        )
        if load and network_config.weights is not None:
            path = Path(network_config.weights)
            if isinstance(network_config, TeacherConfig) and network_config.trained:
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

    def is_trained(self, arm: str) -> bool:
        """Whether the training of an arm has ended, or its teacher was taken as it is."""
        return (self.arm_folder(arm) / "checkpoints" / FINAL).exists()

    def trained_network(self, arm: str) -> EarlyExitNetwork:
        """The network of an arm that was trained."""
        path = self.arm_folder(arm) / "checkpoints" / FINAL
        if not self.is_trained(arm):
            command = "erde train" if arm == TEACHER else "erde distill"
            raise UserError(f"arm '{arm}' of {self.folder} is not trained yet: run {command} first")
        network = self.new_network(arm, load=False)
        checkpoint.load_weights(network, path)
        return network

    # ------------------------------------------------------------ phases

    def train(self) -> None:
        """Train the teacher, if an arm needs one."""
        if parallel.is_first():
            write_json(self.folder / "environment.json", describe_machine(self.device, self.threads))
        if self.needs_teacher and self.config.teacher.trained:
            parallel.first_only(self._take_teacher)
        elif self.needs_teacher:
            self._train_arms([TEACHER])

    def _take_teacher(self) -> None:
        """Keep a teacher that was trained elsewhere as the run's own, and say how good it is, on tune."""
        folder = self.arm_folder(TEACHER)
        if self.is_trained(TEACHER):
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
        teacher = None
        if self.needs_teacher:
            teacher = self.new_network(TEACHER, load=not self.is_trained(TEACHER))
        if self.config.teacher.disjoint and self.config.data.train_subset is None:
            raise UserError(
                "teacher.disjoint asks for images that the students do not see, but they see all of train: "
                "set data.train_subset, or teacher.disjoint=false"
            )
        for arm in self.arms:
            network = self.new_network(arm, load=not self.is_trained(arm))
            job = self._job(arm, network, teacher)
            job.check()
            if "held_out_logits" in job.extras:
                assert teacher is not None
                cross_fitting.check(self, self._job(TEACHER, teacher, None))
            if job.teacher_cache is not None:
                logits = len(job.teacher.heads) * len(self.data.classes) if job.teacher is not None else 0
                check_cache(job.teacher_cache, job.augmentation, len(job.train), logits)
            cost = network_cost(network, self.data.input_size)
            if len(cost.macs) > 1:
                for budget in self.config.calibration.budgets:
                    check_budget(budget, Cost(cost.macs, cost.no_exit_macs))

    def _job(self, arm: str, network: EarlyExitNetwork, teacher: EarlyExitNetwork | None) -> Job:
        config = self.config
        loss: LossConfig
        if arm == TEACHER:
            skip = (config.data.train_subset or 0) if config.teacher.disjoint else 0
            train = self.data.train_share(config.teacher.train_subset, skip)
            settings, loss, distillation = (
                config.teacher_train,
                CrossEntropyConfig(),
                DistillationConfig(),
            )
        else:
            train = self.data.train_share(config.data.train_subset)
            settings, loss, distillation = config.train, config.arms[arm].loss, config.distillation_of(arm)
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
            extras=loss.extras,
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
        learn = any(arm != TEACHER and self.config.arms[arm].loss.needs_teacher for arm in arms)
        teacher = self.trained_network(TEACHER) if learn else None
        jobs = [self._job(arm, self.new_network(arm, load=not self.is_trained(arm)), teacher) for arm in arms]
        if any("held_out_logits" in job.extras for job in jobs):
            held_out = cross_fitting.held_out_logits(
                self, self._job(TEACHER, self.new_network(TEACHER, load=False), None)
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
        self._export_baselines()
        if self.config.export.int8_arm is not None:
            self._export_int8(self.config.export.int8_arm)

    def baseline(self, arm: str) -> Path:
        """Where the ordinary ONNX file of an arm lies: ``no-exit`` is the exported arm's, whatever others are called."""
        name = NO_EXIT if arm == self.config.export.arm else arm
        if arm != self.config.export.arm and arm in (NO_EXIT, NO_EXIT_INT8):
            # No arm can be called so: '+' is no character of their names.
            name = f"arm+{arm}"
        return self.folder / "baselines" / f"{name}.onnx"

    def _export_baselines(self) -> None:
        """The exported arm without its exits, and every arm that has none, as ordinary ONNX files."""
        exported = self.config.export.arm
        arms = [arm for arm in self.arms if arm == exported or len(self.stages(arm).files) == 1]
        for arm in arms:
            path = self.baseline(arm)
            if path.stem == f"arm+{arm}" and not path.exists():
                # A version that kept only one file of the two: which network it is of is not known.
                for name in (NO_EXIT, NO_EXIT_INT8):
                    (path.parent / f"{name}.onnx").unlink(missing_ok=True)
        for arm in arms:
            if not self.baseline(arm).exists():
                self.export_plain(arm, self.baseline(arm))

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
        baseline = self.baseline(self.config.export.arm)
        path = baseline.with_name(f"{NO_EXIT_INT8}.onnx")
        if not path.exists():
            export_int8_plain(baseline, path, train, quantisation.kept_in_float, seed)

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

    def check_stages(self, arm: str) -> None:
        """:class:`UserError` unless the stages of an arm are those that its logits came from."""
        stages = self.stages(arm).paths(self.arm_folder(arm) / "stages")
        run_folder.check_stages(self.folder, arm, stages)

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
        stages = self.stages(arm).paths(folder / "stages")
        hashes = [file_hash(path) for path in stages]
        runner = StageRunner(stages, self.threads)
        cost = self.cost(arm)
        arrays: dict[str, NDArray[Any]] = {
            "exit_macs": np.asarray(cost.exit_macs),
            "no_exit_macs": np.asarray(cost.no_exit_macs),
            run_folder.STAGES_HASHES: np.asarray(hashes),
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
        settings = Settings(**dict(self.config.calibration))
        for arm in self.measured_arms:
            self.check_stages(arm)
            tune, certify, _ = run_folder.read_logits(self.folder, arm)
            path = self.arm_folder(arm) / run_folder.POLICY
            # Milliseconds may come and go with a profile; they choose nothing here.
            cost = dataclasses.replace(self.cost(arm), exit_milliseconds=None)
            with contextlib.suppress(run_folder.UnreadablePolicyError):
                # One that this version cannot read is as good as none: it is written anew.
                if path.exists():
                    request = Request(tune, certify, cost, settings)
                    check_reuse(run_folder.read_policy(self.folder, arm).calibration, request)
            calibrated = calibrate_logits(
                tune,
                certify,
                cost,
                settings,
                tune_reference_right=tune_right,
                certify_reference_right=certify_right,
                name=arm,
            )
            self._write_policy(path, calibrated.to_json())

    def _write_policy(self, path: Path, value: dict[str, Any]) -> None:
        """Write a policy; results that stand on another one go first, so that the folder never contradicts itself."""
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(value)):
                return
        for outdated in (run_folder.RESULTS, REPORT):
            (self.folder / outdated).unlink(missing_ok=True)
        write_json(path, value)

    def evaluate(self, again: bool = False) -> None:
        """Measure every arm on test, seal the bundles, check the runtime against it all, write results and report.

        What is there already stays, unless ``again`` asks for it anew.
        """
        path, report = self.folder / run_folder.RESULTS, self.folder / REPORT
        if again or not path.exists():
            measure.evaluate(self).write(path)
        elif report.exists():
            return
        write_report(Results.read(path), report, measure.gather_evidence(self))


def _lock(folder: Path) -> Lock:
    return Lock(folder / LOCK, f"the run {folder}")


def _with_whole_paths(config: Config) -> Config:
    """The recipe with its local data, weights and cache by their whole paths, so that it works from every folder."""

    def whole(path: Any) -> Any:
        return str(Path(path).resolve()) if isinstance(path, str) and Path(path).exists() else path

    data, root = config.data, os.environ.get("ERDE_DATA")
    if data.name not in SHIPPED and not (root and (Path(root) / data.name).is_dir()):
        data = data.model_copy(update={"name": whole(data.name)})
    teacher, cache = config.teacher, config.teacher.cache
    # It need not be there yet.
    cache = str(Path(cache).resolve()) if isinstance(cache, str) else cache
    teacher = teacher.model_copy(update={"weights": whole(teacher.weights), "cache": cache})
    student = config.student.model_copy(update={"weights": whole(config.student.weights)})
    return config.model_copy(update={"data": data, "teacher": teacher, "student": student})


def _check_cache_folder(config: Config, saved: Path) -> None:
    """A run that someone else made writes into no new folder of its choice."""
    cache = config.teacher.cache
    if isinstance(cache, str) and not Path(cache).is_dir():
        raise UserError(
            f"teacher.cache in {saved} is {cache}, which is no folder: make it, if that is where the teacher's answers "
            "shall go, or set teacher.cache: false there"
        )


def _check_empty(folder: Path) -> None:
    # A start that was killed leaves its lock's file.
    if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        advice = "continue it with --resume" if (folder / CONFIG).is_file() else "it holds other files"
        raise UserError(f"{folder} is not empty: {advice}, or choose another folder with --out")
    check_folder(folder)


def _resumed(config: Config, saved: Path) -> Config:
    """The recipe to go on with: that of ``saved``, but for the keys that may change; else :class:`UserError`.

    What ``config`` leaves to a default stays as the run began with it, so that a later version of erde, with other
    defaults and more keys, goes on with older runs.
    """
    old = _with_whole_paths(load_saved_config(saved))
    began = old.model_dump(mode="json")
    now = _fill_from(config, began)
    for group, key in run_folder.FREE_TO_CHANGE:
        began[group][key] = now[group][key]
    difference = _first_difference(began, now)
    if difference is not None:
        key, before, after = difference
        raise UserError(
            f"{saved.parent} belongs to another recipe: there {key} is {before!r}, now it is {after!r}; give the same "
            f"recipe and overrides, or another folder; `erde run {saved} --out {saved.parent} --resume` goes on as it began"
        )
    return validate(Config, now)


def _fill_from(model: BaseModel, began: dict[str, Any]) -> dict[str, Any]:
    """The tree of ``model``; keys that nobody set have their value in ``began``, where it has them."""
    tree = model.model_dump(mode="json")
    for name in type(model).model_fields:
        value, before = getattr(model, name), began.get(name)
        if name not in model.model_fields_set:
            tree[name] = began.get(name, tree[name])
        elif isinstance(value, BaseModel) and isinstance(before, dict):
            tree[name] = _fill_from(value, before)
        elif isinstance(value, dict) and isinstance(before, dict):
            for key, inner in value.items():
                if isinstance(inner, BaseModel) and isinstance(before.get(key), dict):
                    tree[name][key] = _fill_from(inner, before[key])
    return tree


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(one for one in new if one not in old)]:
            found = _first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
            if found is not None:
                return found
        return None
    return None if old == new else (key, old, new)
