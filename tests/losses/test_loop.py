"""The losses on the real loop: what a method owns is trained, checkpointed, resumed, and not exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import erde
from erde.data.load import DataSplits
from erde.networks import checkpoint
from erde.training.job import FINAL
from erde.training.learner import Learner

torch.set_num_threads(1)
SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 256,
    "augmentation": {"crop_padding": 1, "flip": False},
    "checkpoint_seconds": 0,
}
# What each method keeps under ``criterion.``, by the ends of the names.
OWNED = {
    "dynamickd": ({"name": "dynamickd", "per_exit": True, "per_sample": True}, {"log_scale"}),
    "crd": (
        {"name": "crd", "exits": "all", "negatives": 50},
        {"classes_seen", "memories", "normalisers", "weight", "bias"},
    ),
    "dkd": ({"name": "dkd", "warmup_epochs": 1}, {"images_seen"}),
    "phuong": ({"name": "phuong", "start_temperature": 0.1}, {"annealed_temperature"}),
    "byot": ({"name": "byot", "feature_weight": 0.1}, {"weight", "bias"}),
    "exit_ensemble": ({"name": "exit_ensemble", "feature_weight": 0.1}, {"weight", "bias"}),
    "erde": (
        {"name": "erde", "controller": {"per_exit": True}, "distillation_form": "dkd"},
        {"log_scale"},
    ),
}


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return erde.load_data("digits", tune_size=300, certify_size=300, test_size=360)


def new_network(data: DataSplits) -> erde.EarlyExitNetwork:
    torch.manual_seed(0)
    backbone = erde.build_backbone("resnet8x0.25", classes=10, channels=data.input_size[0])
    return erde.attach_exits(backbone, exits=3, input_size=data.input_size)


def train(data: DataSplits, loss: Any, folder: Path) -> tuple[dict[str, Tensor], set[str]]:
    """Train, or go on, in ``folder``: the tensors of the final file, and the names of the network's own."""
    network = new_network(data)
    erde.distill(network, new_network(data), data, loss=loss, folder=folder, **SETTINGS)
    return checkpoint.load(next(folder.rglob(FINAL)))[0], set(network.state_dict())


@pytest.mark.parametrize("name", OWNED)
def test_killed_and_resumed_is_as_not_killed(
    name: str, data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, owned = OWNED[name]
    expected, network = train(data, loss, tmp_path / "whole")
    own = {key for key in expected if key.startswith("criterion.")}
    assert {key.split(".")[-1] for key in own} == owned
    assert {key.removeprefix("network.") for key in expected if key.startswith("network.")} == network
    assert len(expected) == len(own) + len(network), "nothing else is in the file"

    steps = 0
    original = Learner.step

    def killed(self: Learner, *arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt
        original(self, *arguments)

    monkeypatch.setattr(Learner, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(data, loss, tmp_path / "killed")
    monkeypatch.undo()
    torch.rand(5)
    result, _ = train(data, loss, tmp_path / "killed")
    assert result.keys() == expected.keys()
    assert [key for key in result if not torch.equal(result[key], expected[key])] == []


@pytest.mark.parametrize("name", OWNED)
def test_what_a_method_owns_changes_in_training(name: str, data: DataSplits, tmp_path: Path) -> None:
    states = []
    original = Learner.enter_epoch

    def watched(self: Learner) -> None:
        states.append({key: value.clone() for key, value in self.criterion.state_dict().items()})
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "enter_epoch", watched)
        train(data, OWNED[name][0], tmp_path)
    assert len(states) == 2
    assert states[0]
    assert [key for key, value in states[0].items() if torch.equal(value, states[1][key])] == []
