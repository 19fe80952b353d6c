"""The last phase of a run: measure every arm on test, seal the bundles, hold runtime and torch against it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from erde import bundle, policy
from erde.calibration.bundles import apply
from erde.calibration.checks import seen_before
from erde.common import environment, progress
from erde.common.errors import UserError
from erde.common.files import replacing_folder
from erde.common.history import Epoch
from erde.common.splits import Images, TestLogits, TestSplit
from erde.evaluation import evidence, measures, run_folder
from erde.evaluation.comparison import compare_arms
from erde.evaluation.evidence import ArmInput, Evidence
from erde.evaluation.results import (
    Agreement,
    Arm,
    DataInfo,
    EntropyHistograms,
    ExitCost,
    Quantised,
    Results,
    RuntimeAgreement,
    SplitInfo,
)
from erde.exporting.api import build_manifest
from erde.runtime.session import Session

if TYPE_CHECKING:
    from erde.runs.pipeline import Run

TEACHER = "teacher"
# As a share of the test images, at one operating point.
MOST_TORCH_DISAGREEMENTS = 0.02


def evaluate(run: Run) -> Results:
    """Measure every arm, seal the bundles of the exported one, and check that runtime and torch agree with them."""
    for arm in run.measured_arms:
        run.check_stages(arm)
    inputs = arm_inputs(run)
    for arm, one in inputs.items():
        if line := seen_before(run_folder.read_logits(run.folder, arm)[1], one.test):
            progress.say(f"{arm}: warning: {line}")
    arms = {arm: _arm(run, arm, inputs) for arm in run.measured_arms}
    exported, int8 = run.config.export.arm, run.config.export.int8_arm
    torch_off = _check_torch(run, exported, inputs[exported])
    seal, agreement = _seal_bundle(run, exported, inputs[exported], arms[exported])
    return Results(
        name=run.config.name,
        seed=run.config.seed,
        exported_arm=exported,
        recipe=run.config.model_dump(mode="json"),
        data=_data_info(run),
        arms=arms,
        comparisons=compare_arms({arm: (one.test, one.policy, one.cost) for arm, one in inputs.items()}),
        agreement=Agreement(**agreement.model_dump(), torch_disagreements=torch_off),
        bundle_seal=seal,
        quantised=None if int8 is None else _quantised(run, int8, inputs[int8], arms[int8]),
        environment=json.loads((run.folder / "environment.json").read_text(encoding="utf-8")),
        timings=_timings(run),
    )


def arm_inputs(run: Run) -> dict[str, ArmInput]:
    """Every arm on the test split, with its policy."""
    _, _, right = run.reference_right()
    return {
        arm: ArmInput(
            run_folder.read_logits(run.folder, arm)[2],
            run_folder.read_policy(run.folder, arm),
            run.cost(arm),
            right,
        )
        for arm in run.measured_arms
    }


def gather_evidence(run: Run) -> Evidence:
    """What the report embeds beside the results."""
    return evidence.collect(arm_inputs(run), run.config.export.arm, run.data.test.images)


def _arm(run: Run, arm: str, inputs: dict[str, ArmInput]) -> Arm:
    mine = inputs[arm]
    test, calibrated, cost, right = mine.test, mine.policy, mine.cost, mine.reference_right
    stages = run.stages(arm)
    exported = stages.cost
    network_config, trained_as = run.network_config(arm), run.trained_as(arm)
    history_file = run.arm_folder(trained_as) / "history.json"
    history = [Epoch(**one) for one in json.loads(history_file.read_text("utf-8"))]
    # A teacher that was trained elsewhere has no history.
    wrong = history[-1].parts.get("teacher_wrong") if history else None
    plain = len(exported.macs) == 1
    return Arm(
        role="teacher" if arm == TEACHER else "fixed" if plain else "student",
        precision=stages.precision,
        loss=("ce" if history else "none") if arm == TEACHER else run.config.arms[trained_as].loss.name,
        backbone=network_config.backbone,
        head="none" if plain else network_config.head,
        parameters=exported.parameters[-1],
        no_exit_macs=exported.no_exit_macs,
        no_exit_parameters=exported.no_exit_parameters,
        cost=[
            ExitCost(name=name, macs=macs, parameters=parameters)
            for name, macs, parameters in zip(
                exported.exit_names, exported.macs, exported.parameters, strict=True
            )
        ],
        exits=measures.measure_exits(test, calibrated, right),
        score=calibrated.rule.score,
        sharpness=calibrated.rule.sharpness,
        ensemble=calibrated.rule.ensemble,
        score_candidates=calibrated.candidates,
        score_outcomes=[] if plain else measures.score_outcomes(test, calibrated, cost, right),
        operating_points=measures.measure_points(test, calibrated, cost, right),
        default_operating_point=calibrated.default,
        left_out=calibrated.left_out,
        curve=measures.measure_curve(test, calibrated, cost, right),
        paper_curve=None if plain else measures.paper_curve(test, calibrated, cost, right),
        oracle=measures.oracle(test, calibrated, cost),
        classes=measures.measure_classes(test, calibrated),
        teacher_wrong=wrong if isinstance(wrong, list) else None,
        entropies=_entropies(test, inputs.get(TEACHER)),
        history=history,
    )


def _entropies(test: TestLogits, teacher: ArmInput | None) -> EntropyHistograms | None:
    if teacher is None:
        return None
    return measures.entropies(test, teacher.test.logits[-1].argmax(axis=-1) == teacher.test.labels)


def _seal_bundle(run: Run, arm: str, inputs: ArmInput, measured: Arm) -> tuple[str, RuntimeAgreement]:
    """Seal the bundle of an arm, and hold the runtime against its evaluation.

    A bundle that contradicts its evaluation does not appear; the one of before stays.
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
    # The stages stay, so do the times of this machine.
    profile = run.profile(arm)
    kept = [profile] if profile.is_file() else []
    with replacing_folder(run.bundle_folder(arm)) as beside:
        seal = bundle.write(beside, manifest, run.stages(arm).paths(stages), beside_seal=kept)
        agreement = _check_runtime(run, arm, beside, inputs)
        if agreement.disagreements:
            raise UserError(
                f"the runtime answers {agreement.disagreements:,} of {agreement.images:,} test images otherwise than "
                f"{run_folder.arm_folder(run.folder, arm) / run_folder.LOGITS}, at {len(agreement.operating_points)} operating "
                f"points, so that nothing is sealed: remove that file, the folder {stages} and policy.json there, and run "
                "erde export, erde calibrate and erde evaluate again"
            )
    return seal, agreement


def _quantised(run: Run, arm: str, inputs: ArmInput, measured: Arm) -> Quantised:
    """Seal the bundle in int8 and hold the runtime against its evaluation; torch has no such network."""
    quantisation = run.stages(arm).quantisation
    assert quantisation is not None
    taken = quantisation.taken
    seal, agreement = _seal_bundle(run, arm, inputs, measured)
    return Quantised(
        arm=arm,
        bundle_seal=seal,
        agreement=agreement,
        kept_in_float=list(quantisation.kept_in_float),
        tune_images=quantisation.tune_images,
        fp32_tune_accuracy=list(quantisation.fp32_accuracy),
        tune_accuracy=list(taken.accuracy),
        label_agreement=list(taken.agreement),
        fp32_bytes=quantisation.fp32_bytes,
        bytes=quantisation.bytes,
    )


def _check_torch(run: Run, arm: str, measured: ArmInput) -> int:
    """Torch against the evaluation: how often label or exit of a test image differ, at all operating points.

    Few may, where float32 is coarse; many are another network, and :class:`UserError`.
    """
    rule = measured.policy.rule
    torch_answers, torch_scores = rule.apply(_torch_logits(run, arm, run.data.test))
    torch_off = 0
    for thresholds, exits, labels, band in _evaluated(measured):
        torch_exits = policy.decide(torch_scores, thresholds)
        torch_labels = policy.take_exit(torch_answers, torch_exits).argmax(axis=-1)
        off = int((((torch_exits != exits) | (torch_labels != labels)) & ~band).sum())
        if off > MOST_TORCH_DISAGREEMENTS * len(labels):
            raise UserError(
                f"torch answers {off:,} of {len(labels):,} test images otherwise than the exported stages of '{arm}': its "
                f"stages or its checkpoint in {run.arm_folder(arm)} changed after the export, so that nothing is sealed; "
                "remove stages, logits.npz and policy.json there, and run erde export, erde calibrate and erde evaluate again"
            )
        torch_off += off
    return torch_off


def _check_runtime(run: Run, arm: str, folder: Path, measured: ArmInput) -> RuntimeAgreement:
    """The runtime against the evaluation: label and exit of every test image."""
    session = Session(folder, threads=run.threads)
    split, points = run.data.test, measured.policy.points
    disagreements = 0
    near = np.zeros(len(split), dtype=np.bool_)
    for point, (_, exits, labels, band) in zip(points, _evaluated(measured), strict=True):
        near |= band
        found = [session.predict(images, operating_point=point.name) for images in split.batches(256)]
        same = (np.concatenate([one.exits for one in found]) == exits) & (
            np.concatenate([one.labels for one in found]) == labels
        )
        disagreements += int((~same & ~band).sum())
    return RuntimeAgreement(
        images=len(split),
        operating_points=[point.name for point in points],
        disagreements=disagreements,
        band=int(near.sum()),
        band_width=policy.BAND,
    )


_Evaluated = tuple[policy.Thresholds, NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]


def _evaluated(measured: ArmInput) -> Iterator[_Evaluated]:
    """Per operating point: thresholds, and per test image its exit, its label, and whether it is too near to compare."""
    answers, scores = measured.policy.rule.apply(measured.test.logits)
    # Where two classes tie, the label may tip over, and with it a score that looks at labels.
    ties = policy.near_tie(measured.test.logits)
    for point in measured.policy.points:
        exits = policy.decide(scores, point.thresholds)
        labels = policy.take_exit(answers, exits).argmax(axis=-1)
        yield point.thresholds, exits, labels, policy.in_band(scores, point.thresholds) | ties


def _torch_logits(run: Run, arm: str, split: TestSplit) -> NDArray[np.float32]:
    network = run.trained_network(arm).eval()
    mean, std = torch.tensor(run.data.mean), torch.tensor(run.data.std)

    def forward(images: Images) -> NDArray[np.float32]:
        x = (torch.from_numpy(images).to(torch.float32) / 255 - mean) / std
        logits: NDArray[np.float32] = network(x.permute(0, 3, 1, 2)).numpy()
        return logits

    with torch.no_grad():
        return np.concatenate([forward(images) for images in split.batches(256)], axis=1)


def _data_info(run: Run) -> DataInfo:
    data = run.data
    return DataInfo(
        name=data.name,
        classes=list(data.classes),
        image_shape=data.image_shape,
        mean=list(data.mean),
        std=list(data.std),
        splits={name: SplitInfo(**one) for name, one in data.fingerprints().items()},
    )


def _timings(run: Run) -> dict[str, Any]:
    arms = {arm: json.loads((run.arm_folder(arm) / "timing.json").read_text("utf-8")) for arm in run.arms}
    return {"phase_seconds": run.seconds, "training": arms}
