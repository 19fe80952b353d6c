"""Losses by name, and their keys: a new loss is a class and a line of ``LOSSES`` here, and a file in ``erde.losses``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from erde.common.errors import UserError, nearest
from erde.common.model import Frozen
from erde.common.yaml_reader import shorten
from erde.recipe.types import Count, NotNegative, Positive, Share, SmallShare
from erde.recipe.validation import validate

# A loss may ask for these beyond logits and labels; the loop gives them by these names.
Extra = Literal["student_features", "teacher_features", "indices", "held_out_logits"]
EntropyForm = Literal["negentropy", "uniform_kl", "teacher"]


class LossConfig(Frozen):
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
    standardise: bool = Field(
        False, description="z-score both sides' logits before the KL (arXiv 2403.01427)"
    )
    weight: Positive = Field(1.0, description="a factor of the KL")


class ControllerConfig(Frozen):
    """An entropy controller: the numbers it has, and how fast they move."""

    per_exit: bool = Field(False, description="one number for each exit")
    per_class: bool = Field(False, description="one number for each class's logit")
    per_sample: bool = Field(False, description="one number for each train image")
    gradient_factor: NotNegative = Field(
        0.1, description="of the controller's gradient; 0 freezes it: plain KD"
    )


def _indices(controller: ControllerConfig | None) -> tuple[Extra, ...]:
    return ("indices",) if controller is not None and controller.per_sample else ()


class ERDEConfig(LossConfig):
    """ERDE's own keys; alpha, temperature, exit weights and pairing are shared with KD."""

    summary = "KD, with entropy at intermediate exits where the teacher is wrong"

    name: Literal["erde"] = "erde"
    beta: NotNegative | list[NotNegative] = Field(0.2, description="of the entropy term; a list: per exit")
    kl_on_wrong: bool = Field(
        False, description="keep the KL on teacher-wrong images, beside the entropy term"
    )
    ce_on_wrong: bool = Field(
        True, description="keep the cross-entropy of intermediate exits on teacher-wrong images"
    )
    wrong_test: Literal["exit", "final", "uncertain", "held_out"] = Field(
        "exit",
        description="the teacher is wrong by its paired exit; by its final exit; by its paired exit being wrong or its "
        "largest probability under `uncertainty`; by the paired exit of a teacher that did not see the image",
    )
    uncertainty: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="see wrong_test")
    entropy_form: EntropyForm = Field("negentropy", description="see erde.losses.erde.entropy_penalty")
    entropy_exits: Literal["intermediate", "all"] = Field(
        "intermediate", description="all: the final exit's entropy too"
    )
    distillation_form: Literal["kl", "dkd"] = Field(
        "kl", description="dkd: target_weight TCKD + non_target_weight NCKD in place of the KL"
    )
    target_weight: NotNegative = Field(1.0, description="see distillation_form")
    non_target_weight: NotNegative = Field(8.0, description="see distillation_form")
    controller: ControllerConfig | None = Field(
        None, description="learns a factor of the student's logits in the KL"
    )

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
    target_weight: NotNegative = Field(1.0, description="the paper's alpha")
    non_target_weight: NotNegative = Field(8.0, description="the paper's beta")
    standardise: bool = Field(False, description="z-score both sides' logits first (arXiv 2403.01427)")
    warmup_epochs: NotNegative = Field(0.0, description="the distillation rises linearly from 0 over them")


class CRDConfig(LossConfig):
    """CRD's own keys; exit weights and pairing are shared, alpha and temperature too ``with_kd``."""

    summary = "cross-entropy and a contrast of student and teacher features against a memory of all images"

    name: Literal["crd"] = "crd"
    weight: NotNegative = Field(0.8, description="of the contrastive term, beside the cross-entropy")
    with_kd: bool = Field(False, description="beside kd's loss in place of the cross-entropy")
    exits: Literal["final", "all"] = Field("final", description="the exits whose features are compared")
    dimensions: Count = Field(128, description="of the space that both sides are projected to")
    negatives: Count = Field(16384, description="for each image; at most all images of other classes")
    momentum: SmallShare = Field(0.5, description="share of the old entry when a memory is updated")
    temperature: Positive = Field(0.07, description="of the agreement; not the one of distillation")

    @property
    def extras(self) -> tuple[Extra, ...]:
        """Features of both sides, and which image is which."""
        return ("student_features", "teacher_features", "indices")


class PhuongConfig(OwnTeacherConfig):
    """The keys of :mod:`erde.losses.phuong`."""

    summary = "the network's last exit teaches the earlier ones, at a rising temperature"

    name: Literal["phuong"] = "phuong"
    soft_share: Share = Field(
        0.5, description="of the soft cross-entropy against the hard one; the paper's C"
    )
    start_temperature: Positive = 1.0
    growth: Annotated[float, Field(ge=1)] = Field(1.05, description="of the temperature, where it is too low")
    confidence: Share = Field(
        0.5, description="too low: the last exit's mean largest probability is above it"
    )


class BYOTConfig(OwnTeacherConfig):
    """The keys of :mod:`erde.losses.byot`."""

    summary = "the network's deepest exit teaches the shallow ones, at a fixed temperature"

    name: Literal["byot"] = "byot"
    soft_share: Share = Field(0.3, description="of the soft cross-entropy against the hard one")
    temperature: Positive = 3.0
    feature_weight: NotNegative = Field(0.0, description="of the distance to the deepest stage's features")


class ExitEnsembleConfig(OwnTeacherConfig):
    """The keys of :mod:`erde.losses.exit_ensemble`."""

    summary = "the mean logits of all exits teach each of them"

    name: Literal["exit_ensemble"] = "exit_ensemble"
    weight: NotNegative = Field(1.0, description="of the distance to the mean logits")
    feature_weight: NotNegative = Field(0.0, description="of the distance to the mean features")


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


AnyLoss = Annotated[SerializeAsAny[LossConfig], BeforeValidator(resolve_loss)]
