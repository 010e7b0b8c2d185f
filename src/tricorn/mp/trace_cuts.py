"""Where the steps of a graph can be cut apart: wherever all that the rest needs of what came before can travel.

Tensors travel, and so do sizes, as small tensors of whole numbers; what else the rest needs keeps a cut away.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import fx, nn

# ``tensor`` may also be a tuple of them, or what only a run shows. ``place`` is a device: every stage has its own.
Kind = Literal["tensor", "number", "shape", "place", "other"]

_NUMBERS = frozenset({"dim", "element_size", "ndimension", "nelement", "numel", "stride"})
_TENSORS = frozenset({"T", "H", "mT", "mH", "data", "real", "imag"})
_ARITHMETIC = frozenset({"_operator", "builtins", "math"})
# Whose result may be the same memory as what it was given.
_VIEWS = frozenset({
    "adjoint", "as_strided", "broadcast_to", "chunk", "contiguous", "detach", "diagonal", "dsplit", "expand",
    "expand_as", "flatten", "getattr", "getitem", "hsplit", "moveaxis", "movedim", "narrow", "permute", "positive",
    "ravel", "reshape", "reshape_as", "select", "split", "squeeze", "swapaxes", "swapdims", "t", "tensor_split",
    "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as", "vsplit",
    # Where there is nothing to convert, or to drop.
    "alpha_dropout", "bfloat16", "double", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout",
    "float", "half", "to", "type",
})  # fmt: skip
_VIEWING = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip
# ``x += y`` and its like, by their names in the module ``operator``.
CHANGING = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
_IN_PLACE = frozenset({operator.setitem, *(getattr(operator, name) for name in CHANGING)})


class Span(NamedTuple):
    """Steps of a graph between two cuts. ``kinds`` are those of ``given`` and ``wanted`` where they travel."""

    name: str
    first: bool
    last: bool
    given: tuple[fx.Node, ...]  # of the first span the model's inputs
    steps: tuple[fx.Node, ...]
    wanted: Any  # nodes; of the last span the model's output: nodes in tuples and dicts
    kinds: dict[fx.Node, Kind]


def spans(model: nn.Module, graph: fx.Graph, *, several: bool) -> Iterator[Span]:
    """The graph in pieces: cut where a single value is all that is needed, or also where ``several`` tensors are."""
    given = tuple(node for node in graph.nodes if node.op == "placeholder")
    output = next(node.args[0] for node in graph.nodes if node.op == "output")
    steps = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    kinds = kinds_of(graph)
    hazards = _hazards(model, steps)
    live, done, start, first = dict.fromkeys(given), set(given), 0, True
    for index, node in enumerate(steps):
        done.add(node)
        live = {v: None for v in (*live, node) if not done.issuperset(v.users) and kinds[v] != "place"}
        last = index == len(steps) - 1
        if last or (_can_travel(live, kinds, several) and not _torn(list(live), hazards, index)):
            name = node.name if node.op == "call_function" else str(node.target)
            wanted = output if last else tuple(live)
            yield Span(name, first, last, given, tuple(steps[start : index + 1]), wanted, kinds)
            given, start, first = tuple(live), index + 1, False


def _can_travel(live: dict[fx.Node, None], kinds: dict[fx.Node, Kind], several: bool) -> bool:
    if not live or not any(kinds[value] == "tensor" for value in live):
        return False
    if not several and len(live) > 1:
        return False
    # A value that is only taken apart is no tensor, so it stays with the step that takes it apart.
    return all(
        kinds[value] in ("number", "shape")
        or (kinds[value] == "tensor" and not all(user.target is operator.getitem for user in value.users))
        for value in live
    )


def kinds_of(graph: fx.Graph) -> dict[fx.Node, Kind]:
    """What each node stands for, as far as can be told without running it."""
    kinds: dict[fx.Node, Kind] = {}
    for node in graph.nodes:
        kinds[node] = _kind(node, kinds)
    return kinds


def _kind(node: fx.Node, kinds: dict[fx.Node, Kind]) -> Kind:
    if node.op in ("placeholder", "get_attr", "call_module", "output"):
        return "other" if str(node.target).startswith("*") else "tensor"
    of = [kinds[value] for value in node.all_input_nodes]
    if node.op == "call_method":
        name = str(node.target)
        if name == "size":
            return "number" if len(node.args) > 1 or node.kwargs else "shape"
        if name in _NUMBERS:
            return "number"
        return "tensor" if "tensor" in of else "other"
    if node.target is getattr:
        return _kind_of_attribute(str(node.args[1]))
    if node.target is operator.getitem and of[:1] == ["shape"]:
        return "shape" if isinstance(node.args[1], slice) else "number"
    if getattr(node.target, "__module__", "") in _ARITHMETIC and "tensor" not in of:
        if "shape" in of:
            return "shape" if node.target is operator.add else "other"
        return "number" if of and set(of) == {"number"} else "other"
    return "tensor"


def _kind_of_attribute(name: str) -> Kind:
    found: dict[str, Kind] = {"shape": "shape", "device": "place", "ndim": "number"}
    return found.get(name, "tensor" if name in _TENSORS else "other")


class _Hazard(NamedTuple):
    """From step ``begin`` to step ``end`` nodes of one memory must stay together: then it is changed in place."""

    nodes: frozenset[fx.Node]
    end: int


def _hazards(model: nn.Module, steps: list[fx.Node]) -> list[_Hazard]:
    """Memory that several nodes look at, and the last step that changes it in place."""
    roots: dict[fx.Node, fx.Node] = {}
    changed: dict[fx.Node, int] = {}
    for index, node in enumerate(steps):
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        in_place = _in_place(model, node)
        if source is not None and (in_place or _views(model, node)):
            roots[node] = roots.get(source, source)
        if source is not None and in_place:
            changed[roots[node]] = index
    return [
        _Hazard(frozenset({root, *(node for node, of in roots.items() if of is root)}), end)
        for root, end in changed.items()
    ]


def _torn(live: list[fx.Node], hazards: list[_Hazard], index: int) -> bool:
    """Whether a cut after that step would make two memories of one that is changed later."""
    return any(index < hazard.end and len(hazard.nodes.intersection(live)) > 1 for hazard in hazards)


def _in_place(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = _name(node)
    return (name.endswith("_") and not name.endswith("__")) or node.target in _IN_PLACE or bool(
        node.kwargs.get("inplace")
    )  # fmt: skip


def _views(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), _VIEWING)
    return _name(node) in _VIEWS


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def packed(value: Any) -> torch.Tensor:
    """A value of kind ``number`` or ``shape`` as a tensor; ``unpacked`` gives it back."""
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def unpacked(value: torch.Tensor, kind: Kind) -> Any:
    return value.item() if kind == "number" else tuple(value.tolist()) if kind == "shape" else value
