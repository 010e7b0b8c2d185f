"""What a model's ``forward`` does, as a graph of steps, found by following it with torch.fx.

A submodule that cannot be followed, because what it does depends on the values it is given or on more than these, is
taken as one step; a model that cannot be followed itself is refused with the reason.

torch.fx replaces ``nn.Module.__call__`` for the whole process meanwhile, and we the functions that make tensors, so no
other thread may run a model then.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from tricorn.errors import PlanError
from tricorn.mp.trace_cuts import CHANGING

Call = Callable[..., Any]

_TORCH = str(Path(torch.__file__).parent)
_REMEDY = "make it a plain chain of modules (nn.Sequential), or give it a method pipeline_blocks() that lists its parts"
# What makes a tensor of none: a step like any other, that is made anew at each call.
_MAKERS = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros")
_CHAINS = (nn.TransformerEncoder, nn.TransformerDecoder)


class Graphs(NamedTuple):
    """The steps of a model in training and in evaluation: the same, but for arguments such as ``training=``.

    ``taken_whole``: why submodules that could have been looked into are each one step.
    """

    training: fx.Graph
    evaluation: fx.Graph
    taken_whole: tuple[str, ...]


class _Unfollowable(Exception):
    """``module``, and what about it cannot be followed."""

    def __init__(self, module: nn.Module, what: str) -> None:
        super().__init__(what)
        self.module = module


def follow(model: nn.Module, *, deep: bool, given: frozenset[str] | None) -> Graphs:
    """Follow ``forward`` into ``nn.Sequential``, and if ``deep`` into every submodule that the user wrote.

    ``given`` are the names of the inputs that the model is called with; the others have their defaults. None: all are.
    Raises PlanError when what ``forward`` does depends on more than which tensors it is given.
    """
    whole: dict[nn.Module, str] = {}
    mode = model.training
    try:
        while True:
            try:
                training, evaluation = (_graph(model.train(on), deep, given, whole) for on in (True, False))
                _compare(model, training, evaluation)
            except _Unfollowable as error:
                if error.module is model or error.module in whole:
                    raise PlanError(f"{error}; {_REMEDY}") from None
                whole[error.module] = f"{error}; {_REMEDY}"
            else:
                for node in (*training.nodes, *evaluation.nodes):
                    del node.meta["inside"]  # or a stage would keep the whole model alive
                return Graphs(training, evaluation, tuple(whole.values()))
    finally:
        model.train(mode)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its ``forward``."""
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(module, kind) for kind in kinds)


def _compare(model: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> None:
    ours, theirs = ([(node.op, node.target, node.name) for node in graph.nodes] for graph in (training, evaluation))
    if ours == theirs:
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    nodes = list((training if len(ours) > at else evaluation).nodes)
    module = nodes[at].meta.get("inside", model)
    raise _Unfollowable(module, f"the forward of {_called(module)} takes other steps in eval() than in train()")


def _graph(model: nn.Module, deep: bool, given: frozenset[str] | None, whole: Iterable[nn.Module]) -> fx.Graph:
    """What ``forward`` does. What Python does while it is followed happens once, not at each call: it must not matter.

    Looks at this thread and this model only, for other threads may draw random numbers meanwhile.
    """
    tracer = _Tracer(model, deep, given, whole)
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    found: fx.Graph | None = None
    mistake: Exception | None = None
    try:
        with _making(tracer), _Watch(tracer):
            found = tracer.trace(model)
    except Exception as error:  # tracing runs the user's code on stand-ins for tensors: anything can come out
        mistake = error
    finally:
        changed = [(module, name) for module, before in attributes for name in _restore(module, before)]
    if isinstance(mistake, _Unfollowable):
        raise mistake from None
    if mistake is not None:
        said = str(mistake).splitlines()[0] if str(mistake) else type(mistake).__name__
        module = tracer.inside
        what = f"the forward of {_called(module)} cannot be followed to find where to cut it ({said})"
        raise _Unfollowable(module, what) from None
    if changed:
        module, name = changed[0]
        made = name.startswith("_tensor_constant")  # torch.fx keeps there what it cannot see being made
        what = "makes a tensor by itself, of NumPy or of a list" if made else f"sets self.{name}"
        raise _Unfollowable(module, f"the forward of {_called(module)} {what}")
    assert found is not None
    return found


class _Value(fx.Proxy):
    """A stand-in that notes changes in place as such: by itself torch.fx takes ``x += y`` for ``x = x + y``."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(function: Call) -> Call:
    def change(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return change


for _operation in CHANGING:
    setattr(_Value, f"__{_operation}__", _in_place(getattr(operator, _operation)))


class _Tracer(fx.Tracer):
    """Goes into submodules, and notes of each step the module that it belongs to and the user's line."""

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, deep: bool, given: frozenset[str] | None, whole: Iterable[nn.Module]) -> None:
        super().__init__()
        self.inside = model  # the module whose forward is followed now, or was when it could not be
        self._deep = deep
        self._given = given
        self._whole = {id(module) for module in whole}
        self._modes = _modes()
        self._refuse_chance(model)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if hooked(m) or id(m) in self._whole:
            return True
        if type(m) is nn.Sequential:
            return False
        return not self._deep or (m.__module__.startswith("torch.nn") and type(m) not in _CHAINS)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def call_module(self, m: nn.Module, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        outside, self.inside = self.inside, m
        self._refuse_chance(m)
        if type(m) in _CHAINS:
            forward = _chained(m, forward)
        made = super().call_module(m, forward, args, kwargs)
        self.inside = outside
        return made

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise PlanError("it turns gradients or autocast on or off")
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, __file__)):
            frame = frame.f_back
        node.meta["at"] = _called_from(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        node.meta["inside"] = self.inside
        return node

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: inspect.Signature, function: Call) -> Any:
        parameter = sig.parameters.get(name)
        optional = parameter is not None and parameter.default is not parameter.empty
        if parameter is not None and optional and self._given is not None and name not in self._given:
            return parameter.default
        return super()._proxy_placeholder(name, concrete_args, sig, function)

    def _refuse_chance(self, module: nn.Module) -> None:
        code = getattr(type(module).forward, "__code__", None)
        if code is not None and "random" in code.co_names:
            raise _Unfollowable(module, f"the forward of {_called(module)} uses Python's random numbers")


def _chained(module: nn.Module, forward: Call) -> Call:
    """The forward of PyTorch's chains of layers, without what it finds out about values to choose a faster kernel."""

    @wraps(forward)
    def run(src: Any, *others: Any, is_causal: bool | None = None, **masks: Any) -> Any:
        if masks.pop("tgt_is_causal", None) or masks.pop("memory_is_causal", None):
            raise PlanError("it is told that a mask is causal; give the mask alone")
        if isinstance(module, nn.TransformerEncoder):
            names = {"mask": "src_mask"}
            masks = {**dict(zip(("mask", "src_key_padding_mask"), others, strict=False)), **masks}
            masks["is_causal"] = bool(is_causal)
            others = ()
        else:
            names = {}
        given = {names.get(name, name): value for name, value in masks.items()}
        for layer in module.get_submodule("layers").children():
            src = layer(src, *others, **given)
        norm: Any = module.norm
        return src if norm is None else norm(src)

    return run


def _modes() -> tuple[bool, ...]:
    """What a ``with`` statement of the user's can switch for the steps under it, of which no step would know."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


@contextlib.contextmanager
def _making(tracer: _Tracer) -> Iterator[None]:
    """Have the functions that make tensors be steps of the graph meanwhile."""
    originals = {name: getattr(torch, name) for name in _MAKERS}

    def noted(original: Call) -> Call:
        @wraps(original)
        def make(*args: Any, **kwargs: Any) -> Any:
            return tracer.create_proxy("call_function", original, args, kwargs)

        return make

    for name, original in originals.items():
        setattr(torch, name, noted(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


class _Watch(TorchFunctionMode):
    """Refuses tensors that come of no step of the graph: of NumPy, or of files."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Call, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            module, name = self._tracer.inside, getattr(func, "__name__", "a function")
            raise _Unfollowable(module, f"the forward of {_called(module)} makes a tensor by itself ({name})")
        return result


def _restore(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Give the module its attributes back; the names of those that were changed."""
    after = dict(vars(module))
    vars(module).clear()
    vars(module).update(before)
    return [name for name in {**before, **after} if before.get(name) is not after.get(name)]


def _called(module: nn.Module) -> str:
    return type(module).__name__


def _apply(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _called_from(file: str, line: int, name: str) -> Call:
    """``_apply``, as if it stood on that line: so the traceback of an error shows where the user wrote the call."""
    code = _apply.__code__.replace(co_filename=file, co_firstlineno=line - 1, co_name=name, co_qualname=name)
    return FunctionType(code, {})
