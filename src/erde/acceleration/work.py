"""The whole of ``erde accelerate`` in phases, each of which leaves its result in the folder and is skipped when it is there."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from erde.acceleration.fronts import (
    VIEWS,
    Front,
    Training,
    affordable_trial,
    affordable_views,
    answers,
    answers_alike_mirrored,
    candidates,
    milliseconds_of,
    trial,
    trial_epochs,
)
from erde.acceleration.images import UNKNOWN, Material, load_material, read_pool
from erde.acceleration.teacher import onnx_teacher
from erde.acceleration.torch_model import as_onnx_file
from erde.bench.race import Bench, Measurement, bench
from erde.bundle.sealing import file_hash, read
from erde.calibration.checks import answers_as_labels
from erde.calibration.settings import Settings
from erde.calibration.thresholds import ScoredSplit, sweep
from erde.chains.building import class_names, common_shape
from erde.chains.cascading import seal_chain
from erde.chains.networks import Network, bundle_network, open_network
from erde.chains.preprocessing import Preprocessing
from erde.common import progress
from erde.common.environment import erde_version
from erde.common.errors import UserError, check_seed
from erde.common.files import (
    Lock,
    is_leftover,
    make_folder,
    replacing_file,
    sweep_leftovers,
    write_json,
    write_text,
)
from erde.common.splits import TestLogits, TrainSplit
from erde.common.time_limit import check_minutes
from erde.data.load import DataSplits, measure_pixels
from erde.exporting.api import export
from erde.policy.points import Agreement, Measured, OperatingPoint
from erde.recipe.losses import ERDEConfig, resolve_loss
from erde.recipe.validation import validate
from erde.report.chain_page import ClockRow, chain_page
from erde.report.numbers import significant
from erde.runs.opening import LOCK
from erde.runtime.session import Session

SETTINGS, TRIAL, PLAN, ANSWERS, FRONT, BENCH, REPORT = (
    "settings.json", "trial.json", "plan.json", "answers.npy", "front", "bench.json", "report.html",
)  # fmt: skip
# Of the images. Answers and training states that are kept go by it, so a folder with another one cannot be continued.
ORDER = "random"
# Of the time that is asked for, what training may take; the rest goes to answers, the trial and the measurement.
TRAINING_SHARE = 0.8
FEWEST_EPOCHS, MOST_EPOCHS = 4, 300
# Certified points beside the one that is asked for, in multiples of its risk: a server under load gives way along them.
LADDER = (1, 2, 3, 5)
BENCH_ROUNDS = 15
NO_GAIN = (
    "Nothing is gained here: the front is too seldom sure at this risk. More images, more minutes or a larger --max-risk "
    "would help; at the operating point no-exit the bundle is the model as it was."
)


@dataclass(frozen=True)
class Accelerated:
    """The result: the bundle's folder and what it gains, measured on images that chose nothing."""

    bundle: Path
    point: OperatingPoint
    test: Measured | Agreement
    before_ms: float
    after_ms: float
    median_times: float

    @property
    def gains(self) -> bool:
        """Whether the chain is quicker than the model alone."""
        return self.after_ms < 0.98 * self.before_ms

    def lines(self) -> list[str]:
        """Milliseconds before and after, the promise; and what would help, where nothing is gained."""
        certificate = self.point.certificate
        times = self.before_ms / self.after_ms
        gain = (
            f"{significant(self.before_ms)} ms -> {significant(self.after_ms)} ms an image in the mean ({times:.1f} times "
            f"as fast; the median image {self.median_times:.1f} times), {100 * self.test.macs_saved:.0f} % of the MACs saved."
        )
        lines = [gain, "Nothing is promised." if certificate is None else certificate.sentence()]
        return lines if self.gains else [*lines, NO_GAIN]


def accelerate(
    model: str | Path | nn.Module,
    images: str | Path,
    out: str | Path,
    *,
    held_out: str | Path | None = None,
    max_risk: float = 0.01,
    minutes: float = 60.0,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    loss: str = "kd",
    seed: int = 0,
    resume: bool = False,
) -> Accelerated:
    """Train a front for the classifier ``model``, chain both, certify, measure, and report in ``out``.

    No label is needed: the model's own answers teach the front, and the promise is about answers that differ.

    Args:
        model: an ONNX file, or a torch module that takes normalised images (B, C, H, W) and gives logits (B, K).
        images: a folder of images; with sub-folders named by ``classes`` they are labelled, and the promise is about
            images that the model gets right and the chain wrong.
        held_out: other images to calibrate and to measure on, where the model was trained on ``images``.
        max_risk: to certify. The bundle has points at twice, three and five times this risk too, for a server under load.
        minutes: for all of it, roughly; training takes what answers and trial leave.
        preprocessing: of the model; without it, of a JSON file beside it, or of timm's model. For another torch module
            with size, mean and std.
        loss: by which the front is trained; one that asks where the teacher is wrong takes, without labels, the images
            of which it is unsure.
        resume: continue what was stopped.

    Raises:
        UserError: a model or images that cannot be used, a folder that is there already or that another process works in,
            a risk that is none.
    """
    started = time.monotonic()
    settings = _settings(max_risk)  # as the next: what is wrong is said before hours of work
    resolve_loss(loss)
    check_minutes(minutes)
    check_seed(seed)
    if isinstance(model, nn.Module):
        with as_onnx_file(model, preprocessing) as (path, preprocessing):
            return accelerate(
                path, images, out, held_out=held_out, max_risk=max_risk, minutes=minutes,
                preprocessing=preprocessing, classes=classes, loss=loss, seed=seed, resume=resume,
            )  # fmt: skip
    out, model = Path(out), Path(model)
    network = open_network(model, preprocessing)
    if network.manifest is not None:
        raise UserError(
            f"{model} is a bundle: give the ONNX file of a classifier; erde cascade chains bundles"
        )
    for note in network.notes:
        progress.say(note)
    names = class_names([network], classes)
    pool = read_pool(Path(images), names)
    others = None if held_out is None else read_pool(Path(held_out), names)
    asked = {
        "erde": erde_version(),
        "model": file_hash(model),
        "preprocessing": network.origin["preprocessing"],
        "images": pool.fingerprint,
        "order": ORDER,
        "held_out": None if others is None else others.fingerprint,
        "max_risk": max_risk,
        "loss": loss,
        "seed": seed,
        "classes": names,
    }
    _check_place(out, asked, resume)
    load = partial(load_material, pool, others, common_shape([network]), seed, max_risk)
    if not resume:
        # Images that are refused leave no folder.
        material = load()
        make_folder(out)
    with Lock(out / LOCK, str(out)):
        # Another process may have been quicker.
        _check_place(out, asked, resume)
        sweep_leftovers(out)
        if resume:
            material = load()
        else:
            write_json(out / SETTINGS, asked)
        work = _Work(out, network, names, material, loss, seed)
        front = work.train_front(minutes, 60 * minutes - (time.monotonic() - started))
        return work.finish(front, settings)


def _settings(max_risk: float) -> Settings:
    """Of the calibration: ``max_risk`` first, then the rest of the ladder as far as it is a risk."""
    risks = [round(times * max_risk, 12) for times in LADDER]
    return validate(Settings, {"max_risks": [risks[0], *(risk for risk in risks[1:] if risk < 1)]})


def _check_place(out: Path, asked: dict[str, Any], resume: bool) -> None:
    """Refuse a folder that is there already, or to continue what was begun otherwise."""
    path = out / SETTINGS
    if not resume:
        # A start that was killed leaves its lock's file, and perhaps half of the settings.
        others = [path for path in out.iterdir() if path.name != LOCK] if out.is_dir() else [out]
        if out.exists() and not all(map(is_leftover, others)):
            raise UserError(
                f"{out} is there already: give another place with --out, or continue with --resume"
            )
        return
    if not path.is_file():
        raise UserError(f"{out} holds nothing that could be continued: leave out --resume")
    begun = _read(path)
    # A front that is trained needs none of what goes by it.
    if begun.get("order") != ORDER and not (out / FRONT).exists():
        raise UserError(
            f"{out} was begun with an earlier version of erde, which took the images in another order: begin anew with "
            "another --out"
        )
    changed = [key for key in asked if key not in ("erde", "order") and begun.get(key) != asked[key]]
    if changed:
        raise UserError(
            f"{out} was begun with other settings ({', '.join(changed)}): give them again as they were, or another --out"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: remove {path.parent} and begin anew") from error
    return value


class _Work:
    """One acceleration in its folder."""

    def __init__(
        self, out: Path, network: Network, names: list[str], material: Material, loss: str, seed: int
    ) -> None:
        self.out, self.network, self.names, self.material = out, network, names, material
        self.loss, self.seed = loss, seed
        self.stage = out / "model" / "stage_0.onnx"
        if not self.stage.exists():
            make_folder(self.stage.parent)
            network.write(network.stages, self.stage.parent, common_shape([network]))

    def data(self) -> DataSplits:
        """The splits of the training; where images have no labels, train has the model's answers."""
        material = self.material
        labels = material.train_labels
        if (labels == UNKNOWN).any():
            labels = self._answers().argmax(axis=-1).astype(np.int64)
        train = TrainSplit(material.train, labels)
        mean, std = measure_pixels(train, material.train.shape[-1])
        splits = material.calibration.splits
        return DataSplits(
            "images", train, splits.tune, splits.certify, material.test, tuple(self.names), mean, std
        )

    def _answers(self) -> NDArray[np.float32]:
        path = self.out / ANSWERS
        if not path.exists():
            logits = answers(self.stage, self.material.train, "answers of the model")
            with replacing_file(path) as partial, partial.open("wb") as file:
                np.save(file, logits, allow_pickle=False)
        return np.asarray(np.load(path, allow_pickle=False), dtype=np.float32)

    def train_front(self, minutes: float, seconds: float) -> Path:
        """The front's bundle; of the ``minutes`` that were asked for, ``seconds`` are left."""
        folder = self.out / FRONT
        if folder.exists():
            return folder
        started = time.monotonic()
        data = self.data()
        plan = self.out / PLAN
        if not plan.exists():
            tune_images = np.asarray(data.tune.images[:])
            asked = time.monotonic()
            tune = answers(self.stage, tune_images, "answers to tune")
            per_answer = (time.monotonic() - asked) / len(tune_images)
            left = seconds - (time.monotonic() - started)
            path = self.out / TRIAL
            if not path.exists():
                views = affordable_views(len(data.train), per_answer, left)
                few = affordable_trial(len(data.train), views, per_answer, left)
                mirrored = answers_alike_mirrored(self.stage, tune_images, tune)
                trained = {"epochs": trial_epochs(minutes), "images": few}
                write_json(path, {**trained, "mirrored": mirrored, "views": views})
            # A trial that was stopped goes on as it began: fronts that were trained otherwise cannot be compared.
            begun = _read(path)
            mirrored, views = begun["mirrored"], begun["views"]
            training = self._training(data, mirrored, views)
            fronts = candidates(data, 0 if self.network.uncounted else self.network.macs, self.seed)
            alone = milliseconds_of(self.stage, tune_images[:256])
            front, per_image = trial(
                fronts, training, self.out / "trial", tune, alone, begun["epochs"], begun["images"]
            )
            left = seconds - (time.monotonic() - started) - views * len(data.train) * per_answer
            left *= TRAINING_SHARE
            epochs = int(left / max(1e-9, per_image * len(data.train)))
            epochs = min(max(epochs, FEWEST_EPOCHS), MOST_EPOCHS)
            choice = {"backbone": front.backbone, "reduction": front.reduction, "epochs": epochs}
            write_json(plan, {**choice, "mirrored": mirrored, "views": views})
        chosen = _read(plan)
        front = Front(chosen["backbone"], chosen["reduction"])
        progress.say(f"front: {front.name}, {chosen['epochs']} epochs")
        built = front.build(data, self.seed)
        training = self._training(data, chosen.get("mirrored", True), chosen.get("views", VIEWS))
        training.train(built, front.name, self.out / "training", chosen["epochs"], None)
        return export(built, data, folder, name=front.name)

    def _training(self, data: DataSplits, mirrored: bool, views: int) -> Training:
        loss = resolve_loss(self.loss)
        if isinstance(loss, ERDEConfig) and (self.material.train_labels == UNKNOWN).any():
            # Its own answers are the labels, so only a doubt, or another answer to a changed image, can be an error.
            loss = loss.model_copy(update={"wrong_test": "uncertain"})
        teacher = onnx_teacher(self.stage, data.mean, data.std)
        return Training(data, teacher, self.out / "teacher-cache", loss, mirrored, views, self.seed)

    def finish(self, front: Path, settings: Settings) -> Accelerated:
        """Chain, calibrate, measure and report."""
        bundle = self.out / "bundle"
        if not bundle.exists():
            networks = [bundle_network(front, read(front)), self.network]
            seal_chain(networks, self.material.calibration, self.names, settings, bundle)
        session = Session(bundle, threads=1)
        point = session.manifest.point(None)
        test_images = np.asarray(self.material.test.images[:])
        measured = self._measure(session, point)
        session.profile(images=test_images[:256], batch_sizes=(1, 8, 32), rounds=20)
        raced = bench(
            bundle, test_images[:2000], data="images that chose nothing", against=[], points=[point.name],
            batch_sizes=(1,), threads=(1,), rounds=BENCH_ROUNDS, seed=self.seed,
        )  # fmt: skip
        raced.write(self.out / BENCH)
        result = _result(bundle, point, measured, raced)
        page = chain_page(
            session.manifest,
            session.cost(),
            measured,
            " ".join(result.lines()[::2]),
            _clock(raced),
            _about(raced),
        )
        write_text(self.out / REPORT, page)
        # What only a training that goes on would need.
        for leftover in ("trial", "teacher-cache"):
            shutil.rmtree(self.out / leftover, ignore_errors=True)
        return result

    def _measure(self, session: Session, point: OperatingPoint) -> Measured | Agreement:
        """The default point on test, by labels where there are some."""
        labelled = self.material.calibration.labelled
        test = TestLogits(session.all_logits(self.material.test.images), self.material.test.labels)
        test = test if labelled else answers_as_labels(test)
        swept = sweep(ScoredSplit.of(test, session.rule, None), [point.thresholds])
        return swept.measured(0, session.cost()) if labelled else swept.agreement(0, session.cost())


def _result(bundle: Path, point: OperatingPoint, measured: Measured | Agreement, raced: Bench) -> Accelerated:
    by_name = {row.contender: row for row in raced.measurements}
    before, after = by_name["no-exit"], by_name[point.name]
    return Accelerated(
        bundle=bundle,
        point=point,
        test=measured,
        before_ms=_mean(before, before),
        after_ms=_mean(after, before),
        median_times=before.p50 / after.p50,
    )


def _mean(row: Measurement, alone: Measurement) -> float:
    """Milliseconds an image, by the ratio within a round, which a busy moment hardly moves."""
    # Of calls of one image each: images per second are the mean.
    return 1e3 / alone.images_per_second * row.time_share


def _clock(raced: Bench) -> list[ClockRow]:
    names = {"no-exit": "the last network alone"}
    (alone,) = [row for row in raced.measurements if row.contender == "no-exit"]
    return [
        ClockRow(
            names.get(row.contender, row.contender),
            _mean(row, alone),
            row.p50,
            row.p95,
            row.time_share,
        )
        for row in raced.measurements
    ]


def _about(raced: Bench) -> str:
    return (
        f"All took turns on the same {raced.images:,} images, which chose nothing, in {raced.rounds} rounds, on "
        f"{raced.machine['cpu']}."
    )
