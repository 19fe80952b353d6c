"""Chains of public networks on CIFAR-10's test split: MACs saved, accuracy, promises kept, runtime held against evaluation.

    python benchmarks/cascade.py FRONT ... FALLBACK --preprocessing FILE.json --out FILE.json

Networks are bundles or ONNX files. They may have seen every train image, so tune (2,500), certify (2,500) and test
(5,000) are drawn from the test split, ``--draws`` times. See README.md.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from promise import Population, violation_rates

from erde.calibration.bundles import seal_calibrated
from erde.calibration.checks import answers_as_labels
from erde.calibration.logits import calibrate_logits
from erde.calibration.settings import Settings
from erde.calibration.thresholds import ScoredSplit, sweep
from erde.chains.building import built_chain, check_chain, class_names, common_shape
from erde.chains.cascading import open_networks
from erde.chains.preprocessing import read_preprocessing
from erde.common import progress
from erde.common.environment import describe
from erde.common.files import write_json
from erde.common.splits import CertifyLogits, TestLogits, TuneLogits
from erde.data.load import load_data
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.policy.points import Guarantee
from erde.runtime.session import Session

RISKS = (0.01, 0.005, 0.02)
GUARANTEES: tuple[Guarantee, ...] = ("risk", "disagreement")
TUNE, CERTIFY = 2500, 2500


def split(
    logits: NDArray[np.float32], labels: NDArray[np.int64], seed: int
) -> tuple[TuneLogits, CertifyLogits, TestLogits]:
    """One draw of the three splits."""
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = np.split(order, [TUNE, TUNE + CERTIFY])
    tune, certify, test = ((logits[:, rows], labels[rows]) for rows in parts)
    return TuneLogits(*tune), CertifyLogits(*certify), TestLogits(*test)


def measure_draw(
    cost: Cost,
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    seed: int,
    guarantee: Guarantee,
    score: str = "auto",
) -> list[dict[str, Any]]:
    """A row for each certified risk, of one draw."""
    tune, certify, test = split(logits, labels, seed)
    settings = Settings(max_risks=RISKS, guarantee=guarantee, score=score)
    calibrated = calibrate_logits(tune, certify, cost, settings)
    rows = []
    for point in calibrated.points[1:]:
        measured = sweep(ScoredSplit.of(test, calibrated.rule, None), [point.thresholds]).measured(0, cost)
        agreement = sweep(ScoredSplit.of(answers_as_labels(test), calibrated.rule, None), [point.thresholds])
        final = float((test.logits[-1].argmax(axis=-1) == test.labels).mean())
        rows.append(
            {
                "guarantee": guarantee,
                "draw": seed,
                "max_risk": point.target,
                "score": calibrated.rule.in_words(),
                "macs_saved": round(measured.macs_saved, 4),
                "accuracy": round(measured.accuracy, 4),
                "last_network_accuracy": round(final, 4),
                "risk": round(measured.risk, 4),
                "disagreement": round(agreement.agreement(0, cost).disagreement, 4),
                "exit_rates": [round(rate, 4) for rate in measured.exit_rates],
            }
        )
    return rows


def violations(
    session: Session, logits: NDArray[np.float32], labels: NDArray[np.int64], draws: int
) -> list[dict[str, Any]]:
    """Broken promises of disagreement over ``draws`` draws of certify from the whole pool, at 1 and 2 %."""
    tune = split(logits, labels, 0)[0]
    cost = session.cost(timed=False)
    calibrated = calibrate_logits(
        tune, split(logits, labels, 0)[1], cost, Settings(max_risks=RISKS, guarantee="disagreement")
    )
    pool = answers_as_labels(TestLogits(logits, labels))
    population = Population.of(calibrated.path, ScoredSplit.of(pool, calibrated.rule, None))
    rates = violation_rates(population, draws, seed=1, guarantee="disagreement", sizes=(1000, 2500))
    return [rate.to_json() for rate in rates if rate.max_risk <= 0.02]


def disagreements(session: Session, images: NDArray[np.uint8], logits: NDArray[np.float32]) -> dict[str, int]:
    """How often the runtime's exit or label is another one than the policy's on the stages' logits."""
    answers, scores = session.rule.apply(logits)
    counts = {"images": 0, "other_exit_or_label": 0, "in_band": 0}
    for point in session.manifest.operating_points:
        exits = policy.decide(scores, point.thresholds)
        labels = policy.take_exit(answers, exits).argmax(axis=-1)
        band = policy.in_band(scores, point.thresholds)
        for start in range(0, len(images), 32):
            part = slice(start, start + 32)
            answer = session.predict(images[part], operating_point=point.name)
            other = (answer.exits != exits[part]) | (answer.labels != labels[part])
            counts["other_exit_or_label"] += int((other & ~band[part]).sum())
        counts["images"] += len(images)
        counts["in_band"] += int(band.sum())
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+", type=Path)
    parser.add_argument("--preprocessing", type=Path)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=1000, help="of the count of broken promises")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    given = [] if arguments.preprocessing is None else [read_preprocessing(arguments.preprocessing)]
    networks = open_networks(arguments.networks, given)
    check_chain(networks)
    data = load_data("cifar10", tune_size=1000, certify_size=1000)
    images, labels = np.asarray(data.test.images[:]), data.test.labels
    assert images.shape[1:] == common_shape(networks)
    names = class_names(networks)
    with (
        tempfile.TemporaryDirectory() as folder,
        built_chain(networks, Path(folder) / "chain", images[:2], names) as chain,
    ):
        session = Session(chain, threads=1)
        logits = session.all_logits(images)
        rows: list[dict[str, Any]] = []
        for guarantee, draw in itertools.product(GUARANTEES, range(arguments.draws)):
            rows += measure_draw(session.cost(timed=False), logits, labels, draw, guarantee)
            progress.say(str(rows[-len(RISKS)]))
        tune, certify, _ = split(logits, labels, 0)
        calibrated = calibrate_logits(tune, certify, session.cost(timed=False), Settings(max_risks=RISKS))
        sealed = Path(folder) / "sealed"
        seal_calibrated(session, calibrated, sealed)
        agreed = disagreements(Session(sealed, threads=1), images, logits)
        broken = violations(session, logits, labels, arguments.repetitions)
    write_json(
        arguments.out,
        {
            "networks": [{"name": network.name, "macs": network.macs} for network in networks],
            "environment": describe("cpu", 1, None),
            "draws": rows,
            "runtime_against_evaluation": agreed,
            "broken_promises_of_disagreement": broken,
        },
    )
    progress.say(f"{arguments.out}: {agreed}")


if __name__ == "__main__":
    main()
