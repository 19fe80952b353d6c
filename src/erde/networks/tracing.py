"""The computation of any classifier as one straight list of steps, by torch.fx.

Modules stay whole unless a cut inside them is wanted: a whole module keeps its own ``training`` flag, its own control
flow and its own names. A module is opened only if its own code gives the same steps in training and in evaluation.
"""

from __future__ import annotations

import contextlib
import operator
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from erde.common.errors import UserError
from erde.networks.shapes import mode

# Two sizes tell what follows the batch from what does not.
BATCHES = (2, 3)
# A decision that looks at the batch must also be the same for these: code asks for 1, rarely for other sizes.
_OTHER_BATCHES = (1, 5, 33)
# The name of the model in the wrapper that is traced, which keeps the defaults of the model's own arguments.
_ROOT = "model"
# They take sizes and devices only, so that fx does not see them being called.
_FACTORIES = ("arange", "zeros", "ones", "full", "empty", "linspace", "eye", "rand", "randn", "meshgrid")
BY_VALUE = "its control flow depends on what it computes"
BY_BATCH = "its control flow depends on the number of images in the batch"


class _TracingError(Exception):
    """An error in tracing, with the path of the module in whose code it happened."""

    def __init__(self, cause: BaseException, path: str | None) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.path = path


@dataclass
class Trace:
    """The steps of a model. Targets are the model's own paths.

    ``ends``: a module's path -> the node with the output of its last call.
    """

    model: nn.Module
    graph: fx.Graph
    ends: dict[str, fx.Node]
    constants: dict[str, Any] = field(default_factory=dict)  # tensors that the model's code made on the way

    def lookup(self, path: str) -> Any:
        """The module or tensor that a target of the graph names."""
        return self.constants[path] if path in self.constants else attribute(self.model, path)


class _Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def choose(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """A constant that a model's own code makes depend on its mode."""
    return in_training if training else in_evaluation


class _Tracer(fx.Tracer):
    """Opens the modules in ``opened`` and no other; remembers each module's output, and where tracing failed."""

    # What is computed from a buffer follows it; else its values of today would become constants.
    proxy_buffer_attributes = True

    def __init__(self, opened: Collection[str]) -> None:
        super().__init__()
        self.opened = opened
        self.ends: dict[str, fx.Node] = {}
        self.failed_in: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True for modules that stay whole."""
        return module_qualified_name not in self.opened

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As in fx; notes the output, or the failure."""
        path = None
        try:
            path = self.path_of_module(m)
            output = super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None and path is not None:
                self.failed_in = path
            raise
        if isinstance(output, fx.Proxy):
            self.ends[path] = output.node
        return output


class _ValueProxy(fx.Proxy):
    """A proxy that knows its value for two batch sizes: sizes of images may decide, the batch may not."""

    tracer: _ValueTracer

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __index__(self) -> int:
        return int(self.tracer.decide(self.node))

    def __int__(self) -> int:
        return int(self.tracer.decide(self.node))

    def __float__(self) -> float:
        return float(self.tracer.decide(self.node))

    def __len__(self) -> int:
        return self.tracer.length(self.node)


class _ValueTracer(_Tracer):
    """For code that looks at sizes: carries values for two batch sizes along."""

    def __init__(self, opened: Collection[str], wrapper: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__(opened)
        self.wrapper, self.inputs = wrapper, inputs
        self.computes = False
        self.values: dict[fx.Node, tuple[Any, ...]] = {}
        self.from_batch: set[fx.Node] = set()  # sizes that were computed from the batch's
        self.other_values: dict[int, dict[fx.Node, Any]] = {batch: {} for batch in _OTHER_BATCHES}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy with values."""
        return _ValueProxy(node, self)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **keywords: Any
    ) -> fx.Node:
        """As in fx; computes the step's values too."""
        node = super().create_node(kind, target, args, kwargs, *rest, **keywords)
        if kind == "placeholder":
            self.values[node] = tuple(self.inputs)
        elif kind != "output":
            self.computes = True
            try:
                with torch.no_grad():
                    self.values[node] = tuple(
                        run_node(node, self._lookup, partial(self._value, index))
                        for index in range(len(self.inputs))
                    )
            finally:
                self.computes = False
            if self._follows_batch(node):
                self.from_batch.add(node)
        return node

    def _follows_batch(self, node: fx.Node) -> bool:
        """True if ``node`` is a size, or the answer to a question about a size, that the batch may change."""
        values = self.values[node]
        if not all(_is_size(value) for value in values):
            return False
        if any(value != values[0] for value in values):
            return True
        # In a shape (B, C, H, W) only the batch's own entry follows the batch.
        return node.target is not operator.getitem and any(
            source in self.from_batch for source in node.all_input_nodes
        )

    # fx watches every module's call and attributes while it traces; the computing of values must pass it by.
    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As in fx, but not while values are computed."""
        return forward(*args, **kwargs) if self.computes else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As in fx, but not while values are computed."""
        return attr_val if self.computes else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _value(self, index: int, node: fx.Node) -> Any:
        return self.values[node][index]

    def _lookup(self, path: str) -> Any:
        return attribute(self.wrapper, path)

    def decide(self, node: fx.Node) -> Any:
        """The value of ``node`` where it is no tensor and the same for any batch."""
        values = self.values[node]
        if any(isinstance(value, Tensor) for value in values):
            raise fx.proxy.TraceError(BY_VALUE)
        if not _is_size(values[0]):
            return values[0]  # a tuple or mapping of tensors: whether it is empty
        if any(value != values[0] for value in values):
            raise fx.proxy.TraceError(BY_BATCH)
        if node in self.from_batch:
            for batch in _OTHER_BATCHES:
                if self._value_for(batch, node, otherwise=values[0]) != values[0]:
                    raise fx.proxy.TraceError(BY_BATCH)
        return values[0]

    def length(self, node: fx.Node) -> int:
        """``len`` of the value of ``node``: a tuple's, or a tensor's where that is not the batch."""
        lengths = {len(value) for value in self.values[node]}
        if len(lengths) > 1:
            raise fx.proxy.TraceError(f"{BY_BATCH} (len(x) of a batch: x.shape[0] can be traced)")
        return lengths.pop()

    def _value_for(self, batch: int, wanted: fx.Node, otherwise: Any) -> Any:
        """The value of ``wanted`` for another batch size, by running all steps so far; ``otherwise`` where that fails."""
        values = self.other_values[batch]
        self.computes = True
        try:
            with torch.no_grad():
                for node in self.graph.nodes:
                    if node.op == "placeholder":
                        values[node] = self.inputs[0].new_zeros(batch, *self.inputs[0].shape[1:])
                    elif node not in values:
                        values[node] = run_node(node, self._lookup, values.__getitem__)
        except (RuntimeError, ValueError, IndexError, AssertionError, ZeroDivisionError):
            return otherwise  # batch norm takes no single image in training
        finally:
            self.computes = False
        return values[wanted]

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A decision of the model's code."""
        return bool(self.decide(obj.node))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Items of a tuple, whatever takes them."""
        items: Any = obj
        return iter([items[index] for index in range(len(self.values[obj.node][0]))])


def _is_size(value: Any) -> bool:
    """True if ``value`` is plain (numbers, types, devices) throughout: a tuple of tensors cannot be compared."""
    plain = (int, float, str, type(None), torch.dtype, torch.device)
    return all(isinstance(leaf, plain) for leaf in pytree.tree_leaves(value))


def run_node(node: fx.Node, lookup: Callable[[str], Any], fetch: Callable[[fx.Node], Any]) -> Any:
    """Compute a step of a graph; ``lookup`` knows its targets, ``fetch`` the values of the steps before."""
    args = [fill(argument, fetch) for argument in node.args]
    kwargs = {key: fill(argument, fetch) for key, argument in node.kwargs.items()}
    target: Any = node.target
    if node.op == "get_attr":
        return lookup(target)
    if node.op == "call_module":
        return lookup(target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def fill(argument: Any, fetch: Callable[[fx.Node], Any]) -> Any:
    """A node's argument with values for nodes, in lists of its own: a module may write to its arguments."""
    if isinstance(argument, fx.Node):
        return pytree.tree_map(lambda leaf: leaf, fetch(argument))
    if isinstance(argument, slice):
        return slice(*(fill(part, fetch) for part in (argument.start, argument.stop, argument.step)))
    if isinstance(argument, dict):
        return {key: fill(item, fetch) for key, item in argument.items()}
    if isinstance(argument, list):
        return [fill(item, fetch) for item in argument]
    if type(argument) is tuple:
        return tuple(fill(item, fetch) for item in argument)
    return argument


def attribute(owner: nn.Module, path: str) -> Any:
    """The attribute under a dotted path."""
    return operator.attrgetter(path)(owner)


def example_batches(model: nn.Module, input_size: Sequence[int]) -> list[Tensor]:
    """Images of zeros of (C, H, W), in batches of each of ``BATCHES``, where the model's parameters are."""
    parameter = next(model.parameters())
    return [
        torch.zeros(batch, *input_size, dtype=parameter.dtype, device=parameter.device) for batch in BATCHES
    ]


@contextlib.contextmanager
def without_computing(model: nn.Module) -> Iterator[None]:
    """Tensors have shapes only meanwhile, so that nothing is computed and no statistic of ``model`` learns."""
    # Counters are an exception of fake tensors': single integers are computed all the same.
    counters = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.ndim == 0]
    # A module that assigns to itself (a statistic, a cache) would keep a fake tensor.
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    contents = [
        (value, value.copy())
        for _, kept in attributes
        for value in kept.values()
        if isinstance(value, dict | list | set)
    ]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            yield
    finally:
        for own, kept in attributes:
            own.clear()
            own.update(kept)
        for value, content in contents:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        with torch.no_grad():
            for buffer, before in counters:
                buffer.copy_(before)


@contextlib.contextmanager
def _trace_factories(tracer: fx.Tracer) -> Iterator[None]:
    originals = {name: getattr(torch, name) for name in _FACTORIES}

    def watch(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", original, args, kwargs)
            return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(torch, name, watch(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def _trace_once(model: nn.Module, opened: Collection[str], inputs: Sequence[Tensor] | None) -> Trace:
    """A pass of fx; with ``inputs`` the sizes of computed tensors may decide."""
    wrapper = _Wrapper(model)
    wrapper.training = model.training
    paths = {_ROOT, *(f"{_ROOT}.{path}" for path in opened)}
    tracer = _Tracer(paths) if inputs is None else _ValueTracer(paths, wrapper, inputs)
    try:
        with _trace_factories(tracer):
            graph = tracer.trace(wrapper)
    except Exception as error:
        path = tracer.failed_in
        raise _TracingError(
            error, None if path in (None, _ROOT) else path.removeprefix(f"{_ROOT}.")
        ) from error
    constants = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            if not str(node.target).startswith(f"{_ROOT}."):
                constants[node.target] = getattr(wrapper, node.target)
            node.target = str(node.target).removeprefix(f"{_ROOT}.")
    ends = {path.removeprefix(f"{_ROOT}."): node for path, node in tracer.ends.items() if path != _ROOT}
    return Trace(model, graph, ends, constants)


def _merge_modes(training: Trace, evaluation: Trace) -> str | None:
    """Let constants that depend on the mode follow it, in ``evaluation``; the step that differs where that fails."""
    first, second = list(training.graph.nodes), list(evaluation.graph.nodes)
    changes: list[fx.Node] = []
    for trained, evaluated in zip(first, second, strict=False):
        name = str(evaluated.name)
        if (trained.op, trained.name) != (evaluated.op, name) or not _same_target(
            trained.target, evaluated.target
        ):
            return name
        lefts, rights = _flat(trained), _flat(evaluated)
        if len(lefts) != len(rights):
            return name
        for left, right in zip(lefts, rights, strict=True):
            if isinstance(left, fx.Node) and isinstance(right, fx.Node):
                if left.name != right.name:
                    return name
            elif left is not right and left != right:
                changes.append(evaluated)
    if len(first) != len(second):
        return str((first if len(first) > len(second) else second)[min(len(first), len(second)) - 1].name)
    if changes:
        return _follow_mode(evaluation, training, changes)
    return None


def _output_type(trace: Trace) -> str | None:
    """The type of a model's output, where it is no tensor as far as the trace tells."""
    output = next(node for node in trace.graph.nodes if node.op == "output").args[0]
    if not isinstance(output, fx.Node):
        return type(output).__name__
    # A named tuple is made by a step of its own.
    return output.target.__name__ if isinstance(output.target, type) else None


def _same_target(left: Any, right: Any) -> bool:
    return left == right or all(str(target).startswith("_tensor_constant") for target in (left, right))


def _flat(node: fx.Node) -> list[Any]:
    leaves: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), leaves.append)
    return leaves


def _follow_mode(evaluation: Trace, training: Trace, changes: Sequence[fx.Node]) -> str | None:
    graph = evaluation.graph
    in_training = {node.name: node for node in training.graph.nodes}
    for node in dict.fromkeys(changes):
        trained = in_training[node.name]
        with graph.inserting_before(node):
            flag = graph.create_node("get_attr", "training")
            try:
                node.args = _merge_values(graph, flag, trained.args, node.args)
                node.kwargs = _merge_values(graph, flag, trained.kwargs, node.kwargs)
            except ValueError:
                return str(node.name)
    return None


def _merge_values(graph: fx.Graph, flag: fx.Node, training: Any, evaluation: Any) -> Any:
    """``evaluation`` with its constants that differ in ``training`` turned into a choice by ``flag``."""
    if isinstance(evaluation, fx.Node):
        return evaluation
    if isinstance(evaluation, (tuple, list)):
        pairs = zip(training, evaluation, strict=True)
        return type(evaluation)([_merge_values(graph, flag, *pair) for pair in pairs])
    if isinstance(evaluation, dict):
        if training.keys() != evaluation.keys():
            raise ValueError
        return {key: _merge_values(graph, flag, training[key], value) for key, value in evaluation.items()}
    if training is evaluation or training == evaluation:
        return evaluation
    if isinstance(evaluation, slice) or type(training) is not type(evaluation):
        raise ValueError
    return graph.call_function(choose, (flag, training, evaluation))


class Opener:
    """Traces a model, opening modules on demand; modules that cannot be opened stay whole."""

    def __init__(self, model: nn.Module, input_size: Sequence[int], uses_values: bool = False) -> None:
        """``uses_values``: let sizes and types decide from the start, not in the model's own forward alone: slower."""
        self.model, self.input_size = model, input_size
        self.opened: set[str] = set()
        self.refused: dict[type[nn.Module], str] = {}  # and why
        self.uses_values = uses_values
        self.trace = self._trace()

    def may_open(self, path: str) -> bool:
        """True if a cut could reach something inside the module."""
        module = self.model.get_submodule(path)
        if path in self.opened or type(module) in self.refused or not any(True for _ in module.children()):
            return False
        if _has_hooks(module):
            return False  # they would not be called
        if type(module).forward is nn.Sequential.forward:
            return True
        return not type(module).__module__.startswith("torch.nn.") and "forward" not in vars(module)

    def why_whole(self, path: str) -> str:
        """The reason that the module stays whole: `` (TYPE): REASON``."""
        module = self.model.get_submodule(path)
        name = type(module).__name__
        if type(module) in self.refused:
            return f" ({name}): {self.refused[type(module)]}"
        if _has_hooks(module):
            return f" ({name}): its hooks would not be called otherwise"
        if not any(True for _ in module.children()):
            return f" ({name}): it is a single layer"
        return f" ({name}): it is a module of torch's own; call its layers in a loop in a forward of your own"

    def close(self, node: fx.Node, error: Exception) -> bool:
        """Leave the innermost opened module that holds the step ``node`` whole; False where there is none."""
        culprit = self._innermost(self.trace, self.trace, node.name)
        if culprit is None:
            return False
        self.refused[type(self.model.get_submodule(culprit))] = (
            f"'{node.name}' in it fails on what is traced ({_first_line(error)})"
        )
        self.trace = self._trace()
        return True

    def open(self, paths: Collection[str]) -> bool:
        """Trace with ``paths`` opened too, as far as that goes; True if anything was opened."""
        wanted = {path for path in paths if self.may_open(path)}
        if not wanted:
            return False
        before = set(self.opened)
        self.opened |= wanted
        trace = self._trace()
        if self.opened == before:
            return False
        self.trace = trace
        return True

    def _trace(self) -> Trace:
        while True:
            self.opened = {
                path for path in self.opened if type(self.model.get_submodule(path)) not in self.refused
            }
            try:
                with mode(self.model, False):
                    evaluation = self._attempt()
                with mode(self.model, True):
                    training = self._attempt()
            except _TracingError as error:
                if error.path is None or error.path not in self.opened:
                    raise UserError(_explain(self.model, error.cause)) from error.cause
                self.refused[type(self.model.get_submodule(error.path))] = explain_failure(
                    error.cause, advice=False
                ).removeprefix(" ")
                continue
            differs = _merge_modes(training, evaluation)
            if differs is None:
                return evaluation
            culprit = self._innermost(evaluation, training, differs)
            output = _output_type(training)
            if culprit is None and output is not None:
                raise UserError(
                    f"{type(self.model).__name__} gives a {output} in training and logits in evaluation: build it without "
                    "auxiliary classifiers (such as aux_logits=False), or wrap it"
                )
            if culprit is None:
                raise UserError(
                    f"{type(self.model).__name__} computes something else in training than in evaluation (at '{differs}'): "
                    "put the part that depends on self.training into a module of its own"
                )
            self.refused[type(self.model.get_submodule(culprit))] = (
                f"it computes something else in training than in evaluation (at '{differs}')"
            )

    def _attempt(self) -> Trace:
        if not self.uses_values:
            try:
                return _trace_once(self.model, self.opened, None)
            except _TracingError as error:
                if error.path is not None and error.path in self.opened:
                    raise
                self.uses_values = True
        with without_computing(self.model):
            return _trace_once(self.model, self.opened, example_batches(self.model, self.input_size))

    def _innermost(self, evaluation: Trace, training: Trace, name: str) -> str | None:
        """The opened module in whose own code the step ``name`` stands; None for the model itself."""
        for trace in (evaluation, training):
            for node in trace.graph.nodes:
                if node.name == name:
                    inside = [path for path in enclosing_modules(node) if path in self.opened]
                    if inside:
                        return inside[-1]
        return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def enclosing_modules(node: fx.Node) -> list[str]:
    """Paths of the modules in whose code a step stands, the innermost last; "" is the model itself."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [str(entry[0]).removeprefix(_ROOT).removeprefix(".") for entry in stack]


def _explain(model: nn.Module, error: BaseException) -> str:
    """A line: the operation that cannot be traced, its place, and the remedy."""
    return f"{type(model).__name__} cannot be cut{explain_failure(error)}"


def explain_failure(error: BaseException, advice: bool = True) -> str:
    """`` at FILE:LINE, `CODE`: REASON; ADVICE`` for an error that the tracing of a model's code ended in."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in ("/torch/", "erde/networks/tracing.py", "<frozen"))
    ]
    where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}, `{own[-1].line}`" if own else ""
    text = _first_line(error)
    advised = "put that step into a module of its own, which stays whole"
    if text.startswith(BY_BATCH):
        advised = "an image's answer may not depend on how many come with it"
    elif isinstance(error, fx.proxy.TraceError) or "symbolically traced" in text:
        text = BY_VALUE
    return f"{where}: {text}; {advised}" if advice else f"{where}: {text}"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
