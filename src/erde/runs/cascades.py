"""The teacher behind the students: every student as the front of a chain, and the exported one's chain as a bundle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from erde import bundle
from erde.bundle.manifest import Stage
from erde.calibration.bundles import apply
from erde.calibration.logits import calibrate_logits
from erde.calibration.policy_file import CalibratedPolicy
from erde.calibration.settings import Settings
from erde.chains.building import built_chain, chain_stages
from erde.chains.networks import Network, bundle_network
from erde.common import progress
from erde.common.errors import UserError
from erde.common.files import replacing_folder
from erde.common.splits import CertifyLogits, TestLogits, TuneLogits
from erde.evaluation import measures, run_folder
from erde.evaluation.evidence import ArmInput
from erde.evaluation.results import Cascade, CascadeFront, RuntimeAgreement
from erde.exporting.api import build_manifest
from erde.policy.cost import Cost
from erde.policy.points import OperatingPoint
from erde.recipe.schema import TEACHER
from erde.runs.agreement import check_runtime
from erde.runs.folder import Run

BUNDLE = "bundle-cascade"
HeldOut = tuple[TuneLogits, CertifyLogits, TestLogits]


@dataclass(frozen=True)
class _Chain:
    """A student and the teacher, as networks, costs and test logits."""

    networks: list[Network]
    stages: list[Stage]
    cost: Cost
    policy: CalibratedPolicy
    test: TestLogits
    points: list[OperatingPoint]


def seal_cascade(run: Run) -> Cascade:
    """Measure every student in front of the teacher, and seal the exported one's chain."""
    networks = {arm: _network(run, arm) for arm in run.config.measured_arms}
    teacher = run_folder.read_logits(run.folder, TEACHER)
    chains = {
        arm: _chain(run, arm, [networks[arm], networks[TEACHER]], teacher)
        for arm in networks
        if arm != TEACHER
    }
    exported = run.config.export.arm
    seal = _seal(run, exported, chains[exported])
    return Cascade(
        fallback=TEACHER,
        front=exported,
        bundle_seal=seal[0],
        agreement=seal[1],
        no_exit_macs=chains[exported].cost.no_exit_macs,
        fronts={
            arm: CascadeFront(
                exit_names=[stage.exit_name for stage in chain.stages],
                exit_macs=list(chain.cost.exit_macs),
                score=chain.policy.rule.in_words(),
                operating_points=chain.points,
                default_operating_point=chain.policy.default,
                left_out=chain.policy.left_out,
            )
            for arm, chain in chains.items()
        },
    )


def _chain(run: Run, arm: str, networks: list[Network], teacher: HeldOut) -> _Chain:
    """The chain of ``arm`` and the teacher, calibrated on tune and certify and measured on test."""
    front = run_folder.read_logits(run.folder, arm)
    joined = [np.concatenate([own.logits, last.logits]) for own, last in zip(front, teacher, strict=True)]
    labels = [split.labels for split in front]
    tune, certify = TuneLogits(joined[0], labels[0]), CertifyLogits(joined[1], labels[1])
    test = TestLogits(joined[2], labels[2])
    stages = chain_stages(networks)
    first = len(networks[0].stages)
    cost = Cost(tuple(stage.macs for stage in stages), networks[1].macs, networks=(0, first))
    # A chain is held against its last network, whatever the arms are held against.
    settings = Settings(**{**dict(run.config.calibration), "reference": "final_exit"})
    calibrated = calibrate_logits(tune, certify, cost, settings, name=f"{arm} before {TEACHER}")
    points = measures.measure_points(test, calibrated, cost, None)
    return _Chain(networks, stages, cost, calibrated, test, points)


def _network(run: Run, arm: str) -> Network:
    """``arm`` as a network of a chain, from its exported stages."""
    stages = run.arm_folder(arm) / "stages"
    manifest = build_manifest(stages, name=arm, classes=run.data.classes, provenance={"arm": arm})
    return bundle_network(stages, manifest)


def _seal(run: Run, arm: str, chain: _Chain) -> tuple[str, RuntimeAgreement]:
    target = run.folder / BUNDLE
    sample = np.asarray(run.data.tune.images[slice(2)])
    inputs = ArmInput(chain.test, chain.policy, chain.cost, None)
    with built_chain(chain.networks, target, sample, list(run.data.classes)) as plain:
        manifest = apply(bundle.read(plain), chain.policy, chain.points)
        with replacing_folder(target) as partial:
            seal = bundle.write(partial, manifest, [plain / stage.file for stage in manifest.stages])
            agreement = check_runtime(partial, run.data.test, inputs, run.threads)
            if agreement.disagreements:
                raise UserError(
                    f"the runtime answers {agreement.disagreements:,} of {agreement.images:,} test images otherwise than the "
                    f"logits of '{arm}' and the teacher say, so that no chain is sealed: run erde export, erde calibrate and "
                    "erde evaluate again"
                )
    progress.say(f"cascade: {arm} before {TEACHER}, sealed as {target}")
    return seal, agreement
