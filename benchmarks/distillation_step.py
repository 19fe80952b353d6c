"""Images per second of a training step with and without a teacher, and the teacher's share.

    python benchmarks/distillation_step.py [RECIPE] [KEY=VALUE ...] --out FILE.json

Real train images of the recipe, the recipe's networks and batch size. Each round times three things one
after another (A B C A B C ...): the distillation step of `erde`, the same step with cross-entropy only,
and the teacher's forward pass alone; medians and quartiles over the rounds. See README.md beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from erde import environment
from erde.config import load_config
from erde.data import TrainBatches
from erde.pipeline import TEACHER, Run
from erde.progress import RunLog


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("recipe", nargs="?", default="cifar10-subset")
    arguments.add_argument("overrides", nargs="*")
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--steps", type=int, default=6, help="steps per measurement")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()

    run = Run(load_config(given.recipe, given.overrides), Path("unused"))
    teacher = run.new_network(TEACHER)
    trainers = {
        arm: _Trainer(run._job(arm, run.new_network(arm), teacher), None, RunLog(None))
        for arm in ("erde", "ce")
    }
    batch = trainers["erde"].batches.batch_size

    def steps_of(arm: str) -> Callable[[], None]:
        trainer = trainers[arm]
        endless = itertools.chain.from_iterable(trainer.batches.epoch(epoch) for epoch in itertools.count())
        trainer._enter_epoch()

        def work() -> None:
            for images, labels in itertools.islice(endless, given.steps):
                trainer._step(images, labels)
                trainer.step_in_epoch = 0  # the schedule does not matter here

        return work

    loaded: TrainBatches = trainers["erde"].batches
    fixed = list(itertools.islice(loaded.epoch(0), given.steps))
    network = trainers["erde"].teacher
    assert network is not None

    def teacher_alone() -> None:
        with torch.inference_mode():
            for images, _ in fixed:
                network(images)

    work = {
        "distillation step": steps_of("erde"),
        "cross-entropy step": steps_of("ce"),
        "teacher alone": teacher_alone,
    }
    speeds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(given.rounds + 1):
        for name, call in work.items():
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                speeds[name].append(given.steps * batch / (time.perf_counter() - started))
    shares = [a / b for a, b in zip(speeds["distillation step"], speeds["teacher alone"], strict=True)]
    result = {
        "recipe": given.recipe,
        "overrides": given.overrides,
        "teacher": run.network_config(TEACHER).backbone,
        "student": run.network_config("erde").backbone,
        "batch_size": batch,
        "rounds": given.rounds,
        "images_per_second": {name: _spread(values) for name, values in speeds.items()},
        "teacher_share_of_step": _spread(shares),
        "environment": environment.describe(run.device, run.threads),
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 3), "lower_quartile": round(low, 3), "upper_quartile": round(high, 3)}


if __name__ == "__main__":
    main()
