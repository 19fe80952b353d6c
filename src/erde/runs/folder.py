"""One run: its recipe, its data, and where everything lies in its folder."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from erde.bundle.profile import PROFILE, Profile
from erde.bundle.sealing import file_hash, stages_hash
from erde.bundle.sealing import read as read_bundle
from erde.calibration.exit_choice import ExitChoice
from erde.common import environment, progress
from erde.common.errors import UserError
from erde.common.files import Lock
from erde.data.load import DataSplits, load_splits, load_splits_again
from erde.evaluation import run_folder
from erde.exporting.onnx_files import STAGES, ExportedStages
from erde.policy.cost import Cost
from erde.recipe.schema import Config
from erde.training.loop import choose_device

CONFIG, REPORT, SPLITS = "config.yaml", "report.html", "splits.json"
# Baselines: the exported arm without its exits, and the same in int8.
NO_EXIT, NO_EXIT_INT8 = "no-exit", "no-exit-int8"


class Run:
    """A run folder, its recipe and its data: what the phases share.

    With a ``lock`` it may write, until :meth:`close` or the end of a ``with`` block; of several processes that train
    together the first one has it. :func:`erde.runs.opening.open_run` and :func:`~erde.runs.opening.existing_run` give
    runs with their locks.
    """

    def __init__(self, config: Config, folder: Path, lock: Lock | None = None) -> None:
        self.config, self.folder, self._lock = config, folder, lock
        # Without the lock, another process may be appending to the log.
        self.log = progress.RunLog(None if lock is None else folder / "log.jsonl")
        self.device = choose_device(config.device)
        self.threads = config.threads or environment.available_cpus()
        torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.seconds: dict[str, float] = {}

    def close(self) -> None:
        """Let others write into the folder."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def data(self) -> DataSplits:
        """The four splits; :class:`UserError` if they are not those of the run's ``splits.json``."""
        progress.say(f"data: {self.config.data.name}")
        path = self.folder / SPLITS
        if not path.exists():
            return load_splits(self.config.data, self.config.seed)
        data = load_splits_again(self.config.data, self.config.seed, run_folder.read_json(path))
        if data is None:
            raise UserError(
                f"the data set '{self.config.data.name}' is not the one that this run started with (see "
                f"{path}): bring the old data back, or start a new run"
            )
        return data

    def arm_folder(self, arm: str) -> Path:
        """``arms/<arm>``."""
        return run_folder.arm_folder(self.folder, arm)

    def checkpoints(self, arm: str) -> Path:
        """The folder of an arm's checkpoints."""
        return self.arm_folder(arm) / "checkpoints"

    def bundle_folder(self, arm: str) -> Path:
        """The bundle of the exported arm, in float or int8."""
        return self.folder / ("bundle-int8" if arm == self.config.export.int8_arm else "bundle")

    def profile(self, arm: str) -> Path | None:
        """The file in which ``Session.profile()`` left the times of an exported arm's bundle; None where it did not.

        A bundle of earlier stages, whose exits were chosen anew since, has no times of today's.
        """
        path = self.bundle_folder(arm) / PROFILE
        if self.config.trained_as(arm) != self.config.export.arm or not path.is_file():
            return None
        manifest = read_bundle(path.parent)
        sealed = {stage.file: manifest.files[stage.file] for stage in manifest.stages}
        return path if sealed == {stage.name: file_hash(stage) for stage in self.stage_files(arm)} else None

    def baseline(self, arm: str) -> Path:
        """The ordinary ONNX file of an arm; ``no-exit`` is the exported arm's, whatever others are called."""
        name = NO_EXIT if arm == self.config.export.arm else arm
        if arm != self.config.export.arm and arm in (NO_EXIT, NO_EXIT_INT8):
            # '+' is no character of an arm's name.
            name = f"arm+{arm}"
        return self.folder / "baselines" / f"{name}.onnx"

    def teacher_cache(self) -> Path | None:
        """The folder of the teacher's answers, if they are kept."""
        cache = self.config.teacher.cache
        if isinstance(cache, bool):
            return self.folder / "teacher-cache" if cache else None
        return Path(cache)

    def exit_choice(self, arm: str) -> ExitChoice | None:
        """The exits that an arm with ``exits: auto`` keeps; None for other arms, and before they are chosen."""
        return run_folder.read_exit_choice(self.folder, self.config.trained_as(arm))

    def stages(self, arm: str) -> ExportedStages:
        """The exported stages of an arm."""
        folder = self.arm_folder(arm) / "stages"
        if not (folder / STAGES).exists():
            raise UserError(f"arm '{arm}' of {self.folder} is not exported yet: run erde export first")
        return ExportedStages.read(folder)

    def stage_files(self, arm: str) -> list[Path]:
        """The files of an arm's stages, in their order."""
        return self.stages(arm).paths(self.arm_folder(arm) / "stages")

    def cost(self, arm: str) -> Cost:
        """The cost of an arm's exits; with milliseconds where its bundle was profiled."""
        cost = self.stages(arm).cost
        milliseconds = None
        path = self.profile(arm)
        if path is not None:
            manifest = read_bundle(path.parent)
            milliseconds = Profile.read(path, stages_hash(manifest), len(cost.macs)).exit_milliseconds()
        return Cost(cost.macs, cost.no_exit_macs, milliseconds)
