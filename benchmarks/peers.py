"""erde's runtime against earlyon: the same weights, images, rule and thresholds, taking turns.

    python benchmarks/peers.py RUN --peer-python VENV/bin/python --data FOLDER/NAME --out benchmarks/results/NAME.json

RUN is a run folder whose arm is trained and exported. VENV is an environment of its own with earlyon 0.3, torch,
onnx and the ONNX Runtime of this one; README.md beside this file says how to make it, what is equal and what
cannot be. Nothing is written into RUN.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peers_earlyon
from numpy.typing import NDArray
from peers_earlyon import Arm, timed

import erde
from erde.common import environment
from erde.common.errors import UserError
from erde.policy import rule as policy
from erde.runtime.prediction import Prediction
from erde.runtime.session import Session

EARLYON = "0.3"
ERDE = "erde"
NO_EXIT = "erde, no early exit"
# earlyon's name of erde's score; its other settings are one threshold and one temperature per exit, like erde's.
POLICIES = {"max_probability": "confidence", "entropy": "entropy"}
BATCH_SIZES = (1, 32)
# At batch 1 these are the same as their namesakes.
BATCHES_ONLY = (peers_earlyon.EAGER_BATCH, peers_earlyon.STAGES_BATCH)
EXAMPLES = 10


@dataclass(frozen=True)
class Subject:
    """What both sides are given."""

    session: Session
    images: NDArray[np.uint8]  # test, (N, H, W, C)
    labels: NDArray[np.int64]
    thresholds: list[float | None]
    architecture: dict[str, Any]  # arguments of build_backbone and attach_exits
    weights: dict[str, Any]  # by name, torch tensors
    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: dict[str, Any]  # for the result file


def check_peer(python: Path, ours: Mapping[str, str]) -> dict[str, str]:
    """The versions in the other environment; :class:`UserError` if it cannot be compared with."""
    if not python.is_file():
        raise UserError(
            f"--peer-python: there is no {python}: make the environment as benchmarks/README.md says"
        )
    script = Path(peers_earlyon.__file__)
    try:
        done = subprocess.run([python, script, "--versions"], capture_output=True, text=True, timeout=120)
        theirs: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise UserError(
            f"--peer-python: {python} is no Python with numpy: make the environment anew"
        ) from error
    for package in ("earlyon", "torch", "onnx", "onnxruntime"):
        if package not in theirs:
            raise UserError(
                f"--peer-python: {package} is not installed for {python}: see benchmarks/README.md"
            )
    if not theirs["earlyon"].startswith(f"{EARLYON}."):
        raise UserError(
            f"--peer-python: earlyon {theirs['earlyon']} is installed for {python}, expected {EARLYON}"
        )
    for package in ("onnxruntime", "torch"):
        if theirs[package] != ours[package]:
            raise UserError(
                f"--peer-python: {package} {theirs[package]} is installed for {python}, here it is {ours[package]}: "
                "install the same there"
            )
    return theirs


def prepare(given: argparse.Namespace, folder: Path) -> Subject:
    """Export the arm's network into a bundle at ``folder``, and calibrate it for earlyon's rule."""
    from erde.recipe.load import load_config
    from erde.runs.folder import Run
    from erde.runs.networks import trained_network

    run_path, data = given.run, given.data
    recipe = run_path / "config.yaml"
    if not recipe.is_file():
        raise UserError(f"{run_path} is not a run folder: it has no config.yaml (erde run writes one)")
    if not data.is_dir():
        raise UserError(f"--data: there is no folder {data}")
    config = load_config(recipe)
    if data.name == config.data.name:
        os.environ["ERDE_DATA"] = str(data.resolve().parent)
    else:
        config = config.model_copy(update={"data": config.data.model_copy(update={"name": str(data)})})
    # What it once started from may be gone; its trained weights are in the run.
    config = config.model_copy(update={"student": config.student.model_copy(update={"weights": None})})
    arm = given.arm or config.export.arm
    if arm not in config.arms:
        raise UserError(f"--arm: no arm '{arm}' in this run; it has: {', '.join(config.arms)}")
    student = config.network_of(arm)
    if student.exits == 1:
        raise UserError(f"--arm: '{arm}' has no early exits: choose another arm")
    run = Run(config, run_path)
    network = trained_network(run, arm)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    erde.export(network, run.data, folder, name=arm)
    calibrated = erde.calibrate(
        folder, run.data, max_risk=given.max_risk, score=given.score, sharpness=1.0, ensemble="none"
    )
    if calibrated.left_out:
        raise UserError(f"--max-risk: {calibrated.left_out[0].note}")
    point = next(one for one in calibrated.points if one.kind == "risk")
    session = Session(folder, threads=1)
    if given.profiled:
        session.profile()
    facts = {
        "run": config.name,
        "arm": arm,
        "backbone": student.backbone,
        "exits": len(session.manifest.stages),
        "rule": calibrated.rule.in_words(),
        "operating_point": point.name,
        "thresholds": point.thresholds,
        "profiled": given.profiled,
    }
    architecture = {
        "backbone": student.backbone,
        "classes": len(run.data.classes),
        "input_size": run.data.input_size,
        "exits": student.exits,
        "head": student.head,
    }
    images = run.data.test.images
    return Subject(
        session, images[:], run.data.test.labels, point.thresholds,
        architecture, weights, run.data.mean, run.data.std, facts,
    )  # fmt: skip


class Peer:
    """earlyon in a process that lives as long as this object is open."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.hello = self._read()
        self.arms: list[str] = self.hello.pop("arms")

    @classmethod
    @contextmanager
    def open(cls, python: Path, subject: Subject, score: str, folder: Path) -> Iterator[Peer]:
        """Hand over network, images and setting in ``folder``, and start the other side."""
        import torch

        torch.save(subject.weights, folder / "weights.pt")
        np.save(folder / "images.npy", subject.images)
        setting = {
            "thresholds": subject.thresholds,
            "policy": POLICIES[score],
            "temperature": 1.0,
            "source": str(Path(erde.__file__).parent),
            **subject.architecture,
            "mean": subject.mean,
            "std": subject.std,
        }
        (folder / "setting.json").write_text(json.dumps(setting), encoding="utf-8")
        with subprocess.Popen(
            [python, peers_earlyon.__file__, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        ) as process:
            try:
                yield cls(process)
            finally:
                process.terminate()

    def ask(self, arm: str, batches: Sequence[NDArray[np.int64]]) -> dict[str, list[Any]]:
        """What :func:`peers_earlyon.timed` gives, of the images in these rows."""
        assert self._process.stdin is not None
        question = {"arm": arm, "batches": [rows.tolist() for rows in batches]}
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("earlyon's process ended; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Ours:
    """erde through its public call."""

    arms = (ERDE, NO_EXIT)

    def __init__(self, subject: Subject) -> None:
        session, self._images = subject.session, subject.images
        self._arms = {
            ERDE: Arm(session.predict, _read),
            NO_EXIT: Arm(lambda batch: session.predict(batch, operating_point="no-exit"), _read),
        }

    def ask(self, arm: str, batches: Sequence[NDArray[np.int64]]) -> dict[str, list[Any]]:
        """Like :meth:`Peer.ask`."""
        return timed(self._arms[arm], [self._images[rows] for rows in batches])


def _read(prediction: Prediction) -> peers_earlyon.Answer:
    return prediction.exits.tolist(), prediction.labels.tolist()


def agreement(
    subject: Subject, answers: Mapping[str, dict[str, list[Any]]], order: NDArray[np.int64]
) -> dict[str, dict[str, Any]]:
    """Per arm: exit shares, accuracy, and the images on which exit or label differ from erde's."""
    rule, cost = subject.session.manifest.rule(), subject.session.cost(timed=False)
    scores = rule.apply(subject.session.all_logits(subject.images[order]))[1]
    exit_macs = np.asarray(cost.exit_macs)
    near = policy.in_band(scores, subject.thresholds)
    reference = {key: np.asarray(answers[ERDE][key]) for key in ("exits", "labels")}
    found = {}
    for name, answer in answers.items():
        exits, labels = np.asarray(answer["exits"]), np.asarray(answer["labels"])
        exit_differs, label_differs = exits != reference["exits"], labels != reference["labels"]
        examples = [
            {
                "image": int(order[row]),
                "exits": [int(reference["exits"][row]), int(exits[row])],
                "labels": [int(reference["labels"][row]), int(labels[row])],
                "scores": [round(float(one), 7) for one in scores[:-1, row]],
            }
            for row in np.flatnonzero(exit_differs | label_differs)[:EXAMPLES]
        ]
        found[name] = {
            "exit_shares": (np.bincount(exits, minlength=len(exit_macs)) / len(exits)).tolist(),
            "accuracy": float((labels == subject.labels[order]).mean()),
            "macs_saved": 1 - float(exit_macs[exits].mean()) / cost.no_exit_macs,
            "exits_differ": int(exit_differs.sum()),
            "labels_differ": int(label_differs.sum()),
            "exits_differ_beyond_band": int((exit_differs & ~near).sum()),
            "examples": examples,
        }
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "lower_quartile": round(low, 4), "upper_quartile": round(high, 4)}


def summarise(rounds: Mapping[str, list[list[float]]]) -> dict[str, Any]:
    """Of seconds per arm, round and batch: milliseconds per batch, and how many times erde's, round by round."""
    found = {}
    for name, own in rounds.items():
        milliseconds = [1e3 * one for seconds in own for one in seconds]
        found[name] = {
            "milliseconds": spread(milliseconds),
            "mean_milliseconds": round(statistics.fmean(milliseconds), 4),
        }
        pairs = list(zip(own, rounds[ERDE], strict=True))
        found[name]["times_erde_by_median"] = spread(
            [statistics.median(a) / statistics.median(b) for a, b in pairs]
        )
        # The mean is what a stream of images takes; the median of a mixture of exits need not move with it.
        found[name]["times_erde_by_sum"] = spread([sum(a) / sum(b) for a, b in pairs])
    return found


def measure(
    sides: Mapping[str, Ours | Peer], order: NDArray[np.int64], size: int, rounds: int, per_round: int
) -> dict[str, list[list[float]]]:
    """Seconds per arm, round and batch: in every round all arms have the same batches, one arm after another."""
    arms = list(sides)
    seconds: dict[str, list[list[float]]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        start = number * per_round * size
        rows = order[np.arange(start, start + per_round * size) % len(order)].reshape(per_round, size)
        # Another arm begins each time, so that none always follows the same one after the pause.
        turn = number % len(arms)
        for name in arms[turn:] + arms[:turn]:
            answer = sides[name].ask(name, list(rows))
            if number:  # the first round warms up
                seconds[name].append(answer["seconds"])
    return seconds


def check(sides: Mapping[str, Ours | Peer], order: NDArray[np.int64]) -> dict[str, dict[str, list[Any]]]:
    """Every arm's answers for all images, in batches of 32 where the arm leaves batches whole."""
    batches = [order[start : start + 32] for start in range(0, len(order), 32)]
    return {name: side.ask(name, batches) for name, side in sides.items()}


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """The whole measurement."""
    import torch

    torch.set_num_threads(1)
    machine = environment.describe("cpu", 1)
    theirs = check_peer(given.peer_python, machine["versions"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subject = prepare(given, folder / "bundle")
        order = np.random.default_rng(given.seed).permutation(len(subject.images))
        ours = Ours(subject)
        with Peer.open(given.peer_python, subject, given.score, folder) as peer:
            sides: dict[str, Ours | Peer] = dict.fromkeys(ours.arms, ours) | dict.fromkeys(peer.arms, peer)
            agreed = agreement(subject, check(sides, order[: given.check]), order[: given.check])
            load = [list(os.getloadavg())]
            batch: dict[str, Any] = {}
            for size in BATCH_SIZES:
                taking_part = {
                    name: side for name, side in sides.items() if size > 1 or name not in BATCHES_ONLY
                }
                per_round = max(1, given.images // size)
                seconds = measure(taking_part, order, size, given.rounds, per_round)
                batch[str(size)] = summarise(seconds)
                load.append(list(os.getloadavg()))
            hello = peer.hello
    return {
        **subject.facts,
        "images_checked": len(order[: given.check]),
        "rounds": given.rounds,
        "images_per_round": given.images,
        "threads": 1,
        "batch": batch,
        "agreement": agreed,
        "peer": {"versions": theirs, **hello},
        "load": load,
        "environment": machine,
    }


def table(result: Mapping[str, Any]) -> str:
    """The result for people."""
    saved = 100 * result["agreement"][ERDE]["macs_saved"]
    lines = [
        f"{result['backbone']}, {result['exits']} exits, {result['rule']}, {result['operating_point']}: "
        f"MACs saved {saved:.1f} %"
    ]
    for size, arms in result["batch"].items():
        lines += [
            "",
            f"batch {size}{'':34} ms (quartiles)        mean   times erde: medians (quartiles), sums",
        ]
        for name, row in arms.items():
            ms, medians, sums = row["milliseconds"], row["times_erde_by_median"], row["times_erde_by_sum"]
            lines.append(
                f"{name:38} {_in_words(ms):>24} {row['mean_milliseconds']:7.3f}   "
                f"{_in_words(medians, 2):20} {_in_words(sums, 2)}"
            )
    lines += [
        "",
        f"of {result['images_checked']:,} test images: exit shares, accuracy, exits and labels other than erde's",
    ]
    for name, row in result["agreement"].items():
        shares = " ".join(f"{100 * one:.1f}" for one in row["exit_shares"])
        lines.append(
            f"{name:38} {shares} %, {100 * row['accuracy']:.2f} %, exits {row['exits_differ']} "
            f"({row['exits_differ_beyond_band']} of them beyond 1e-5 of a threshold), labels {row['labels_differ']}"
        )
        # Arms that answer otherwise by design would fill the screen; the file has examples of theirs.
        if 0 < row["exits_differ"] + row["labels_differ"] <= EXAMPLES:
            lines += [f"    {example}" for example in row["examples"]]
    return "\n".join(lines)


def _in_words(one: Mapping[str, float], digits: int = 3) -> str:
    return f"{one['median']:.{digits}f} ({one['lower_quartile']:.{digits}f} to {one['upper_quartile']:.{digits}f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument(
        "--peer-python", type=Path, required=True, help="Python of the environment with earlyon"
    )
    parser.add_argument("--data", type=Path, required=True, help="the run's data set, as FOLDER/NAME")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arm", help="of the run; the exported one by default")
    parser.add_argument("--score", choices=sorted(POLICIES), default="max_probability")
    parser.add_argument(
        "--max-risk", type=float, default=0.01, help="of the operating point that is compared"
    )
    parser.add_argument("--profiled", action="store_true", help="profile erde's session before it is timed")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--images", type=int, default=64, help="per arm and round")
    parser.add_argument(
        "--check", type=int, default=10_000, help="images on which exits and labels are compared"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the images' order")
    given = parser.parse_args()
    try:
        for name, least in (("rounds", 2), ("images", 2), ("check", 1)):
            if getattr(given, name) < least:
                raise UserError(f"--{name} is {getattr(given, name)}, expected {least} or more")
        if not given.out.resolve().parent.is_dir():
            raise UserError(f"--out: there is no folder {given.out.parent}")
        result = compare(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
