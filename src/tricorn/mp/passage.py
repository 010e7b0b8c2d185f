"""One microbatch on its way through one stage: forward, and backward in one part or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tricorn.mp import wire
from tricorn.mp.backward import backward

if TYPE_CHECKING:
    from tricorn.mp.deferred import Deferral
    from tricorn.mp.partition import Stage


class Passage:
    """``run`` makes of what the stage before handed on, or of the model's inputs, what the stage hands on, or the loss.

    With ``again``, no more is kept of a forward than what was given: backward computes it once more, with the random
    numbers and the buffers of the first time.
    """

    def __init__(self, run: Callable[[Any], Any], stage: Stage, deferral: Deferral, *, again: bool) -> None:
        self._run, self._stage, self._deferral = run, stage, deferral
        self._before = _Before(stage) if again else None
        self._given: Any = None
        self._entry = _Entry()
        self._made: Any = None
        self._waiting: list[Callable[[], None]] = []

    def forward(self, given: Any) -> Any:
        """What comes of it; the tensors given may be overwritten."""
        if self._before is None:
            self._made = self._forward(given)
            return self._made
        self._given = given
        return self._forward(mapped(_copied, given))

    def backward(self, gradients: Sequence[Tensor] = (), *, hurried: bool) -> None:
        """Backward; if ``hurried``, but for the weight gradients that can wait until ``finish``.

        ``gradients`` are those of what wants one in what was made.
        """
        if self._before is not None:
            with self._before:
                self._made = self._forward(self._given)
        self._deferral.waiting = self._waiting if hurried else None
        try:
            if not self._stage.last:
                backward(wire.wanted(self._made), gradients)
            elif self._made is not None:
                torch.autograd.backward(self._made)
        finally:
            self._deferral.waiting = None
        self._made = self._given = None

    def finish(self) -> None:
        """Compute the weight gradients that wait."""
        while self._waiting:
            self._waiting.pop()()

    @property
    def gradients(self) -> Sequence[Tensor | None]:
        """After ``backward``: of what wants one in what was given; None for zero."""
        return self._entry.gradients

    def _forward(self, given: Any) -> Any:
        return self._run(given if self._stage.first else self._entry.let_in(given))


class _Entry:
    """Where backward ends: values come in as what a node has made, so the first layer may work in place on them."""

    def __init__(self) -> None:
        self.gradients: Sequence[Tensor | None] = ()

    def let_in(self, value: Any) -> Any:
        parts = wire.tensors(value)
        wanted = wire.wanted(value)
        self.gradients = [None] * len(wanted)
        if wanted:
            anchor = torch.zeros((), requires_grad=True)
            made = iter(_enter(anchor, self, [part.detach() for part in wanted]))
            parts = tuple(next(made) if part.requires_grad else part for part in parts)
        return parts[0] if isinstance(value, Tensor) else parts


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, entry: _Entry, parts: Sequence[Tensor]) -> Any:
        ctx.set_materialize_grads(False)
        ctx.entry = entry
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        ctx.entry.gradients = gradients
        return None, None, None


_enter: Callable[..., tuple[Tensor, ...]] = _Enter.apply


class _Before:
    """The random numbers and buffers that a stage had, which it has again within the context."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._then = self._now()
        self._since = self._then

    def __enter__(self) -> None:
        self._since = self._now()
        self._set(self._then)

    def __exit__(self, *exception: object) -> None:
        self._set(self._since)

    def _now(self) -> tuple[list[Tensor], Tensor, Tensor | None]:
        buffers = [buffer.detach().clone() for buffer in self._stage.buffers()]
        on_gpu = torch.cuda.get_rng_state(self._stage.device) if self._stage.device.type == "cuda" else None
        return buffers, torch.get_rng_state(), on_gpu

    def _set(self, state: tuple[list[Tensor], Tensor, Tensor | None]) -> None:
        buffers, on_cpu, on_gpu = state
        for buffer, value in zip(self._stage.buffers(), buffers, strict=True):
            buffer.data.copy_(value)  # .data: autograd keeps batch statistics, and would take this for a change of them
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, self._stage.device)


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value with the function applied to each tensor in it, however deep in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: mapped(function, item) for name, item in value.items()}
    return tuple(mapped(function, item) for item in value) if isinstance(value, tuple | list) else value


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
