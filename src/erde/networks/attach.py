"""Putting exits on a backbone or any other classifier: :func:`attach_exits` gives an :class:`EarlyExitNetwork`."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from erde.common.errors import UserError, nearest
from erde.common.progress import say
from erde.networks.backbones import Backbone
from erde.networks.cost import count_macs
from erde.networks.cutting import Cut, build_stage
from erde.networks.heads import (
    AUTO,
    HEADS,
    NATIVE,
    Features,
    check_head,
    make_head,
    tokens_for,
)
from erde.networks.network import EarlyExitNetwork
from erde.networks.places import Plan, plan_exits, wanted_share
from erde.networks.shapes import Handed, InputSize, example_input, mode, new_modules_in_mode_of

# float32 steps in another order differ in the last bits; relative to the largest logit.
_SAME = 1e-5
# A single image above all: code that asks for the size of the batch asks for 1.
_COMPARED_BATCHES = (1, 2, 5)
FINAL = "final"
# exits="auto": as many exits as there are places, at most so many.
MOST_EXITS = 8


def attach_exits(
    model: nn.Module,
    exits: int | Sequence[str] = 3,
    *,
    input_size: InputSize,
    head: str = AUTO,
    dropout: float = 0.1,
    boosted: bool = False,
) -> EarlyExitNetwork:
    """Put exits on a classifier, sharing its weights; its own classifier is the final exit.

    Stage k+1 needs the output of stage k alone. See docs/backbones.md.

    Args:
        model: a backbone of ``erde.build_backbone``, a model of timm's, or any module that takes images (B, C, H, W) and
            gives logits (B, K).
        exits: their number, the final exit included, placed at equal shares of the model's MACs; or the paths of modules
            behind which intermediate exits stand, such as ``layer1`` or ``blocks.3``. Of a
            ``Backbone`` the names of blocks (``group1``: after its last block). ``auto``: as many as there are places,
            at most 8, closer together near the image; :func:`keep_exits` drops some of them after training.
        input_size: (C, H, W) of the images.
        head: of the intermediate exits: ``erde``, ``linear``, ``conv``, ``tower``, ``native`` (a backbone's own heads), or
            ``auto``, which chooses by the features.
        dropout: of those heads, during training.
        boosted: each exit adds its logits to half of those of the exit before. Its own classifier's logits are then the last
            summand of the final exit.

    Raises:
        UserError: an exit that does not exist or cannot stand there, too many exits, an unknown head, an input that does
            not fit, a model that cannot be traced or does not give logits.
    """
    check_head(head)
    exits, at_most = _check_exits(exits)
    input_size = _check_input_size(input_size)
    _check_kind(model)
    if isinstance(model, Backbone):
        network = _attach_to_blocks(model, exits, at_most, input_size, head, dropout)
    else:
        try:
            network = _attach_to_trace(model, exits, at_most, input_size, head, dropout)
        except UserError:
            raise
        except Exception as error:
            # A model's code may fail in ways that the tracing does not foresee.
            text = str(error).splitlines()[0] if str(error) else "no reason given"
            raise UserError(
                f"{type(model).__name__} cannot be cut: {type(error).__name__}: {text}"
            ) from error
    if at_most and len(network.stages) == 1:
        raise UserError(
            f"exits='auto' needs a place for an early exit, and {type(model).__name__} has none: give exits=1, or another one"
        )
    # Only now: a traced network was compared with the model.
    network.boosted = boosted
    return network


def _check_exits(exits: Any) -> tuple[int | list[str], bool]:
    """Number or places of the exits, and whether fewer will do."""
    expected = "expected a whole number, 'auto', or a list of module paths such as ['layer1', 'layer3']"
    if isinstance(exits, str) and exits == AUTO:
        return MOST_EXITS, True
    if isinstance(exits, str):
        raise UserError(f"exits='{exits}' is a single name: write exits=['{exits}']")
    if isinstance(exits, bool) or not isinstance(exits, (Integral, Iterable)):
        raise UserError(f"exits={exits!r}: {expected}")
    if isinstance(exits, Integral):
        return int(exits), False
    names = list(exits)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise UserError(f"exits={names!r}: {wrong[0]!r} is not a module path; {expected}")
    return names, False


def _check_input_size(input_size: Any) -> InputSize:
    sides = list(input_size) if isinstance(input_size, Iterable) and not isinstance(input_size, str) else []
    positive = all(
        isinstance(side, Integral) and not isinstance(side, bool) and int(side) >= 1 for side in sides
    )
    if len(sides) != 3 or not positive:
        raise UserError(
            f"input_size={input_size!r}: expected (C, H, W), three whole numbers of 1 or more, such as (3, 32, 32)"
        )
    channels, height, width = (int(side) for side in sides)
    return channels, height, width


def _check_kind(model: Any) -> None:
    """Raise unless the model is a float32 module whose Python code can be traced."""
    if isinstance(model, type):
        raise UserError(f"{model.__name__} is a class: pass an instance of it")
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is a {type(model).__name__}, expected a torch.nn.Module")
    name = type(model).__name__
    for path, module in model.named_modules():
        where = f"'{path}' in {name}" if path else name
        kind = type(module).__module__
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise UserError(
                f"{where} is compiled: put exits on it before it is compiled (torch.compile(x)._orig_mod is x)"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"{where} is a scripted or traced module (TorchScript), whose code cannot be cut: pass the module it was made "
                "from"
            )
        if kind.startswith("torch.ao.nn") and "quantized" in kind and "qat" not in kind:
            raise UserError(
                f"{where} is quantised ({type(module).__name__}): put exits on the float model; the bundle can be int8 all the "
                "same (precision='int8')"
            )
    for path, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(
                f"{name} has parameters of {str(parameter.dtype).removeprefix('torch.')} ('{path}'), expected float32: call "
                "model.float() first (training can use bfloat16 all the same)"
            )


def _attach_to_blocks(
    backbone: Backbone,
    exits: int | Sequence[str],
    at_most: bool,
    input_size: InputSize,
    head: str,
    dropout: float,
) -> EarlyExitNetwork:
    names, macs, handed, classes = _trace_blocks(backbone, input_size)
    native = dict(getattr(backbone, "native_heads", {}))
    if head == NATIVE and not native:
        raise UserError(f"this backbone brings no exit heads of its own: choose {', '.join((AUTO, *HEADS))}")
    if isinstance(exits, int):
        own = [names.index(name) for name in native] if native and head in (AUTO, NATIVE) else None
        cuts = _place_by_macs(macs, exits, backbone, own, at_most)
    else:
        cuts = sorted({_find_block(names, name) for name in exits})
        if cuts and cuts[-1] == len(names) - 1:
            last = next(name for name in exits if _find_block(names, name) == cuts[-1])
            raise UserError(
                f"exit '{last}' stands at the end of the backbone, where the final exit already is: leave it out"
            )
    blocks = list(backbone.blocks.named_children())
    bounds = [0, *(cut + 1 for cut in cuts), len(blocks)]
    stages = [nn.Sequential(OrderedDict(blocks[start:end])) for start, end in itertools.pairwise(bounds)]
    heads: list[nn.Module] = []
    looks_at: list[int | None] = []
    for cut in cuts:
        if head in (AUTO, NATIVE) and names[cut] in native:
            heads.append(native[names[cut]])
            looks_at.append(None)
        elif head == NATIVE:
            raise UserError(
                f"the backbone brings no head for an exit at '{names[cut]}': it has them at {', '.join(native)}"
            )
        else:
            output = handed[cut]
            tensors = output if isinstance(output, tuple) else (output,)
            kinds = [Features.of(tensor.shape[1:], input_size) for tensor in tensors]
            index = _deepest(kinds)
            looks_at.append(index if isinstance(output, tuple) else None)
            heads.append(_head_for_block(head, kinds[index], classes, dropout, names[cut]))
    network = EarlyExitNetwork(
        stages,
        [*heads, backbone.classifier],
        [*(names[cut] for cut in cuts), FINAL],
        [*looks_at, None],
    )
    # New modules start in training mode: without this a backbone in eval mode would give a mixture.
    return network.train(backbone.training)


def _head_for_block(head: str, features: Features, classes: int, dropout: float, name: str) -> nn.Module:
    if len(features.shape) == 3:
        # Blocks hand over maps, channels first; their own head is the paper's.
        return HEADS["erde" if head == AUTO else head](features.shape, classes, dropout)
    return make_head(head, features, range(features.places), classes, dropout, name)


def _deepest(kinds: Sequence[Features]) -> int:
    """Index of the tensor with the most channels; the last of several."""
    return max(range(len(kinds)), key=lambda index: (kinds[index].channels, index))


def _trace_blocks(
    backbone: Backbone, input_size: InputSize
) -> tuple[list[str], list[int], list[Handed], int]:
    """Names, MACs and outputs of the blocks, and the number of classes."""
    was_training = backbone.training
    backbone.eval()
    x: Handed = example_input(backbone, input_size)
    names, macs, handed = [], [], []
    try:
        for name, block in backbone.blocks.named_children():
            block_macs, x = count_macs(block, x)
            names.append(name)
            macs.append(block_macs)
            handed.append(x)
        _, logits = count_macs(backbone.classifier, x)
    except RuntimeError as error:
        raise UserError(
            f"the backbone does not take images of (C, H, W) = {tuple(input_size)}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        backbone.train(was_training)
    assert isinstance(logits, Tensor)
    return names, macs, handed, logits.shape[-1]


def _place_by_macs(
    macs: Sequence[int],
    exits: int,
    backbone: Backbone,
    own: Sequence[int] | None = None,
    at_most: bool = False,
) -> list[int]:
    """Blocks after which the intermediate exits stand: nearest to the wanted shares of the MACs, all different.

    ``own``: the blocks that bring a head along, and so the only places. ``at_most``: fewer where there are fewer places.
    """
    # Nothing is learnt before the stem's first block, and the last block's end is the final exit's.
    candidates = list(range(backbone.first_exit_block, len(macs) - 1)) if own is None else sorted(own)
    if at_most:
        exits = min(exits, len(candidates) + 1)
    if not 1 <= exits <= len(candidates) + 1:
        raise UserError(
            f"exits={exits} is not possible on this backbone: expected 1 to {len(candidates) + 1}, the final one included"
        )
    total = sum(macs)
    ends = [sum(macs[: index + 1]) / total for index in range(len(macs))]
    cuts: list[int] = []
    for number in range(1, exits):
        # Leave enough candidates for the exits that are still to be placed.
        free = [cut for cut in candidates if not cuts or cut > cuts[-1]]
        free = free[: len(free) - (exits - 1 - number)]
        share = wanted_share(number, exits, at_most)
        cuts.append(min(free, key=lambda cut: abs(ends[cut] - share)))
    return cuts


def _find_block(names: Sequence[str], wanted: str) -> int:
    """The last block with that name, or of the group with that name."""
    matches = [index for index, name in enumerate(names) if name == wanted or name.startswith(f"{wanted}_")]
    if not matches:
        groups = {name.split("_")[0] for name in names}
        raise UserError(f"no place '{wanted}' for an exit{nearest(wanted, {*names, *groups})}")
    return matches[-1]


# ---------------------------------------------------------------- any model


def _attach_to_trace(
    model: nn.Module,
    exits: int | Sequence[str],
    at_most: bool,
    input_size: InputSize,
    head: str,
    dropout: float,
) -> EarlyExitNetwork:
    if head == NATIVE:
        raise UserError(
            "head native is for backbones that bring exit heads along: choose auto, erde, linear, conv or tower"
        )
    classes = _check_model(model, input_size)
    if model._forward_hooks or model._forward_pre_hooks:
        say(f"the forward hooks of {type(model).__name__} itself are not called by the network with exits")
    plan = plan_exits(model, exits, input_size, at_most)
    bounds: list[Cut | None] = [None, *plan.cuts, plan.tail]
    stages = [build_stage(plan.trace, plan.facts, start, end) for start, end in itertools.pairwise(bounds)]
    classifier = build_stage(plan.trace, plan.facts, plan.tail, None)
    last = _channels_last(plan, plan.tail, input_size)
    kinds = [Features.of(shape, input_size, last) for shape in plan.tail.shapes]
    final = max(kinds, key=lambda features: features.channels)
    looked_at = _check_classifier(model, classifier, plan, final)
    heads: list[nn.Module] = []
    looks_at: list[int | None] = []
    for cut, name in zip(plan.cuts, plan.names, strict=True):
        last = _channels_last(plan, cut, input_size)
        kinds = [Features.of(shape, input_size, last) for shape in cut.shapes]
        index = _deepest(kinds)
        looks_at.append(index if cut.tensors > 1 else None)
        tokens = tokens_for(kinds[index], final, looked_at)
        heads.append(make_head(head, kinds[index], tokens, classes, dropout, name))
    network = EarlyExitNetwork(
        stages, [*heads, classifier], [*plan.names, FINAL], [*looks_at, None], plan.notes
    )
    network.to(next(model.parameters()).device)
    for note in plan.notes:
        say(note)
    _check_same(model, network, input_size)
    new_modules_in_mode_of(network, model)
    return network


def _channels_last(plan: Plan, cut: Cut, input_size: InputSize) -> bool:
    """True if the maps at ``cut`` have their channels last, by the nearest map from there on whose shape tells.

    With as many channels as pixels a side the shape does not tell. Only where no later one does, earlier ones count.
    """
    later = [place for place in plan.places if place.place >= cut.place]
    earlier = [place for place in reversed(plan.places) if place.place < cut.place]
    for place in (*later, plan.tail, *earlier):
        for shape in place.shapes:
            first, last = (Features.of(shape, input_size, layout) for layout in (False, True))
            if first.kind == "map" and first == last:
                return first.channels_last
    return False


def _probe(model: nn.Module, input_size: InputSize, batch: int = 2) -> Tensor:
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(20)
    return torch.randn(batch, *input_size, generator=generator).to(parameter)


def _check_model(model: nn.Module, input_size: InputSize) -> int:
    """The number of classes, if the model gives logits for images of that size at all."""
    name = type(model).__name__
    if not any(True for _ in model.parameters()):
        raise UserError(f"{name} has no parameters: there is nothing to put exits on")
    try:
        with mode(model, False), torch.no_grad():
            logits = model(_probe(model, input_size))
    except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} does not take images of (C, H, W) = {tuple(input_size)}: {text}") from error
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{name} gives a {type(logits).__name__}, expected a tensor of logits (B, K): wrap it in a module that returns "
            "the logits alone"
        )
    if logits.ndim != 2 or len(logits) != 2:
        raise UserError(
            f"{name} gives shape {('B', *logits.shape[1:])} for a batch of B, expected logits (B, K): give it a classifier"
        )
    if getattr(model, "num_classes", None) == 0:
        raise UserError(
            f"{name} has num_classes=0, so it gives features and no logits: build it with its classifier"
        )
    return logits.shape[-1]


def _check_classifier(model: nn.Module, classifier: nn.Module, plan: Plan, final: Features) -> range:
    """The tokens that the model's own classifier reads; :class:`UserError` where no gradient reaches its features."""
    name = type(model).__name__
    if not any(plan.facts.macs[plan.tail.place + 1 :]):
        raise UserError(f"{name} ends without a classifier behind its features: build it with one")
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(21)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    features = [draw(torch.empty(2, *shape)).to(parameter).requires_grad_() for shape in plan.tail.shapes]
    # Classifiers often start at zero, which lets no gradient through either.
    weights = {key: weight.detach() + 0.02 * draw(weight) for key, weight in classifier.named_parameters()}
    with mode(classifier, False), torch.enable_grad():
        handed = features[0] if len(features) == 1 else tuple(features)
        logits = torch.func.functional_call(classifier, weights, (handed,))
        loss = (logits * draw(logits)).sum()
    gradients = torch.autograd.grad(loss, features, allow_unused=True) if loss.requires_grad else [None]
    if any(gradient is None or not bool(gradient.abs().sum() > 0) for gradient in gradients):
        raise UserError(
            f"{name}'s classifier is detached from its features: no gradient passes (detach() or no_grad() in between), so its "
            "features could not be trained"
        )
    if final.kind != "tokens":
        return range(1)
    widest = next(
        gradient
        for gradient in gradients
        if gradient is not None and tuple(gradient.shape[1:]) == final.shape
    )
    places = (
        widest.reshape(2, final.places, final.channels).abs().sum(dim=(0, 2)).nonzero().flatten().tolist()
    )
    return range(places[0], places[-1] + 1)


def _check_same(model: nn.Module, network: EarlyExitNetwork, input_size: InputSize) -> None:
    """Raise unless the final exit gives the model's logits, at several batch sizes, and early exits keep images apart."""
    for batch in _COMPARED_BATCHES:
        images = _probe(model, input_size, batch)
        with mode(model, False), mode(network, False), torch.no_grad():
            expected, logits = model(images), network.forward_final(images)
        difference = float((logits - expected).abs().max())
        if not difference <= _SAME * max(1.0, float(expected.abs().max())):
            raise UserError(
                f"cut at its exits {type(model).__name__} gives other logits than before (by {difference:.2g}, for a batch "
                f"of {batch}): it keeps something from one call to the next, draws random numbers, its answer depends on the "
                "number of images in the batch, or its forward switches something on for a while (torch.autocast)"
            )
    images = _probe(model, input_size)
    others = torch.cat([images[:1], -3 * images[1:]])
    with mode(network, False), torch.no_grad():
        answers, changed = (network(batch)[:-1, 0] for batch in (images, others))
    for name, answer, other in zip(network.exit_names, answers, changed, strict=False):
        if not float((answer - other).abs().max()) <= _SAME * max(1.0, float(answer.abs().max())):
            raise UserError(
                f"no exit can stand at '{name}': there an image's answer depends on the other images of its batch, which early "
                "exits would take away; let the model compute image by image, in the order of the batch"
            )
    _check_same_gradients(model, network, input_size)


def _check_same_gradients(model: nn.Module, network: EarlyExitNetwork, input_size: InputSize) -> None:
    """Raise if the model's forward keeps parameters from learning by no_grad(), which a cut would lose."""
    images = _probe(model, input_size, 1)
    with mode(model, False), mode(network, False), torch.enable_grad():
        reached, reached_by_network = _reachable(model(images)), _reachable(network.forward_final(images))
    with mode(model, True):
        pass  # some models keep values of evaluation, with their graph, until they are in training
    frozen = [name for name, weight in model.named_parameters() if weight in reached_by_network - reached]
    if frozen:
        raise UserError(
            f"{type(model).__name__} keeps '{frozen[0]}'{f' and {len(frozen) - 1} more' if frozen[1:] else ''} from learning by "
            "no_grad() or detach() in its forward, which cut at exits it would not: freeze them instead "
            "(parameter.requires_grad_(False)), and take it out of the forward"
        )


def _reachable(logits: Tensor) -> set[Tensor]:
    """The parameters that a gradient of ``logits`` would reach, by the graph alone."""
    reached: set[Tensor] = set()
    waiting, seen = [logits.grad_fn], {logits.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            reached.add(variable)
        following = {source for source, _ in node.next_functions} - seen
        seen |= following
        waiting += following
    return reached
