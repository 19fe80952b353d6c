"""timm's models: the contract that holds for all of them, their names, and how timm comes to be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erde.common.errors import UserError
from erde.exporting.onnx_files import export_stages
from erde.networks.attach import attach_exits
from erde.networks.backbones import build_backbone
from erde.networks.backbones import timm as timm_backbones
from erde.networks.cost import count_macs, network_cost
from erde.networks.network import EarlyExitNetwork
from erde.recipe.load import load_config
from erde.runtime.stages import StageRunner
from tests.helpers.oracles import hooked_macs

torch.set_num_threads(1)

# A member of each family, for the smallest images that it takes. Those that take seconds are among the slow tests.
QUICK: dict[str, int] = {
    "resnet18": 32, "resnetv2_18": 64, "seresnext26d_32x4d": 64, "ecaresnet26t": 64, "skresnet18": 64, "resnest14d": 64,
    "regnetx_002": 64, "regnety_002": 64, "mobilenetv3_small_050": 32,
    "mnasnet_small": 64, "tinynet_e": 64, "lcnet_050": 64, "efficientnet_b0": 64, "convnext_atto": 32,
    "starnet_s1": 64, "test_vit": 64, "vit_tiny_patch16_224": 32, "deit_tiny_distilled_patch16_224": 32,
    "vit_relpos_small_patch16_224": 32, "flexivit_small": 64, "mixer_s32_224": 64, "resmlp_12_224": 32,
    "eva02_tiny_patch14_224": 56, "test_resnet": 64,
}  # fmt: skip
SLOW: dict[str, int] = {
    "densenet121": 32,
    "ghostnet_050": 64, "vgg11": 64, "inception_v3": 96, "xception41": 64, "res2net50_14w_8s": 64, "dpn68": 64, "cspresnet50": 64,
    "darknet53": 64, "hrnet_w18_small": 64, "selecsls42": 64, "repvgg_a0": 64, "mobileone_s0": 64, "fastvit_t8": 64,
    "gmixer_24_224": 64, "xcit_nano_12_p16_224": 64, "cait_xxs24_224": 64, "pit_ti_224": 224, "pvt_v2_b0": 64,
    "twins_svt_small": 224, "tnt_s_patch16_224": 224, "levit_128s": 224, "swin_tiny_patch4_window7_224": 224,
    "crossvit_tiny_240": 240, "coatnet_nano_rw_224": 64, "mobilevit_xxs": 64, "mobilevitv2_050": 64,
    "edgenext_xx_small": 64, "poolformer_s12": 64, "visformer_tiny": 224, "nf_regnet_b0": 64, "focalnet_tiny_srf": 64,
}  # fmt: skip
# Across kinds: plain and inverted blocks, class token, pooled tokens, maps with channels last, several tensors crossing.
EXPORTED = (
    "resnet18", "mobilenetv3_small_050", "regnety_002", "convnext_atto", "densenet121", "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224", "mixer_s32_224", "resmlp_12_224", "ghostnet_050", "hrnet_w18_small",
    "swin_tiny_patch4_window7_224", "tnt_s_patch16_224",
)  # fmt: skip
CASES = [
    *(pytest.param(name, size, id=name) for name, size in QUICK.items()),
    *(pytest.param(name, size, id=name, marks=pytest.mark.slow) for name, size in SLOW.items()),
]


def make(name: str, size: int, exits: Any = 3) -> tuple[nn.Module, EarlyExitNetwork]:
    torch.manual_seed(0)
    model = build_backbone(f"timm/{name}", classes=5, image_size=(size, size))
    # Zeros at the start, of residual branches and classifiers, would hide what is not connected.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, attach_exits(model, exits, input_size=(3, size, size))


def images(size: int, number: int = 2) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


def gradients(module: nn.Module, logits: Tensor) -> dict[int, Tensor]:
    module.zero_grad()
    logits.square().mean().backward()
    return {
        id(parameter): parameter.grad.clone()
        for parameter in module.parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }


def test_the_list_is_long_enough() -> None:
    assert len(QUICK) + len(SLOW) >= 40
    assert len(EXPORTED) >= 12


@pytest.mark.parametrize(("name", "size"), CASES)
def test_contract(name: str, size: int) -> None:
    model, network = make(name, size)
    assert len(network.stages) == 3
    assert network.exit_names[-1] == "final"
    x = images(size)
    # In training: the same random numbers, the same statistics of the batch.
    torch.manual_seed(2)
    expected = model.train()(x)
    torch.manual_seed(2)
    assert torch.allclose(network.train().forward_final(x), expected, rtol=1e-4, atol=1e-5)
    # In evaluation.
    expected = model.eval()(x)
    logits = network.eval()(x)
    assert logits.shape == (3, 2, 5)
    assert torch.allclose(logits[-1], expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(network.forward_until(x, 1), logits[:2], rtol=1e-5, atol=1e-6)
    # The same gradient by way of the stages as without; and none is cut off from all exits together.
    own = gradients(model, expected)
    through = gradients(network, logits[-1])
    assert own.keys() == through.keys()
    assert all(torch.allclose(tensor, through[key], rtol=1e-3, atol=1e-5) for key, tensor in own.items())
    # Some (levit) keep what they computed once in eval mode, with its graph: training mode lets go of it.
    reached = gradients(network, network.train().eval()(x))
    # Norms of heads are fixed.
    heads = {
        id(parameter)
        for head in network.heads[:-1]
        for parameter in head.parameters()
        if parameter.requires_grad
    }
    assert reached.keys() == own.keys() | heads
    silent = [key for key, parameter in model.named_parameters() if id(parameter) not in own]
    assert silent == []
    # Names of the model's own, and back.
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    network.load_state_dict(state)
    assert torch.equal(network(x), logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_stages_are_the_network(name: str, tmp_path: Path) -> None:
    size = {**QUICK, **SLOW}[name]
    _, network = make(name, size)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    exported = export_stages(network, (size, size, 3), mean, std, tmp_path / "stages")
    runner = StageRunner(exported.paths(tmp_path / "stages"), threads=1)
    for batch in (1, 2, 7):
        pixels = torch.randint(
            0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(batch)
        )
        normalised = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(
            std
        ).reshape(3, 1, 1)
        with torch.no_grad():
            expected = network.eval()(normalised)
        result = torch.from_numpy(runner.all_logits(pixels.numpy()))
        assert float((result - expected).abs().max()) <= 1e-3 * max(1.0, float(expected.abs().max()))


# ---------------------------------------------------------------- cost


def counted_by_ptflops(model: nn.Module, size: int) -> int:
    timm_backbones.import_timm()  # ptflops imports torchvision
    from ptflops import get_model_complexity_info

    macs, _ = get_model_complexity_info(
        model.eval(),
        (3, size, size),
        as_strings=False,
        print_per_layer_stat=False,
        backend="aten",
        verbose=False,
    )
    return int(macs)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 32), ("mobilenetv3_small_050", 32), ("regnety_002", 64)]
)
def test_macs_of_convolutional_networks_by_two_independent_counters(name: str, size: int) -> None:
    model, network = make(name, size)
    result = network_cost(network, (3, size, size)).no_exit_macs
    assert result == hooked_macs(model, torch.zeros(1, 3, size, size))[0]
    other = counted_by_ptflops(model, size)
    # It counts biases too.
    assert result == pytest.approx(other, rel=5e-3)


def test_macs_of_a_transformer_hold_the_products_of_attention() -> None:
    model, network = make("vit_tiny_patch16_224", 64)
    tokens, width, depth = 17, 192, 12
    layers = hooked_macs(model, torch.zeros(1, 3, 64, 64))[0]
    products = depth * 2 * tokens * tokens * width
    result = network_cost(network, (3, 64, 64)).no_exit_macs
    assert result == layers + products
    other = counted_by_ptflops(model, 64)
    assert result == pytest.approx(other, rel=2e-2)


def test_macs_of_torchs_fused_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    macs, _ = count_macs(layer, torch.zeros(1, 5, 16))
    # Three projections and one behind, two products of 5 by 5 tokens, two layers between 16 and 32.
    assert macs == 4 * 5 * 16 * 16 + 2 * 5 * 5 * 16 + 2 * 5 * 16 * 32


# ---------------------------------------------------------------- names and import


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/resnet1", r"unknown backbone 'timm/resnet1' \(did you mean 'timm/resnet"),
        ("timm/zzzzqqqq", r"unknown backbone 'timm/zzzzqqqq' \(timm.list_models\(\) names them\)"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_backbone(name, classes=5)


def test_the_recipe_knows_timm() -> None:
    config = load_config("digits", ["student.backbone=timm/resnet18", "student.pretrained=true"])
    assert config.student.backbone == "timm/resnet18"
    assert config.student.pretrained
    # Reading a recipe imports neither torch nor timm: timm's names are looked at when the network is built.
    wrong = load_config("digits", ["teacher.backbone=timm/resnet1"]).teacher.backbone
    with pytest.raises(UserError, match=r"unknown backbone 'timm/resnet1' \(did you mean"):
        build_backbone(wrong, classes=5)


def test_pretrained_weights_that_there_are_not() -> None:
    with pytest.raises(UserError, match="backbone 'resnet8' has no pretrained weights"):
        build_backbone("resnet8", classes=5, pretrained=True)


def test_pretrained_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = timm_backbones.import_timm()

    def offline(*_: Any, **__: Any) -> nn.Module:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        UserError, match=r"timm/resnet18': timm's weights for it cannot be had here.*\(no network\)"
    ):
        build_backbone("timm/resnet18", classes=5, pretrained=True)


def test_a_size_that_the_model_does_not_take() -> None:
    with pytest.raises(UserError, match=r"does not take images of \(C, H, W\) = \(3, 8, 8\)"):
        make("vit_tiny_patch16_224", 8)


def test_recipes_without_timm_do_not_import_it() -> None:
    code = (
        "import sys\nfrom erde.recipe.load import load_config\nload_config('digits', [])\nimport erde.networks.attach\n"
        "assert not {'timm', 'torchvision'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class _Import:
    """``import timm`` as a stand-in: fails as often as there are errors."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self, name: str, *rest: Any) -> Any:
        if name == "timm" and self.errors:
            raise self.errors.pop(0)
        return self.original(name, *rest)

    original: Any = __import__


@pytest.mark.parametrize("operator", ["nms", "qnms"])
def test_the_missing_operators_are_declared_and_the_import_tried_again(
    monkeypatch: pytest.MonkeyPatch, operator: str
) -> None:
    declared: list[str] = []
    monkeypatch.setattr(timm_backbones, "_declare_operators", lambda: declared.append("both"))
    error = RuntimeError(f"operator torchvision::{operator} does not exist")
    monkeypatch.setattr("builtins.__import__", _Import(error))
    timm_backbones.import_timm()
    assert declared == ["both"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::roi_align does not exist"),
        RuntimeError("CUDA"),
        ImportError("no timm"),
    ],
)
def test_any_other_failure_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(timm_backbones, "_declare_operators", lambda: pytest.fail("declared"))
    monkeypatch.setattr("builtins.__import__", _Import(error))
    with pytest.raises(type(error)) as caught:
        timm_backbones.import_timm()
    assert caught.value is error


def test_timm_can_be_imported_in_a_fresh_process() -> None:
    # With a CPU-only torch this needs the declarations; with any other it needs nothing.
    code = "from erde.networks.backbones.timm import import_timm; assert import_timm().is_model('resnet18')"
    subprocess.run([sys.executable, "-c", code], check=True)
