"""The numbers of docs/families.md."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from erde.networks.backbones import Backbone, build_backbone
from erde.networks.cost import count_parameters
from erde.recipe.backbones import BACKBONES
from tests.helpers import family_costs
from tests.helpers.oracles import hooked_macs
from tests.networks import test_backbones
from tests.networks.test_backbone_families import PUBLISHED
from tests.networks.test_msdnet import AUTHORS_OPERATIONS, AUTHORS_PARAMETERS, MSDNETS, native_exits


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a heading of docs/families.md, without its own two first lines."""
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    part = re.split(r"^## ", text, flags=re.M)
    result = next(section for section in part if section.startswith(heading + "\n"))
    rows = [line for line in result.splitlines() if line.startswith("|")][2:]
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]


def test_the_document_has_every_backbone_with_its_numbers() -> None:
    rows = {row[0]: row[2:] for row in table("Backbones")}
    published = {name: f"{number:,} [1]" for name, number in test_backbones.PUBLISHED.items()}
    published |= {name: f"{number:,} [1]" for name, (_, number) in PUBLISHED.items()}
    published["densenet-bc-100-12"] = f"{PUBLISHED['densenet-bc-100-12'][1]:,} with 10 classes [2]"
    published |= {name: f"{int(AUTHORS_PARAMETERS[name].split()[-1]):,} [3]" for name in MSDNETS}
    expected = {}
    for name in BACKBONES:
        backbone = build_backbone(name, classes=100).eval()
        network = _AllExits(backbone) if name in MSDNETS else backbone
        macs, _ = hooked_macs(network, torch.zeros(1, 3, 32, 32))
        expected[name] = [f"{count_parameters(backbone):,}", f"{macs:,}", published.get(name, "")]
    assert rows == expected


class _AllExits(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> list[Tensor]:
        return native_exits(self.backbone, x)


def test_the_document_has_the_exits_of_msdnet() -> None:
    rows = table("Exits of MSDNet")
    expected = []
    for name, steps in MSDNETS.items():
        macs = [f"{macs / 1e6:.2f}" for _, macs in family_costs.msdnet(steps, 100, 3, 32)]
        authors = [f"{int(operations) / 1e6:.2f}" for operations in AUTHORS_OPERATIONS[name].split()]
        expected.append([name, ", ".join(macs), ", ".join(authors)])
    assert rows == expected
