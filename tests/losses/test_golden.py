"""Numbers that the authors' own code gave; tests/losses/golden/README.md says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from erde.losses import build_loss
from erde.recipe.losses import LOSSES, resolve_loss
from tests.helpers import oracles
from tests.helpers.loss_samples import byot_loss, dkd_loss, exit_ensemble_loss, kd_loss, make_settings

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"
NAMES = ["byot", "crd", "dkd", "dkd_standardised", "exit_ensemble", "kd", "kd_standardised", "phuong"]
EXITS, IMAGES, CLASSES = 3, 6, 7
# Only the distillation term: the authors' functions have no cross-entropy.
TERM: dict[str, Any] = {"alpha": 1.0}


def golden(name: str) -> Any:
    """The file's content; no file is a failed test."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def logits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = np.random.default_rng(seed)
    student = 3 * generator.normal(size=(EXITS, IMAGES, CLASSES))
    teacher = 3 * generator.normal(size=(EXITS, IMAGES, CLASSES))
    labels = generator.integers(CLASSES, size=IMAGES)
    return torch.tensor(student, requires_grad=True), torch.tensor(teacher), torch.tensor(labels)


def close(result: Any, expected: Any, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(result), np.asarray(expected), rtol=rtol, atol=1e-12)


def test_each_file_has_an_origin_and_a_test() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == NAMES
    for name in NAMES:
        content = golden(name)
        assert set(content["origin"]) >= {"repository", "commit", "file", "function", "licence"}
        assert len(content["origin"]["commit"]) == 40
        assert "seed" in content["inputs"] or "default_rng" in content["inputs"]


def test_goldens_tell_the_methods_apart() -> None:
    """The four files on the same inputs have different numbers, and no loss passes for another."""
    first = {
        name: golden(name)["cases"][0]["value_per_exit"]
        for name in ("kd", "dkd", "kd_standardised", "dkd_standardised")
    }
    rows = np.array(list(first.values()))
    for row in range(4):
        for other in range(row):
            assert (np.abs(rows[row] - rows[other]) > 0.05 * np.abs(rows[row])).all()


@pytest.mark.parametrize("name", ["kd", "kd_standardised", "dkd", "dkd_standardised"])
def test_distillation_terms(name: str) -> None:
    for case in golden(name)["cases"]:
        student, teacher, labels = logits(case["seed"])
        function = dkd_loss if name.startswith("dkd") else kd_loss
        knobs = {
            key: case[key] for key in ("temperature", "target_weight", "non_target_weight") if key in case
        }
        for i, expected in enumerate(case["value_per_exit"]):
            loss = function(
                student[i : i + 1],
                teacher[i : i + 1],
                labels,
                standardise=name.endswith("standardised"),
                **knobs,
                **TERM,
            )["loss"]
            close(loss.detach(), expected)
            (gradient,) = torch.autograd.grad(loss, student)
            # The authors' 1e-7 lets a target probability of 0 keep a trace of a gradient.
            close(gradient[i, 0], case["gradient_of_image_0_per_exit"][i], rtol=1e-7)


def test_published_weights_come_from_the_shared_alpha() -> None:
    """The recipes of the papers: what to set for ``0.1 CE + 9 KL`` and ``CE + 1 TCKD + 8 NCKD``."""
    student, teacher, labels = (tensor.detach() for tensor in logits(0))
    ce = oracles.cross_entropy(student.numpy(), labels.numpy()).mean(axis=1)
    parts = kd_loss(student, teacher, labels, alpha=0.9, temperature=2.0, standardise=True, weight=10.0)
    close(
        parts["loss"], sum(0.1 * ce + 9 * np.array(golden("kd_standardised")["cases"][0]["value_per_exit"]))
    )
    parts = dkd_loss(student, teacher, labels, alpha=0.5, exit_weights=2.0)
    close(parts["loss"], sum(ce + np.array(golden("dkd")["cases"][0]["value_per_exit"])))


def test_byot() -> None:
    for case in golden("byot")["cases"]:
        student, _, labels = logits(case["seed"])
        loss = byot_loss(student, labels)["loss"]
        close(loss.detach(), case["value"])
        (gradient,) = torch.autograd.grad(loss, student)
        close(gradient[:, 0], case["gradient_of_image_0_per_exit"])


def test_exit_ensemble() -> None:
    for case in golden("exit_ensemble")["cases"]:
        generator = np.random.default_rng(case["seed"])
        student = torch.tensor(3 * generator.normal(size=(EXITS, IMAGES, CLASSES)), requires_grad=True)
        labels = torch.tensor(generator.integers(CLASSES, size=IMAGES))
        features = torch.tensor(np.abs(generator.normal(size=(EXITS, IMAGES, 4))), requires_grad=True)
        parts = exit_ensemble_loss(student, labels, features=features, feature_weight=1.0)
        for part, key in (("ce", "cross_entropy"), ("ensemble", "ensemble"), ("feature", "feature")):
            close(parts[part].sum(), case[key])
        close(parts["loss"].detach(), case["cross_entropy"] + case["ensemble"] + case["feature"])
        gradients = torch.autograd.grad(parts["loss"], (student, features))
        close(gradients[0][:, 0], case["gradient_of_image_0_per_exit"])
        close(gradients[1][:, 0], case["gradient_of_features_of_image_0_per_exit"])


def test_phuong_with_its_rising_temperature() -> None:
    settings = make_settings()
    module = build_loss(resolve_loss("phuong"), settings).double()
    module.exit_weights.fill_(1.0)
    generator = np.random.default_rng(3)
    steps = golden("phuong")["steps"]
    used = [step["temperature"] for step in steps]
    assert 1 < len(set(used)) < len(used), "the temperature must both rise and stay"
    for step in steps:
        student = torch.tensor(3 * generator.normal(size=(EXITS, IMAGES, CLASSES)), requires_grad=True)
        labels = torch.tensor(generator.integers(CLASSES, size=IMAGES))
        parts = module(student, None, labels)
        close(parts["temperature"], step["temperature"])
        close(parts["loss"].detach(), step["value"])
        (gradient,) = torch.autograd.grad(parts["loss"], student)
        close(gradient[:, 0], step["gradient_of_image_0_per_exit"])
        module.end_step(1)


def crd_inputs() -> tuple[Any, Any, list[Any]]:
    """Projections [(weight, bias), ...], memories (2, 40, 8), and per step (features, indices, negatives)."""
    generator = np.random.default_rng(2)
    projections = [(generator.normal(size=(8, width)), generator.normal(size=8)) for width in (5, 9)]
    memories = np.stack([generator.uniform(-0.6, 0.6, size=(40, 8)) for _ in range(2)])
    steps = []
    for _ in range(3):
        features = [generator.normal(size=(IMAGES, width)) for width in (5, 9)]
        indices = generator.permutation(40)[:IMAGES]
        others = [generator.permutation(np.setdiff1d(np.arange(40), [index]))[:12] for index in indices]
        steps.append((features, indices, np.stack(others)))
    return projections, memories, steps


def test_crd() -> None:
    """Three steps: values, gradients of the student's features and of a projection, Z, and both memories."""
    expected = golden("crd")
    projections, memories, steps = crd_inputs()
    settings = make_settings(student_shapes=((5,),) * 3, teacher_shapes=((9,),) * 3)
    config = LOSSES["crd"](name="crd", dimensions=8, negatives=12)  # type: ignore[call-arg]
    contrast = build_loss(config, settings).double().contrasts[0]
    with torch.no_grad():
        for layer, (weight, bias) in zip(
            (contrast.project_student, contrast.project_teacher), projections, strict=True
        ):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
        contrast.memories.copy_(torch.tensor(memories))
    oracle = oracles.CRD(projections, memories, 0.07, 0.5)
    for (features, indices, negatives), step in zip(steps, expected["steps"], strict=True):
        student, teacher = torch.tensor(features[0], requires_grad=True), torch.tensor(features[1])
        chosen = torch.tensor(negatives)
        loss = contrast(
            student, teacher, torch.tensor(indices), chosen, torch.ones_like(chosen, dtype=torch.bool)
        ).mean()
        close(loss.detach(), step["value"])
        close(oracle.step(features, indices, list(negatives)), step["value"])
        gradients = torch.autograd.grad(loss, (student, contrast.project_teacher.weight))
        close(gradients[0][0], step["gradient_of_student_features_of_image_0"])
        close(gradients[1][0], step["gradient_of_teacher_projection_row_0"])
    close(contrast.normalisers, expected["normalisers"])
    for row, key in enumerate(("student_memory_rows_0_to_2", "teacher_memory_rows_0_to_2")):
        close(contrast.memories[row, :3], expected[key])
        close(oracle.memories[row][:3], expected[key])


def test_kd_is_not_standardised_kd() -> None:
    """A golden that another method could pass would be none."""
    case = golden("kd_standardised")["cases"][0]
    student, teacher, labels = logits(case["seed"])
    plain: NDArray[Any] = kd_loss(student, teacher, labels, temperature=case["temperature"], **TERM)[
        "kl"
    ].numpy()
    assert (np.abs(plain - case["value_per_exit"]) > 0.1).all()
