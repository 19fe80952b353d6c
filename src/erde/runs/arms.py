"""The measures of a trained arm on the test split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from erde.calibration.exit_choice import ExitChoice
from erde.common.history import Epoch
from erde.common.splits import TestLogits
from erde.evaluation import measures
from erde.evaluation.evidence import ArmInput
from erde.evaluation.results import Arm, EntropyHistograms, ExitCost
from erde.exporting.onnx_files import ExportedStages
from erde.recipe.schema import TEACHER, Config


def measure_arm(
    config: Config,
    arm: str,
    inputs: Mapping[str, ArmInput],
    stages: ExportedStages,
    history: Sequence[Epoch],
    exit_choice: ExitChoice | None = None,
) -> Arm:
    """All measures of ``arm``; ``inputs`` are those of all arms, since the teacher's answers sort the test images."""
    own = inputs[arm]
    test, calibrated, cost, right = own.test, own.policy, own.cost, own.reference_right
    network, exported = config.network_of(arm), stages.cost
    # A teacher that was trained elsewhere has no history.
    wrong = history[-1].parts.get("teacher_wrong") if history else None
    if exit_choice is not None and isinstance(wrong, list):
        # Training had more exits than were kept; the final one is always among them.
        kept = [*(candidate.kept for candidate in exit_choice.candidates), True]
        wrong = [share for share, stays in zip(wrong, kept, strict=True) if stays]
    plain = len(exported.macs) == 1
    role: Literal["teacher", "student", "fixed"]
    if arm == TEACHER:
        role, loss = "teacher", "ce" if history else "none"
    else:
        role, loss = "fixed" if plain else "student", config.loss_of(config.trained_as(arm)).name
    return Arm(
        role=role,
        precision=stages.precision,
        loss=loss,
        backbone=network.backbone,
        head="none" if plain else network.head,
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
        history=list(history),
        exit_choice=exit_choice,
    )


def _entropies(test: TestLogits, teacher: ArmInput | None) -> EntropyHistograms | None:
    if teacher is None:
        return None
    return measures.entropies(test, teacher.test.logits[-1].argmax(axis=-1) == teacher.test.labels)
