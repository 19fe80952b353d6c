"""Exit heads that die: how a student ends with other heads, on the product's own loop, with and without a refit.

    python benchmarks/heads.py RECIPE [KEY=VALUE ...] --teacher exits|FILE.npz --arms ce,kd,erde --heads 'before; now'
        --seeds 0,1,2 --work FOLDER --out FILE.json

Arms of one seed share data order, initialisation and teacher, and are trained together. FOLDER keeps checkpoints and
logits: a second call goes on where the first one ended. Splits and the teacher are those of seed 0. See README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from erde.calibration.logits import calibrate_logits
from erde.calibration.settings import Settings
from erde.common.files import replacing_file, write_json
from erde.common.splits import CertifyLogits, Split, TestLogits, TuneLogits
from erde.evaluation import measures
from erde.networks import checkpoint
from erde.networks.cost import network_cost
from erde.networks.heads import ERDEHead, reset_head
from erde.networks.network import EarlyExitNetwork
from erde.networks.network import EarlyExitNetwork as Network
from erde.networks.shapes import mode
from erde.policy.cost import Cost
from erde.recipe.load import load_config
from erde.recipe.losses import resolve_loss
from erde.recipe.schema import TEACHER, Config
from erde.runs.folder import Run
from erde.runs.networks import new_network, trained_network
from erde.runs.opening import open_run
from erde.runs.training import make_job, train
from erde.training import loop
from erde.training.api import build_criterion
from erde.training.health import measure_health
from erde.training.job import Job
from erde.training.learner import Learner
from erde.training.loop import describe_machine

RISKS = (0.01, 0.005, 0.02)
BATCH = 500


def heads_of(network: EarlyExitNetwork) -> list[Any]:
    # Of no type: to a checker each attribute of a module is a tensor or a module.
    return [head for head in network.heads[:-1] if isinstance(head, ERDEHead)]


def fixed_norms(network: EarlyExitNetwork) -> list[Any]:
    """The norms of all intermediate heads that the product fixes, of heads for tokens too."""
    return [
        module for head in network.heads[:-1] for module in head.modules() if "fixed_scale" in vars(module)
    ]


# ---------------------------------------------------------------- variants: (learner) -> None, once it is built


def trained_norm(learner: Learner) -> None:
    """The norm as it was: scale 1 and shift 0 at the start, and trained."""
    for norm in fixed_norms(learner.network):
        nn.init.ones_(norm.weight)
        norm.requires_grad_(True)


def with_groups(learner: Learner, split: Callable[[Network], Iterable[dict[str, Any]]]) -> None:
    """The optimiser with other settings for some parameters; ``scale`` multiplies their learning rate."""
    config, groups = learner.job.config, list(split(learner.network))
    named = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [parameter for parameter in learner.network.parameters() if id(parameter) not in named]
    rest += list(learner.job.criterion.parameters())
    learner.optimizer = torch.optim.SGD(
        [{"params": rest}, *groups],
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=True,
        weight_decay=config.weight_decay,
    )

    def scale(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= group.get("scale", 1.0)

    learner.optimizer.register_step_pre_hook(scale)


def head_parameters(network: Network) -> list[nn.Parameter]:
    return [parameter for head in network.heads[:-1] for parameter in head.parameters()]


def norm_parameters(network: Network) -> list[nn.Parameter]:
    return [parameter for head in heads_of(network) for parameter in head.norm.parameters()]


def clip_heads(learner: Learner) -> None:
    parameters = head_parameters(learner.network)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)

    learner.optimizer.register_step_pre_hook(clip)


def floor_norm(learner: Learner) -> None:
    def hold(*_: Any) -> None:
        with torch.no_grad():
            for head in heads_of(learner.network):
                head.norm.weight.clamp_(min=0.3)
                head.norm.bias.clamp_(-0.3, 0.3)

    learner.optimizer.register_step_post_hook(hold)


def activation(learner: Learner, make: Callable[[], nn.Module]) -> None:
    for head in heads_of(learner.network):
        head.relu = make()


def zero_start(learner: Learner) -> None:
    for head in heads_of(learner.network):
        nn.init.zeros_(head.linear.weight)
        nn.init.zeros_(head.linear.bias)


def fixed_at(learner: Learner, inputs: float | None) -> None:
    """The norm fixed at a scale as if the linear layer read so many numbers; None: at 1."""
    for head in heads_of(learner.network):
        scale = 1.0 if inputs is None else (inputs / head.linear.in_features) ** 0.5
        nn.init.constant_(head.norm.weight, min(1.0, scale))


def by_fan_in(network: Network) -> list[dict[str, Any]]:
    linear = [head.linear for head in heads_of(network)]
    return [{"params": [layer.weight], "scale": min(1.0, 256 / layer.in_features)} for layer in linear]


def other_group(
    learner: Learner, parameters: Callable[[Network], list[nn.Parameter]], **settings: float
) -> None:
    with_groups(learner, lambda network: [{"params": parameters(network), **settings}])


Change = Callable[[Learner], None]
HALF = {"dropout": 0.5}
# Name -> (keys of student, keys of train, changes).
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], list[Change]]] = {
    "before": (HALF, {}, [trained_norm]),
    "head lr x 0.1": (HALF, {}, [trained_norm, partial(other_group, parameters=head_parameters, scale=0.1)]),
    "head weight decay 0": (HALF, {}, [trained_norm, partial(other_group, parameters=head_parameters, weight_decay=0.0)]),
    "norm weight decay 0": (HALF, {}, [trained_norm, partial(other_group, parameters=norm_parameters, weight_decay=0.0)]),
    "linear lr by fan-in": (HALF, {}, [trained_norm, partial(with_groups, split=by_fan_in)]),
    "heads clipped at 1": (HALF, {}, [trained_norm, clip_heads]),
    "all clipped at 1": (HALF, {"gradient_clip": 1.0}, [trained_norm]),
    "norm with a floor": (HALF, {}, [trained_norm, floor_norm]),
    "norm fixed at 1": (HALF, {}, [partial(fixed_at, inputs=None)]),
    "leaky ReLU": (HALF, {}, [trained_norm, partial(activation, make=lambda: nn.LeakyReLU(0.1))]),
    "GELU": (HALF, {}, [trained_norm, partial(activation, make=nn.GELU)]),
    "no activation": (HALF, {}, [trained_norm, partial(activation, make=nn.Identity)]),
    "dropout 0.1": ({}, {}, [trained_norm]),
    "linear starts at 0": (HALF, {}, [trained_norm, zero_start]),
    "warm-up of 5 epochs": (HALF, {"warmup_epochs": 5}, [trained_norm]),
    "now with dropout 0.5": (HALF, {}, []),
    "now": ({}, {}, []),
    "scaled as 64 inputs": ({}, {}, [partial(fixed_at, inputs=64)]),
    "scaled as 1024 inputs": ({}, {}, [partial(fixed_at, inputs=1024)]),
    "now, learning rate 0.05": ({}, {"learning_rate": 0.05}, []),
    "now, learning rate 0.2": ({}, {"learning_rate": 0.2}, []),
    "now, warm-up of 5 epochs": ({}, {"warmup_epochs": 5}, []),
    "now, all clipped at 1": ({}, {"gradient_clip": 1.0}, []),
    "tower": ({"head": "tower"}, {}, []),
    "boosted": ({"boosted": True}, {}, []),
    "gradient equilibrium": ({}, {"gradient_equilibrium": True}, []),
    "images by reach": ({}, {"image_weights": "reached"}, []),
}  # fmt: skip


class VariantLearner(Learner):
    """A learner whose network and optimiser are changed before training, by the variant in its job's name.

    The refit is that of the product, whatever the heads were before; the network is kept as it was before the refit.
    """

    def __init__(self, job: Job, *arguments: Any) -> None:
        super().__init__(job, *arguments)
        for change in VARIANTS[job.name.split("/", 1)[1]][2]:
            change(self)

    def _start_refit(self) -> None:
        assert self.folder is not None
        checkpoint.save(self.folder / "joint.safetensors", self.network.state_dict(), {})
        for norm in fixed_norms(self.network):
            norm.requires_grad_(False)
        super()._start_refit()


# ---------------------------------------------------------------- one seed


AFTER = ("joint", "refit", "refit by ce")


def train_seed(
    run: Run, teacher: EarlyExitNetwork, arms: list[str], variants: list[str], after: list[str], folder: Path
) -> None:
    """Train every arm with every variant together; each leaves one file of logits for each of ``after``."""
    jobs, folders = [], []
    for arm in arms:
        for variant in variants:
            place = folder / f"{arm}, {variant}"
            if not (place / f"{after[-1]}.npz").exists():
                jobs.append(variant_job(run, arm, variant, teacher))
                folders.append(place)
    if not jobs:
        return
    # In the place of the learner that the loop imported.
    with mock.patch.object(loop, "Learner", VariantLearner):
        loop.train_together(jobs, folders)
    for job, place in zip(jobs, folders, strict=True):
        if after == ["joint"]:
            write_logits(run, job.network, place / "joint.npz")
            continue
        write_logits(run, job.network, place / "refit.npz")
        checkpoint.load_weights(job.network, place / "joint.safetensors")
        write_logits(run, job.network, place / "joint.npz")
        refit_by_cross_entropy(run, job)
        write_logits(run, job.network, place / f"{AFTER[-1]}.npz")


def refit_by_cross_entropy(run: Run, job: Job) -> None:
    """New heads on the frozen backbone, by cross-entropy, for as many epochs as the product's own refit."""
    torch.manual_seed(job.seed)
    for head in job.network.heads[:-1]:
        reset_head(head)
    changes = {"freeze_backbone": True, "epochs": job.config.refit_heads, "refit_heads": 0}
    criterion = build_criterion(
        resolve_loss("ce"), run.config.distillation, job.network, None, run.data, train_images=len(job.train)
    )
    alone = dataclasses.replace(
        job, criterion=criterion, teacher=None, extras=(), config=job.config.model_copy(update=changes)
    )
    loop.train_network(alone)


def variant_job(run: Run, arm: str, variant: str, teacher: EarlyExitNetwork) -> Job:
    config, (student_keys, keys, _) = run.config, VARIANTS[variant]
    student = config.student.model_copy(update=student_keys)
    loss = next((known.loss for name, known in config.arms.items() if name == arm), resolve_loss(arm))
    changed = {arm: config.arms["ce"].model_copy(update={"loss": loss})}
    run.config = config.changed(arms=changed, student=student, export={"arm": arm})
    try:
        job = make_job(run, arm, new_network(run, arm), teacher)
    finally:
        run.config = config
    settings = job.config.model_copy(update=keys)
    return dataclasses.replace(job, name=f"{arm}/{variant}", config=settings)


def variant_cost(run: Run, arm: str, variant: str, teacher: EarlyExitNetwork) -> Cost:
    cost = network_cost(variant_job(run, arm, variant, teacher).network, run.data.input_size)
    return Cost(cost.macs, cost.no_exit_macs)


@torch.no_grad()
def write_logits(run: Run, network: EarlyExitNetwork, path: Path) -> None:
    data = run.data
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)

    def normalised(split: Split, first: int) -> torch.Tensor:
        images = torch.from_numpy(np.asarray(split.images[first : first + BATCH]))
        return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)

    arrays: dict[str, NDArray[Any]] = {}
    with mode(network, False):
        for split in (data.tune, data.certify, data.test):
            parts = [network(normalised(split, first)).numpy() for first in range(0, len(split), BATCH)]
            arrays[f"{split.name}_logits"] = np.concatenate(parts, axis=1)
            arrays[f"{split.name}_labels"] = split.labels
    tune = [(normalised(data.tune, 0), torch.from_numpy(data.tune.labels[:BATCH]))]
    early = len(network.stages) > 1
    arrays["dead"] = np.array(measure_health(network, tune).dead_units if early else [])
    with replacing_file(path) as beside, beside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


# ---------------------------------------------------------------- numbers


def measure(path: Path, cost: Cost) -> dict[str, Any]:
    """Dead units, accuracy of the exits on tune and test, certified points on test."""
    with np.load(path) as arrays:
        tune = TuneLogits(arrays["tune_logits"], arrays["tune_labels"])
        certify = CertifyLogits(arrays["certify_logits"], arrays["certify_labels"])
        test = TestLogits(arrays["test_logits"], arrays["test_labels"])
        row: dict[str, Any] = {"dead_units": arrays["dead"].tolist()}
    for split in (tune, test):
        name = "tune" if split is tune else "test"
        row[f"{name}_accuracy"] = (
            (split.logits.argmax(axis=-1) == split.labels).mean(axis=1).round(4).tolist()
        )
    if len(tune.logits) == 1:  # a front of one exit: only in a cascade
        return row
    policy = calibrate_logits(tune, certify, cost, Settings(max_risks=RISKS))
    row["score"] = [policy.rule.score, policy.rule.sharpness, policy.rule.ensemble]
    for point in measures.measure_points(test, policy, cost, None):
        measured = point.test
        if measured is not None and point.name.startswith("risk"):
            row[point.name] = {
                "macs_saved": round(measured.macs_saved, 4),
                "accuracy": round(measured.accuracy, 4),
                "risk": round(measured.risk, 4),
            }
    return row


def load(arguments: argparse.Namespace, seed: int) -> Config:
    overrides = [
        f"train.refit_heads={0 if arguments.after == 'joint' else 8}",
        f"seed={seed}",
        *(["data.split_seed=0"] if seed else []),
        *arguments.overrides,
    ]
    if arguments.teacher != "exits":
        teacher = {
            "backbone": "resnet20-a", "exits": 1, "trained": True, "weights": arguments.teacher,
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        }  # fmt: skip
        overrides.append(f"teacher={json.dumps(teacher)}")
    return load_config(arguments.recipe, overrides)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument(
        "--teacher", default="exits", help="exits: the recipe's own; or weights of a plain resnet20-a"
    )
    parser.add_argument("--arms", default="ce,kd,erde")
    parser.add_argument("--heads", default="before; now", help=f"of: {'; '.join(VARIANTS)}")
    parser.add_argument("--after", choices=["joint", "all"], default="all", help="joint: without refits")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    # Names of variants have commas of their own.
    arms, variants = arguments.arms.split(","), arguments.heads.split("; ")
    after = ["joint"] if arguments.after == "joint" else list(AFTER)
    teacher = "exits" if arguments.teacher == "exits" else "plain"
    rows: list[dict[str, Any]] = []
    if arguments.out.exists():
        rows = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]
    if teacher == "exits":
        base = open_run(load(arguments, 0), arguments.work / "teacher", (arguments.work / "teacher").exists())
        train(base)
    for seed in map(int, arguments.seeds.split(",")):
        config = load(arguments, seed)
        folder = arguments.work / teacher / f"seed{seed}"
        run = Run(config, folder)
        # The teacher of seed 0 teaches every seed.
        network = new_network(run, TEACHER) if teacher == "plain" else trained_network(base, TEACHER)
        train_seed(run, network, arms, variants, after, folder)
        costs = {variant: variant_cost(run, arms[0], variant, network) for variant in variants}
        for arm, variant, moment in itertools.product(arms, variants, after):
            key = {"teacher": teacher, "seed": seed, "arm": arm, "heads": variant, "after": moment}
            if any(key.items() <= row.items() for row in rows):
                continue
            path = folder / f"{arm}, {variant}" / f"{moment}.npz"
            rows.append({**key, **measure(path, costs[variant])})
            print(json.dumps(rows[-1]), flush=True)
        recipe = config.model_dump(mode="json")
        if config.teacher.weights is not None:
            recipe["teacher"]["weights"] = Path(config.teacher.weights).name
        machine = describe_machine(run.device, run.threads)
        write_json(arguments.out, {"recipe": recipe, "environment": machine, "rows": rows})


if __name__ == "__main__":
    main()
