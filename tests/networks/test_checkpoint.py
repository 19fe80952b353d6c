from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import resource
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from erde.networks import checkpoint
from tests.helpers.checks import entries, user_error


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)
    )


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


# ---------------------------------------------------------------- files


def test_tensors_and_state_come_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 4, 5, generator=generator)
    tensors = {
        "float": image,
        "channels_last": image.to(memory_format=torch.channels_last),
        "view": image[:, 1:, ::2],
        "bf16": image.bfloat16(),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "count": torch.tensor(2**40),
        "bytes": torch.get_rng_state(),
        "yes": torch.tensor([True, False]),
        "empty": torch.zeros(0),
        "parameter": nn.Parameter(torch.randn(3, generator=generator)),
        "not_finite": torch.tensor([float("nan"), float("inf")]),
    }
    state = {"epoch": 3, "history": [{"parts": {"ce": [0.1, 1 / 3]}, "name": "é"}], "nothing": None}
    checkpoint.save(tmp_path / "some.safetensors", tensors, state)
    result, found_state = checkpoint.load(tmp_path / "some.safetensors")
    assert found_state == {"format_version": checkpoint.FORMAT_VERSION, **state}
    assert result.keys() == tensors.keys()
    for name in tensors.keys() - {"not_finite"}:
        assert same(result[name], tensors[name]), name
    assert result["not_finite"].isnan().tolist() == [True, False]
    assert not result["parameter"].requires_grad


def test_a_checkpoint_of_another_format(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    for version in (2, "1", None):
        save_file(
            {"weight": torch.ones(3)}, path, {"erde": json.dumps({"format_version": version, "epoch": 1})}
        )
        with user_error(f"{path} is a checkpoint of format version {version!r}, this erde reads 1"):
            checkpoint.load(path)


def test_a_checkpoint_without_the_optimiser(tmp_path: Path) -> None:
    network = small_network()
    momentum = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for optimizer in (momentum, torch.optim.AdamW(network.parameters())):
        with user_error("the checkpoint has nothing of the optimiser"):
            checkpoint.restore_optimizer(optimizer, {})
    checkpoint.restore_optimizer(torch.optim.SGD(network.parameters(), lr=0.1), {})


def test_the_file_is_safetensors_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    checkpoint.save(path, {"weight": torch.ones(3)}, {"epoch": 1})
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    assert header["weight"] == {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    assert json.loads(header["__metadata__"]["erde"])["epoch"] == 1
    assert content[8 + size :] == struct.pack("<3f", 1, 1, 1)
    assert not zipfile.is_zipfile(path)


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_a_pickle_is_refused_and_not_run(write: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "some.safetensors", tmp_path / "trace"
    if write == "pickle":
        path.write_bytes(pickle.dumps(_Malicious(trace)))
    else:
        torch.save({"weight": _Malicious(trace)}, path)
    with user_error("is not a readable safetensors file"):
        checkpoint.load(path)
    assert not trace.exists()


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    checkpoint.save(path, {"weight": torch.randn(1000)}, {"epoch": 1})
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with user_error(f"{path} is not a readable safetensors file"):
        checkpoint.load(path)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with user_error("no checkpoint at"):
        checkpoint.load(tmp_path / "some.safetensors")
    with user_error("is not a readable safetensors file"):
        checkpoint.load(tmp_path)


def test_prefixes() -> None:
    tensors = {"a.weight": torch.zeros(1), "b": torch.ones(1)}
    under = checkpoint.with_prefix("network", tensors)
    assert list(under) == ["network.a.weight", "network.b"]
    others = {"networks.c": torch.zeros(1), "meter": torch.zeros(1), "optimizer.network.d": torch.zeros(1)}
    assert checkpoint.under_prefix("network", {**under, **others}) == tensors


# ---------------------------------------------------------------- failures while writing


@pytest.mark.parametrize("error", [RuntimeError("simulated"), KeyboardInterrupt()])
def test_a_failure_while_writing_keeps_the_old_checkpoint(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some.safetensors"
    checkpoint.save(path, {"weight": torch.ones(3)}, {"epoch": 1})
    write = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(type(error)):
        checkpoint.save(path, {"weight": torch.zeros(3)}, {"epoch": 2})
    tensors, state = checkpoint.load(path)
    assert same(tensors["weight"], torch.ones(3))
    assert state["epoch"] == 1
    assert entries(tmp_path) == ["some.safetensors"]


def test_a_real_failing_write_is_the_systems_own_error(tmp_path: Path) -> None:
    # safetensors' own writer turns it into an error without a number, by which a full disk is known.
    path = tmp_path / "some.safetensors"
    checkpoint.save(path, {"weight": torch.ones(3)}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            checkpoint.save(path, {"weight": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert same(checkpoint.load(path)[0]["weight"], torch.ones(3))
    assert entries(tmp_path) == ["some.safetensors"]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.safetensors"
    checkpoint.save(path, {"weight": torch.ones(3)}, {})

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with user_error(f"no space left on the disk while writing {path}"):
        checkpoint.save(path, {"weight": torch.zeros(3)}, {})
    assert same(checkpoint.load(path)[0]["weight"], torch.ones(3))
    assert entries(tmp_path) == ["some.safetensors"]


# ---------------------------------------------------------------- optimisers


def make_optimizer(name: str, network: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    if name == "plain sgd":
        return torch.optim.SGD(network.parameters(), lr=0.1)
    return torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.01)


def take_step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    network(torch.randn(5, 2, 6, 6, generator=generator)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["sgd", "plain sgd", "adamw"])
def test_an_optimiser_goes_on_bit_for_bit(name: str, channels_last: bool, tmp_path: Path) -> None:
    network = small_network()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # A frozen parameter has no state.
    network[1].bias.requires_grad_(False)
    optimizer = make_optimizer(name, network)
    for seed in range(3):
        take_step(network, optimizer, seed)
    path = tmp_path / "some.safetensors"
    checkpoint.save(path, checkpoint.optimizer_tensors(optimizer), {})

    other_network = copy.deepcopy(network)
    other = make_optimizer(name, other_network)
    checkpoint.restore_optimizer(other, checkpoint.load(path)[0])
    before, after = optimizer.state_dict(), other.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    assert len(before["state"]) == (0 if name == "plain sgd" else 5)
    for index, values in before["state"].items():
        assert all(same(torch.as_tensor(value), after["state"][index][key]) for key, value in values.items())
    take_step(network, optimizer, 3)
    take_step(other_network, other, 3)
    for key, value in network.state_dict().items():
        assert same(value, other_network.state_dict()[key]), key


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("plain", [False, True])
def test_load_weights(plain: bool, tmp_path: Path) -> None:
    network, path = small_network(), tmp_path / "some.safetensors"
    take_step(network, make_optimizer("sgd", network), 0)
    weights = dict(network.state_dict())
    if plain:
        save_file({**weights, "unused": torch.zeros(1)}, path)
    else:
        checkpoint.save(path, {**checkpoint.with_prefix("network", weights), "meter": torch.zeros(1)}, {})
    other = small_network()
    checkpoint.load_weights(other, path)
    for key, value in other.state_dict().items():
        assert same(value, weights[key]), key


def test_load_weights_that_do_not_fit(tmp_path: Path) -> None:
    network, path = small_network(), tmp_path / "some.safetensors"
    before = copy.deepcopy(network.state_dict())
    other = {key: value + 1 for key, value in before.items()}
    missing = {key: value for key, value in other.items() if key != "4.bias"}
    checkpoint.save(path, checkpoint.with_prefix("network", missing), {})
    with user_error(r"does not fit the network: it has no '4\.bias'"):
        checkpoint.load_weights(network, path)
    checkpoint.save(path, checkpoint.with_prefix("network", {**other, "4.bias": torch.zeros(7)}), {})
    with user_error(r"'4\.bias' has shape \(7,\), expected \(3,\)"):
        checkpoint.load_weights(network, path)
    # A network that was half replaced would be worse than none.
    for key, value in network.state_dict().items():
        assert same(value, before[key]), key


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"erde": "{"}, "its metadata is not JSON"),
        ({"erde": "[" * 100_000}, "its metadata is not JSON"),
        ({"erde": "3"}, "its metadata is not a JSON object"),
        ({"erde": '{"format_version": 2}'}, "of format version 2, this erde reads 1"),
    ],
)
def test_metadata_that_erde_did_not_write(metadata: dict[str, str], words: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "some.safetensors", metadata=metadata)
    with user_error(words):
        checkpoint.load(tmp_path / "some.safetensors")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    network = torch.nn.Linear(2, 2)
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tensors["bias"][1] = float("nan")
    save_file(tensors, tmp_path / "some.safetensors")
    with user_error("'bias' has values that are not finite: give another file of weights"):
        checkpoint.load_weights(network, tmp_path / "some.safetensors")
