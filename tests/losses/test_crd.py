"""CRD: its negatives, its memories, several processes."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from erde.losses.base import Criterion, gather_ranks, ranks
from erde.losses.crd import contrastive_loss, draw_negatives
from tests.helpers import oracles
from tests.helpers.loss_samples import (
    CLASSES,
    EXITS,
    IMAGES,
    TRAIN_IMAGES,
    build,
    extras_of,
    make_settings,
    sample,
)

torch.set_num_threads(1)


def train_labels() -> Tensor:
    return torch.arange(TRAIN_IMAGES) % CLASSES


def batch(seed: int, indices: Tensor | None = None) -> tuple[Any, ...]:
    """(logits, teacher logits, labels) and extras of a step, with labels that belong to the indices."""
    student, teacher, _ = sample(seed, dtype=torch.float32)
    extras = extras_of("crd", seed, torch.float32)
    if indices is not None:
        extras["indices"] = indices
    return (student, teacher, train_labels()[extras["indices"]]), extras


def see_all(module: nn.Module) -> None:
    """Show the criterion every train image once."""
    order = torch.arange(TRAIN_IMAGES).repeat(2)
    for start in range(0, TRAIN_IMAGES, IMAGES):
        arguments, extras = batch(start, order[start : start + IMAGES])
        module(*arguments, **extras)


# ---------------------------------------------------------------- the loss


def test_contrastive_loss_by_hand() -> None:
    # N = 10, two negatives: M/N = 0.2. -ln(0.6/0.8) - ln(0.2/0.3) - ln(0.2/0.6) = 0.28768 + 0.40547 + 1.09861.
    positive = torch.tensor([0.6], dtype=torch.float64)
    negative = torch.tensor([[0.1, 0.4]], dtype=torch.float64)
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert float(contrastive_loss(positive, negative, valid, 10)) == pytest.approx(1.7917595, abs=1e-5)
    # The second does not count: M/N = 0.1. -ln(0.6/0.7) - ln(0.1/0.2) = 0.15415 + 0.69315.
    valid[0, 1] = False
    assert float(contrastive_loss(positive, negative, valid, 10)) == pytest.approx(0.8472979, abs=1e-5)


def test_an_image_without_negatives_has_a_loss_and_a_gradient() -> None:
    """As in a train split of one class."""
    positive = torch.tensor([0.6], requires_grad=True)
    negative = torch.tensor([[0.1, 0.4]], requires_grad=True)
    loss = contrastive_loss(positive, negative, torch.zeros(1, 2, dtype=torch.bool), 10)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    gradients = torch.autograd.grad(loss.sum(), (positive, negative))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_with_all_negatives_the_criterion_equals_the_oracle() -> None:
    """Through the whole criterion, over three steps: with more negatives asked than there are, nothing is drawn."""
    module = build("crd").double()
    contrast = module.contrasts[0]
    projections = [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in (contrast.project_student, contrast.project_teacher)
    ]
    oracle = oracles.CRD(projections, contrast.memories.numpy().copy(), 0.07, 0.5)
    known = np.full(TRAIN_IMAGES, -1)
    for seed in range(3):
        (student, teacher, labels), extras = batch(seed)
        indices = extras["indices"].numpy()
        known[indices] = labels.numpy()
        features = [extras[f"{whose}_features"][-1].double() for whose in ("student", "teacher")]
        parts = module(
            student.double(),
            teacher,
            labels,
            student_features=[None, None, features[0]],
            teacher_features=[None, None, features[1]],
            indices=extras["indices"],
        )
        others = [np.flatnonzero(known != label) for label in labels.numpy()]
        assert len({len(rows) for rows in others}) > 1, "images must differ in their number of negatives"
        expected = oracle.step([tensor.numpy() for tensor in features], indices, others)
        assert float(parts["crd"]) == pytest.approx(expected, rel=1e-9)
        ce = oracles.ce_loss(student.double().numpy(), labels.numpy(), [0.5, 1.0, 1.5])
        # On the final exit, whose weight is 1.5.
        assert float(parts["loss"].detach()) == pytest.approx(ce + 0.8 * 1.5 * expected, rel=1e-9)
    np.testing.assert_allclose(contrast.memories.numpy(), oracle.memories, rtol=1e-9, atol=1e-12)


def test_the_loss_falls_when_pairs_align() -> None:
    """Features that tell the image, at both sides: the projections learn to bring pairs together."""
    module = build({"name": "crd", "negatives": 20, "weight": 1.0})
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(TRAIN_IMAGES, 8, generator=generator)
    mix = torch.randn(8, 9, generator=generator)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    student, teacher, _ = sample(dtype=torch.float32)

    def step(shuffled: bool = False) -> float:
        order = torch.randperm(TRAIN_IMAGES, generator=generator)[:IMAGES]
        seen = images[order]
        other = (images @ mix)[order.flip(0) if shuffled else order]
        parts = module(
            student,
            teacher,
            train_labels()[order],
            student_features=[None, None, seen],
            teacher_features=[None, None, other],
            indices=order,
        )
        optimizer.zero_grad()
        parts["loss"].backward()
        if not shuffled:
            optimizer.step()
        return float(parts["crd"])

    losses = [step() for _ in range(150)]
    first, last = np.mean(losses[5:15]), np.mean(losses[-10:])
    assert last < 0.5 * first
    module.eval()
    # Teacher features of other images than the student's do not fit.
    assert np.mean([step(shuffled=True) for _ in range(10)]) > 2 * last


@pytest.mark.parametrize("exits", ["final", "all"])
def test_the_exits_that_are_compared(exits: str) -> None:
    module = build({"name": "crd", "exits": exits}, make_settings(pairs=(2, 0, 1)))
    assert len(module.contrasts) == (EXITS if exits == "all" else 1)
    channels = [contrast.channels for contrast in module.contrasts]
    # Widths 4, 4, 8 of the student, 5, 4, 9 of the teacher, whose exits 2, 0, 1 are paired.
    assert channels == ([(4, 9), (4, 5), (8, 4)] if exits == "all" else [(8, 4)])
    arguments, extras = batch(0)
    for features in extras["student_features"]:
        features.requires_grad_()
    parts = module(*arguments, **extras)
    parts["loss"].backward()
    reached = [features.grad is not None for features in extras["student_features"]]
    assert reached == ([True] * 3 if exits == "all" else [False, False, True])
    assert parts["crd"].shape == ((EXITS,) if exits == "all" else ())


# ---------------------------------------------------------------- negatives


def test_negatives_are_different_images_of_other_classes() -> None:
    known, labels = train_labels(), torch.tensor([0, 1, 4, 4])
    torch.manual_seed(0)
    result, valid = draw_negatives(known, labels, 20)
    assert result.shape == (4, 20)
    assert bool(valid.all())
    for row, label in zip(result, labels, strict=True):
        assert len(set(row.tolist())) == 20
        assert bool((known[row] != label).all())
    # Rows are drawn apart, and again in each step.
    assert set(result[2].tolist()) != set(result[3].tolist())
    again, _ = draw_negatives(known, labels, 20)
    assert not torch.equal(result, again)
    torch.manual_seed(0)
    assert torch.equal(draw_negatives(known, labels, 20)[0], result)


def test_every_other_image_is_drawn_as_often() -> None:
    known = train_labels()
    torch.manual_seed(0)
    result, _ = draw_negatives(known, torch.zeros(4000, dtype=torch.long), 8)
    counts = result.flatten().bincount(minlength=TRAIN_IMAGES).double()
    assert float(counts[known == 0].sum()) == 0
    # 8 of 32 for each of 4,000 rows: 1,000 each, with a standard deviation of 27.
    assert bool(((counts[known != 0] - 1000).abs() < 5 * 27.4).all())


def test_in_a_small_set_all_other_images_are_negatives() -> None:
    known = torch.tensor([0, 0, 0, 1, 2, -1])
    result, valid = draw_negatives(known, torch.tensor([0, 1]), 16384)
    assert result[0][valid[0]].sort().values.tolist() == [3, 4, 5]
    assert result[1][valid[1]].sort().values.tolist() == [0, 1, 2, 4, 5]


def test_classes_become_known_as_images_are_seen() -> None:
    module = build("crd")
    assert bool((module.classes_seen == -1).all())
    arguments, extras = batch(0)
    module(*arguments, **extras)
    seen = torch.zeros(TRAIN_IMAGES, dtype=torch.bool)
    seen[extras["indices"]] = True
    assert torch.equal(module.classes_seen[seen], train_labels()[seen])
    assert bool((module.classes_seen[~seen] == -1).all())
    see_all(module)
    assert torch.equal(module.classes_seen, train_labels())


def test_the_same_seed_draws_the_same_negatives() -> None:
    values = []
    for seed in (0, 0, 1):
        module = build({"name": "crd", "negatives": 5})
        arguments, extras = batch(0)
        torch.manual_seed(seed)
        values.append(float(module(*arguments, **extras)["crd"]))
    assert values[0] == values[1] != values[2]


# ---------------------------------------------------------------- memories


def test_the_memories_of_the_batch_move_and_have_length_1() -> None:
    module = build("crd")
    contrast = module.contrasts[0]
    before = contrast.memories.clone()
    arguments, extras = batch(0)
    module(*arguments, **extras)
    seen = torch.zeros(TRAIN_IMAGES, dtype=torch.bool)
    seen[extras["indices"]] = True
    assert torch.equal(contrast.memories[:, ~seen], before[:, ~seen])
    torch.testing.assert_close(contrast.memories[:, seen].norm(dim=-1), torch.ones(2, IMAGES))
    embedding = nn.functional.normalize(contrast.project_student(extras["student_features"][-1]), dim=1)
    expected = nn.functional.normalize(0.5 * before[0][extras["indices"]] + 0.5 * embedding, dim=1)
    torch.testing.assert_close(contrast.memories[0][extras["indices"]], expected.detach())


def test_the_constants_are_measured_once() -> None:
    module = build("crd")
    contrast = module.contrasts[0]
    assert contrast.normalisers.tolist() == [-1, -1]
    arguments, extras = batch(0)
    module(*arguments, **extras)
    first = contrast.normalisers.clone()
    assert bool((first > 0).all())
    see_all(module)
    assert torch.equal(contrast.normalisers, first)


def test_wrong_indices() -> None:
    arguments, extras = batch(0)
    extras["indices"] = extras["indices"][1:]
    with pytest.raises(ValueError, match=r"^expected indices \(7,\), got \(6,\)$"):
        build("crd")(*arguments, **extras)


# ---------------------------------------------------------------- several processes


def test_one_process_gathers_its_own_rows() -> None:
    rows = torch.ones(3, 2, requires_grad=True)
    assert ranks() == 1
    assert torch.equal(gather_ranks(rows), rows)
    assert not gather_ranks(rows).requires_grad


STATEFUL = ["crd", "phuong", "dkd"]


def criterion(name: str) -> Criterion:
    return build({"name": name, **({"warmup_epochs": 2} if name == "dkd" else {})})


def halves(name: str, rank: int | None) -> tuple[Any, Any]:
    """The arguments of a step; of the first three and last three images for a rank."""
    (student, teacher, labels), extras = batch(0)
    # The first rank's answers are sure, the second's are not; together they are sure enough for phuong to act.
    student = student * torch.tensor([10.0] * 3 + [0.1] * 4).unsqueeze(-1)
    part = slice(0, 6) if rank is None else slice(3 * rank, 3 * rank + 3)
    extras = {
        key: value[part] if isinstance(value, Tensor) else [tensor[part] for tensor in value]
        for key, value in extras.items()
    }
    arguments = (student[:, part], teacher[:, part], labels[part])
    return arguments, extras if name == "crd" else {}


def work(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results: dict[str, Any] = {"rows": gather_ranks(torch.full((2, 1), float(rank))), "ranks": ranks()}
    for name in STATEFUL:
        module = criterion(name)
        arguments, extras = halves(name, rank)
        parts = module(*arguments, **extras)
        module.end_step(1)
        results[name] = (float(parts["loss"]), module.state_dict())
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_keep_the_same_state_as_one(tmp_path: Path) -> None:
    """What is kept is the same on both ranks, and what one process would keep after the whole batch."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, str(tmp_path)), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(300)
        assert [worker.exitcode for worker in workers] == [0, 0]
    finally:
        # Where one has failed the other waits for it.
        for worker in workers:
            worker.kill()
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert results[0]["rows"].flatten().tolist() == [0, 0, 1, 1]
    assert results[0]["ranks"] == 2
    for name in STATEFUL:
        whole = criterion(name)
        arguments, extras = halves(name, None)
        whole(*arguments, **extras)
        whole.end_step(1)
        before = criterion(name).state_dict()
        for key, value in whole.state_dict().items():
            assert torch.equal(results[0][name][1][key], results[1][name][1][key]), (name, key)
            torch.testing.assert_close(
                results[0][name][1][key], value, rtol=1e-4, atol=1e-6, msg=f"{name} {key}"
            )
        assert any(not torch.equal(value, before[key]) for key, value in whole.state_dict().items())
        # Each rank has images of its own.
        assert results[0][name][0] != results[1][name][0]
