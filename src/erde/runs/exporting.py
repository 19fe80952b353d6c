"""The phase ``export``: every arm's stages and logits, the baselines, and the exported arm in int8."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from erde.bundle.sealing import file_hash
from erde.common import progress
from erde.common.files import check_new, make_folder, replacing_file
from erde.evaluation import run_folder
from erde.exporting.onnx_files import (
    STAGES,
    export_int8_plain,
    export_int8_stages,
    export_plain,
    export_stages,
)
from erde.runs.choosing import choose_arms_exits
from erde.runs.folder import NO_EXIT_INT8, Run
from erde.runs.networks import trained_network
from erde.runtime.stages import StageRunner


def export(run: Run) -> None:
    """Write every arm's stages and its logits on tune, certify and test; then the plain baselines; int8 last.

    Arms whose exits are still to be chosen come last: the reference that they are held against may be another arm.
    """
    config = run.config
    for arm in sorted(config.trained_arms, key=lambda arm: config.network_of(arm).exits == "auto"):
        if config.network_of(arm).exits == "auto":
            choose_arms_exits(run, arm)
        stages = run.arm_folder(arm) / "stages"
        if not (stages / STAGES).exists():
            progress.say(f"{arm}: export")
            data = run.data
            export_stages(
                trained_network(run, arm),
                data.image_shape,
                data.mean,
                data.std,
                stages,
                run.config.export.opset,
                data.train.images,
            )
        if not (run.arm_folder(arm) / run_folder.LOGITS).exists():
            _write_logits(run, arm)
    _export_baselines(run)
    if run.config.export.int8_arm is not None:
        _export_int8(run, run.config.export.int8_arm)


def export_without_exits(run: Run, arm: str, path: Path) -> None:
    """An arm's network without exits as one ordinary ONNX file, which is not there yet."""
    check_new(path, "choose another name")
    data = run.data
    export_plain(
        trained_network(run, arm),
        data.image_shape,
        data.mean,
        data.std,
        path,
        run.config.export.opset,
        data.train.images,
    )


def _export_baselines(run: Run) -> None:
    """The exported arm without its exits, and every arm that has none, as ordinary ONNX files."""
    exported = run.config.export.arm
    arms = [arm for arm in run.config.trained_arms if arm == exported or len(run.stages(arm).files) == 1]
    for arm in arms:
        if not run.baseline(arm).exists():
            export_without_exits(run, arm, run.baseline(arm))


def _export_int8(run: Run, arm: str) -> None:
    """The exported arm's stages, logits and plain baseline in int8, with ranges from the students' train images."""
    folder, source = make_folder(run.arm_folder(arm)), run.arm_folder(run.config.export.arm)
    train, seed = run.data.train_share(run.config.data.train_subset), run.config.seed
    baseline = run.baseline(run.config.export.arm)
    path = baseline.with_name(f"{NO_EXIT_INT8}.onnx")
    if (folder / "stages" / STAGES).exists():
        made = dataclasses.replace(run.stages(arm), quantisation=None)
        if made != run.stages(run.config.export.arm):
            # The float stages have other exits since: nothing that was made of the earlier ones holds.
            names = (run_folder.LOGITS, run_folder.POLICY, f"stages/{STAGES}")
            for outdated in (path, *(folder / name for name in names)):
                outdated.unlink(missing_ok=True)
    if not (folder / "stages" / STAGES).exists():
        progress.say(f"{arm}: quantise")
        export_int8_stages(source / "stages", folder / "stages", train, run.data.tune, seed)
    quantisation = run.stages(arm).quantisation
    assert quantisation is not None
    if not (folder / run_folder.LOGITS).exists():
        _write_logits(run, arm)
        run.log.write("quantised", arm=arm, **dataclasses.asdict(quantisation))
    if not path.exists():
        export_int8_plain(baseline, path, train, quantisation.kept_in_float, seed)


def _write_logits(run: Run, arm: str) -> None:
    stages = run.stage_files(arm)
    hashes = [file_hash(path) for path in stages]
    runner = StageRunner(stages, run.threads)
    cost = run.cost(arm)
    arrays: dict[str, NDArray[Any]] = {
        "exit_macs": np.asarray(cost.exit_macs),
        "no_exit_macs": np.asarray(cost.no_exit_macs),
        run_folder.STAGES_HASHES: np.asarray(hashes),
    }
    for split in (run.data.tune, run.data.certify, run.data.test):
        arrays[f"{split.name}_logits"] = runner.all_logits(split.images)
        arrays[f"{split.name}_labels"] = split.labels
    path = run.arm_folder(arm) / run_folder.LOGITS
    with replacing_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes allow_pickle for an array
