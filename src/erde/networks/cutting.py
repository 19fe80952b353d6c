"""Cuts through a traced model, and the stretches between cuts as modules that share its weights.

A cut stands after a step of the graph. Through it flow the values that later steps need, but for constants that depend
on no image (parameters, position tables: computed again) and sizes (read off the tensors that flow).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils import _pytree as pytree

from erde.common.errors import UserError
from erde.networks.cost import MacCounter
from erde.networks.shapes import mode
from erde.networks.tracing import BATCHES, Trace, example_batches, run_node, without_computing

# More tensors than these are no place for an exit.
MOST_TENSORS = 4
# Kinds of values: images, or computed from them; sizes; independent of both.
_DATA, _SIZE, _CONSTANT = "data", "size", "constant"


class StepError(Exception):
    """A step of a traced model fails, though the model itself does not: its code looks at the type of its input."""

    def __init__(self, node: fx.Node, cause: Exception) -> None:
        super().__init__(str(cause))
        self.node, self.cause = node, cause


@dataclass
class Facts:
    """Facts about a graph's nodes, in order, from a run for each of ``BATCHES``.

    ``values``: per node its output for each batch size; ``kinds``; ``macs`` of a single image; ``changed_by``: nodes whose
    tensors a later step writes over -> the places of those steps.
    """

    nodes: list[fx.Node]
    values: dict[fx.Node, tuple[Any, ...]]
    kinds: dict[fx.Node, str]
    macs: list[int]
    changed_by: dict[fx.Node, list[int]]
    place: dict[fx.Node, int] = field(init=False)

    def __post_init__(self) -> None:
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.total_macs = sum(self.macs)
        self.macs_until = list(itertools.accumulate(self.macs))


@dataclass(frozen=True)
class Cut:
    """A cut after the node at ``place``: the nodes whose values flow through it, and the shapes of their tensors."""

    place: int
    live: tuple[fx.Node, ...]
    shapes: tuple[tuple[int, ...], ...]  # of each tensor, without the batch
    folds: tuple[int, ...]  # rows of each tensor per image; handed over as an axis
    share: float  # of the model's MACs before it

    @property
    def tensors(self) -> int:
        """Number of tensors that flow through."""
        return len(self.shapes)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_random(node: fx.Node) -> bool:
    name = str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")).lower()
    return any(word in name for word in ("rand", "dropout", "bernoulli", "normal", "multinomial"))


def gather_facts(trace: Trace, input_size: Sequence[int]) -> Facts:
    """Run ``trace`` for each of ``BATCHES``, without computing (fake tensors) where that goes.

    Raises:
        StepError: where a step fails.
    """
    prune(trace.graph)
    try:
        return _gather(
            trace, input_size, without_computing(trace.model), _changed_in_training(trace, input_size)
        )
    except StepError as error:
        if not isinstance(error.cause, DataDependentOutputException | DynamicOutputShapeException):
            raise
        # A module that stays whole may decide by values, which fake tensors do not have.
        return _gather(trace, input_size, torch.no_grad(), _changed_in_training(trace, input_size))


def _changed_in_training(trace: Trace, input_size: Sequence[int]) -> dict[fx.Node, list[int]]:
    """``changed_by`` as far as a run in training shows it: dropout in place writes in training only."""
    nodes = list(trace.graph.nodes)
    changed_by: dict[fx.Node, list[int]] = {}
    # A step that needs values ends the run early: what it has shown by then counts.
    with suppress(StepError), without_computing(trace.model), mode(trace.model, True):
        images = example_batches(trace.model, input_size)[0]
        _run(trace, nodes, images, {node: [] for node in nodes}, changed_by)
    return changed_by


def _gather(
    trace: Trace,
    input_size: Sequence[int],
    context: AbstractContextManager[None],
    changed_by: dict[fx.Node, list[int]],
) -> Facts:
    nodes = list(trace.graph.nodes)
    values: dict[fx.Node, list[Any]] = {node: [] for node in nodes}
    with context, mode(trace.model, False):
        macs = [
            _run(trace, nodes, images, values, changed_by)
            for images in example_batches(trace.model, input_size)
        ]
    kinds: dict[fx.Node, str] = {}
    for node in nodes:
        kinds[node] = _kind(node, kinds, values)
    # From batches of 2 and 3 images to a single image: the constant part stays.
    macs_of_image = [2 * of_two - of_three for of_two, of_three in zip(*macs, strict=True)]
    return Facts(
        nodes, {node: tuple(both) for node, both in values.items()}, kinds, macs_of_image, changed_by
    )


def _run(
    trace: Trace,
    nodes: Sequence[fx.Node],
    image: Tensor,
    values: dict[fx.Node, list[Any]],
    changed_by: dict[fx.Node, list[int]],
) -> list[int]:
    macs = []
    versions: dict[fx.Node, list[int]] = {}
    current: dict[fx.Node, Any] = {}
    for index, node in enumerate(nodes):
        counter = MacCounter()
        if node.op == "placeholder":
            current[node] = image
        elif node.op == "output":
            current[node] = fx.node.map_arg(node.args[0], current.__getitem__)
        else:
            try:
                with counter:
                    current[node] = run_node(node, trace.lookup, current.__getitem__)
            except Exception as error:
                raise StepError(node, error) from error
        macs.append(counter.macs)
        for earlier, before in versions.items():
            now = [tensor._version for tensor in _tensors(current[earlier])]
            if now != before:
                versions[earlier] = now
                if index not in changed_by.setdefault(earlier, []):
                    changed_by[earlier].append(index)
        if node.op != "get_attr":
            versions[node] = [tensor._version for tensor in _tensors(current[node])]
    for node in nodes:
        values[node].append(current[node])
    return macs


def prune(graph: fx.Graph) -> None:
    """Take out assertions, which a cut would carry sizes along for."""
    for node in reversed(list(graph.nodes)):
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and "assert" in name and not node.users:
            graph.erase_node(node)


def _kind(node: fx.Node, kinds: dict[fx.Node, str], values: dict[fx.Node, list[Any]]) -> str:
    if node.op == "placeholder":
        return _DATA
    if node.op == "get_attr":
        return _CONSTANT
    sources = {kinds[source] for source in node.all_input_nodes}
    if not _tensors(values[node][0]):
        return _SIZE if sources - {_CONSTANT} else _CONSTANT
    if _DATA in sources or _is_random(node):
        return _DATA
    return _SIZE if _SIZE in sources else _CONSTANT


def find_cuts(facts: Facts) -> list[Cut]:
    """All clean cuts in order: floating tensors flow through, image by image, and not too many of them."""
    needed = _needed(facts, facts.nodes[-1:], range(len(facts.nodes)))
    last_use: dict[fx.Node, int] = {}
    for node in facts.nodes:
        if node in needed or node.op == "output":
            for source in _sources(node, facts):
                last_use[source] = facts.place[node]
    cuts: list[Cut] = []
    seen: set[tuple[fx.Node, ...]] = set()
    for place, node in enumerate(facts.nodes[:-1]):
        if node.op in ("placeholder", "get_attr"):
            continue
        live = tuple(
            earlier
            for earlier in facts.nodes[: place + 1]
            if facts.kinds[earlier] == _DATA and last_use.get(earlier, -1) > place
        )
        if not live or live in seen:
            continue
        seen.add(live)
        clean = _clean_shapes(live, facts)
        if clean is not None:
            cuts.append(Cut(place, live, *clean, facts.macs_until[place] / max(1, facts.total_macs)))
    return cuts


def _sources(node: fx.Node, facts: Facts) -> set[fx.Node]:
    """Values that ``node`` needs: its own inputs, and the inputs of constants that are computed again."""
    sources: set[fx.Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        if source in sources:
            continue
        sources.add(source)
        if facts.kinds[source] != _DATA and _tensors(facts.values[source][0]):
            waiting += source.all_input_nodes
    return sources


def _clean_shapes(
    live: Sequence[fx.Node], facts: Facts
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]] | None:
    """Shapes and folds of the tensors that flow; None where they are not numbers for each image, or too many."""
    shapes, folds = [], []
    for node in live:
        for smaller, larger in zip(*(_tensors(value) for value in facts.values[node]), strict=True):
            if smaller.ndim < 2 or smaller.shape[1:] != larger.shape[1:] or not smaller.is_floating_point():
                return None
            fold = smaller.shape[0] // BATCHES[0]
            if (smaller.shape[0], larger.shape[0]) != tuple(fold * batch for batch in BATCHES) or fold == 0:
                return None
            shapes.append((*([fold] if fold > 1 else []), *smaller.shape[1:]))
            folds.append(fold)
    return (tuple(shapes), tuple(folds)) if 1 <= len(shapes) <= MOST_TENSORS else None


def _needed(facts: Facts, wanted: Sequence[fx.Node], places: range) -> set[fx.Node]:
    """The nodes at ``places`` that ``wanted`` is computed from, and those that write over a needed value."""
    needed = set(wanted)
    changing = {place for places_of in facts.changed_by.values() for place in places_of}
    for place in reversed(places):
        node = facts.nodes[place]
        if node in needed or place in changing:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return needed


class _StageBuilder:
    """A stretch of the graph as a graph of its own, from the values that flow in to those that flow out."""

    def __init__(self, model: nn.Module, facts: Facts, start: Cut | None, end: Cut | None) -> None:
        self.model, self.facts, self.start, self.end = model, facts, start, end
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, Any] = {}
        self.carrier: fx.Node | None = None

    def build(self) -> fx.Graph:
        first = self.start.place + 1 if self.start is not None else 0
        last = self.end.place + 1 if self.end is not None else len(self.facts.nodes) - 1
        self._take_in(first)
        wanted = list(self.end.live) if self.end is not None else self.facts.nodes[-1].all_input_nodes
        needed = _needed(self.facts, wanted, range(first, last))
        for place in range(first, last):
            node = self.facts.nodes[place]
            if node in needed and node not in self.copies and node.op not in ("placeholder", "get_attr"):
                self.copies[node] = self._copy(node)
        self.graph.output(self._give_out())
        return self.graph

    def _take_in(self, first: int) -> None:
        x = self.graph.placeholder("x")
        self.carrier = x
        if self.start is None:
            # fx gives the model's own placeholder a place of its own.
            self.copies[next(node for node in self.facts.nodes if node.op == "placeholder")] = x
            return
        count = itertools.count()
        single = self.start.tensors == 1
        for node in self.start.live:
            # Heads and losses keep the stage's input: a step that writes over it gets a copy.
            copied = any(place >= first for place in self.facts.changed_by.get(node, ()))

            def take(value: Any, copied: bool = copied) -> Any:
                if not isinstance(value, Tensor):
                    return value
                index = next(count)
                taken = x if single else self.graph.call_function(_item, (x, index))
                if index == 0:
                    self.carrier = taken
                if self.start is not None and self.start.folds[index] > 1:
                    taken = self.graph.call_method("flatten", (taken, 0, 1))
                return self.graph.call_method("clone", (taken,)) if copied else taken

            self.copies[node] = pytree.tree_map(take, self.facts.values[node][0])

    def _give_out(self) -> Any:
        if self.end is None:
            return fx.node.map_arg(self.facts.nodes[-1].args[0], self._fetch)
        given: list[fx.Node] = []
        for node in self.end.live:
            value, own = self.facts.values[node][0], self.copies[node]
            for path, leaf in pytree.tree_leaves_with_path(value):
                if isinstance(leaf, Tensor):
                    given.append(self._fold(self._pick(own, path), leaf.shape, self.end.folds[len(given)]))
        return given[0] if len(given) == 1 else tuple(given)

    def _fold(self, own: fx.Node, shape: Sequence[int], fold: int) -> fx.Node:
        if fold == 1:
            return own
        return self.graph.call_method("unflatten", (own, 0, (-1, fold)))

    def _pick(self, own: Any, path: Sequence[Any]) -> Any:
        for key in path:
            index = key.idx if isinstance(key, pytree.SequenceKey) else key.key
            own = self.graph.call_function(_item, (own, index)) if isinstance(own, fx.Node) else own[index]
        return own

    def _fetch(self, node: fx.Node) -> Any:
        if node in self.copies:
            return self.copies[node]
        values = self.facts.values[node]
        if node.op != "get_attr" and not _tensors(values[0]):
            return pytree.tree_map(self._size, values[0], values[1])
        assert self.facts.kinds[node] != _DATA, node
        self.copies[node] = self._copy(node)
        return self.copies[node]

    def _size(self, smaller: Any, larger: Any) -> Any:
        """A size, from its values for both batches: constant, or a multiple of the batch."""
        if smaller == larger or not isinstance(smaller, int):
            return smaller
        if isinstance(smaller, bool) or smaller * BATCHES[1] != larger * BATCHES[0]:
            raise UserError(
                f"{type(self.model).__name__} cannot be cut: a number that a later step needs "
                f"({smaller} for {BATCHES[0]} images, {larger} for {BATCHES[1]}) depends on the number of "
                "images in the batch; an image's answer may not depend on how many come with it"
            )
        batch = self.graph.call_method("size", (self.carrier, 0))
        times = smaller // BATCHES[0]
        return batch if times == 1 else self.graph.call_function(_times, (batch, times))

    def _copy(self, node: fx.Node) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._fetch)
        return self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)


def _item(values: Any, index: Any) -> Any:
    return values[index]


def _times(batch: int, times: int) -> int:
    return batch * times


def build_stage(trace: Trace, facts: Facts, start: Cut | None, end: Cut | None) -> fx.GraphModule:
    """The stretch from ``start`` (None: the image) to ``end`` (None: the logits), with the model's own modules inside.

    Names inside are the model's own paths.
    """
    graph = _StageBuilder(trace.model, facts, start, end).build()
    targets = {
        str(node.target): trace.lookup(str(node.target))
        for node in graph.nodes
        if node.op in ("call_module", "get_attr")
    }
    stage = fx.GraphModule(targets, graph, class_name="Stage")
    _keep_persistence(stage, trace.model)
    return stage


def _keep_persistence(stage: nn.Module, model: nn.Module) -> None:
    """Leave out of the stage's state dict the buffers that the model's leaves out."""
    kept = set(model.state_dict())
    for path, module in stage.named_modules():
        for name in module._buffers:
            if (f"{path}.{name}" if path else name) not in kept:
                module._non_persistent_buffers_set.add(name)
