"""Small things that many tests look at, made once. A test that changes one of them copies it first."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import erde
from erde.data.load import DataSplits
from erde.networks.network import EarlyExitNetwork

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Results depend on the number of threads, and a run sets it for the whole process: put it back."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> DataSplits:
    """scikit-learn's digits, gray 8x8: 797 train images, 300 / 500 / 200 others."""
    return erde.load_data("digits", channels=1, tune_size=300, certify_size=500, test_size=200)


@pytest.fixture(scope="session")
def tiny_network(digits: DataSplits) -> EarlyExitNetwork:
    """Three exits on the smallest backbone, trained for seconds: good enough that its exits differ."""
    torch.manual_seed(0)
    backbone = erde.build_backbone("resnet8x0.5", classes=10, channels=1)
    network = erde.attach_exits(backbone, 3, input_size=digits.input_size, dropout=0.2)
    augmentation = {"crop_padding": 1, "flip": False}
    erde.train(
        network, digits, epochs=6, batch_size=32, learning_rate=0.05, device="cpu", augmentation=augmentation
    )
    return network.eval()


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_network: EarlyExitNetwork, digits: DataSplits, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """``tiny_network`` as a sealed and calibrated bundle. Read only: see ``bundle_copy``."""
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    erde.export(tiny_network, digits, folder, name="tiny")
    erde.calibrate(folder, digits, max_risk=(0.05, 0.1), budgets=(0.8,))
    return folder


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle for a test to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
