"""A run of the model that decides, at the first use of each weight, how it is split.

A linear layer or convolution that is given a split value sums over it (row); one that is given a whole value splits
what it makes (column).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tricorn.mp.tensor.cut import Block, Blocks, Cut
from tricorn.mp.tensor.rehearsal import Rehearsal
from tricorn.mp.tensor.rules import attention, product, view
from tricorn.mp.tensor.split import RULES, Split, Spread, wrap


class Follow(TorchFunctionMode):
    """Decides at the first use of each parameter how it is split: ``roles``, (dim, blocks) by name."""

    def __init__(
        self,
        team: Rehearsal,
        names: Mapping[int, str],
        stopped: Mapping[str, str],
        arranged: Mapping[str, Sequence[int]],
    ) -> None:
        super().__init__()
        self.roles: dict[str, tuple[int, Blocks]] = {}
        self.refused: dict[str, str] = {}
        self._team = team
        self._names = names
        self._stopped = stopped
        self._arranged = arranged
        self._used: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        given = kwargs or {}
        if RULES.get(func) in _LOOKING:
            return func(*args, **given)
        if (decide := _DECIDING.get(func)) is not None:
            decide(self, args, given)
        self._look_behind((args, given))
        args, given = self._seen(args), self._seen(given)
        result = func(*args, **given)
        _remember(result)
        return result

    def finish(self, output: Any) -> None:
        """Hear what the model returned: small split outputs are not worth it."""
        self._look_behind(output)
        for split in _tensors(output):
            if isinstance(split, Split):
                self._team.stopped(split.spread.origins, "the model's output", sliced=True)

    def _seen(self, value: Any) -> Any:
        """The value with its parameters as they are split; those that are not are whole from now on."""
        if isinstance(value, nn.Parameter):
            name = self._names.get(id(value), "")
            if (role := self.roles.get(name)) is not None:
                return wrap(value.view_as(value), Spread(*role, self._team, frozenset({name})))
            self._used.add(name)
        if isinstance(value, dict):
            return {key: self._seen(item) for key, item in value.items()}
        return type(value)(self._seen(item) for item in value) if type(value) in (tuple, list) else value

    def _look_behind(self, value: Any) -> None:
        """Find tensors that were made where this mode does not see, of split ones: by functions of the user's own."""
        for tensor in _tensors(value):
            if tensor.grad_fn is None or _NOTE in _notes(tensor.grad_fn):
                continue
            ahead: list[Any] = [tensor.grad_fn]
            done: set[Any] = {None}
            while ahead:
                node = ahead.pop()
                done.add(node)
                name = self._names.get(id(getattr(node, "variable", None)))
                own = frozenset({name}) if name in self.roles else frozenset()
                self._team.stopped(own | _notes(node).get(_NOTE, own), _hidden(tensor))
                if _NOTE not in _notes(node):
                    ahead += [before for before, _ in node.next_functions if before not in done]
            _notes(tensor.grad_fn)[_NOTE] = frozenset()

    def _allowed(self, *parameters: Any) -> bool:
        """Whether these parameters (or None) may still be split."""
        names = [self._names.get(id(parameter)) for parameter in parameters if parameter is not None]
        return all(name is not None and name not in self._used and name not in self.roles for name in names)

    def _take(self, dim: int, blocks: Blocks, *parameters: Any) -> None:
        for parameter in parameters:
            if parameter is not None:
                self.roles[self._names[id(parameter)]] = dim, blocks

    def _column(self, weight: Any, bias: Any, dim: int = 0) -> None:
        """Divide what the layer makes."""
        name, length = self._names[id(weight)], weight.shape[dim]
        if name in self._stopped:
            return
        lengths = self._arranged.get(name, (length,))
        if min(lengths) < self._team.shards:
            self.refused[name] = f"its {min(lengths)} outputs are fewer than the {self._team.shards} workers"
            return
        blocks = tuple(Block(each, Cut(each, self._team.shards, free=True)) for each in lengths)
        self._take(dim, blocks, weight)
        if bias is not None:
            self._take(0, blocks, bias)

    def linear(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, weight, bias = _named(("input", "weight", "bias"), args, kwargs)
        if self._allowed(weight):
            if isinstance(x, Split) and x.spread.dim == x.ndim - 1:
                self._take(1, x.spread.blocks, weight)
            elif not isinstance(x, Split) and self._allowed(bias):
                self._column(weight, bias)

    def matmul(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        *_, x, weight = args
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and self._allowed(weight):
            if isinstance(x, Split) and x.spread.dim == x.ndim - 1:
                self._take(0, x.spread.blocks, weight)
            elif not isinstance(x, Split):
                self._column(weight, None, dim=1)

    def convolution(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        x, weight, bias, *_, groups = _named(names, args, kwargs)
        if not self._allowed(weight) or x.ndim != weight.ndim:
            return
        if isinstance(x, Split):
            if x.spread.dim == 1 and groups in (None, 1):
                self._take(1, x.spread.blocks, weight)
            elif x.spread.dim == 1 and groups == x.size(1) == len(weight) and self._allowed(bias):
                self._take(0, x.spread.blocks, weight, bias)
        elif groups in (None, 1) and self._allowed(bias):
            self._column(weight, bias)

    def norm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("input", "running_mean", "running_var", "weight", "bias"), args, strict=False)) | kwargs
        self._affine(given["input"], given.get("weight"), given.get("bias"))

    def group_norm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("input", "num_groups", "weight", "bias"), args, strict=False)) | kwargs
        self._affine(given["input"], given.get("weight"), given.get("bias"))

    def _affine(self, x: Any, weight: Any, bias: Any) -> None:
        if isinstance(x, Split) and x.spread.dim == 1 and self._allowed(weight, bias):
            self._take(0, x.spread.blocks, weight, bias)

    def embedding(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        given = dict(zip(names, args, strict=False)) | kwargs
        weight = given["weight"]
        if not self._allowed(weight):
            return
        if not product.plain_lookup(given):
            self.refused[self._names[id(weight)]] = "its lookups are sparse, renormalised or scaled by frequency"
        elif self._team.is_large(self._names[id(weight)]):
            self._column(weight, None)
        else:
            self.refused[self._names[id(weight)]] = "it is small"

    def attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(attention.NAMES, args, strict=False)) | kwargs
        out, heads, shards = given["out_proj_weight"], given["num_heads"], self._team.shards
        ins = [given.get(f"{name}_weight") for name in ("in_proj", "q_proj", "k_proj", "v_proj")]
        if not self._allowed(out, given["in_proj_bias"], *ins):
            return
        name = self._names[id(out)]
        if not attention.splittable(given):
            self.refused[name] = "its attention has a bias for keys and values, or attends to zero"
        elif heads < shards:
            self.refused[name] = f"its {heads} heads are fewer than the {shards} workers"
        else:
            block = Block(out.shape[1], Cut(heads, shards))
            self._take(1, (block,), out)
            self._take(0, (block,) * 3, ins[0], given["in_proj_bias"])
            self._take(0, (block,), *ins[1:])


_NOTE = "tricorn"
_LOOKING = (view.of_the_part, view.size, view.numel, view.length)
_DECIDING: dict[Any, Callable[[Follow, tuple[Any, ...], dict[str, Any]], None]] = {
    F.linear: Follow.linear,
    torch.matmul: Follow.matmul, Tensor.matmul: Follow.matmul, torch.mm: Follow.matmul, Tensor.mm: Follow.matmul,
    torch.addmm: Follow.matmul, Tensor.addmm: Follow.matmul,
    F.conv1d: Follow.convolution, F.conv2d: Follow.convolution, F.conv3d: Follow.convolution,
    F.batch_norm: Follow.norm, F.group_norm: Follow.group_norm,
    F.embedding: Follow.embedding, F.multi_head_attention_forward: Follow.attention,
}  # fmt: skip


def _named(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name) for name in names]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in inner for tensor in _tensors(item)]


def _remember(result: Any) -> None:
    """Note on what autograd keeps of each tensor that this mode saw it being made, and of which split weights."""
    for tensor in _tensors(result):
        if tensor.grad_fn is not None:
            _notes(tensor.grad_fn)[_NOTE] = tensor.spread.origins if isinstance(tensor, Split) else frozenset()


def _notes(node: Any) -> dict[str, Any]:
    """What can be written on a node of the graph of autograd, for as long as the graph is there."""
    notes: dict[str, Any] = node.metadata
    return notes


def _hidden(tensor: Tensor) -> str:
    return f"{type(tensor.grad_fn).__name__}, which is not an operation of torch"
