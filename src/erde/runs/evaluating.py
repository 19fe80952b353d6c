"""The phase ``evaluate``: every arm on test, sealed bundles that agree with it, results and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from erde import bundle
from erde.calibration.bundles import apply
from erde.calibration.checks import seen_before
from erde.common import environment, progress
from erde.common.errors import UserError
from erde.common.files import replacing_folder
from erde.common.history import Epoch
from erde.evaluation import evidence, run_folder
from erde.evaluation.comparison import compare_arms
from erde.evaluation.evidence import ArmInput
from erde.evaluation.results import Agreement, Arm, DataInfo, Quantised, Results, RuntimeAgreement, SplitInfo
from erde.exporting.api import build_manifest
from erde.report.run_page import write_report
from erde.runs.agreement import check_runtime, check_torch
from erde.runs.arms import measure_arm
from erde.runs.calibrating import reference_right
from erde.runs.cascades import seal_cascade
from erde.runs.folder import REPORT, Run
from erde.runs.networks import trained_network


def evaluate(run: Run, again: bool = False) -> None:
    """Measure every arm on test, seal the bundles, check the runtime against it all, write results and report.

    Results that are there stay, unless ``again`` asks for new ones.
    """
    path, report = run.folder / run_folder.RESULTS, run.folder / REPORT
    anew = again or not path.exists()
    if not anew and report.exists():
        return
    if anew:
        for arm in run.config.measured_arms:
            run_folder.check_stages(run.folder, arm, run.stage_files(arm))
    inputs = arm_inputs(run)
    if anew:
        measure_run(run, inputs).write(path)
    collected = evidence.collect(inputs, run.config.export.arm, run.data.test.images)
    write_report(Results.read(path), report, collected)


def arm_inputs(run: Run) -> dict[str, ArmInput]:
    """Every arm on the test split, with its policy."""
    _, _, right = reference_right(run.config, run.folder)
    return {
        arm: ArmInput(
            run_folder.read_logits(run.folder, arm)[2],
            run_folder.read_policy(run.folder, arm),
            run.cost(arm),
            right,
        )
        for arm in run.config.measured_arms
    }


def measure_run(run: Run, inputs: dict[str, ArmInput]) -> Results:
    """Measure every arm, seal the bundles of the exported one, and check that runtime and torch agree with them."""
    config = run.config
    for arm, measured in inputs.items():
        if line := seen_before(run_folder.read_logits(run.folder, arm)[1], measured.test):
            progress.say(f"{arm}: warning: {line}")
    arms = {
        arm: measure_arm(config, arm, inputs, run.stages(arm), _history(run, arm), run.exit_choice(arm))
        for arm in inputs
    }
    exported, int8 = config.export.arm, config.export.int8_arm
    torch_off = check_torch(
        trained_network(run, exported), run.data, inputs[exported], exported, run.arm_folder(exported)
    )
    seal, agreement = _seal_bundle(run, exported, inputs[exported], arms[exported])
    return Results(
        name=config.name,
        seed=config.seed,
        exported_arm=exported,
        recipe=config.model_dump(mode="json"),
        data=_data_info(run),
        arms=arms,
        comparisons=compare_arms({arm: (own.test, own.policy, own.cost) for arm, own in inputs.items()}),
        agreement=Agreement(**agreement.model_dump(), torch_disagreements=torch_off),
        bundle_seal=seal,
        quantised=None if int8 is None else _seal_int8(run, int8, inputs[int8], arms[int8]),
        cascade=None if config.cascade is None else seal_cascade(run),
        environment=json.loads((run.folder / "environment.json").read_text(encoding="utf-8")),
        timings=_timings(run),
    )


def _history(run: Run, arm: str) -> list[Epoch]:
    path = run.arm_folder(run.config.trained_as(arm)) / "history.json"
    return [Epoch(**entry) for entry in json.loads(path.read_text("utf-8"))]


def _seal_bundle(run: Run, arm: str, inputs: ArmInput, measured: Arm) -> tuple[str, RuntimeAgreement]:
    """Seal the bundle of an arm, and compare the runtime with its evaluation.

    A bundle that contradicts its evaluation does not appear; an older bundle stays.
    """
    stages = run.arm_folder(arm) / "stages"
    provenance = {
        "arm": arm,
        "recipe": run.config.model_dump(mode="json"),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "splits": run.data.fingerprints(),
    }
    manifest = build_manifest(
        stages, name=f"{run.config.name}-{arm}", classes=run.data.classes, provenance=provenance
    )
    manifest = apply(manifest, inputs.policy, measured.operating_points)
    # Where the stages stay, so do the times of this machine.
    profile = run.profile(arm)
    kept = [] if profile is None else [profile]
    with replacing_folder(run.bundle_folder(arm)) as partial:
        seal = bundle.write(partial, manifest, run.stage_files(arm), beside_seal=kept)
        agreement = check_runtime(partial, run.data.test, inputs, run.threads)
        if agreement.disagreements:
            raise UserError(
                f"the runtime answers {agreement.disagreements:,} of {agreement.images:,} test images otherwise than "
                f"{run.arm_folder(arm) / run_folder.LOGITS}, at {len(agreement.operating_points)} operating "
                f"points, so that nothing is sealed: remove that file, the folder {stages} and policy.json there, and run "
                "erde export, erde calibrate and erde evaluate again"
            )
    return seal, agreement


def _seal_int8(run: Run, arm: str, inputs: ArmInput, measured: Arm) -> Quantised:
    """Seal the bundle in int8 and compare the runtime with its evaluation; torch has no such network."""
    quantisation = run.stages(arm).quantisation
    assert quantisation is not None
    seal, agreement = _seal_bundle(run, arm, inputs, measured)
    return Quantised(
        arm=arm,
        bundle_seal=seal,
        agreement=agreement,
        kept_in_float=list(quantisation.kept_in_float),
        tune_images=quantisation.tune_images,
        fp32_tune_accuracy=list(quantisation.fp32_accuracy),
        tune_accuracy=list(quantisation.taken.accuracy),
        label_agreement=list(quantisation.taken.agreement),
        fp32_bytes=quantisation.fp32_bytes,
        bytes=quantisation.bytes,
    )


def _data_info(run: Run) -> DataInfo:
    data = run.data
    return DataInfo(
        name=data.name,
        classes=list(data.classes),
        image_shape=data.image_shape,
        mean=list(data.mean),
        std=list(data.std),
        splits={name: SplitInfo(**split) for name, split in data.fingerprints().items()},
    )


def _timings(run: Run) -> dict[str, Any]:
    def read(path: Path) -> Any:
        return json.loads(path.read_text("utf-8"))

    training = {arm: read(run.arm_folder(arm) / "timing.json") for arm in run.config.trained_arms}
    return {"phase_seconds": run.seconds, "training": training}
