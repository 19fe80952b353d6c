"""Times of the stages that could be made of a network's exits: what is timed is what would be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn

from erde.common.splits import TuneSplit
from erde.exporting import exit_times
from erde.exporting.exit_times import at_most_their_parts, measure_exits
from erde.exporting.onnx_files import export_stages
from erde.networks.attach import attach_exits
from erde.networks.backbones import build_backbone
from erde.networks.network import EarlyExitNetwork, keep_exits
from erde.runtime.stages import StageRunner


class Tokens(nn.Module):
    """Patches as tokens; each step puts a token of its own before them, for as many images as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.mix = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.tokens = nn.Parameter(torch.randn(3, 1, 8))
        self.classify = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) to (B, 10)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        for mix, token in zip(self.mix, self.tokens, strict=True):
            x = mix(torch.cat([token.expand(x.shape[0], -1, -1), x], dim=1)).relu()
        return self.classify(x.mean(dim=1))


MEAN, STD, SHAPE = (0.4, 0.5, 0.6), (0.3, 0.3, 0.3), (32, 32, 3)


def network_of(backbone: str, exits: Any) -> EarlyExitNetwork:
    torch.manual_seed(0)
    model = build_backbone(backbone, classes=10, channels=3, image_size=(32, 32))
    return attach_exits(model, exits, input_size=(3, 32, 32)).eval()


@pytest.fixture(scope="module")
def tune() -> TuneSplit:
    images = np.random.default_rng(1).integers(0, 256, (20, *SHAPE)).astype(np.uint8)
    return TuneSplit(images, np.arange(20, dtype=np.int64) % 10)


def test_stages_that_ask_for_the_number_of_images(tune: TuneSplit) -> None:
    torch.manual_seed(0)
    network = attach_exits(Tokens(), ["mix.0", "mix.1"], input_size=(3, 32, 32)).eval()
    times, logits = measure_exits(network, MEAN, STD, tune, threads=1, rounds=1)
    assert not np.isnan(times.stages[np.triu_indices(3)]).any()
    images = (
        torch.from_numpy(np.array(tune.images)).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN)[:, None, None]
    ) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        assert_allclose(logits.logits, network(images).numpy(), rtol=1e-4, atol=1e-4)


def test_the_graphs_that_are_timed_are_those_of_the_reduced_network(
    tmp_path: Path, tune: TuneSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Behind both exits stands a residual block whose input is added to something.
    network, timed = network_of("resnet14", ["group1_block1", "group2_block1"]), {}
    monkeypatch.setattr(
        exit_times,
        "StageRunner",
        lambda paths, *rest, **more: (
            timed.update({path.stem: onnx.load(path) for path in paths}) or StageRunner(paths, *rest, **more)
        ),
    )
    _, logits = measure_exits(network, MEAN, STD, tune, threads=1, rounds=1)
    assert sorted(timed) == ["0-0", "0-1", "0-2", "1-1", "1-2", "2-2"]
    names = network.exit_names[:-1]
    for kept in ((0,), (1,)):
        folder = tmp_path / f"kept-{kept[0]}"
        reduced = keep_exits(network, [names[exit] for exit in kept])
        exported = export_stages(reduced, SHAPE, MEAN, STD, folder, images=tune.images)
        # The logits that the choice was made on are those of the exits that stay.
        chain = StageRunner(exported.paths(folder), threads=1).all_logits(tune.images)
        assert_allclose(chain, logits.logits[[*kept, -1]], rtol=1e-4, atol=1e-4)
        starts, ends = [0, *(exit + 1 for exit in kept)], [*kept, len(names)]
        for path, start, end in zip(exported.paths(folder), starts, ends, strict=True):
            assert shape_of(onnx.load(path)) == shape_of(timed[f"{start}-{end}"])


def shape_of(model: Any) -> tuple[Any, ...]:
    """Operators, inputs, outputs and the number of weights of a graph."""
    graph = model.graph
    return (
        sorted(node.op_type for node in graph.node),
        [value.name for value in graph.input],
        [value.name for value in graph.output],
        sum(int(np.prod(tensor.dims)) for tensor in graph.initializer),
    )


@pytest.mark.slow
def test_stages_that_hand_over_several_tensors_are_cut_too(tune: TuneSplit) -> None:
    network = network_of("msdnet", 4)
    times, logits = measure_exits(network, MEAN, STD, tune, threads=1, rounds=1)
    images = torch.from_numpy(np.asarray(tune.images)).float() / 255
    normalised = (images - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad():
        expected = network(normalised.permute(0, 3, 1, 2)).numpy()
    assert_allclose(logits.logits, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    above = np.triu(np.ones((4, 4), dtype=bool))
    assert (times.stages[above] > 0).all()
    assert np.isnan(times.stages[~above]).all()
    assert times.decision > 0


def test_no_stage_takes_longer_than_its_parts() -> None:
    nan = np.nan
    measured = np.array(
        [[1.0, 9.0, 9.0, 7.0], [nan, 2.0, 2.5, 9.0], [nan, nan, 1.0, 2.0], [nan, nan, nan, 1.5]]
    )
    expected = [[1.0, 3.0, 3.5, 5.0], [nan, 2.0, 2.5, 4.0], [nan, nan, 1.0, 2.0], [nan, nan, nan, 1.5]]
    assert_allclose(at_most_their_parts(measured), expected)
    assert measured[0, 1] == 9.0
