"""The engines of docs/engines.md and the single ONNX file beside the bundle in ONNX Runtime: the same answers? How quick?

    python benchmarks/engines.py runs/a/bundle runs/a/bundle-cascade --out engines.json

All of CIFAR-10's test split, at every operating point; times are of single images and one thread, in turns. See README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from erde.chains.single_file import OUTPUTS, write_single_file
from erde.common import environment
from erde.common.errors import UserError
from erde.common.files import write_json
from erde.data.load import load_data
from erde.policy import rule as policy
from erde.policy.points import OperatingPoint
from erde.runtime.prediction import Prediction
from erde.runtime.session import Session

Images = NDArray[np.uint8]
# Label, probabilities and exit of one image, (1, H, W, C).
Answer = tuple[int, NDArray[Any], int]
BATCH = 64
# Images of a contender's turn.
TURN = 100


def single_file(bundle: Path, point: str, folder: Path, taken: bool = True) -> Callable[[Images], Answer]:
    """The bundle as one ONNX file in ONNX Runtime; with ``taken=False`` no image reaches a threshold."""
    path = Path(tempfile.mkdtemp(dir=folder)) / f"{point}.onnx"  # a point is written more than once
    write_single_file(bundle, path, point)
    if not taken:
        model = onnx.load(str(path))
        put_out_of_reach(model.graph)
        onnx.save(model, str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    graph = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def answer(image: Images) -> Answer:
        label, probabilities, exit = graph.run(list(OUTPUTS), {"images": image})
        return int(label[0]), probabilities[0], int(exit[0])

    return answer


def put_out_of_reach(graph: Any) -> None:
    """Raise the thresholds of a single file's graph and of its branches."""
    for weight in graph.initializer:
        if weight.name.startswith("threshold_"):
            weight.CopyFrom(onnx.numpy_helper.from_array(np.float64(np.inf).reshape(()), weight.name))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                put_out_of_reach(attribute.g)


def one_by_one(session: Session, point: str) -> Callable[[Images], Answer]:
    """A session as the same function."""

    def answer(image: Images) -> Answer:
        given: Prediction = session.predict(image, operating_point=point)
        return int(given.labels[0]), given.probabilities[0], int(given.exits[0])

    return answer


class Engines:
    """All sections on one bundle."""

    def __init__(self, bundle: Path, images: Images, rounds: int, scratch: Path) -> None:
        self.bundle, self.images, self.rounds, self.scratch = bundle, images, rounds, scratch
        self.session = Session(bundle, threads=1)
        self.points = [point.name for point in self.session.manifest.operating_points]
        self.default = self.session.manifest.default_operating_point
        self.logits = self.session.all_logits(images)
        self.scores = self.session.rule.apply(self.logits)[1]

    def compared(
        self,
        point: OperatingPoint,
        labels: NDArray[np.int64],
        exits: NDArray[np.int64],
        other_labels: NDArray[np.int64],
        other_exits: NDArray[np.int64],
    ) -> dict[str, int]:
        """Images with another label or exit, and how many of them are too near to a threshold or a tie to tell."""
        band = policy.in_band(self.scores, point.thresholds) | policy.near_tie(self.logits)
        differ = (labels != other_labels) | (exits != other_exits)
        return {
            "labels_differ": int((labels != other_labels).sum()),
            "exits_differ": int((exits != other_exits).sum()),
            "outside_the_band": int((differ & ~band).sum()),
            "in_band": int(band.sum()),
        }

    # ------------------------------------------------------------ sections

    def single(self) -> dict[str, Any]:
        """The single file of each operating point beside ``Session.predict``, image by image."""
        results: dict[str, Any] = {}
        for name in self.points:
            known, other = one_by_one(self.session, name), single_file(self.bundle, name, self.scratch)
            pairs = [(known(image[None]), other(image[None])) for image in self.images]
            labels, exits, other_labels, other_exits = (
                np.array([pair[who][place] for pair in pairs]) for who in (0, 1) for place in (0, 2)
            )
            same = [(a, b) for a, b in pairs if (a[0], a[2]) == (b[0], b[2])]
            results[name] = {
                **self.compared(self.session.manifest.point(name), labels, exits, other_labels, other_exits),
                "probabilities_differ_by": max(float(np.abs(a[1] - b[1]).max()) for a, b in same),
            }
        return results

    def openvino(self) -> dict[str, Any]:
        """The bundle in OpenVINO beside ONNX Runtime, in batches."""
        try:
            session = Session(self.bundle, threads=1, engine="openvino")
        except UserError as error:
            return {"refused": str(error)}
        logits = session.all_logits(self.images)
        results: dict[str, Any] = {
            "logits_differ_by": float(np.abs(logits - self.logits).max()),
            "scores_differ_by": float(np.abs(session.rule.apply(logits)[1] - self.scores).max()),
        }
        for name in self.points:
            labels, exits = [], []
            for either in (self.session, session):
                answers = [
                    either.predict(self.images[start : start + BATCH], operating_point=name)
                    for start in range(0, len(self.images), BATCH)
                ]
                labels.append(np.concatenate([answer.labels for answer in answers]))
                exits.append(np.concatenate([answer.exits for answer in answers]))
            point = self.session.manifest.point(name)
            results[name] = self.compared(point, labels[0], exits[0], labels[1], exits[1])
        return results

    def times(self) -> dict[str, Any]:
        """Milliseconds of a single image, and within each round the ratio to the bundle in ONNX Runtime."""
        results: dict[str, Any] = {}
        for name in dict.fromkeys((self.default, "no-exit")):
            contenders = {
                "bundle": one_by_one(self.session, name),
                "single file": single_file(self.bundle, name, self.scratch),
            }
            try:
                session = Session(self.bundle, threads=1, engine="openvino")
                contenders["bundle in OpenVINO"] = one_by_one(session, name)
            except UserError as error:
                print(f"{self.bundle}: no time in OpenVINO: {error}", flush=True)
            seconds = self._in_turns(contenders)
            bundle = seconds["bundle"].sum(axis=1)
            results[name] = {
                who: {
                    "p50_ms": 1000 * float(np.median(taken)),
                    "times_bundle": np.quantile(taken.sum(axis=1) / bundle, [0.25, 0.5, 0.75]).tolist(),
                }
                for who, taken in seconds.items()
            }
        return results

    def exits(self) -> dict[str, Any]:
        """The exits of the default operating point, beside the single file without exits.

        ``share``: its time, of that. ``untaken``: microseconds of an exit that is computed and not taken, which is what no
        threshold in reach takes longer, shared out.
        """
        thresholds = self.session.manifest.point(self.default).thresholds
        out_of_reach = [None if threshold is None else np.inf for threshold in thresholds]
        contenders = {
            "no exits": single_file(self.bundle, "no-exit", self.scratch),
            "bundle": one_by_one(self.session, self.default),
            "single file": single_file(self.bundle, self.default, self.scratch),
            "bundle, untaken": lambda image: self.session.predict(image, thresholds=out_of_reach),
            "single file, untaken": single_file(self.bundle, self.default, self.scratch, taken=False),
        }
        seconds = self._in_turns(contenders)
        mean = {who: taken.mean(axis=1) for who, taken in seconds.items()}
        results: dict[str, Any] = {"no_exits_p50_ms": 1000 * float(np.median(seconds["no exits"]))}
        count = sum(threshold is not None for threshold in thresholds)
        for who in ("bundle", "single file"):
            more = (mean[f"{who}, untaken"] - mean["no exits"]) / count
            results[who] = {
                "p50_ms": 1000 * float(np.median(seconds[who])),
                "share": np.quantile(mean[who] / mean["no exits"], [0.25, 0.5, 0.75]).tolist(),
                "untaken": (1e6 * np.quantile(more, [0.25, 0.5, 0.75])).tolist(),
            }
        return results

    def _in_turns(self, contenders: dict[str, Callable[[Images], Any]]) -> dict[str, NDArray[np.float64]]:
        """Seconds of each contender and image, (rounds, TURN): the same images for all, in an order of each round's own."""
        generator = np.random.default_rng(0)
        seconds: dict[str, list[NDArray[np.float64]]] = {who: [] for who in contenders}
        for _ in range(self.rounds):
            images = self.images[generator.integers(0, len(self.images), TURN)]
            for place in generator.permutation(len(contenders)):
                who = list(contenders)[place]
                contenders[who](images[:1])  # the one before left its own data in the caches
                taken = np.zeros(TURN)
                for row in range(TURN):
                    started = time.perf_counter()
                    contenders[who](images[row : row + 1])
                    taken[row] = time.perf_counter() - started
                seconds[who].append(taken)
        return {who: np.array(rounds) for who, rounds in seconds.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--only", default="single,openvino,times")
    parser.add_argument("--images", type=int, help="the first ones; all without it")
    parser.add_argument("--rounds", type=int, default=30, help="of the times")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    images = np.ascontiguousarray(np.asarray(load_data("cifar10").test.images[: arguments.images]))
    results: dict[str, Any] = {}
    for bundle in arguments.bundles:
        with tempfile.TemporaryDirectory() as scratch:
            engines = Engines(bundle, images, arguments.rounds, Path(scratch))
            results[bundle.name] = {"precision": engines.session.manifest.precision}
            for section in arguments.only.split(","):
                results[bundle.name][section] = getattr(engines, section)()
                print(bundle.name, section, json.dumps(results[bundle.name][section]), flush=True)
    about = {"images": len(images), "openvino": version("openvino")}
    write_json(arguments.out, {"environment": environment.describe("cpu", 1), **about, "bundles": results})


if __name__ == "__main__":
    main()
