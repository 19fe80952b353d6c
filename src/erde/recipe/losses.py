"""Losses by name, and their keys: a new loss is a class and a line of ``LOSSES`` here, and a file in ``erde.losses``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, WithJsonSchema

from erde.common.errors import UserError, nearest
from erde.common.yaml_reader import shorten
from erde.recipe.types import Count, NotNegative, Positive, Section, Share, SmallShare
from erde.recipe.validation import validate

# A loss may ask for these beyond logits and labels; the loop gives them by these names.
Extra = Literal["student_features", "teacher_features", "indices", "held_out_logits"]
EntropyForm = Literal["negentropy", "uniform_kl", "teacher"]


class LossConfig(Section):
    """A loss and its own keys.

    ``extras`` names further inputs of the loss: ``student_features`` and ``teacher_features``, the stages' outputs, lists
    of (B, ...); ``indices``, positions in the train split (B,); ``held_out_logits`` (Et, B, K), of a teacher that was not
    trained on the image.
    """

    summary: ClassVar[str] = ""
    needs_teacher: ClassVar[bool] = True

    name: str

    @property
    def extras(self) -> tuple[Extra, ...]:
        """Inputs beyond logits and labels."""
        return ()


class OwnTeacherConfig(LossConfig):
    """All its keys are its own: alpha, temperature and pairing of ``distillation`` play no part."""

    needs_teacher = False

    @property
    def extras(self) -> tuple[Extra, ...]:
        """The student's features, if they weigh anything."""
        return ("student_features",) if getattr(self, "feature_weight", 0) else ()


class CrossEntropyConfig(LossConfig):
    """No keys but the shared exit weights."""

    summary = "joint cross-entropy of all exits"
    needs_teacher = False

    name: Literal["ce"] = "ce"


class KDConfig(LossConfig):
    """Logit standardisation; alpha, temperature, exit weights and pairing are shared by all distilling losses."""

    summary = "cross-entropy and T² KL(teacher || student), exit by exit"

    name: Literal["kd"] = "kd"
    standardise: bool = False
    """Z-score both sides' logits before the KL (arXiv 2403.01427)."""
    weight: Positive = 1.0
    """A factor of the KL."""


class ControllerConfig(Section):
    """An entropy controller: the numbers it has, and how fast they move."""

    per_exit: bool = False
    """A number for each exit."""
    per_class: bool = False
    """A number for each class, on that class's logit."""
    per_sample: bool = False
    """A number for each train image."""
    gradient_factor: NotNegative = 0.1
    """A factor of the controller's gradient. 0: the controller stays as it is, and the loss is plain `kd`."""


def _indices(controller: ControllerConfig | None) -> tuple[Extra, ...]:
    return ("indices",) if controller is not None and controller.per_sample else ()


class ERDEConfig(LossConfig):
    """ERDE's own keys; alpha, temperature, exit weights and pairing are shared with KD."""

    summary = "KD, with entropy at intermediate exits where the teacher is wrong"

    name: Literal["erde"] = "erde"
    beta: NotNegative | list[NotNegative] = 0.2
    """Weight of the entropy term. A list: per exit."""
    kl_on_wrong: bool = False
    """Keep the KL on images that the teacher gets wrong, beside the entropy term."""
    ce_on_wrong: bool = True
    """Keep the cross-entropy of intermediate exits on these images."""
    wrong_test: Literal["exit", "final", "uncertain", "held_out", "harm"] = "exit"
    """The answer that decides whether an image counts as wrong. `exit`: of the paired teacher exit. `final`: of the
    teacher's final exit. `uncertain`: of the paired exit, which also counts as wrong if its largest probability is below
    `uncertainty`. `held_out`: of the paired exit of a teacher that did not see the image. `harm`: of the student's own
    exit, where its final exit is right; keep the KL with it (`kl_on_wrong`)."""
    uncertainty: Annotated[float, Field(ge=0, le=1)] = 0.5
    """For `wrong_test: uncertain`: the least probability of an answer that is not wrong."""
    entropy_form: EntropyForm = "negentropy"
    """The formula of the entropy term."""
    entropy_exits: Literal["intermediate", "all"] = "intermediate"
    """The exits that have the entropy term."""
    distillation_form: Literal["kl", "dkd"] = "kl"
    """The distillation loss on images that the teacher gets right."""
    target_weight: NotNegative = 1.0
    """For `dkd`: weight of the target class."""
    non_target_weight: NotNegative = 8.0
    """For `dkd`: weight of the other classes."""
    controller: ControllerConfig | None = None
    """An entropy controller, with the keys of `dynamickd`."""

    @property
    def extras(self) -> tuple[Extra, ...]:
        """Held-out logits and indices, if the keys ask for them."""
        held_out: tuple[Extra, ...] = ("held_out_logits",) if self.wrong_test == "held_out" else ()
        return (*held_out, *_indices(self.controller))


class DynamicKDConfig(LossConfig, ControllerConfig):
    """The controller's keys; alpha, temperature, exit weights and pairing are shared with KD."""

    summary = "KD with a learnt factor on the student's logits in the KL"

    name: Literal["dynamickd"] = "dynamickd"

    @property
    def extras(self) -> tuple[Extra, ...]:
        """Indices, if the controller asks for them."""
        return _indices(self)


class DKDConfig(LossConfig):
    """DKD's own keys; alpha, temperature, exit weights and pairing are shared with KD."""

    summary = "KD with the target class and the other classes weighted apart"

    name: Literal["dkd"] = "dkd"
    target_weight: NotNegative = 1.0
    """Weight of the target class; the paper's alpha."""
    non_target_weight: NotNegative = 8.0
    """Weight of the other classes; the paper's beta."""
    standardise: bool = False
    """Z-score both sides' logits first (arXiv 2403.01427)."""
    warmup_epochs: NotNegative = 0.0
    """Epochs over which the distillation rises linearly from 0."""


class CRDConfig(LossConfig):
    """CRD's own keys; exit weights and pairing are shared, alpha and temperature too ``with_kd``."""

    summary = "cross-entropy and a contrast of student and teacher features against a memory of all images"

    name: Literal["crd"] = "crd"
    weight: NotNegative = 0.8
    """Weight of the contrastive term, beside the cross-entropy."""
    with_kd: bool = False
    """Put `kd`'s loss in place of the cross-entropy."""
    exits: Literal["final", "all"] = "final"
    """The exits whose features are compared, each with its own memories."""
    dimensions: Count = 128
    """Dimensions of the space that both sides are projected to."""
    negatives: Count = 16384
    """Other images per image and step; at most all images of other classes."""
    momentum: SmallShare = 0.5
    """Share of the old entry when a memory is updated."""
    temperature: Positive = 0.07
    """Temperature of the agreement; not `distillation.temperature`."""

    @property
    def extras(self) -> tuple[Extra, ...]:
        """Features of both sides, and which image is which."""
        return ("student_features", "teacher_features", "indices")


class PhuongConfig(OwnTeacherConfig):
    """The keys of :mod:`erde.losses.phuong`."""

    summary = "the network's last exit teaches the earlier ones, at a rising temperature"

    name: Literal["phuong"] = "phuong"
    soft_share: Share = 0.5
    """Weight of the last exit's answers against the labels; the paper's C."""
    start_temperature: Positive = 1.0
    """Temperature at the start."""
    growth: Annotated[float, Field(ge=1)] = 1.05
    """Factor of the temperature after a step in which the last exit is too sure. 1 keeps the temperature."""
    confidence: Share = 0.5
    """The last exit is too sure if its mean largest probability, at the temperature, is above this."""


class BYOTConfig(OwnTeacherConfig):
    """The keys of :mod:`erde.losses.byot`."""

    summary = "the network's deepest exit teaches the shallow ones, at a fixed temperature"

    name: Literal["byot"] = "byot"
    soft_share: Share = 0.3
    """Weight of the deepest exit's answers against the labels."""
    temperature: Positive = 3.0
    """Temperature of both sides. There is no factor T²."""
    feature_weight: NotNegative = 0.0
    """Weight of the squared distance to the deepest stage's features."""


class ExitEnsembleConfig(OwnTeacherConfig):
    """The keys of :mod:`erde.losses.exit_ensemble`."""

    summary = "the mean logits of all exits teach each of them"

    name: Literal["exit_ensemble"] = "exit_ensemble"
    weight: NotNegative = 1.0
    """Weight of the mean squared distance to the mean logits."""
    feature_weight: NotNegative = 0.0
    """Weight of the mean squared distance to the mean features."""


LOSSES: dict[str, type[LossConfig]] = {
    "ce": CrossEntropyConfig,
    "kd": KDConfig,
    "erde": ERDEConfig,
    "dynamickd": DynamicKDConfig,
    "dkd": DKDConfig,
    "crd": CRDConfig,
    "phuong": PhuongConfig,
    "byot": BYOTConfig,
    "exit_ensemble": ExitEnsembleConfig,
}


def resolve_loss(value: Any) -> Any:
    """A loss name or mapping as the config of that loss."""
    if isinstance(value, LossConfig):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value:
        raise UserError(f"loss: a loss needs a name, got {shorten(value)}; for example {{name: erde}}")
    name = str(value["name"])
    if name not in LOSSES:
        raise UserError(f"loss: unknown loss '{name}'{nearest(name, LOSSES)}")
    return validate(LOSSES[name], dict(value), prefix="loss.")


AnyLoss = Annotated[
    SerializeAsAny[LossConfig],
    BeforeValidator(resolve_loss),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]}),
]
