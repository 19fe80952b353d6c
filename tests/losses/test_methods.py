"""The methods beside KD and ERDE: oracles, limits, and what their own parameters and buffers do."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from erde.losses.base import Criterion, ExitSettings, exit_kl, soft_cross_entropy
from erde.losses.dkd import decoupled_kl
from erde.losses.kd import standardise_logits
from tests.helpers import oracles
from tests.helpers.loss_samples import (
    CLASSES,
    EXITS,
    IMAGES,
    STUDENT_SHAPES,
    TRAIN_IMAGES,
    build,
    byot_loss,
    dkd_loss,
    erde_loss,
    exit_ensemble_loss,
    extras_of,
    kd_loss,
    make_settings,
    phuong_loss,
    sample,
)
from tests.losses.test_losses import as_numpy, assert_parts

torch.set_num_threads(1)
WEIGHTS = [0.5, 1.0, 1.5]


# ---------------------------------------------------------------- oracles


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"alpha": [0.2, 0.5, 0.9], "exit_weights": WEIGHTS, "temperature": 2.0},
        {"target_weight": 0.5, "non_target_weight": 2.0, "strength": 0.3},
        {"standardise": True, "temperature": 1.5},
    ],
    ids=str,
)
def test_dkd_equals_the_oracle(seed: int, arguments: dict[str, Any]) -> None:
    student, teacher, labels = sample(seed)
    expected = oracles.dkd_parts(*as_numpy(student, teacher, labels), **arguments)
    assert_parts(dkd_loss(student, teacher, labels, **arguments), expected)


@pytest.mark.parametrize(
    "arguments", [{}, {"temperature": 2.5, "soft_share": 0.2, "exit_weights": WEIGHTS}], ids=str
)
def test_phuong_equals_the_oracle(arguments: dict[str, Any]) -> None:
    student, _, labels = sample()
    assert_parts(
        phuong_loss(student, labels, **arguments),
        oracles.phuong_parts(*as_numpy(student, labels), **arguments),
    )


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize(
    "arguments", [{}, {"temperature": 1.5, "soft_share": 0.6, "exit_weights": WEIGHTS}], ids=str
)
def test_byot_and_exit_ensemble_equal_the_oracles(arguments: dict[str, Any], weight: float) -> None:
    student, _, labels = sample()
    features = torch.randn(EXITS, IMAGES, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with_features = {"features": features, "feature_weight": weight} if weight else {}
    as_arrays = {"features": features.numpy(), "feature_weight": weight} if weight else {}
    assert_parts(
        byot_loss(student, labels, **arguments, **with_features),
        oracles.byot_parts(student.numpy(), labels.numpy(), **arguments, **as_arrays),
    )
    own = {"exit_weights": arguments.get("exit_weights", 1.0), "weight": 0.7}
    assert_parts(
        exit_ensemble_loss(student, labels, **own, **with_features),
        oracles.exit_ensemble_parts(student.numpy(), labels.numpy(), **own, **as_arrays),
    )


@pytest.mark.parametrize(
    "switches", [{}, {"per_exit": True}, {"per_class": True}, {"per_sample": True}], ids=str
)
def test_dynamickd_equals_the_oracle(switches: dict[str, Any]) -> None:
    student, teacher, labels = sample()
    module = build({"name": "dynamickd", **switches}).double()
    log_scale = module.controller.log_scale
    with torch.no_grad():
        log_scale.copy_(torch.randn(log_scale.shape, generator=torch.Generator().manual_seed(3)))
    extras = extras_of({"name": "dynamickd", **switches})
    parts = module(student, teacher, labels, **extras)
    scale = log_scale.detach()
    if switches.get("per_sample"):
        scale = scale[:, extras["indices"]]
    expected = oracles.kd_parts(
        *as_numpy(student, teacher, labels),
        alpha=module.alpha.numpy(),
        temperature=3.0,
        exit_weights=WEIGHTS,
        scale=np.exp(scale.numpy()),
    )
    mean = np.exp(scale.numpy()).mean(axis=(1, 2) if switches.get("per_exit") else None)
    assert_parts(parts, {**expected, "controller": mean})


@pytest.mark.parametrize("form", ["kl", "dkd"])
def test_erde_with_a_controller_and_held_out_errors_equals_the_oracle(form: str) -> None:
    student, teacher, labels = sample()
    held_out = sample(9)[1]
    scale = torch.tensor([0.5, 1.5, 2.0], dtype=torch.float64).reshape(3, 1, 1)
    arguments = {"wrong_test": "held_out", "distillation_form": form}
    parts = erde_loss(student, teacher, labels, scale=scale, held_out_logits=held_out, **arguments)
    expected = oracles.erde_parts(
        *as_numpy(student, teacher, labels),
        scale=scale.numpy(),
        held_out_logits=held_out.numpy(),
        **arguments,
    )
    assert_parts(parts, expected)


# ---------------------------------------------------------------- DKD


@given(st.integers(0, 10_000), st.floats(0.5, 8), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_dkd_is_kd_where_the_weights_say_so(seed: int, temperature: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = spread * torch.randn(
        2, EXITS, IMAGES, CLASSES, generator=generator, dtype=torch.float64
    )
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    student.requires_grad_()
    target = (teacher / temperature).softmax(dim=-1)[:, torch.arange(IMAGES), labels]
    dkd = dkd_loss(
        student, teacher, labels, temperature=temperature, target_weight=1, non_target_weight=1 - target
    )
    kd = kd_loss(student, teacher, labels, temperature=temperature)
    gradients = [torch.autograd.grad(parts["loss"], student)[0] for parts in (dkd, kd)]
    torch.testing.assert_close(dkd["loss"].detach(), kd["loss"].detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)


@given(st.integers(0, 10_000), st.floats(0.5, 8), st.floats(0, 20))
@settings(max_examples=40, deadline=None)
def test_both_halves_are_zero_at_equality_and_never_negative(
    seed: int, temperature: float, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = spread * torch.randn(2, 1, 4, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(6, (4,), generator=generator)
    for half in decoupled_kl(student, student + 3, labels, temperature):
        assert float(half.abs().max()) < 1e-12
    for half in decoupled_kl(student, teacher, labels, temperature):
        assert float(half.min()) > -1e-12


def test_the_second_half_does_not_see_the_target() -> None:
    student, teacher, labels = sample()
    student.requires_grad_()
    first, second = decoupled_kl(student, teacher, labels, 2.0)
    (gradient,) = torch.autograd.grad(second.sum(), student)
    assert float(gradient[:, torch.arange(IMAGES), labels].abs().max()) == 0
    with_other_target = student.detach().clone()
    with_other_target[:, torch.arange(IMAGES), labels] += 4
    moved = decoupled_kl(with_other_target, teacher, labels, 2.0)
    torch.testing.assert_close(moved[1], second.detach())
    assert bool(((moved[0] - first.detach()).abs() > 1e-3).all())


def test_dkd_warms_up_by_images_seen() -> None:
    module = build({"name": "dkd", "warmup_epochs": 0.5}).double()
    student, teacher, labels = sample()
    plain = build("dkd").double()(student, teacher, labels)
    strengths, losses = [], []
    for _ in range(4):
        parts = module(student, teacher, labels)
        strengths.append(float(parts["strength"]))
        losses.append(float(parts["loss"]))
    # 7 of 40 images a step, half an epoch to go: 7/20, 14/20, then full.
    assert strengths == pytest.approx([0.35, 0.7, 1.0, 1.0])
    assert losses[0] < losses[1] < losses[2]
    assert losses[2] == losses[3] == pytest.approx(float(plain["loss"]))


# ---------------------------------------------------------------- logit standardisation


def test_standardised_logits_have_mean_0_and_variance_1() -> None:
    student, _, _ = sample()
    result = standardise_logits(student)
    torch.testing.assert_close(result.mean(-1), torch.zeros(EXITS, IMAGES, dtype=torch.float64))
    torch.testing.assert_close(
        result.var(-1), torch.ones(EXITS, IMAGES, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_standardised_kd_does_not_see_scale_and_shift() -> None:
    student, teacher, labels = sample()
    for loss, part in ((kd_loss, "kl"), (dkd_loss, "nckd")):
        values = [
            loss(a * student + 2, teacher, labels, standardise=standardise)[part]
            for standardise in (True, False)
            for a in (1.0, 3.0)
        ]
        torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
        assert bool(((values[2] - values[3]).abs() > 1e-2).all())


# ---------------------------------------------------------------- DynamicKD


def test_a_frozen_controller_is_kd() -> None:
    student, teacher, labels = sample()
    student.requires_grad_()
    frozen = build({"name": "dynamickd", "gradient_factor": 0.0}).double()
    result, expected = frozen(student, teacher, labels), build("kd").double()(student, teacher, labels)
    gradients = [
        torch.autograd.grad(part["loss"], student, retain_graph=True)[0] for part in (result, expected)
    ]
    assert torch.equal(result["loss"], expected["loss"])
    assert torch.equal(*gradients)
    result["loss"].backward()
    assert float(frozen.controller.log_scale.grad.abs().max()) == 0


@pytest.mark.parametrize("factor", [1.0, 0.25, 3.0])
def test_the_gradient_factor_is_one_of_the_controllers_gradient_alone(factor: float) -> None:
    student, teacher, labels = sample()
    student.requires_grad_()
    gradients = []
    for gradient_factor in (1.0, factor):
        module = build({"name": "dynamickd", "gradient_factor": gradient_factor}).double()
        loss = module(student, teacher, labels)["loss"]
        gradients.append(torch.autograd.grad(loss, (student, module.controller.log_scale)))
    torch.testing.assert_close(gradients[1][0], gradients[0][0])
    torch.testing.assert_close(gradients[1][1], factor * gradients[0][1])


def test_the_kl_alone_teaches_the_controller() -> None:
    student, teacher, labels = sample()
    gradients = []
    for alpha in (0.0, 0.5):
        module = build({"name": "dynamickd", "gradient_factor": 1}).double()
        module.alpha.fill_(alpha)
        loss = module(student, teacher, labels)["loss"]
        gradients.append(torch.autograd.grad(loss, module.controller.log_scale)[0])
    kl = kd_loss(student, teacher, labels, temperature=3.0, alpha=0.5, exit_weights=WEIGHTS)
    assert float(gradients[0].abs().max()) == 0
    # d/db of a_i w_i T² KL(t || exp(b) s) at b = 0, by differences.
    step = 1e-5
    values = [
        kd_loss(
            student,
            teacher,
            labels,
            temperature=3.0,
            alpha=0.5,
            exit_weights=WEIGHTS,
            scale=torch.tensor(math.exp(b), dtype=torch.float64),
        )
        for b in (-step, step)
    ]
    assert float(gradients[1]) == pytest.approx(
        float(values[1]["loss"] - values[0]["loss"]) / (2 * step), rel=1e-6
    )
    assert torch.equal(values[0]["ce"], kl["ce"])


def test_the_controller_finds_the_factor_that_is_missing() -> None:
    """A student whose logits are half the teacher's at one exit and double at another: factors 2 and 1/2."""
    _, teacher, labels = sample()
    student = teacher * torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1)
    module = build({"name": "dynamickd", "per_exit": True, "gradient_factor": 1}).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        parts = module(student, teacher, labels)
        parts["loss"].backward()
        optimizer.step()
    assert parts["controller"].tolist() == pytest.approx([2.0, 1.0, 0.5], rel=1e-3)
    assert float(parts["kl"].max()) < 1e-5


def test_the_factor_is_positive_wherever_the_controller_goes() -> None:
    module = build("dynamickd")
    for value in (-50.0, 0.0, 5.0):
        with torch.no_grad():
            module.controller.log_scale.fill_(value)
        assert float(module.controller(torch.zeros(3, 7, 5)).detach().min()) > 0


@pytest.mark.parametrize(
    ("switches", "shape"),
    [
        ({}, (1, 1, 1)),
        ({"per_exit": True}, (EXITS, 1, 1)),
        ({"per_class": True}, (1, 1, CLASSES)),
        ({"per_sample": True}, (1, TRAIN_IMAGES, 1)),
        ({"per_exit": True, "per_class": True, "per_sample": True}, (EXITS, TRAIN_IMAGES, CLASSES)),
    ],
    ids=str,
)
def test_what_has_a_number_of_its_own(switches: dict[str, bool], shape: tuple[int, ...]) -> None:
    loss = {"name": "dynamickd", **switches}
    module = build(loss).double()
    student, teacher, labels = sample()
    extras = extras_of(loss)
    module(student, teacher, labels, **extras)["loss"].backward()
    gradient = module.controller.log_scale.grad
    assert gradient.shape == shape
    seen = torch.zeros(shape[1], dtype=torch.bool)
    seen[extras.get("indices", slice(None))] = True
    assert bool((gradient[:, seen].abs() > 0).all())
    assert float(gradient[:, ~seen].abs().sum()) == 0
    assert len(gradient.unique()) == gradient[:, seen].numel() + int(bool((~seen).any()))


def test_dynamickd_with_a_single_exit() -> None:
    student, teacher, labels = sample()
    settings = ExitSettings(CLASSES, (0.9,), 4.0, (1.0,), (2,))
    module = build({"name": "dynamickd", "per_exit": True}, settings).double()
    parts = module(student[:1], teacher, labels)
    expected = oracles.kd_parts(*as_numpy(student[:1], teacher, labels), pairs=[2])
    assert float(parts["loss"].detach()) == pytest.approx(expected["loss"], rel=1e-7)  # alpha is float32
    assert parts["controller"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("switches", "logits"),
    [({"per_class": True}, (EXITS, IMAGES, CLASSES + 1)), ({"per_exit": True}, (EXITS + 1, IMAGES, CLASSES))],
)
def test_a_controller_of_another_size(switches: dict[str, bool], logits: tuple[int, ...]) -> None:
    module = build({"name": "dynamickd", **switches})
    with pytest.raises(ValueError, match=r"^expected logits of \d exits and \d classes for this controller"):
        module(torch.zeros(logits), torch.zeros(logits), torch.zeros(IMAGES, dtype=torch.long))


@pytest.mark.parametrize("indices", [None, torch.zeros(IMAGES + 1, dtype=torch.long)])
def test_a_controller_per_sample_needs_indices(indices: Tensor | None) -> None:
    student, teacher, labels = sample()
    with pytest.raises(ValueError, match=r"^expected indices \(B,\) for a controller per sample"):
        build({"name": "dynamickd", "per_sample": True})(student, teacher, labels, indices=indices)


# ---------------------------------------------------------------- combinations with ERDE


def test_erde_with_dkd_and_a_teacher_that_is_always_right_is_dkd() -> None:
    student, teacher, labels = sample()
    teacher[:, torch.arange(IMAGES), labels] += 20
    value = erde_loss(student, teacher, labels, distillation_form="dkd")["loss"]
    torch.testing.assert_close(value, dkd_loss(student, teacher, labels)["loss"])


def test_held_out_errors_take_the_place_of_the_teachers_own() -> None:
    student, teacher, labels = sample()
    held_out = sample(9)[1]
    own = erde_loss(student, teacher, labels)
    by_held_out = erde_loss(student, teacher, labels, wrong_test="held_out", held_out_logits=held_out)
    assert not torch.equal(own["teacher_wrong"], by_held_out["doubted"])
    expected = (held_out.argmax(-1) != labels).double().mean(1)
    assert torch.equal(by_held_out["doubted"], expected)
    # The teacher's own errors are recorded all the same, as for every loss.
    assert torch.equal(own["teacher_wrong"], by_held_out["teacher_wrong"])
    # What the KL is taken to is still the teacher: with its own answers as held-out ones nothing changes.
    same = erde_loss(student, teacher, labels, wrong_test="held_out", held_out_logits=teacher)
    own["doubted"] = own["teacher_wrong"]
    assert_parts(same, {name: part.numpy() for name, part in own.items()})
    # A teacher that has memorised its images teaches doubt all the same.
    memorised = teacher.clone()
    memorised[:, torch.arange(IMAGES), labels] += 20
    assert float(erde_loss(student, memorised, labels)["entropy"].max()) == 0
    doubting = erde_loss(student, memorised, labels, wrong_test="held_out", held_out_logits=held_out)
    assert bool((doubting["entropy"][:-1] > 0).all())


def test_held_out_logits_are_paired_like_the_teachers() -> None:
    student, teacher, labels = sample()
    held_out = sample(9)[1]
    parts = erde_loss(
        student, teacher, labels, wrong_test="held_out", held_out_logits=held_out, pairs=[2, 2, 2]
    )["doubted"]
    assert len(set(parts.tolist())) == 1
    assert float(parts[0]) == float((held_out[2].argmax(-1) != labels).double().mean())


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (None, r"^expected held-out logits for wrong_test='held_out', got none$"),
        (torch.zeros(EXITS, IMAGES + 1, CLASSES), r"^expected teacher logits \(Et, B, K\)"),
    ],
)
def test_held_out_logits_that_do_not_fit(held_out: Tensor | None, message: str) -> None:
    student, teacher, labels = sample()
    with pytest.raises(ValueError, match=message):
        erde_loss(student, teacher, labels, wrong_test="held_out", held_out_logits=held_out)


def test_erde_with_a_frozen_controller_is_erde() -> None:
    student, teacher, labels = sample()
    values = [
        build({"name": "erde", "controller": controller}).double()(student, teacher, labels)["loss"].detach()
        for controller in (None, {"per_exit": True, "gradient_factor": 0.0})
    ]
    assert torch.equal(*values)


def test_the_entropy_term_does_not_see_the_controller() -> None:
    student, teacher, labels = sample()
    plain = erde_loss(student, teacher, labels)
    scaled = erde_loss(student, teacher, labels, scale=torch.tensor(3.0))
    for part in ("ce", "entropy", "teacher_wrong"):
        assert torch.equal(plain[part], scaled[part])
    assert not torch.equal(plain["kl"], scaled["kl"])


# ---------------------------------------------------------------- a network's own exits as teachers


def temperatures_of(module: Criterion, student: Tensor, labels: Tensor, steps: int) -> list[float]:
    temperatures = []
    for _ in range(steps):
        temperatures.append(float(module(student, None, labels)["temperature"]))
        module.end_step(1)
    return temperatures


def test_phuongs_temperature_rises_while_the_last_exit_is_too_sure() -> None:
    student, _, labels = sample()
    module = build("phuong")
    temperatures = temperatures_of(module, 3 * student, labels, 60)
    rises = sum(b > a for a, b in itertools.pairwise(temperatures))
    assert temperatures[0] == 1
    assert temperatures[1] == pytest.approx(1.05)
    last = oracles.softmax(3 * student[-1].numpy(), temperatures[-1]).max(-1).mean()
    before = oracles.softmax(3 * student[-1].numpy(), temperatures[-1] / 1.05).max(-1).mean()
    assert last <= 0.5 < before
    assert temperatures[-1] == pytest.approx(1.05**rises, rel=1e-4)


def test_phuongs_knobs_of_the_temperature() -> None:
    student, _, labels = sample()
    module = build({"name": "phuong", "start_temperature": 2.0, "growth": 1.5, "confidence": 1.0})
    assert temperatures_of(module, student, labels, 2) == [2.0, 2.0]
    module = build({"name": "phuong", "start_temperature": 2.0, "growth": 1.5, "confidence": 0.0})
    assert temperatures_of(module, student, labels, 2) == [2.0, 3.0]


def test_phuongs_temperature_rises_by_the_whole_batch() -> None:
    student, _, labels = sample()
    half = len(labels) // 2
    # The first half's answers are as sure as can be, the second's are not sure at all.
    student = student.clone()
    student[-1, :half] *= 1000
    student[-1, half:] = 0
    for confidence, rises in ((0.5, True), (0.7, False)):
        module = build({"name": "phuong", "growth": 1.5, "confidence": confidence})
        for rows in (slice(0, half), slice(half, 2 * half)):
            assert float(module(student[:, rows], None, labels[rows])["temperature"]) == 1
        module.end_step(2)
        assert float(module.state_dict()["annealed_temperature"]) == (1.5 if rises else 1.0)


@pytest.mark.parametrize("loss", [phuong_loss, byot_loss, exit_ensemble_loss])
def test_own_targets_are_detached(loss: Any) -> None:
    """The gradient at an exit that only teaches is that of its own terms."""
    student, _, labels = sample()
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, labels)["loss"], student)
    ce = oracles.softmax(student[-1].detach().numpy())
    ce[np.arange(IMAGES), labels.numpy()] -= 1
    expected = ce / IMAGES * (0.5 if loss is phuong_loss else 1.0)
    if loss is exit_ensemble_loss:
        expected += 2 * (student[-1] - student.mean(0)).detach().numpy() / (IMAGES * CLASSES)
    np.testing.assert_allclose(gradient[-1].numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [phuong_loss, byot_loss, exit_ensemble_loss])
def test_an_exit_without_a_weight_learns_nothing_from_the_others(loss: Any) -> None:
    student, _, labels = sample()
    student.requires_grad_()
    features = torch.randn(EXITS, IMAGES, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with_features = {} if loss is phuong_loss else {"features": features, "feature_weight": 1.0}
    value = loss(student, labels, exit_weights=[1.0, 0.0, 0.0], **with_features)["loss"]
    for gradient in torch.autograd.grad(value, (student, features)[: 1 + len(with_features) // 2]):
        assert float(gradient[0].abs().max()) > 0
        assert float(gradient[1:].abs().max()) == 0


def test_soft_cross_entropy_is_the_kl_and_the_teachers_entropy() -> None:
    student, teacher, _ = sample()
    difference = soft_cross_entropy(student, teacher, 2.0) - exit_kl(student, teacher, 2.0)
    np.testing.assert_allclose(difference.numpy(), oracles.entropy(teacher.numpy(), 2.0), rtol=1e-9)


@pytest.mark.parametrize("name", ["phuong", "byot", "exit_ensemble"])
def test_a_network_with_one_exit_learns_from_the_labels_alone(name: str) -> None:
    student, _, labels = sample()
    settings = ExitSettings(CLASSES, (0.9,), 4.0, (1.0,), (), student_shapes=STUDENT_SHAPES[-1:])
    parts = build(name, settings).double()(student[:1], None, labels)
    ce = oracles.ce_loss(*as_numpy(student[:1], labels))
    assert float(parts["loss"]) == pytest.approx(ce * (0.5 if name == "phuong" else 1.0))


def test_exits_that_agree_have_no_distance() -> None:
    student, _, labels = sample()
    alike = student[:1].expand(EXITS, -1, -1)
    assert float(exit_ensemble_loss(alike, labels)["ensemble"].max()) < 1e-28
    features = torch.ones(EXITS, IMAGES, 4, dtype=torch.float64)
    assert float(byot_loss(alike, labels, features=features)["feature"].max()) == 0


@pytest.mark.parametrize("name", ["byot", "exit_ensemble"])
def test_features_come_closer_by_their_adapters(name: str) -> None:
    loss = {"name": name, "feature_weight": 1.0}
    module = build(loss)
    student, _, labels = sample(dtype=torch.float32)
    extras = extras_of(loss, dtype=torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    distances = []
    for _ in range(60):
        optimizer.zero_grad()
        parts = module(student, None, labels, **extras)
        parts["loss"].backward()
        optimizer.step()
        distances.append(float(parts["feature"][:-1].sum()))
    assert distances[-1] < 0.7 * distances[0]


@pytest.mark.parametrize("loss", [byot_loss, exit_ensemble_loss])
def test_features_of_other_shapes(loss: Any) -> None:
    student, _, labels = sample()
    with pytest.raises(ValueError, match=r"^expected features \(E, B, C\)"):
        loss(student, labels, features=torch.zeros(EXITS, IMAGES + 1, 4))


def test_pairs_of_a_teacher_with_fewer_exits() -> None:
    student, teacher, labels = sample(teacher_exits=2)
    module = build({"name": "dkd"}, make_settings(pairs=(0, 0, 1))).double()
    expected = oracles.dkd_parts(
        *as_numpy(student, teacher[[0, 0, 1]], labels),
        alpha=module.alpha.numpy(),
        temperature=3.0,
        exit_weights=WEIGHTS,
    )
    assert_parts(module(student, teacher, labels), expected)
