"""Inputs for the tests of the losses: logits, features, settings, and every loss with its switches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erde import losses
from erde.losses import ExitSettings, build_loss
from erde.losses.base import Criterion
from erde.recipe.losses import LOSSES, LossConfig, resolve_loss

EXITS, IMAGES, CLASSES, TRAIN_IMAGES = 3, 7, 5, 40
# Of one image: a map, tokens, a vector.
STUDENT_SHAPES = ((4, 3, 3), (6, 4), (8,))
TEACHER_SHAPES = ((5, 3, 3), (7, 4), (9,))

# Every loss as it comes, and with what changes its course.
VARIANTS: dict[str, dict[str, Any]] = {name: {"name": name} for name in LOSSES} | {
    "kd-standardised": {"name": "kd", "standardise": True, "weight": 2.0},
    "erde-dkd": {"name": "erde", "distillation_form": "dkd", "ce_on_wrong": False},
    "erde-controller": {
        "name": "erde",
        "controller": {"per_exit": True, "gradient_factor": 1},
        "entropy_form": "teacher",
    },
    "erde-everywhere": {
        "name": "erde",
        "entropy_exits": "all",
        "ce_on_wrong": False,
        "kl_on_wrong": True,
        "entropy_form": "uniform_kl",
    },
    "erde-held-out": {"name": "erde", "wrong_test": "held_out", "entropy_form": "uniform_kl"},
    "erde-harm": {"name": "erde", "wrong_test": "harm", "kl_on_wrong": True},
    "erde-all": {
        "name": "erde",
        "distillation_form": "dkd",
        "controller": {"per_exit": True, "per_sample": True, "gradient_factor": 1},
        "wrong_test": "held_out",
    },
    "dynamickd-all": {
        "name": "dynamickd",
        "per_exit": True,
        "per_class": True,
        "per_sample": True,
        "gradient_factor": 1,
    },
    "dkd-warmup": {"name": "dkd", "warmup_epochs": 2, "standardise": True},
    "crd-all": {"name": "crd", "exits": "all", "with_kd": True, "negatives": 10},
    "byot-features": {"name": "byot", "feature_weight": 0.1},
    "exit_ensemble-features": {"name": "exit_ensemble", "feature_weight": 0.1},
}


def sample(seed: int = 0, teacher_exits: int = EXITS, dtype: torch.dtype = torch.float64) -> Any:
    """Logits of student and teacher, and labels; half of the teacher's answers are right."""
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(EXITS, IMAGES, CLASSES, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(teacher_exits, IMAGES, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    teacher[:, torch.arange(IMAGES), labels] += 1.5
    return student.to(dtype), teacher.to(dtype), labels


def features(shapes: Any, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(IMAGES, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def extras_of(loss: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What the loop would hand to this loss beside logits and labels."""
    config = resolve_loss(loss)
    generator = torch.Generator().manual_seed(seed + 100)
    everything = {
        "student_features": features(STUDENT_SHAPES, seed + 1, dtype),
        "teacher_features": features(TEACHER_SHAPES, seed + 2, dtype),
        "indices": torch.randperm(TRAIN_IMAGES, generator=generator)[:IMAGES],
        "held_out_logits": sample(seed + 50, dtype=dtype)[1],
    }
    return {name: everything[name] for name in config.extras}


def make_settings(
    pairs: tuple[int, ...] = (0, 1, 2), temperature: float = 3.0, **changes: Any
) -> ExitSettings:
    values = {
        "student_shapes": STUDENT_SHAPES,
        "teacher_shapes": TEACHER_SHAPES,
        "train_images": TRAIN_IMAGES,
        **changes,
    }
    return ExitSettings(CLASSES, (0.2, 0.5, 0.9), temperature, (0.5, 1.0, 1.5), pairs, **values)


def build(loss: Any, settings: ExitSettings | None = None, seed: int = 0) -> Criterion:
    """The criterion of a loss, its random start fixed."""
    torch.manual_seed(seed)
    return build_loss(resolve_loss(loss), settings or make_settings())


def needs_teacher(loss: Any) -> bool:
    return resolve_loss(loss).needs_teacher


# ---------------------------------------------------------------- the loss functions, called with keywords


def _with_keywords(function: Any, config: type[LossConfig], has_teacher: bool, **defaults: Any) -> Any:
    """``function`` whose config and settings are keywords; one number stands for all exits, and exit i teaches i."""

    def call(student_logits: Tensor, *others: Tensor, **keywords: Any) -> dict[str, Tensor]:
        exits = len(student_logits)
        shared = {"alpha": 0.9, "exit_weights": 1.0, "pairs": range(exits), "label_smoothing": 0.0}
        if has_teacher:
            shared["temperature"] = 4.0
        settings = {key: keywords.pop(key, value) for key, value in shared.items()}
        for key in ("alpha", "exit_weights"):
            if isinstance(settings[key], float):
                settings[key] = (settings[key],) * exits
        extras = {
            key: keywords.pop(key)
            for key in (*defaults, "scale", "held_out_logits", "features")
            if key in keywords
        }
        # Not validated: a weight may be a tensor.
        own = config.model_construct(**keywords)
        assert set(keywords) <= set(config.model_fields), keywords
        return function(
            student_logits,
            *others,
            own,
            ExitSettings(classes=student_logits.shape[-1], **{"temperature": 1.0, **settings}),
            **{**defaults, **extras},
        )

    return call


kd_loss = _with_keywords(losses.kd_loss, LOSSES["kd"], True)
erde_loss = _with_keywords(losses.erde_loss, LOSSES["erde"], True)
dkd_loss = _with_keywords(losses.dkd_loss, LOSSES["dkd"], True, strength=1.0)
phuong_loss = _with_keywords(losses.phuong_loss, LOSSES["phuong"], False, temperature=1.0)
byot_loss = _with_keywords(losses.byot_loss, LOSSES["byot"], False)
exit_ensemble_loss = _with_keywords(losses.exit_ensemble_loss, LOSSES["exit_ensemble"], False)
