from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import erde.losses
from erde.common.errors import UserError
from erde.losses import ExitSettings, build_loss, cross_entropy_loss
from erde.losses.base import exit_entropy, exit_kl, pair_exits
from erde.losses.erde import entropy_penalty
from erde.recipe.losses import resolve_loss
from erde.recipe.schema import DistillationConfig
from tests.helpers import oracles
from tests.helpers.loss_samples import CLASSES, EXITS, IMAGES, erde_loss, kd_loss, make_settings, sample

torch.set_num_threads(1)

# Every setting at a value that differs from its default; each must change the loss of SAMPLE.
SWITCHES: list[dict[str, Any]] = [
    {"kl_on_wrong": True},
    {"ce_on_wrong": False},
    {"wrong_test": "final"},
    {"wrong_test": "uncertain"},
    {"wrong_test": "harm"},
    {"wrong_test": "harm", "kl_on_wrong": True},
    {"wrong_test": "uncertain", "uncertainty": 0.9},
    {"entropy_form": "uniform_kl"},
    {"entropy_form": "teacher"},
    {"entropy_exits": "all"},
    {"beta": 0.7},
    {"beta": [0.2, 0.4, 0.2]},
    {"alpha": 0.4},
    {"alpha": [0.2, 0.5, 0.9]},
    {"temperature": 2.0},
    {"exit_weights": [0.5, 1.0, 1.5]},
    {"pairs": [2, 2, 2]},
    {"pairs": [0, 0, 2]},
    {"distillation_form": "dkd"},
    {"distillation_form": "dkd", "target_weight": 3.0},
    {"distillation_form": "dkd", "non_target_weight": 1.0},
]


def as_numpy(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.numpy() for tensor in tensors)


def assert_parts(result: dict[str, Tensor], expected: dict[str, Any]) -> None:
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(result[name].detach().numpy(), value, rtol=1e-12, atol=1e-14, err_msg=name)


# ---------------------------------------------------------------- values


def test_two_classes_by_hand() -> None:
    # Student p = (3/4, 1/4) at both exits; teacher (1/2, 1/2 + tiny) is right on image 1 only.
    student = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64).expand(2, 2, 2)
    teacher = torch.tensor([0.0, 1e-12], dtype=torch.float64).expand(2, 2, 2)
    labels = torch.tensor([0, 1])
    # CE: -ln(3/4) = 0.28768 and -ln(1/4) = 1.38629. KL((1/2,1/2) || (3/4,1/4)) = 0.14384.
    # ln 2 - H(3/4,1/4) = 0.69315 - 0.56234 = 0.13081.
    assert float(cross_entropy_loss(student, labels)["loss"]) == pytest.approx(2 * 0.8369882168, abs=1e-9)
    kd = kd_loss(student, teacher, labels, alpha=0.5, temperature=1.0)
    assert float(kd["loss"]) == pytest.approx(2 * (0.5 * 0.8369882168 + 0.5 * 0.1438410362), abs=1e-9)
    erde = erde_loss(student, teacher, labels, alpha=0.5, beta=0.3, temperature=1.0)
    every_exit = 0.5 * 0.8369882168 + 0.5 * 0.1438410362 / 2
    assert float(erde["loss"]) == pytest.approx(2 * every_exit + 0.3 * 0.1308120359 / 2, abs=1e-9)
    assert erde["teacher_wrong"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("exit_weights", [1.0, [0.5, 1.0, 1.5]])
def test_cross_entropy_equals_the_oracle(exit_weights: Any) -> None:
    student, _, labels = sample()
    parts = cross_entropy_loss(student, labels, exit_weights=exit_weights)
    expected = oracles.ce_loss(student.numpy(), labels.numpy(), exit_weights)
    assert float(parts["loss"]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"alpha": [0.2, 0.5, 0.9], "temperature": 2.5},
        {"alpha": 0.3, "exit_weights": [0.5, 1.0, 1.5], "pairs": [0, 0, 2]},
        {"standardise": True, "weight": 10.0, "temperature": 2.0},
    ],
)
def test_kd_equals_the_oracle(seed: int, arguments: dict[str, Any]) -> None:
    student, teacher, labels = sample(seed)
    parts = kd_loss(student, teacher, labels, **arguments)
    assert_parts(parts, oracles.kd_parts(*as_numpy(student, teacher, labels), **arguments))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("arguments", [{}, *SWITCHES], ids=str)
def test_erde_equals_the_oracle(seed: int, arguments: dict[str, Any]) -> None:
    student, teacher, labels = sample(seed)
    parts = erde_loss(student, teacher, labels, **arguments)
    assert_parts(parts, oracles.erde_parts(*as_numpy(student, teacher, labels), **arguments))


@given(
    distillation_form=st.sampled_from(["kl", "dkd"]),
    kl_on_wrong=st.booleans(),
    ce_on_wrong=st.booleans(),
    wrong_test=st.sampled_from(["exit", "final", "uncertain", "harm"]),
    entropy_form=st.sampled_from(["negentropy", "uniform_kl", "teacher"]),
    entropy_exits=st.sampled_from(["intermediate", "all"]),
    pairs=st.lists(st.integers(0, 1), min_size=EXITS, max_size=EXITS),
)
@settings(max_examples=30, deadline=None)
def test_switches_together_equal_the_oracle(pairs: list[int], **switches: Any) -> None:
    student, teacher, labels = sample(4, teacher_exits=2)
    arguments = {"alpha": [0.2, 0.5, 0.9], "beta": [0.3, 0.2, 0.1], "pairs": pairs, **switches}
    parts = erde_loss(student, teacher, labels, **arguments)
    assert_parts(parts, oracles.erde_parts(*as_numpy(student, teacher, labels), **arguments))


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_switch_changes_the_value(switch: dict[str, Any]) -> None:
    student, teacher, labels = sample()
    default = erde_loss(student, teacher, labels)["loss"]
    assert abs(float(erde_loss(student, teacher, labels, **switch)["loss"] - default)) > 1e-4


def test_uncertainty_changes_the_uncertain_test() -> None:
    student, teacher, labels = sample()
    shares = [
        float(erde_loss(student, teacher, labels, wrong_test="uncertain", uncertainty=value)["doubted"].sum())
        for value in (0.0, 0.5, 0.95)
    ]
    assert shares[0] < shares[1] < shares[2]


@given(st.integers(0, 10_000), st.floats(0.5, 8), st.floats(0, 20))
@settings(max_examples=60, deadline=None)
def test_kl_is_zero_at_equality_and_never_negative(seed: int, temperature: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    s, t = spread * torch.randn(2, 1, 4, 6, generator=generator, dtype=torch.float64)
    assert float(exit_kl(s, s, temperature).abs().max()) < 1e-12
    assert float(exit_kl(s, t, temperature).min()) > -1e-12
    # A constant added to all logits is the same distribution.
    assert float(exit_kl(s + 3, s, temperature).abs().max()) < 1e-12


def test_kl_has_the_teacher_in_front() -> None:
    student = torch.tensor([[[math.log(9.0), 0.0]]], dtype=torch.float64)
    teacher = torch.zeros(1, 1, 2, dtype=torch.float64)
    # KL((.5,.5) || (.9,.1)) = 0.51083, the other way round it is 0.36806.
    assert float(exit_kl(student, teacher, 1.0)) == pytest.approx(0.5108256238, abs=1e-9)


@pytest.mark.parametrize(("form", "bound"), [("negentropy", math.log(6)), ("uniform_kl", math.inf)])
def test_entropy_penalties_are_zero_at_uniform_and_bounded_as_told(form: Any, bound: float) -> None:
    uniform = torch.full((1, 1, 6), 2.0, dtype=torch.float64)
    assert float(entropy_penalty(uniform, uniform, form)) == pytest.approx(0, abs=1e-12)
    peaked = torch.zeros(1, 1, 6, dtype=torch.float64)
    peaked[..., 0] = 60
    value = float(entropy_penalty(peaked, uniform, form))
    assert value == pytest.approx(bound) if math.isfinite(bound) else value > 10 * math.log(6)


def test_teacher_form_is_zero_where_the_entropies_agree() -> None:
    student, _, _ = sample()
    assert float(entropy_penalty(student, student.flip(-1), "teacher").max()) < 1e-20
    assert float(entropy_penalty(student, 0 * student, "teacher").min()) > 1e-3


def test_erde_with_a_teacher_that_is_always_right_is_kd() -> None:
    student, teacher, labels = sample()
    teacher[:, torch.arange(IMAGES), labels] += 20
    values, gradients = [], []
    for loss in (kd_loss, erde_loss):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, labels, alpha=[0.2, 0.5, 0.9])["loss"]
        value.backward()
        values.append(value.detach())
        gradients.append(leaf.grad)
    assert torch.equal(values[0], values[1])
    assert torch.equal(gradients[0], gradients[1])


def test_erde_without_beta_and_with_all_kl_is_kd() -> None:
    student, teacher, labels = sample()
    assert torch.equal(
        erde_loss(student, teacher, labels, beta=0.0, kl_on_wrong=True)["loss"],
        kd_loss(student, teacher, labels)["loss"],
    )


def test_parts_are_means_over_all_images_also_where_masked() -> None:
    student, teacher, labels = sample()
    whole = erde_loss(student, teacher, labels, ce_on_wrong=False)
    single = [
        erde_loss(student[:, b : b + 1], teacher[:, b : b + 1], labels[b : b + 1], ce_on_wrong=False)
        for b in range(IMAGES)
    ]
    assert 0 < float(whole["teacher_wrong"][0]) < 1
    for name in whole:
        assert torch.allclose(whole[name], torch.stack([parts[name] for parts in single]).mean(0), rtol=1e-12)


# ---------------------------------------------------------------- gradients


def test_gradient_of_the_entropy_penalty() -> None:
    logits = sample()[0].requires_grad_()
    penalty = entropy_penalty(logits, logits.detach(), "negentropy")
    (gradient,) = torch.autograd.grad(penalty.sum(), logits)
    p = oracles.softmax(logits.detach().numpy())
    expected = p * (np.log(p) + oracles.entropy(logits.detach().numpy())[..., None])
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["negentropy", "uniform_kl"])
def test_a_step_down_the_entropy_penalty_raises_the_entropy(form: Any) -> None:
    logits = sample()[0].requires_grad_()
    (gradient,) = torch.autograd.grad(entropy_penalty(logits, logits.detach(), form).sum(), logits)
    assert bool((exit_entropy(logits - 1e-3 * gradient) > exit_entropy(logits)).all())


@pytest.mark.parametrize("criterion", [lambda s, t, y: cross_entropy_loss(s, y), kd_loss, erde_loss])
def test_bfloat16_is_near_float64(criterion: Any) -> None:
    student, teacher, labels = sample(dtype=torch.bfloat16)
    expected = criterion(student.double(), teacher.double(), labels)["loss"]
    loss = criterion(student, teacher, labels)["loss"]
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("loss", [kd_loss, erde_loss])
@pytest.mark.parametrize(
    "arguments", [{"alpha": [0.1, 0.2]}, {"exit_weights": [1.0] * 4}, {"pairs": [0]}, {"pairs": [0, 1, 2, 2]}]
)
def test_wrong_number_of_values_per_exit(loss: Any, arguments: dict[str, Any]) -> None:
    student, teacher, labels = sample()
    with pytest.raises(ValueError, match="exits"):
        loss(student, teacher, labels, **arguments)


# ---------------------------------------------------------------- shared settings


STUDENT_MACS = [40, 70, 100]


def resolve(teacher_macs: list[int] | None = None, **distillation: Any) -> ExitSettings:
    return ExitSettings.resolve(DistillationConfig(**distillation), CLASSES, STUDENT_MACS, teacher_macs)


def test_rising_alpha_is_linear_in_macs() -> None:
    assert resolve().alpha == pytest.approx((0.2, 0.55, 0.9))
    uneven = ExitSettings.resolve(DistillationConfig(), CLASSES, [10, 20, 90, 110], None)
    assert uneven.alpha == pytest.approx((0.2, 0.27, 0.76, 0.9))
    assert ExitSettings.resolve(DistillationConfig(), CLASSES, [50], None).alpha == (0.9,)


def test_given_alpha() -> None:
    assert resolve(alpha=0.3).alpha == (0.3, 0.3, 0.3)
    assert resolve(alpha=[0.1, 0.2, 0.3]).alpha == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("uniform", (1, 1, 1)),
        ("linear", (0.5, 1, 1.5)),
        ("macs", (40 / 70, 1, 100 / 70)),
        ([3, 1, 0], (3, 1, 0)),
    ],
)
def test_exit_weights(weights: Any, expected: tuple[float, ...]) -> None:
    assert resolve(exit_weights=weights).exit_weights == pytest.approx(expected)


@pytest.mark.parametrize("key", ["alpha", "exit_weights"])
@pytest.mark.parametrize("number", [2, 4])
def test_wrong_number_of_shared_values_is_the_users_error(key: str, number: int) -> None:
    with pytest.raises(UserError, match=rf"^distillation\.{key} has {number} values for 3 exits"):
        resolve(**{key: [0.5] * number})


def test_wrong_number_of_betas_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"^loss\.beta has 2 values for 3 exits"):
        build_loss(resolve_loss({"name": "erde", "beta": [0.1, 0.2]}), make_settings())


@pytest.mark.parametrize(
    ("student", "teacher", "pairing", "expected"),
    [
        ([40, 70, 100], [10, 20, 500], "exit", (0, 1, 2)),
        ([40, 70, 100], [10, 20, 500], "final", (2, 2, 2)),
        ([40, 70, 100], [50, 100], "final", (1, 1, 1)),
        ([40, 70, 100], [100, 390, 700, 1000], "exit", (1, 2, 3)),
        ([10, 95, 100], [100, 390, 700, 1000], "exit", (0, 3, 3)),
        ([40, 70, 100], [1000], "exit", (0, 0, 0)),
        ([100], [300, 700, 1000], "exit", (2,)),
    ],
)
def test_pair_exits(student: Any, teacher: Any, pairing: str, expected: tuple[int, ...]) -> None:
    assert pair_exits(student, teacher, pairing) == expected


def test_resolve_pairs_only_with_a_teacher() -> None:
    assert resolve(None).pairs == ()
    assert resolve([50, 100]).pairs == (0, 0, 1)
    assert resolve([50, 100], pairing="final").pairs == (1, 1, 1)


def test_doctests() -> None:
    attempted = 0
    for module in pkgutil.iter_modules(erde.losses.__path__, "erde.losses."):
        result = doctest.testmod(importlib.import_module(module.name))
        assert result.failed == 0, module.name
        attempted += result.attempted
    assert attempted >= 14
