"""Policies and results made without training or calibrating, for tests of what measures and draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from erde.calibration.choice import Contender, ContenderTarget
from erde.calibration.exit_choice import ExitChoice, ExitTimes, choose_exits
from erde.calibration.policy_file import CalibratedPolicy
from erde.calibration.settings import Settings
from erde.calibration.thresholds import ScoredSplit, search_path
from erde.common.splits import TestLogits, TuneLogits
from erde.evaluation import measures
from erde.evaluation.comparison import compare_arms
from erde.evaluation.results import Agreement, Arm, DataInfo, ExitCost, Results
from erde.policy.cost import Cost
from erde.policy.points import Calibration, Certificate, OperatingPoint
from erde.policy.rule import PAPER_RULE, ExitRule, Thresholds
from tests.helpers.oracles import synthetic_logits

COST = Cost(exit_macs=(42, 71, 104), no_exit_macs=100)
THRESHOLDS = (0.7, 0.5)


def hand_made_policy(
    rule: ExitRule = PAPER_RULE,
    thresholds: Thresholds = THRESHOLDS,
    *,
    cost: Cost = COST,
    temperatures: Sequence[float] = (0.8, 1.1, 1.3),
    tune_seed: int = 1,
) -> CalibratedPolicy:
    """Points ``no-exit`` and ``early`` (the default), and paths that a small tune split gives."""
    tune = TuneLogits(*synthetic_logits(tune_seed, 600))
    exits = len(cost.exit_macs)
    tune = TuneLogits(tune.logits[-exits:], tune.labels)
    certificate = Certificate(
        guarantee="risk", max_risk=0.05, confidence=0.9, images=600, lost=9, won=4, risk=0.015,
        upper_bound=0.024, reference="final_exit", method="by hand", assumptions="none",
    )  # fmt: skip
    points = [
        OperatingPoint(
            name="no-exit", kind="no-exit", target=None, thresholds=[None] * (exits - 1), certificate=None
        )
    ]
    if exits > 1:
        points.append(
            OperatingPoint(
                name="early", kind="risk", target=0.05, thresholds=list(thresholds), certificate=certificate
            )
        )
    return CalibratedPolicy(
        rule=rule,
        temperatures=list(temperatures)[:exits],
        path=search_path(ScoredSplit.of(tune, rule, None), cost),
        points=points,
        default=points[-1].name,
        left_out=[],
        calibration=Calibration(
            exit_rates=[], score_histograms=[], score_ranges=[], tune_images=600, certify_images=600,
            tune_fingerprint="", certify_fingerprint="", choices="", sources=[],
        ),
        candidates=[],
        paper_path=search_path(ScoredSplit.of(tune, PAPER_RULE, None), cost),
        contenders=[
            Contender(
                ExitRule("margin", 0.5),
                (ContenderTarget(0.01, (0.9, 0.8), 0.1), ContenderTarget(0.02, (0.6, None), 0.2)),
            ),
            Contender(ExitRule("patience", ensemble="geometric"), (ContenderTarget(0.01, (None, 1.5), 0.3),)),
        ]
        if exits > 1
        else [],
    )  # fmt: skip


def hand_made_arm(test: TestLogits, calibrated: CalibratedPolicy, cost: Cost, teacher: bool = True) -> Arm:
    """The results that a run would have of a network with these logits."""
    exits = len(cost.exit_macs)
    return Arm(
        role="student" if exits > 1 else "fixed",
        loss="erde",
        backbone="resnet20",
        head="erde",
        parameters=1000,
        no_exit_macs=cost.no_exit_macs,
        no_exit_parameters=900,
        cost=[
            ExitCost(name=f"group{index}", macs=macs, parameters=100 * (index + 1))
            for index, macs in enumerate(cost.exit_macs)
        ],
        exits=measures.measure_exits(test, calibrated, None),
        score=calibrated.rule.score,
        sharpness=calibrated.rule.sharpness,
        ensemble=calibrated.rule.ensemble,
        score_candidates=[],
        score_outcomes=measures.score_outcomes(test, calibrated, cost, None),
        operating_points=measures.measure_points(test, calibrated, cost, None),
        default_operating_point=calibrated.default,
        left_out=[],
        curve=measures.measure_curve(test, calibrated, cost, None),
        paper_curve=measures.paper_curve(test, calibrated, cost, None),
        oracle=measures.oracle(test, calibrated, cost),
        classes=measures.measure_classes(test, calibrated),
        teacher_wrong=None,
        entropies=measures.entropies(test, test.labels > 1) if teacher else None,
        history=[],
    )


def hand_made_exit_choice() -> ExitChoice:
    """A choice among three exits, the last of which is too dear."""
    stages = np.array(
        [[1.0, 2.1, 6.2, 4.0], [0.0, 1.2, 5.2, 3.1], [0.0, 0.0, 4.1, 2.0], [0.0, 0.0, 0.0, 0.9]]
    )
    logits, labels = synthetic_logits(2, 300, signals=(0.9, 1.6, 2.2, 2.6))
    return choose_exits(
        TuneLogits(logits, labels),
        ["group1", "group2", "group3"],
        ExitTimes(stages, 0.1),
        Settings(max_risks=(0.05,), score="margin"),
        threads=2,
        machine="by hand",
    )


def hand_made_results(arms: Mapping[str, tuple[TestLogits, CalibratedPolicy, Cost]]) -> Results:
    """A run of these arms."""
    return Results(
        name="by hand",
        seed=0,
        exported_arm=next(iter(arms)),
        recipe={},
        data=DataInfo(
            name="synthetic", classes=list("abcde"), image_shape=(8, 8, 1), mean=[0.0], std=[1.0], splits={}
        ),
        arms={name: hand_made_arm(*arguments, teacher=name != "ce") for name, arguments in arms.items()},
        comparisons=compare_arms(arms),
        agreement=Agreement(
            images=1, operating_points=[], disagreements=0, torch_disagreements=0, band=0, band_width=1e-5
        ),
        bundle_seal="",
        environment={},
        timings={},
    )  # fmt: skip
