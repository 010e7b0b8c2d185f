"""A piece of a followed ``forward`` as a module of its own."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from tricorn.errors import PlanError
from tricorn.mp.trace_cuts import Span, packed, unpacked

_SEVERAL = 2


class Part(nn.Module):
    """A span of the model's ``forward``: as it runs in training, and as it runs in evaluation.

    The two differ in arguments only, such as ``training=`` of a dropout. The first takes the model's inputs, each other
    what the one before returned: the value that is alive between them, or a tuple of the values.
    """

    def __init__(self, model: nn.Module, in_training: Span, in_evaluation: Span) -> None:
        super().__init__()
        self._spans = in_training, in_evaluation
        self._signature = inspect.signature(model.forward)
        modules = [str(node.target) for node in in_training.steps if node.op == "call_module"]
        self.submodules = nn.ModuleDict({_key(name): model.get_submodule(name) for name in modules})
        for span in self._spans:
            for node in _outside(span, "get_attr"):
                self._hold(_key(node.target), operator.attrgetter(str(node.target))(model))

    def _hold(self, key: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(key, value)
        else:
            setattr(self, key, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        span = self._spans[0 if self.training else 1]
        values = self._inputs(span, args, kwargs) if span.first else _received(span, args[0])
        values |= {node: getattr(self, _key(node.target)) for node in _outside(span, "get_attr")}
        for node in _outside(span, "call_function"):  # the only one that does not travel is where a tensor lies
            values[node] = next(value.device for value in values.values() if isinstance(value, torch.Tensor))
        for node in span.steps:
            given = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.meta["at"](self._function(node), *given)
        return fx.node.map_arg(span.wanted, values.__getitem__) if span.last else _handed_on(span, values)

    def _inputs(self, span: Span, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[fx.Node, Any]:
        bound = self._signature.bind(*args, **kwargs)
        names = {node: str(node.target).lstrip("*") for node in span.given}
        if unknown := bound.arguments.keys() - names.values():
            raise PlanError(
                f"the model is called with {min(unknown)}, which the first sample has not",
                remedy="Let every sample have the same inputs.",
            )
        bound.apply_defaults()
        return {node: bound.arguments[name] for node, name in names.items()}

    def _function(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_module":
            return self.submodules[_key(node.target)]
        if node.op == "call_method":
            return lambda value, *args, **kwargs: getattr(value, str(node.target))(*args, **kwargs)
        assert callable(node.target)
        return node.target


def _received(span: Span, value: Any) -> dict[fx.Node, Any]:
    values = value if len(span.given) >= _SEVERAL else (value,)
    return {node: unpacked(part, span.kinds[node]) for node, part in zip(span.given, values, strict=True)}


def _handed_on(span: Span, values: dict[fx.Node, Any]) -> Any:
    parts = tuple(values[node] if span.kinds[node] == "tensor" else packed(values[node]) for node in span.wanted)
    return parts if len(parts) >= _SEVERAL else parts[0]


def _outside(span: Span, op: str) -> Iterator[fx.Node]:
    """What the steps use and is neither given nor theirs: parameters and other attributes, and devices.

    They are looked up in each part, so none has to travel.
    """
    read = [node for step in span.steps for node in step.all_input_nodes]
    if span.last:
        fx.node.map_arg(span.wanted, read.append)
    theirs = {*span.given, *span.steps}
    return (node for node in dict.fromkeys(read) if node.op == op and node not in theirs)


def _key(target: object) -> str:
    return "at_" + str(target).replace(".", "__")
