"""The recipe: one frozen, typed tree. A recipe file, the command line and Python fill in the same keys.

Unknown keys and wrong types are errors that name the key, the nearest valid one and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, PrivateAttr, field_validator, model_validator

from erde.common.errors import UserError, nearest
from erde.common.model import Frozen
from erde.policy.points import Guarantee, Reference
from erde.policy.rule import SCORES
from erde.recipe.backbones import check_backbone_name
from erde.recipe.losses import AnyLoss, CrossEntropyConfig, LossConfig
from erde.recipe.types import (
    MAX_THREADS,
    Count,
    CropShare,
    NotNegative,
    OpenShare,
    Positive,
    Section,
    Share,
    SmallShare,
)
from erde.recipe.validation import Model, validate

# The name of the teacher among the arms of a run.
TEACHER = "teacher"
# Of ONNX, the lowest and the highest that stages are written in.
OPSETS = (18, 23)
# Keys of `train` that are not passed on to the teacher: arms that are compared share it.
STUDENTS_ONLY = ("image_weights", "gradient_equilibrium", "freeze_backbone")
# Keys that leave the results as they are: a run may go on with others, group and key.
FREE_TO_CHANGE = (
    ("train", "together"),
    ("train", "checkpoint_seconds"),
    ("train", "tensorboard"),
    ("teacher", "cache"),
    ("data", "workers"),
    ("data", "memory_limit_gib"),
    ("data", "skip_unreadable"),  # what it leaves out would show in splits.json
)


class AugmentationConfig(Section):
    """Batched augmentation of training images, on the device."""

    crop_padding: int = Field(4, ge=0, le=1024)
    """Pixels of black padding before a random crop. 0: no crop."""
    flip: bool = True
    """Flip half of the images left to right, at random."""
    cutout: int = Field(0, ge=0, le=4096)
    """Side, in pixels, of a square at a random place that is set to the mean colour. 0: none."""
    views: Count | None = None
    """Show each image in this many of its flips and shifts, always the same ones. `null`: in all of them. Not with
    `cutout` or `resized_crop`."""
    resized_crop: tuple[CropShare, CropShare] | None = None
    """Train on random parts of the images. The two numbers are the least and the largest share of the image's area. For
    streamed sets. It replaces `crop_padding`, which is then 0."""

    @model_validator(mode="before")
    @classmethod
    def _one_crop(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("resized_crop") is not None:
            return {"crop_padding": 0, **value}
        return value

    @model_validator(mode="after")
    def _finite(self) -> AugmentationConfig:
        if self.views is not None and self.cutout:
            raise ValueError(
                "views counts flips and shifts, and cutout has places without number: set one of them"
            )
        if self.views is not None and self.resized_crop is not None:
            raise ValueError(
                "views counts flips and shifts, and resized_crop has parts without number: set one of them"
            )
        return self

    @model_validator(mode="after")
    def _crops(self) -> AugmentationConfig:
        if self.resized_crop is not None and self.resized_crop[0] > self.resized_crop[1]:
            raise ValueError(f"resized_crop is {list(self.resized_crop)}: expected the lower share first")
        if self.resized_crop is not None and self.crop_padding:
            raise ValueError(
                f"resized_crop and crop_padding={self.crop_padding} are two ways to crop: leave one of them out"
            )
        return self


class DataConfig(Section):
    """The images and their splits."""

    name: str = "digits"
    """A shipped name (`erde list datasets`), a folder, or a Hugging Face hub id such as `owner/name`."""
    image_column: str | None = None
    """Column of the images. `null`: `image`, `img`, or any column of images."""
    label_column: str | None = None
    """Column of the labels, which are integers from 0 or a class label type. `null`: `label`, `labels`, `fine_label`,
    `class` or `target`."""
    group: str | None = None
    """Column of groups that are never split, such as a video or a patient."""
    channels: Literal[1, 3] = 3
    """Channels that the networks take. Colour images become gray, gray ones become colour, and transparency is dropped.
    `digits` always has 1."""
    image_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Pixels a side. Images are resized so that they cover it, then cropped at the centre. `null`: the images' own size,
    which must be the same for all. Ignored by `digits`."""
    train_subset: Count | None = None
    """Train images that the students see. The other splits stay whole."""
    split_seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seed of the four splits. If it is set, runs with different `seed` have the same splits and can share a teacher and
    its cache. `null`: the recipe's `seed`."""
    tune_size: Count = 2500
    """Images of tune."""
    certify_size: Count = 2500
    """Images of certify."""
    test_size: Count = 2500
    """Images of test, if the data set has no test split of its own."""
    held_out: Literal["train", "test"] = "train"
    """Where tune and certify are taken from. `test`: for weights that were trained elsewhere and have seen all train
    images; test is then what is left of it."""
    mean: list[float] | None = None
    """Mean per channel, of pixels divided by 255. `null`: measured on train."""
    std: list[Positive] | None = None
    """Standard deviation per channel, likewise. At least 0.001 is used."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Random changes of the train images."""
    streaming: Literal["auto", "always", "never"] = "auto"
    """Decode images while training instead of keeping them in memory. `auto`: by `memory_limit_gib`. Ignored by
    `digits`."""
    memory_limit_gib: Positive = 4.0
    """With `streaming: auto`, a set is streamed if the decoded images of its larger split take more than this, in GiB, or
    if `augmentation.resized_crop` is set."""
    workers: int = Field(2, ge=0, le=256)
    """Processes that decode images of streamed sets."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and name them. `false`: stop at the first. A streamed set is decoded once at
    the start for this."""

    @model_validator(mode="after")
    def _encoded_for_crops(self) -> DataConfig:
        if self.augmentation.resized_crop is None:
            return self
        if self.name == "digits" or self.streaming == "never":
            reason = "'digits' has no files" if self.name == "digits" else "data.streaming is 'never'"
            raise ValueError(
                f"augmentation.resized_crop cuts parts from image files while training, and {reason}: "
                "use augmentation.crop_padding"
            )
        return self


class NetworkConfig(Section):
    """An early-exit network; ``exits: 1`` is a plain network."""

    backbone: str = "resnet20"
    """A name of `erde list backbones`, or `timm/<name>` for any classifier of timm's."""
    exits: Count | Literal["auto"] | Annotated[list[str], Field(min_length=1)] = 3
    """Number of exits, the final one included, at about equal shares of the MACs. Or the blocks or groups (`group1`)
    that the intermediate exits follow; for timm's models, paths of modules (`layer1`, `blocks.3`). `1`: a plain
    network. `auto`, for students: train up to 8 exits, then keep those that save most milliseconds on tune."""
    head: Literal["auto", "erde", "linear", "conv", "tower", "native"] = "auto"
    """Intermediate heads. `auto`: the backbone's own heads if it has some, else `erde` on erde's backbones and a head
    by shape on others. `tower`: a small convolutional network, for early maps."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout of the intermediate heads in training."""
    boosted: bool = False
    """Each exit adds its logits to half of those of the exit before, and learns what that one left over. Not with
    `train.backbone_epochs`, `freeze_backbone` or `refit_heads`."""
    weights: str | None = None
    """A safetensors file to start from: a checkpoint of erde, or a plain state dict of the network with its exits."""
    pretrained: bool = False
    """Start from timm's own weights, from its cache or the network. Only for `timm/<name>`. `weights` takes
    precedence."""


class TrainConfig(Section):
    """The training loop, the same for all arms."""

    epochs: Annotated[int, Field(ge=1, le=1_000_000)] = 60
    """Passes over the train images."""
    batch_size: Count = 128
    """Images per step, of all processes together. A last batch that is not full is dropped."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` uses Nesterov momentum."""
    learning_rate: Positive = 0.1
    """Peak learning rate. The default suits `sgd`; set it for `adamw`."""
    momentum: Share = 0.9
    """Momentum of `sgd`."""
    weight_decay: NotNegative = 5e-4
    """Weight decay."""
    schedule: Literal["cosine", "step", "onecycle"] = "cosine"
    """Schedule of the learning rate."""
    warmup_epochs: NotNegative = 1.0
    """Epochs of linear rise from 0 at the start. With `onecycle`: the rising part."""
    milestones: list[OpenShare] = Field([0.625, 0.75, 0.875])
    """For `step`: shares of the training after which the learning rate drops."""
    gamma: Positive = 0.1
    """For `step`: the factor at each milestone."""
    accumulate: Count = 1
    """Compute each batch in this many parts, for less memory. The gradient is the same but for what sees one part at a
    time: batch norm, `image_weights: reached`, and the losses that keep what they have seen, `crd` and, with
    `warmup_epochs`, `dkd`."""
    ema: OpenShare | None = None
    """Decay of a moving average of the weights, which becomes the trained network."""
    gradient_clip: Positive | None = None
    """Largest norm of the whole gradient."""
    image_weights: Literal["equal", "reached"] = "equal"
    """Weights of images in the loss of each exit. `reached`: those that would not be answered before it count twice
    as much as the others. Of a teacher only if `teacher.train` says so. Not for losses that compare features."""
    gradient_equilibrium: bool = False
    """Train each stage by the mean of the losses of the exits behind it, not by their sum. Of a teacher only if
    `teacher.train` says so."""
    label_smoothing: SmallShare = 0.0
    """Label smoothing of the loss `ce` only. Distilling arms have `distillation.label_smoothing`."""
    backbone_epochs: int = Field(0, ge=0)
    """The first of `epochs`, which train the final exit alone. The others train all exits together. Each part has its own
    schedule. Fewer than `epochs`, unless the network has one exit."""
    freeze_backbone: bool = False
    """Train the intermediate heads only, after `backbone_epochs` or from the start. A network with one exit is trained
    whole, and a teacher too, unless `teacher.train` says otherwise."""
    refit_heads: int = Field(0, ge=0)
    """Further epochs that train new intermediate heads on the finished backbone."""
    channels_last: bool = True
    """Memory layout of images and features: channels last."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bfloat16 autocast on a GPU that has bfloat16, float32 elsewhere."""
    compile: bool = False
    """Use `torch.compile`. The first steps then take minutes."""
    together: bool = False
    """Train all arms in one go. Batches and the teacher's answers are then made once for all."""
    tensorboard: bool = False
    """Write scalars per epoch to `arms/<arm>/tensorboard`."""
    checkpoint_seconds: NotNegative = 30.0
    """Least time between checkpoints within a phase."""

    @model_validator(mode="after")
    def _phases(self) -> TrainConfig:
        if self.backbone_epochs > self.epochs:
            raise ValueError(f"backbone_epochs ({self.backbone_epochs}) exceeds epochs ({self.epochs})")
        return self


def check_phases(where: str, train: TrainConfig, has_early_exits: bool) -> None:
    """Raise if the early exits of a network would never be trained."""
    if has_early_exits and train.backbone_epochs == train.epochs:
        raise UserError(
            f"{where}: train.backbone_epochs is {train.backbone_epochs}, as many as train.epochs, so that the early exits "
            "would never be trained: lower it, or raise train.epochs"
        )


class DistillationConfig(Section):
    """The settings that all distilling methods of a run share, so that methods differ by their losses alone."""

    alpha: Share | list[Share] | Literal["rising"] = "rising"
    """Weight of the distillation term. A list: per exit of the student. `rising`: 0.2 to 0.9, linear in MACs."""
    temperature: Positive = 4.0
    """Temperature T of the softened answers."""
    pairing: Literal["exit", "final"] = "exit"
    """`exit`: teacher exit i teaches student exit i, or the exit at the nearest relative depth. `final`: the teacher's
    final exit teaches all."""
    exit_weights: Literal["uniform", "linear", "macs"] | list[NotNegative] = "uniform"
    """Weight of each exit's loss. A list: per exit of the student. `ce` arms use it too."""
    label_smoothing: SmallShare = 0.0
    """Label smoothing in the cross-entropy of distilling arms."""


class TeacherConfig(NetworkConfig):
    """The teacher: an early-exit network, trained with cross-entropy by the same loop."""

    backbone: str = "resnet56"
    """As of `student`."""
    train: dict[str, Any] = Field({})
    """Keys of `train` that differ for the teacher."""
    train_subset: Count | None = None
    """Train images that the teacher sees. `null`: all. With `disjoint`: all others."""
    disjoint: bool = False
    """Take the teacher's images from outside `data.train_subset`, which must then be set."""
    cross_fit: Annotated[int, Field(ge=2)] | None = None
    """Divide the train images into this many parts, every class evenly, and train one more teacher for each part on the
    others. For losses that need a teacher's answers to images that it did not see (`erde` with `wrong_test: held_out`).
    The parts are cut by image, whatever `data.group` is."""
    cache: bool | str = False
    """Keep the teacher's answers to each view of each image on disk. `true`: in `<run>/teacher-cache`. A folder: runs
    can share it."""
    trained: bool = False
    """`weights` hold a teacher that was trained elsewhere. It is measured and used as it is. `train`, `train_subset`,
    `disjoint` and `cross_fit` are then refused."""
    match: Literal["name", "order"] = "name"
    """Match the tensors of a `trained` teacher by name or by order."""
    mean: list[float] | None = None
    """Mean per channel that a `trained` teacher's inputs were normalised with. `null`: that of the data."""
    std: list[Positive] | None = None
    """Standard deviation, likewise. Give both or neither."""
    classes: list[str] | None = None
    """Classes in the order of a `trained` teacher's outputs. `null`: the order of the data."""

    @model_validator(mode="after")
    def _as_it_is(self) -> TeacherConfig:
        if self.exits == "auto":
            raise ValueError(
                "exits is 'auto', which is for students, whose exits are chosen by their time: give the teacher a number of "
                "exits or their places"
            )
        if self.disjoint and self.cross_fit is not None:
            raise ValueError(
                "disjoint and cross_fit are two ways to images that a teacher did not see: leave one out"
            )
        if not self.trained:
            for key in ("mean", "std", "classes"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key} is for a teacher that was trained elsewhere: set trained, or leave it out"
                    )
            if self.match != "name":
                raise ValueError(
                    "match is for a teacher that was trained elsewhere: set trained, or leave it out"
                )
            return self
        if self.weights is None:
            raise ValueError("trained asks for a teacher that is used as it is: name its file in weights")
        for key in ("train", "train_subset", "disjoint", "cross_fit"):
            if getattr(self, key):
                raise ValueError(f"trained says that the teacher is not trained here: leave out {key}")
        return self


class ArmConfig(Section):
    """A network to train beside the others: its loss, and where its network differs from ``student``."""

    loss: AnyLoss
    """A name of `erde list losses`, or a mapping with `name` and the loss's own keys."""
    student: dict[str, Any] = Field({})
    """Keys of `student` that differ for this arm."""
    distillation: dict[str, Any] = Field({})
    """Keys of `distillation` that differ for this arm."""


class ExportConfig(Section):
    """The arm that becomes the bundle, and its precisions."""

    arm: str = "erde"
    """The arm whose bundle is written. Left out, and without an arm `erde`: the only arm with early exits."""
    opset: Annotated[int, Field(ge=OPSETS[0], le=OPSETS[1])] = 18
    """ONNX operator set."""
    precisions: list[Literal["fp32", "int8"]] = Field(["fp32"])
    """Precisions of the exported arm, each once. `fp32` must be there. With `int8` the arm also becomes an arm and a
    bundle in int8."""

    @model_validator(mode="after")
    def _each_once(self) -> ExportConfig:
        if len(set(self.precisions)) != len(self.precisions):
            raise ValueError("each of precisions once")
        if "fp32" not in self.precisions:
            raise ValueError("precisions must hold fp32: int8 is made from it")
        return self

    @property
    def int8_arm(self) -> str | None:
        """The name of ``arm`` in int8, where that is asked for."""
        return f"{self.arm}-int8" if "int8" in self.precisions else None


class CalibrationConfig(Section):
    """Thresholds: what is promised, against what, and which exit rules are tried.

    The one definition of these settings: recipes, the command line and ``erde.calibrate`` all fill it in.
    """

    max_risks: Annotated[tuple[OpenShare, ...], Field(min_length=1)] = (
        0.01,
        0.0025,
        0.005,
        0.02,
        0.03,
        0.05,
    )
    """One certified operating point for each. The first is the default one, and the score is chosen for it. At least
    one, each once."""
    confidence: OpenShare = 0.9
    """Confidence of each certificate."""
    budgets: tuple[OpenShare, ...] = ()
    """One operating point for each: mean MACs on tune, as a share of the network without exits. Not certified. Every arm
    with exits must be able to meet it."""
    reference: Literal["final_exit", "no_exit_network", "teacher"] = "final_exit"
    """The answers with which early answers are compared. `no_exit_network` needs an arm with the backbone of `student`
    and `exits: 1`."""
    guarantee: Guarantee = "risk"
    """The promise of a certificate. `risk`: few images are lost. `net_drop`: accuracy drops little; images won count
    too. `expected_risk`: conformal, without a confidence. `disagreement`: few images get another answer than from the
    full network; no label is looked at."""
    score: str = "auto"
    """The score on which exits decide, a name of `erde list scores`. `auto`: the score that saves most MACs on tune, at
    the first of `max_risks`."""
    sharpness: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None
    """Sharpness of the score. `null`: chosen on tune."""
    ensemble: Literal["auto", "none", "arithmetic", "geometric"] = "auto"
    """Ensemble of the exits so far. `auto`: `none`."""

    @field_validator("score")
    @classmethod
    def _known(cls, score: str) -> str:
        if score not in ("auto", *SCORES):
            raise ValueError(f"unknown score '{score}'{nearest(score, ['auto', *SCORES])}")
        return score

    @field_validator("max_risks", "budgets")
    @classmethod
    def _each_once(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        # Compared as operating points are named.
        if len({f"{100 * value:g}" for value in values}) != len(values):
            raise ValueError(f"expected each once, got {list(values)}")
        return values

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.score in ("energy", "patience", "harm") and self.ensemble not in ("auto", "none"):
            why = "reads raw logits" if self.score == "energy" else "looks at earlier exits by itself"
            raise ValueError(f"the score '{self.score}' {why}: it has no {self.ensemble} ensemble")
        check_guarantee(self.guarantee, self.reference)
        return self


def check_guarantee(guarantee: Guarantee, reference: Reference) -> None:
    """:class:`UserError` for a guarantee that does not hold against ``reference``."""
    if guarantee == "expected_risk" and reference != "final_exit":
        raise UserError(
            f"the guarantee 'expected_risk' needs the reference 'final_exit', got '{reference}': against any other even a "
            "network without early exits may lose images; ask for 'risk'"
        )
    if guarantee == "disagreement" and reference not in ("final_exit", "fallback"):
        raise UserError(
            f"the guarantee 'disagreement' needs the reference 'final_exit', got '{reference}': it compares answers with "
            "those of the network's own last exit"
        )


def _is_plain(student: Any, arm: Any) -> bool:
    """Whether an arm of a recipe that is not checked yet has one exit."""
    own = arm.get("student") if isinstance(arm, Mapping) else None
    exits = [
        network["exits"] for network in (own, student) if isinstance(network, Mapping) and "exits" in network
    ]
    return bool(exits) and exits[0] == 1


class CascadeConfig(Section):
    """A chain of networks, whose front is the exported arm."""

    fallback: Literal["teacher"] = "teacher"
    """The network that answers what the front is not sure of, and that the promise is held against."""


class Config(Section):
    """A recipe.

    The teacher and the arms may override keys of the shared sections. Overrides are merged and checked when the recipe
    is read; :meth:`train_of`, :meth:`network_of` and :meth:`distillation_of` give the result.
    """

    name: str = "run"
    """Name of the run and, with the arm's, of the bundle."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Decides splits, first weights, order, augmentation and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks are trained. `auto`: on a GPU if torch sees one."""
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)] | None = None
    """CPU threads of torch and ONNX Runtime. `null`: all CPUs that the process may use."""
    data: DataConfig = DataConfig()
    """The images and their splits."""
    teacher: TeacherConfig = TeacherConfig()
    """The teacher. It is trained only if an arm learns from it, `calibration.reference` is `teacher`, or there is
    a `cascade`."""
    student: NetworkConfig = NetworkConfig()
    """The network of the arms."""
    distillation: DistillationConfig = DistillationConfig()
    """Settings that the distilling losses share."""
    train: TrainConfig = TrainConfig()
    """The training loop."""
    arms: dict[str, ArmConfig]
    """The networks to train, by name."""
    export: ExportConfig = ExportConfig()
    """The arm that becomes the bundle."""
    calibration: CalibrationConfig = CalibrationConfig()
    """The promises, and the exit rules that are tried."""
    cascade: CascadeConfig | None = None
    """Keep the teacher behind the students: `cascade: {}` measures each student in front of it, and seals the exported
    one's chain as `bundle-cascade`."""

    _teacher_train: TrainConfig = PrivateAttr()
    _students: dict[str, NetworkConfig] = PrivateAttr()
    _distillations: dict[str, DistillationConfig] = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _only_arm(cls, value: Any) -> Any:
        """Let ``export.arm`` be the only arm with early exits, if the recipe does not name an arm."""
        if not isinstance(value, Mapping) or not isinstance(value.get("arms"), Mapping):
            return value
        export, arms = value.get("export", {}), value["arms"]
        if not isinstance(export, Mapping) or "arm" in export or ExportConfig().arm in arms:
            return value
        plain = [arm for arm, about in arms.items() if _is_plain(value.get("student"), about)]
        early = [arm for arm in arms if arm not in plain]
        return {**value, "export": {**export, "arm": early[0]}} if len(early) == 1 else value

    @model_validator(mode="after")
    def _resolve(self) -> Config:
        def merge(model: type[Model], shared: Frozen, own: dict[str, Any], where: str) -> Model:
            return validate(model, {**shared.model_dump(), **own}, prefix=f"{where}.")

        of_students = {key: TrainConfig.model_fields[key].default for key in STUDENTS_ONLY}
        self._teacher_train = merge(
            TrainConfig, self.train, {**of_students, **self.teacher.train}, "teacher.train"
        )
        self._students = {
            name: merge(NetworkConfig, self.student, arm.student, f"arms.{name}.student")
            for name, arm in self.arms.items()
        }
        self._distillations = {
            name: merge(DistillationConfig, self.distillation, arm.distillation, f"arms.{name}.distillation")
            for name, arm in self.arms.items()
        }
        return self

    @model_validator(mode="after")
    def _cross_references(self) -> Config:
        if self.teacher.cache and (self.data.augmentation.cutout or self.data.augmentation.resized_crop):
            raise UserError(
                "teacher.cache needs views that can be numbered, and cutout and resized_crop have endless ones: set "
                "data.augmentation.cutout=0 and leave resized_crop out, or set teacher.cache=false"
            )
        if self.teacher.cross_fit is not None and not self.held_out_arms:
            raise UserError(
                "teacher.cross_fit is set, and no arm asks for held-out predictions: give an arm erde's "
                "wrong_test: held_out, or leave cross_fit out"
            )
        if self.export.arm not in self.arms:
            raise UserError(
                f"export.arm is '{self.export.arm}', which is not an arm{nearest(self.export.arm, self.arms)}"
            )
        for arm in self.arms:
            if arm == TEACHER or not arm.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise UserError(
                    f"'{arm}' cannot name an arm: letters, digits, '-', '_' and '.', and not 'teacher'"
                )
        if self.export.int8_arm in self.arms:
            raise UserError(
                f"'{self.export.int8_arm}' cannot name an arm: with export.precisions int8 it is what "
                f"'{self.export.arm}' is called in int8"
            )
        networks = {TEACHER: self.teacher, "student": self.student}
        networks |= {f"arms.{arm}.student": student for arm, student in self._students.items()}
        for where, network in networks.items():
            try:
                check_backbone_name(network.backbone)
            except UserError as error:
                raise UserError(f"{where}.backbone: {error}") from error
        for where, network, train in (
            ("teacher", self.teacher, self._teacher_train),
            *((f"arm '{arm}'", student, self.train) for arm, student in self._students.items()),
        ):
            check_phases(where, train, network.exits != 1)
            if network.boosted and network.exits == "auto":
                raise UserError(
                    f"{where}: boosted exits add to the answers of those before them, so that exits=auto could drop none: "
                    "give a number of exits or their places, or set boosted=false"
                )
        if self.calibration.reference == "no_exit_network":
            self.no_exit_arm()
        if self.cascade is not None and self.teacher.boosted:
            raise UserError(
                "teacher.boosted and cascade do not go together: behind a front the teacher has no early exits, whose logits "
                "boosted exits add up; set teacher.boosted=false"
            )
        return self

    def no_exit_arm(self) -> str:
        """The arm that is the students' backbone without exits, for ``calibration.reference: no_exit_network``."""
        for arm in self.arms:
            network = self._students[arm]
            if network.exits == 1 and network.backbone == self.student.backbone:
                return arm
        raise UserError(
            "calibration.reference is 'no_exit_network', and no arm trains it: add an arm with "
            "loss: ce and student: {exits: 1}"
        )

    def changed(self, **sections: Any) -> Config:
        """This recipe with other sections, checked again; keys that were not set stay unset."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return validate(Config, {**given, **sections})

    def train_of(self, arm: str) -> TrainConfig:
        """The training of an arm, or of the teacher."""
        return self._teacher_train if arm == TEACHER else self.train

    def network_of(self, arm: str) -> NetworkConfig:
        """The network of an arm, of the exported one in int8, or of the teacher."""
        return self.teacher if arm == TEACHER else self._students[self.trained_as(arm)]

    def distillation_of(self, arm: str) -> DistillationConfig:
        """The distillation of an arm; the teacher has none of its own."""
        return DistillationConfig() if arm == TEACHER else self._distillations[arm]

    def loss_of(self, arm: str) -> LossConfig:
        """The loss of an arm; the teacher's is cross-entropy."""
        return CrossEntropyConfig() if arm == TEACHER else self.arms[arm].loss

    @property
    def needs_teacher(self) -> bool:
        """Whether an arm learns from a teacher, is compared with it, or stands in front of it."""
        learns = any(arm.loss.needs_teacher for arm in self.arms.values())
        return learns or self.calibration.reference == TEACHER or self.cascade is not None

    @property
    def trained_arms(self) -> list[str]:
        """All arms that are trained, the teacher first."""
        return [*([TEACHER] if self.needs_teacher else []), *self.arms]

    @property
    def held_out_arms(self) -> list[str]:
        """Arms whose loss asks for the teacher's held-out predictions."""
        return [name for name, arm in self.arms.items() if "held_out_logits" in arm.loss.extras]

    @property
    def measured_arms(self) -> list[str]:
        """All arms with logits of their own; the int8 variant stands right after its float arm."""
        arms = []
        for arm in self.trained_arms:
            arms.append(arm)
            if arm == self.export.arm and self.export.int8_arm is not None:
                arms.append(self.export.int8_arm)
        return arms

    def trained_as(self, arm: str) -> str:
        """The arm whose training made ``arm``: another one for int8 only."""
        return self.export.arm if arm == self.export.int8_arm else arm

    def to_yaml(self) -> str:
        """The resolved recipe, as a file that :func:`load_config` reads back to an equal tree."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
