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
    Share,
    SmallShare,
)
from erde.recipe.validation import Model, validate

# The name of the teacher among the arms of a run.
TEACHER = "teacher"


class AugmentationConfig(Frozen):
    """Batched augmentation of training images, on the device."""

    crop_padding: int = Field(4, ge=0, le=1024, description="pixels of zero padding before a random crop")
    flip: bool = Field(True, description="flip left to right, every second time")
    cutout: int = Field(0, ge=0, le=4096, description="side of a square set to the mean colour, in pixels")
    views: Count | None = Field(
        None,
        description="each image in so many of its flips and shifts, always the same; None: in all of them",
    )
    resized_crop: tuple[CropShare, CropShare] | None = Field(
        None,
        description="least and largest share of the image's area that a random part has; it takes the place of crop_padding",
    )

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


class DataConfig(Frozen):
    """The images and their splits."""

    name: str = Field("digits", description="a shipped name, a hub id, or a folder")
    image_column: str | None = None
    label_column: str | None = None
    group: str | None = Field(
        None, description="column whose equal values stay in one split: a video, a patient"
    )
    channels: Literal[1, 3] = 3
    image_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="pixels a side, at most 4096; None keeps the images' own size"
    )
    train_subset: Count | None = Field(
        None, description="images of train that students see; limits train only"
    )
    split_seed: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="of the four splits; None: seed. Set, runs with other seeds have the same splits"
    )
    tune_size: Count = 2500
    certify_size: Count = 2500
    test_size: Count = Field(2500, description="only used where the data set has no test split of its own")
    mean: list[float] | None = Field(None, description="per channel, of x/255; None measures it on train")
    std: list[Positive] | None = None
    augmentation: AugmentationConfig = AugmentationConfig()
    streaming: Literal["auto", "always", "never"] = "auto"
    memory_limit_gib: Positive = Field(4.0, description="larger sets are streamed by a DataLoader")
    workers: int = Field(2, ge=0, le=256, description="DataLoader processes, for streamed sets")
    skip_unreadable: bool = Field(
        False, description="leave out images that cannot be read, instead of stopping"
    )

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


class NetworkConfig(Frozen):
    """An early-exit network; ``exits: 1`` is a plain network."""

    backbone: str = "resnet20"
    exits: Count | Annotated[list[str], Field(min_length=1)] = 3
    head: Literal["auto", "erde", "linear", "conv", "native"] = "auto"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weights: str | None = Field(None, description="safetensors to start from")
    pretrained: bool = Field(False, description="timm's own weights, for backbones of timm's")


class TrainConfig(Frozen):
    """The training loop, the same for all arms."""

    epochs: Annotated[int, Field(ge=1, le=1_000_000)] = 60
    batch_size: Count = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive = 0.1
    momentum: Share = 0.9
    weight_decay: NotNegative = 5e-4
    schedule: Literal["cosine", "step", "onecycle"] = "cosine"
    warmup_epochs: NotNegative = Field(1.0, description="linear, from 0; of onecycle it is the rising part")
    milestones: list[OpenShare] = Field([0.625, 0.75, 0.875], description="for step: shares of the training")
    gamma: Positive = Field(0.1, description="for step: the factor at each milestone")
    accumulate: Count = Field(1, description="compute a batch in so many parts, for less memory")
    ema: OpenShare | None = Field(
        None, description="decay of a moving average of the weights, which becomes the trained network"
    )
    gradient_clip: Positive | None = Field(None, description="largest global gradient norm")
    label_smoothing: SmallShare = Field(0.0, description="of the loss ce only")
    backbone_epochs: int = Field(0, ge=0, description="of epochs: the final exit alone, before all together")
    freeze_backbone: bool = Field(
        False,
        description="after backbone_epochs, or from the start, train heads only; a network with one exit is trained whole",
    )
    refit_heads: int = Field(
        0,
        ge=0,
        description="epochs after the others that train new intermediate heads on the finished backbone",
    )
    channels_last: bool = True
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 autocast on a GPU that has it"
    )
    compile: bool = Field(False, description="torch.compile; the first steps take minutes")
    together: bool = Field(
        False, description="train all arms in one go: batches and teacher answers are made once"
    )
    tensorboard: bool = Field(False, description="scalars per epoch in arms/<arm>/tensorboard")
    checkpoint_seconds: NotNegative = Field(30.0, description="between checkpoints within a phase")

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


class DistillationConfig(Frozen):
    """The settings that all distilling methods of a run share, so that methods differ by their losses alone."""

    alpha: Share | list[Share] | Literal["rising"] = Field(
        "rising", description="share of the distillation term; rising: 0.2 to 0.9, linear in MACs"
    )
    temperature: Positive = 4.0
    pairing: Literal["exit", "final"] = Field(
        "exit",
        description="exit: exit i teaches i, or the nearest relative depth; final: the last teaches all",
    )
    exit_weights: Literal["uniform", "linear", "macs"] | list[NotNegative] = "uniform"
    label_smoothing: SmallShare = Field(
        0.0, description="in the cross-entropy of distilling arms; train.label_smoothing is not for them"
    )


class TeacherConfig(NetworkConfig):
    """The teacher: an early-exit network, trained with cross-entropy by the same loop."""

    backbone: str = "resnet56"
    train: dict[str, Any] = Field({}, description="keys of train that differ for the teacher")
    train_subset: Count | None = Field(None, description="images of train that the teacher sees")
    disjoint: bool = Field(False, description="take them from outside data.train_subset, as unseen images")
    cross_fit: Annotated[int, Field(ge=2)] | None = Field(
        None, description="folds: so many more teachers tell what each says of images that it did not see"
    )
    cache: bool | str = Field(
        False, description="keep its answers on disk: true for <run>/teacher-cache, or a folder to share"
    )
    trained: bool = Field(
        False, description="weights hold a trained network: it is measured and used as it is"
    )
    match: Literal["name", "order"] = Field("name", description="how a trained teacher's tensors are found")
    mean: list[float] | None = Field(None, description="its own normalisation; None: that of the data")
    std: list[Positive] | None = None
    classes: list[str] | None = Field(None, description="its own order of classes; None: that of the data")

    @model_validator(mode="after")
    def _as_it_is(self) -> TeacherConfig:
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


class ArmConfig(Frozen):
    """A network to train beside the others: its loss, and where its network differs from ``student``."""

    loss: AnyLoss
    student: dict[str, Any] = Field({})
    distillation: dict[str, Any] = Field({})


class ExportConfig(Frozen):
    """The arm that becomes the bundle, and its precisions."""

    arm: str = "erde"
    opset: Annotated[int, Field(ge=18, le=23)] = 18
    precisions: list[Literal["fp32", "int8"]] = Field(
        ["fp32"], description="int8 beside fp32: the arm in int8 too, as an arm and a bundle of its own"
    )

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


class CalibrationConfig(Frozen):
    """Thresholds: what is promised, against what, and which exit rules are tried.

    The one definition of these settings: recipes, the command line and ``erde.calibrate`` all fill it in.
    """

    max_risks: Annotated[tuple[OpenShare, ...], Field(min_length=1)] = Field(
        (0.01, 0.0025, 0.005, 0.02, 0.03, 0.05),
        description="certified operating points; the first is the default one, and the score is chosen for it",
    )
    confidence: OpenShare = Field(0.9, description="of the certificates and of what is said of budgets")
    budgets: tuple[OpenShare, ...] = Field(
        (), description="MAC budgets, shares of the network without exits; met on tune, not certified"
    )
    reference: Literal["final_exit", "no_exit_network", "teacher"] = "final_exit"
    guarantee: Guarantee = Field(
        "risk",
        description="net_drop: of the accuracy, images won count too; expected_risk: conformal, without a confidence; "
        "disagreement: another answer than the full network's, which needs no labels",
    )
    score: str = Field("auto", description="auto: what saves most MACs at the first of max_risks, on tune")
    sharpness: Annotated[float, Field(ge=1e-3, le=1e3)] | None = Field(
        None, description="None: chosen on tune, like the score"
    )
    ensemble: Literal["auto", "none", "arithmetic", "geometric"] = Field(
        "auto", description="of the exits so far; auto: none"
    )

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


class Config(Frozen):
    """A recipe.

    The teacher and the arms may override keys of the shared sections. Overrides are merged and checked when the recipe
    is read; :meth:`train_of`, :meth:`network_of` and :meth:`distillation_of` give the result.
    """

    name: str = "run"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)] | None = Field(
        None, description="CPU threads; None: all that this process may use"
    )
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: NetworkConfig = NetworkConfig()
    distillation: DistillationConfig = DistillationConfig()
    train: TrainConfig = TrainConfig()
    arms: dict[str, ArmConfig]
    export: ExportConfig = ExportConfig()
    calibration: CalibrationConfig = CalibrationConfig()

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

        self._teacher_train = merge(TrainConfig, self.train, self.teacher.train, "teacher.train")
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
        asks = any("held_out_logits" in arm.loss.extras for arm in self.arms.values())
        if self.teacher.cross_fit is not None and not asks:
            raise UserError(
                "teacher.cross_fit is set, and no arm asks for held-out predictions: give an arm erde's "
                "wrong_test: held_out, or leave cross_fit out"
            )
        if self.export.arm not in self.arms:
            raise UserError(
                f"export.arm is '{self.export.arm}', which is no arm{nearest(self.export.arm, self.arms)}"
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
        if self.calibration.reference == "no_exit_network":
            self.no_exit_arm()
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
        """Whether an arm learns from a teacher, or is compared with it."""
        learns = any(arm.loss.needs_teacher for arm in self.arms.values())
        return learns or self.calibration.reference == TEACHER

    @property
    def trained_arms(self) -> list[str]:
        """All arms that are trained, the teacher first."""
        return [*([TEACHER] if self.needs_teacher else []), *self.arms]

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
