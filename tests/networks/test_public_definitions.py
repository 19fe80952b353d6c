"""The shipped backbones compute what the public definitions of the same names compute."""

from __future__ import annotations

import pytest
import torch

from erde.networks.backbones import build_backbone
from tests.helpers.known_weights import fill, sequence

# Of the second image of ``sequence((2, 3, 32, 32))`` with the weights of ``fill``, 10 classes: the first four
# logits; of MSDNet the first logit of every exit. Computed with the public code: github.com/HobbitLong/RepDistiller
# at b84f547 (models/), github.com/andreasveit/densenet-pytorch (DenseNet3) and github.com/kalviny/MSDNet-PyTorch
# at f654595 (models/msdnet.py, with the settings of its README).
LOGITS = {
    "resnet8": "0.362362668 -0.190249706 -0.0900272455 -0.0281501153",
    "resnet8x4": "0.44175997 -0.0721386323 -0.632119857 -0.102341083",
    "wrn-16-2": "0.361106658 0.0526413964 -0.21924098 -0.0760636269",
    "vgg8": "-0.245488368 -0.664396372 1.28454482 -1.22412353",
    "vgg13": "-0.339773002 -0.521827141 1.19225614 -1.18289119",
    "vgg16": "-0.335461617 -0.528845504 1.19127932 -1.1829573",
    "mobilenetv2": "0.907721991 0.0187997748 -0.588417765 -0.627400451",
    "shufflenetv1": "1.28309992 -4.37072846 0.449173312 1.86031482",
    "shufflenetv2": "0.642512616 0.943453973 0.121891602 -0.372533323",
    "densenet-bc-100-12": "0.277248521 -0.148207892 -0.212860947 0.140097437",
    "msdnet": "0.230578139 0.217113245 0.249906358 0.228633791 0.191955994 0.186075765 "
    "0.235736959 0.218841568 0.197762401 0.203733044",
    "msdnet-7": "0.230578139 0.217113245 0.198728157 0.208255096 0.216655118 0.230836028 0.185659626",
    "msdnet-budgeted": "0.200168488 0.206222584 0.207240951 0.25536465 0.23280626",
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_of_the_public_definition(name: str) -> None:
    backbone = fill(build_backbone(name, classes=10))
    x, result = sequence((2, 3, 32, 32)), []
    with torch.no_grad():
        for block_name, block in backbone.blocks.named_children():
            x = block(x)
            if block_name in backbone.native_heads:
                result.append(backbone.native_heads[block_name](x)[1, 0])
        logits = backbone.classifier(x)[1]
    result.extend(logits[:1] if result else logits[:4])
    expected = [float(number) for number in LOGITS[name].split()]
    assert torch.stack(result).tolist() == pytest.approx(expected, rel=1e-6)
