"""Blocks of a model found by following its ``forward`` with torch.fx.

A model falls apart wherever a single value is all that the rest of ``forward`` needs of what came before: between
the layers of a chain, between the residual blocks of a residual network, never inside one.

torch.fx replaces ``nn.Module.__call__`` for the whole process meanwhile, so no other thread may run a model then.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from tricorn.errors import PlanError

Follows = Callable[[nn.Module], bool]
Call = Callable[..., Any]

_TORCH = str(Path(torch.__file__).parent)
_REMEDY = "make it a plain chain of modules (nn.Sequential), or give it a method pipeline_blocks() that lists its parts"


def traced(model: nn.Module, enough: int) -> list[tuple[str, nn.Module]]:
    """The blocks of a model with the name of the last thing each does, in order.

    The first takes the model's inputs, each other what the one before it returned. Submodules are taken as they are
    if that makes ``enough`` blocks, else followed too. Raises PlanError when what ``forward`` does depends on more
    than which tensors it is given.
    """
    mode = model.training
    try:
        whole = _traced(model, _into_sequential)
        if len(whole) >= enough:
            return whole
        try:
            return max(whole, _traced(model, _into_all), key=len)
        except PlanError:
            return whole
    finally:
        model.train(mode)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its ``forward``."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, kind) for kind in kinds)


def _into_sequential(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and not hooked(module)


def _into_all(module: nn.Module) -> bool:
    return _into_sequential(module) or not (module.__module__.startswith("torch.nn") or hooked(module))


def _traced(model: nn.Module, follows: Follows) -> list[tuple[str, nn.Module]]:
    training, evaluation = _graph(model.train(), follows), _graph(model.eval(), follows)
    if [(n.op, n.target, n.name) for n in training.nodes] != [(n.op, n.target, n.name) for n in evaluation.nodes]:
        raise PlanError(f"the forward of {type(model).__name__} takes other steps in eval() than in train(); {_REMEDY}")
    pairs = zip(_spans(training), _spans(evaluation), strict=True)
    return [(in_training.name, _Part(model, in_training, in_evaluation)) for in_training, in_evaluation in pairs]


class _Tracer(fx.Tracer):
    """Goes into the submodules that ``follows`` says, and notes the user's line of each step."""

    proxy_buffer_attributes = True

    def __init__(self, follows: Follows) -> None:
        super().__init__()
        self._follows = follows
        self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self._follows(m)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise PlanError("it turns gradients or autocast on or off")
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        node.meta["at"] = _called_from(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        return node


def _modes() -> tuple[bool, ...]:
    """What a ``with`` statement of the user's can switch for the steps under it, of which no step would know."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


class _Watch(TorchFunctionMode):
    """Notes tensors that come of none of the model's inputs and parameters: random numbers, constants, counts."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_function__(
        self, func: Call, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.made.append(getattr(func, "__name__", "a function"))
        return result


def _graph(model: nn.Module, follows: Follows) -> fx.Graph:
    """What ``forward`` does. What Python does while it is followed happens once, not at each call: it must not matter.

    Looks at this thread and this model only, for other threads may draw random numbers meanwhile.
    """
    name = type(model).__name__
    for module in model.modules():
        code = getattr(type(module).forward, "__code__", None)
        if (module is model or follows(module)) and code is not None and "random" in code.co_names:
            raise PlanError(f"the forward of {type(module).__name__} uses Python's random numbers; {_REMEDY}")
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    try:
        with _Watch() as watch:
            graph = _Tracer(follows).trace(model)
    except Exception as error:  # tracing runs the user's code on stand-ins for tensors: anything can come out
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(
            f"the forward of {name} cannot be followed to find where to cut it ({said}); {_REMEDY}"
        ) from None
    finally:
        changed = [f"self.{attribute}" for module, before in attributes for attribute in _restore(module, before)]
    if watch.made:
        raise PlanError(f"the forward of {name} makes a tensor by itself ({watch.made[0]}); {_REMEDY}")
    if changed:
        raise PlanError(f"the forward of {name} sets {changed[0]}; {_REMEDY}")
    return graph


def _restore(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Give the module its attributes back; the names of those that were changed."""
    after = dict(vars(module))
    vars(module).clear()
    vars(module).update(before)
    return [name for name in {**before, **after} if before.get(name) is not after.get(name)]


class _Span(NamedTuple):
    """Steps of a graph from one value that is alone in use to the next."""

    name: str
    first: bool
    given: tuple[fx.Node, ...]  # of the first span the model's inputs, of the others the one value
    steps: tuple[fx.Node, ...]
    wanted: Any  # the one value, or the model's output: a node, or nodes in tuples and dicts


def _spans(graph: fx.Graph) -> Iterator[_Span]:
    given = tuple(node for node in graph.nodes if node.op == "placeholder")
    output = next(node.args[0] for node in graph.nodes if node.op == "output")
    steps = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    live, done, start = set(given), set(given), 0
    for index, node in enumerate(steps):
        done.add(node)
        live = {value for value in (*live, node) if not done.issuperset(value.users)}
        last = index == len(steps) - 1
        # A value that is only taken apart is no tensor, so it stays with the step that takes it apart.
        if last or (len(live) == 1 and not all(u.target is operator.getitem for value in live for u in value.users)):
            wanted = output if last else next(iter(live))
            name = node.name if node.op == "call_function" else str(node.target)
            yield _Span(name, start == 0, given, tuple(steps[start : index + 1]), wanted)
            given, start = (wanted,), index + 1


class _Part(nn.Module):
    """A span of the model's ``forward``: as it runs in training, and as it runs in evaluation.

    The two differ in arguments only, such as ``training=`` of a dropout.
    """

    def __init__(self, model: nn.Module, in_training: _Span, in_evaluation: _Span) -> None:
        super().__init__()
        self._spans = in_training, in_evaluation
        self._signature = inspect.signature(model.forward)
        modules = [str(node.target) for node in in_training.steps if node.op == "call_module"]
        self.submodules = nn.ModuleDict({_key(name): model.get_submodule(name) for name in modules})
        for span in self._spans:
            for node in _attributes(span):
                self._hold(_key(node.target), operator.attrgetter(str(node.target))(model))

    def _hold(self, key: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(key, value)
        else:
            setattr(self, key, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        span = self._spans[0 if self.training else 1]
        values = {node: getattr(self, _key(node.target)) for node in _attributes(span)}
        if span.first:
            bound = self._signature.bind(*args, **kwargs)
            bound.apply_defaults()
            values |= {node: bound.arguments[str(node.target).lstrip("*")] for node in span.given}
        else:
            values[span.given[0]] = args[0]
        for node in span.steps:
            given = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.meta["at"](self._function(node), *given)
        return fx.node.map_arg(span.wanted, values.__getitem__)

    def _function(self, node: fx.Node) -> Call:
        if node.op == "call_module":
            return self.submodules[_key(node.target)]
        if node.op == "call_method":
            return lambda value, *args, **kwargs: getattr(value, str(node.target))(*args, **kwargs)
        assert callable(node.target)
        return node.target


def _attributes(span: _Span) -> Iterator[fx.Node]:
    """Parameters and other attributes that the steps use by name: looked up in each part, so none has to travel."""
    read = [node for step in span.steps for node in step.all_input_nodes]
    fx.node.map_arg(span.wanted, read.append)
    return (node for node in dict.fromkeys(read) if node.op == "get_attr")


def _key(target: object) -> str:
    return "at_" + str(target).replace(".", "__")


def _apply(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _called_from(file: str, line: int, name: str) -> Call:
    """``_apply``, as if it stood on that line: so the traceback of an error shows where the user wrote the call."""
    code = _apply.__code__.replace(co_filename=file, co_firstlineno=line - 1, co_name=name, co_qualname=name)
    return FunctionType(code, {})
