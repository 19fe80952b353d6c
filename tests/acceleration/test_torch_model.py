"""A torch module in the place of an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from erde.acceleration import work
from erde.acceleration.torch_model import as_onnx_file
from erde.acceleration.work import accelerate
from erde.chains.preprocessing import Preprocessing
from erde.data.load import DataSplits
from erde.losses import erde as erde_module
from erde.networks.network import EarlyExitNetwork
from erde.runtime.session import Session
from tests.helpers.big_network import MEAN, STD, write_photos
from tests.helpers.checks import user_error

GRAY = Preprocessing(size=(8, 8), mean=(MEAN,), std=(STD,))


class Plain(nn.Module):
    """Answers in an object, as Hugging Face's models do, if asked."""

    def __init__(self, wrapped: bool = False, width: int = 64) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(width, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        logits = self.layers(x)
        return SimpleNamespace(logits=logits) if self.wrapped else logits


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_file_answers_as_the_module_does(wrapped: bool) -> None:
    torch.manual_seed(0)
    model = Plain(wrapped).train()
    x = torch.randn(5, 1, 8, 8)
    with as_onnx_file(model, GRAY) as (path, preprocessing):
        assert path.name == "Plain.onnx"
        assert preprocessing is GRAY
        (logits,) = onnxruntime.InferenceSession(path).run(["logits"], {"x": x.numpy()})
    assert model.training  # the user's own is left as it was
    model.wrapped = False
    expected = model.eval()(x).detach().numpy()
    assert np.abs(logits - expected).max() < 1e-5
    assert not path.exists()


def test_a_model_of_timm_brings_its_preprocessing() -> None:
    model = Plain()
    model.pretrained_cfg = {  # type: ignore[assignment]
        "input_size": (1, 8, 8), "mean": (0.5,), "std": (0.25,), "crop_pct": 0.8, "interpolation": "bicubic",
    }  # fmt: skip
    with as_onnx_file(model, None) as (_, preprocessing):
        assert preprocessing == Preprocessing(size=(8, 8), mean=(0.5,), std=(0.25,), resize=(10, 10))
        assert preprocessing.warnings == (
            "Plain.pretrained_cfg asks for bicubic resizing; erde resizes bilinearly",
        )


def test_what_is_refused(tiny_network: EarlyExitNetwork) -> None:
    cases: list[tuple[nn.Module, Preprocessing | None, str]] = [
        (tiny_network, GRAY, "the model has exits already: write it with erde.export"),
        (
            Plain(),
            None,
            r"a Plain, does not say what images it takes: give preprocessing=erde.Preprocessing\(size=",
        ),
        (Plain(), Preprocessing(mean=(0.0,), std=(1.0,)), "expected size, mean and std for a torch module"),
        (Plain(), Preprocessing(size=(8, 8), mean=(0.0,), std=(1.0,), layout="NHWC"), "expected NCHW"),
        (Plain().half(), GRAY, "parameters of float16"),
    ]
    for model, preprocessing, message in cases:
        with user_error(message), as_onnx_file(model, preprocessing):
            pass


@pytest.mark.slow
def test_a_module_is_accelerated_without_labels_by_erde(
    digits: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Plain(width=160)
    images = torch.from_numpy(np.asarray(digits.train.images[:])).permute(0, 3, 1, 2)
    x, labels = (images.float() / 255 - MEAN) / STD, torch.from_numpy(digits.train.labels)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(12):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
            optimizer.step()
    asked, agreement = [], []
    wrong = erde_module.wrong_images

    def spy(
        student: Tensor, teacher: Tensor, paired: Tensor, labels: Tensor, config: Any, held_out: Any
    ) -> Tensor:
        agreement.append(float((paired[-1].argmax(dim=-1) == labels).float().mean()))
        asked.append(config.wrong_test)
        return wrong(student, teacher, paired, labels, config, held_out)

    monkeypatch.setattr(erde_module, "wrong_images", spy)
    monkeypatch.setattr(work, "MOST_EPOCHS", 30)  # that would be reached, and take a while
    photos = write_photos(digits, tmp_path / "photos", False)
    result = accelerate(
        model, photos, tmp_path / "out", max_risk=0.1, minutes=1, preprocessing=GRAY, loss="erde"
    )
    assert set(asked) == {"uncertain"}
    # Its own answers are the labels, so nothing is wrong but what it is unsure of.
    assert np.mean(agreement) > 0.5
    # A mirrored digit is another thing: see the share of labels above.
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["mirrored"] is False
    session = Session(result.bundle)
    assert [stage.network for stage in session.manifest.stages][-1] == "Plain"
    answers = session.predict(np.asarray(digits.test.images[:]), operating_point="no-exit").labels
    test = torch.from_numpy(np.asarray(digits.test.images[:])).permute(0, 3, 1, 2)
    expected = model.eval()((test.float() / 255 - MEAN) / STD).argmax(dim=1).numpy()
    assert answers.tolist() == expected.tolist()
    with user_error("unknown loss 'erd'"):
        accelerate(model, photos, tmp_path / "other", preprocessing=GRAY, loss="erd")
