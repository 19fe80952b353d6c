"""Which front is best in a cascade: the students of benchmarks/heads.py, each before public networks, on CIFAR-10's test split.

    python benchmarks/fronts.py FOLDER ... --behind FILE.onnx ... --preprocessing FILE.json --out FILE.json

FOLDER is a ``--work`` of heads.py: the students "ARM, now" of all its seeds, before their refit. The networks behind
them may have seen every train image, so tune (2,500), certify (2,500) and test (5,000) are drawn from the test split,
``--draws`` times. See README.md.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from cascade import GUARANTEES, measure_draw
from numpy.typing import NDArray

from erde.chains.cascading import open_networks
from erde.chains.networks import Network
from erde.chains.preprocessing import read_preprocessing
from erde.common.environment import describe
from erde.common.files import write_json
from erde.data.load import load_data
from erde.networks.attach import attach_exits
from erde.networks.backbones import build_backbone
from erde.networks.cost import network_cost
from erde.policy.cost import Cost
from erde.runtime.stages import StageRunner

SIZE = (3, 32, 32)
STUDENT = "resnet8"
SCORES = ("auto", "harm")
MEANS = ("macs_saved", "accuracy", "last_network_accuracy", "risk", "disagreement")


def network_logits(network: Network, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(1, N, K) of a network of a single exit."""
    with tempfile.TemporaryDirectory() as folder:
        network.write(network.stages, Path(folder), images.shape[1:])
        runner = StageRunner([Path(folder) / stage.file for stage in network.stages], 1)
        return runner.all_logits(images)


def student_macs(exits: int) -> tuple[int, ...]:
    network = attach_exits(build_backbone(STUDENT, classes=10), exits, input_size=SIZE)
    return network_cost(network, SIZE).macs


def chain_cost(front: tuple[int, ...], behind: list[int]) -> Cost:
    """Cumulative MACs of a front's exits and of the networks behind it, of which each has one exit."""
    whole = list(itertools.accumulate(behind, initial=front[-1]))[1:]
    starts = range(len(front), len(front) + len(behind))
    return Cost((*front, *whole), behind[-1], networks=(0, *starts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--behind", nargs="+", type=Path, required=True)
    parser.add_argument("--preprocessing", type=Path)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    given = [] if arguments.preprocessing is None else [read_preprocessing(arguments.preprocessing)]
    networks = open_networks(arguments.behind, given)
    data = load_data("cifar10", tune_size=1000, certify_size=1000)
    images, labels = np.asarray(data.test.images[:]), data.test.labels
    behind = {network.name: network_logits(network, images) for network in networks}
    # The last network alone, and all of them.
    tails = [networks[-1:], *([networks] if len(networks) > 1 else [])]
    rows: list[dict[str, Any]] = []
    for path in sorted(path for folder in arguments.folders for path in folder.glob("**/*, now/joint.npz")):
        with np.load(path) as arrays:
            front = arrays["test_logits"]
            assert np.array_equal(arrays["test_labels"], labels)
        arm, seed = path.parent.name.split(", ")[0], int(path.parent.parent.name.removeprefix("seed"))
        for tail, guarantee, score in itertools.product(tails, GUARANTEES, SCORES):
            logits = np.concatenate([front, *(behind[network.name] for network in tail)])
            cost = chain_cost(student_macs(len(front)), [network.macs for network in tail])
            draws = [
                row
                for draw in range(arguments.draws)
                for row in measure_draw(cost, logits, labels, draw, guarantee, score)
            ]
            for risk in sorted({row["max_risk"] for row in draws}):
                at = [row for row in draws if row["max_risk"] == risk]
                rows.append(
                    {
                        "arm": arm,
                        "seed": seed,
                        "exits": len(front),
                        "front_accuracy": round(float((front[-1].argmax(axis=-1) == labels).mean()), 4),
                        "behind": [network.name for network in tail],
                        "guarantee": guarantee,
                        "score": score,
                        "max_risk": risk,
                        **{key: round(mean(row[key] for row in at), 4) for key in MEANS},
                    }
                )
    machine = describe("cpu", 1, None)
    write_json(arguments.out, {"draws": arguments.draws, "environment": machine, "rows": rows})


if __name__ == "__main__":
    main()
