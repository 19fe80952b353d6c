"""What every loss of the table must do, with its switches too."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from erde.common.errors import UserError
from erde.losses import cross_entropy_loss
from erde.recipe.losses import LOSSES, resolve_loss
from tests.helpers.loss_samples import (
    CLASSES,
    EXITS,
    IMAGES,
    VARIANTS,
    build,
    byot_loss,
    dkd_loss,
    erde_loss,
    exit_ensemble_loss,
    extras_of,
    kd_loss,
    make_settings,
    needs_teacher,
    phuong_loss,
    sample,
)

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
every_variant = pytest.mark.parametrize("loss", VARIANTS.values(), ids=VARIANTS.keys())
WITH_STATE = [name for name, loss in VARIANTS.items() if build(loss).state_dict()]


def call(
    module: nn.Module, loss: Any, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    student, teacher, labels = sample(seed, dtype=dtype)
    result: dict[str, Tensor] = module(
        student.requires_grad_(),
        teacher if needs_teacher(loss) else None,
        labels,
        **extras_of(loss, seed, dtype),
    )
    return result


@every_variant
def test_contract(loss: Any) -> None:
    student, teacher, labels = sample(dtype=torch.float32)
    student.requires_grad_()
    teacher.requires_grad_()
    extras = extras_of(loss, dtype=torch.float32)
    for tensor in extras.get("teacher_features", []):
        tensor.requires_grad_()
    module = build(loss)
    parts = module(student, teacher if needs_teacher(loss) else None, labels, **extras)
    assert parts["loss"].shape == ()
    assert all(parts[part].shape in ((), (EXITS,)) for part in parts)
    assert all(bool(part.isfinite().all()) for part in parts.values())
    # Parts are for the log: only the loss carries a graph.
    assert [part for part in parts if parts[part].requires_grad] == ["loss"]
    parts["loss"].backward()
    assert student.grad is not None
    assert bool((student.grad.abs().sum(dim=-1) > 0).all())
    # What a method owns is learnt; a teacher is not.
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name
    assert teacher.grad is None
    assert all(tensor.grad is None for tensor in extras.get("teacher_features", []))


@every_variant
def test_survives_torch_compile(loss: Any) -> None:
    eager, compiled = build(loss), build(loss)
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)  # a break in the graph is an error
    for seed in range(2):
        values = []
        for module, forward in ((eager, eager), (compiled, run)):
            torch.manual_seed(seed)
            parts = call(forward, loss, seed)
            parts["loss"].backward()
            values.append([parts["loss"].detach(), *(parameter.grad for parameter in module.parameters())])
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(eager.state_dict(), compiled.state_dict(), rtol=1e-5, atol=1e-6)


@every_variant
@pytest.mark.parametrize(
    ("student", "teacher", "labels"),
    [
        ((IMAGES, CLASSES), (EXITS, IMAGES, CLASSES), (IMAGES,)),
        ((EXITS, IMAGES, CLASSES), (EXITS, IMAGES, CLASSES), (IMAGES + 1,)),
        ((EXITS, IMAGES, CLASSES), (EXITS, IMAGES, CLASSES), (IMAGES, 1)),
        ((EXITS, IMAGES, CLASSES), (EXITS, IMAGES, CLASSES + 1), (IMAGES,)),
        ((EXITS, IMAGES, CLASSES), (EXITS, IMAGES + 1, CLASSES), (IMAGES,)),
        ((EXITS, IMAGES, CLASSES), (IMAGES, CLASSES), (IMAGES,)),
    ],
)
def test_wrong_shapes(loss: Any, student: Any, teacher: Any, labels: Any) -> None:
    student_is_wrong = len(student) != 3 or labels != (IMAGES,)
    # Plain CRD looks at the teacher's features, not at its logits.
    if not (student_is_wrong or (needs_teacher(loss) and loss != {"name": "crd"})):
        pytest.skip("this loss does not look at a teacher's logits")
    with pytest.raises(ValueError, match="expected"):
        build(loss)(
            torch.zeros(student),
            torch.zeros(teacher),
            torch.zeros(labels, dtype=torch.long),
            **extras_of(loss, dtype=torch.float32),
        )


@pytest.mark.parametrize("name", ["crd", "crd-all", "byot-features", "exit_ensemble-features"])
@pytest.mark.parametrize("change", ["channels", "dimensions", "number"])
def test_wrong_features(name: str, change: str) -> None:
    loss = VARIANTS[name]
    extras = extras_of(loss, dtype=torch.float32)
    last = extras["student_features"][-1]
    if change == "channels":
        extras["student_features"][-1] = torch.zeros(IMAGES, last.shape[1] + 1)
    elif change == "dimensions":
        extras["student_features"][-1] = torch.zeros(IMAGES)
    else:
        extras["student_features"].pop()
    student, teacher, labels = sample(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"expected features"):
        build(loss)(student, teacher if needs_teacher(loss) else None, labels, **extras)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_huge_logits(loss: Any, dtype: torch.dtype) -> None:
    student, teacher, labels = sample(dtype=dtype)
    student = (100 * student.sign()).requires_grad_()
    module = build(loss)
    parts = module(
        student,
        -100 * teacher.sign() if needs_teacher(loss) else None,
        labels,
        **extras_of(loss, dtype=dtype),
    )
    parts["loss"].backward()
    assert all(bool(value.isfinite().all()) for value in parts.values())
    assert all(value.dtype != torch.bfloat16 for value in parts.values())
    assert student.grad is not None
    gradients = [
        student.grad,
        *(parameter.grad for parameter in module.parameters() if parameter.grad is not None),
    ]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert float(student.grad.abs().max()) > 0


# Of these the last exit is a target too, and its gradient there is cut on purpose.
OWN_TARGETS = {"phuong": EXITS - 1, "byot": EXITS - 1, "exit_ensemble": 0}


@every_variant
def test_gradcheck(loss: Any) -> None:
    exits = OWN_TARGETS.get(loss["name"], EXITS)
    if not exits:
        pytest.skip("every exit is part of its own target; its gradient is in the golden numbers")
    if loss["name"] == "crd":
        loss = {**loss, "dimensions": 3}  # 128 would be thousands of parameters to nudge
    if loss["name"] == "dynamickd":
        loss = {
            **loss,
            "gradient_factor": 1,
        }  # another factor is another gradient than the value's, on purpose
    module = build(loss).double()
    student, teacher, labels = sample()
    extras = extras_of(loss)
    # The first call measures constants, and those of later ones are kept.
    module(student, teacher, labels, **extras)
    module.eval()
    fixed = student[exits:]
    free = [student[:exits].clone().requires_grad_()]
    if "student_features" in extras:
        free += [features.requires_grad_() for features in extras["student_features"][:-1]]

    def value(logits: Tensor, *others: Tensor) -> Any:
        torch.manual_seed(0)
        if others:
            extras["student_features"][:-1] = others
        return module(torch.cat([logits, fixed]), teacher, labels, **extras)["loss"]

    owned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert torch.autograd.gradcheck(
        lambda *all: value(*all[: len(free)]), (*free, *owned), fast_mode=bool(owned)
    )


class NoWaiting(TorchDispatchMode):
    """Raises where the host would have to wait for the device: a tensor's value as a number, a size that depends on values."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function.overloadpacket._qualified_op_name
        waiting = {
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "is_nonzero",
            "equal",
            "unique",
            "_unique2",
        }
        if name.removeprefix("aten::") in waiting:
            raise AssertionError(f"{name} waits for the device")
        if name in ("aten::index", "aten::index_put_"):
            assert all(item is None or item.dtype != torch.bool for item in arguments[1]), f"{name} by a mask"
        return function(*arguments, **(keywords or {}))


@every_variant
def test_never_waits_for_the_device(loss: Any) -> None:
    student, teacher, labels = sample(dtype=torch.float32)
    extras = extras_of(loss, dtype=torch.float32)
    module = build(loss)
    student.requires_grad_()
    with NoWaiting():
        for _ in range(2):
            parts = module(student, teacher if needs_teacher(loss) else None, labels, **extras)
            parts["loss"].backward()


def test_the_watch_for_waiting_sees_it() -> None:
    for wait in (
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ):
        with pytest.raises(AssertionError, match=r"waits for the device|by a mask"), NoWaiting():
            wait(torch.ones(3))


# ---------------------------------------------------------------- functions and knobs


SHARED = {"alpha": [0.2, 0.5, 0.9], "temperature": 3.0, "exit_weights": [0.5, 1.0, 1.5], "pairs": [0, 0, 1]}
OWN = {"exit_weights": [0.5, 1.0, 1.5]}
FUNCTIONS: dict[str, Any] = {
    "ce": lambda s, t, y, **knobs: cross_entropy_loss(s, y, **OWN, **knobs),
    "kd": lambda s, t, y, **knobs: kd_loss(s, t, y, **SHARED, **knobs),
    "erde": lambda s, t, y, **knobs: erde_loss(s, t, y, **SHARED, **knobs),
    "dkd": lambda s, t, y, **knobs: dkd_loss(s, t, y, **SHARED, **knobs),
    "phuong": lambda s, t, y, **knobs: phuong_loss(s, y, **OWN, **knobs),
    "byot": lambda s, t, y, **knobs: byot_loss(s, y, **OWN, **knobs),
    "exit_ensemble": lambda s, t, y, **knobs: exit_ensemble_loss(s, y, **OWN, **knobs),
}
KNOBS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FUNCTIONS),
    ("kd", {"standardise": True}),
    ("kd", {"weight": 3.0}),
    ("dkd", {"target_weight": 3.0}),
    ("dkd", {"non_target_weight": 3.0}),
    ("dkd", {"standardise": True}),
    ("erde", {"distillation_form": "dkd", "target_weight": 3.0, "non_target_weight": 2.0}),
    ("erde", {"beta": 0.9}),
    ("erde", {"beta": [0.1, 0.6, 0.2]}),
    ("erde", {"kl_on_wrong": True}),
    ("erde", {"ce_on_wrong": False}),
    ("erde", {"wrong_test": "final"}),
    ("erde", {"wrong_test": "uncertain", "uncertainty": 0.95}),
    ("erde", {"wrong_test": "harm"}),
    ("erde", {"entropy_form": "teacher"}),
    ("erde", {"entropy_exits": "all"}),
    ("phuong", {"soft_share": 0.2}),
    ("byot", {"soft_share": 0.2}),
    ("byot", {"temperature": 1.0}),
    ("exit_ensemble", {"weight": 3.0}),
]


@pytest.mark.parametrize(("name", "knobs"), KNOBS, ids=str)
def test_module_equals_function(name: str, knobs: dict[str, Any]) -> None:
    student, teacher, labels = sample(teacher_exits=2)
    module = build({"name": name, **knobs}, make_settings(pairs=(0, 0, 1))).double()
    result, expected = module(student, teacher, labels), FUNCTIONS[name](student, teacher, labels, **knobs)
    assert result.keys() - {"temperature"} == expected.keys()
    for part in expected:
        # The module's buffers start as float32.
        assert torch.allclose(result[part], expected[part], rtol=1e-6), part
    if knobs:
        plain = build(name, make_settings(pairs=(0, 0, 1))).double()(student, teacher, labels)["loss"]
        assert abs(float(result["loss"] - plain)) > 1e-4


def test_smoothed_labels_reach_every_cross_entropy() -> None:
    for loss in VARIANTS.values():
        torch.manual_seed(1)
        plain = call(build(loss), loss)["ce"]
        torch.manual_seed(1)
        smoothed = call(build(loss, make_settings(label_smoothing=0.2)), loss)["ce"]
        assert bool(((plain - smoothed).abs() > 1e-3).all()), loss


def test_variants_differ() -> None:
    values: dict[float, str] = {}
    for name, loss in VARIANTS.items():
        module = build(loss)
        for seed in range(2):  # a controller starts where plain distillation is
            result = call(module, loss, seed)
            result["loss"].backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(parameter.grad, alpha=-0.1)
        value = float(call(module, loss)["loss"].detach())
        assert value not in values, f"{name} is {values.get(value)}"
        values[value] = name


# ---------------------------------------------------------------- state


def test_losses_that_have_state() -> None:
    assert {VARIANTS[name]["name"] for name in WITH_STATE} == set(LOSSES) - {"ce", "kd"}


@pytest.mark.parametrize("name", WITH_STATE)
def test_state_dict_is_all_of_the_state(name: str) -> None:
    """A criterion built anew and given the state goes on as the one that it came from, bit by bit."""
    loss = VARIANTS[name]
    first = build(loss)
    for seed in range(3):
        call(first, loss, seed)["loss"].backward()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(parameter.grad, alpha=-0.1)
    second = build(loss, seed=9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(3, 5):
        values = []
        for module in (first, second):
            torch.manual_seed(seed)
            values.append(call(module, loss, seed)["loss"].detach())
        assert torch.equal(*values)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pytest.mark.parametrize("name", WITH_STATE)
def test_evaluation_mode_leaves_the_state(name: str) -> None:
    loss = VARIANTS[name]
    module = build(loss).eval()
    before = copy.deepcopy(module.state_dict())
    call(module, loss)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"name": "crd", "temperature": 0}, r"^loss\.temperature: expected greater than 0, got 0$"),
        ({"name": "crd", "momentum": 1}, r"^loss\.momentum: expected less than 1, got 1$"),
        ({"name": "crd", "negatives": 0}, r"^loss\.negatives: expected greater than or equal to 1, got 0$"),
        ({"name": "crd", "exits": "some"}, r"^loss\.exits: expected 'final' or 'all', got 'some'$"),
        (
            {"name": "dkd", "non_target_weight": -1},
            r"^loss\.non_target_weight: expected greater than or equal to 0",
        ),
        ({"name": "dkd", "beta": 2}, r"^unknown key 'loss\.beta'"),
        ({"name": "phuong", "growth": 0.9}, r"^loss\.growth: expected greater than or equal to 1, got 0\.9$"),
        (
            {"name": "phuong", "soft_share": 1.5},
            r"^loss\.soft_share: expected less than or equal to 1, got 1\.5$",
        ),
        ({"name": "byot", "temperature": -3}, r"^loss\.temperature: expected greater than 0, got -3$"),
        (
            {"name": "exit_ensemble", "weight": -1},
            r"^loss\.weight: expected greater than or equal to 0, got -1$",
        ),
        ({"name": "kd", "weight": 0}, r"^loss\.weight: expected greater than 0, got 0$"),
        (
            {"name": "dynamickd", "gradient_factor": -1},
            r"^loss\.gradient_factor: expected greater than or equal to 0, got -1$",
        ),
        (
            {"name": "erde", "controller": {"per_exits": True}},
            r"^unknown key 'loss\.controller\.per_exits' \(did you mean 'loss\.controller\.per_exit'\?\)$",
        ),
        (
            {"name": "exit-ensemble"},
            r"^loss: unknown loss 'exit-ensemble' \(did you mean 'exit_ensemble'\?\)$",
        ),
    ],
    ids=str,
)
def test_a_knob_out_of_its_range(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_loss(knobs)


@pytest.mark.parametrize("name", ["crd", "crd-all", "byot-features", "exit_ensemble-features"])
@pytest.mark.parametrize(
    ("shapes", "offered"),
    [
        ((), "none"),
        (((4, 3, 3), (6, 4)), "none"),
        ((*((1, 2, 3, 4),) * 3,), re.escape("of shape (1, 2, 3, 4)")),
    ],
)
def test_features_where_the_backbone_offers_none(name: str, shapes: Any, offered: str) -> None:
    loss = VARIANTS[name]
    message = rf"^the loss '{loss['name']}' compares features, and the student's backbone offers {offered} at exit \d"
    with pytest.raises(UserError, match=message):
        build(loss, make_settings(student_shapes=shapes))


def test_features_where_the_teacher_offers_none() -> None:
    with pytest.raises(
        UserError, match=r"^the loss 'crd' compares features, and the teacher's backbone offers none"
    ):
        build("crd", make_settings(teacher_shapes=()))


@pytest.mark.parametrize(
    ("loss", "images", "message"),
    [
        ("crd", CLASSES, rf"^the loss 'crd' needs at least {CLASSES + 1} train images, got {CLASSES}"),
        ("crd", 0, rf"^the loss 'crd' needs at least {CLASSES + 1} train images, got 0"),
        (
            {"name": "dynamickd", "per_sample": True},
            0,
            "^a controller with per_sample needs at least 1 train images",
        ),
        (
            {"name": "dkd", "warmup_epochs": 1},
            0,
            r"^loss\.warmup_epochs of 'dkd' needs at least 1 train images",
        ),
    ],
    ids=str,
)
def test_too_few_train_images(loss: Any, images: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(loss, make_settings(train_images=images))


# ---------------------------------------------------------------- documents


def test_every_loss_has_a_summary_and_a_card_that_names_its_keys() -> None:
    folder = ROOT / "docs" / "methods"
    assert {path.stem for path in folder.glob("*.md")} - {"README"} == set(LOSSES)
    for name, config in LOSSES.items():
        assert config.summary
        assert not config.summary.endswith(".")
        text = (folder / f"{name}.md").read_text(encoding="utf-8")
        for heading in ("## When to use it", "## Keys", "## Cost", "## Attribution"):
            assert f"\n{heading}\n" in text, (name, heading)
        rows = set(re.findall(r"^\| `(\w+)` \|", text, re.M))
        keys = set(config.model_fields) - {"name"}
        assert keys <= rows, (name, keys - rows)


def test_links_of_the_cards_lead_somewhere() -> None:
    links = 0
    for path in (ROOT / "docs" / "methods").glob("*.md"):
        for target in re.findall(r"\]\(([^()\s]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                links += 1
                assert (path.parent / target.partition("#")[0]).exists(), (path.name, target)
    assert links > 20
