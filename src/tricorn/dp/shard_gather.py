"""Weights that are here only while a block computes: gathered before it runs, forward and backward, and let go after.

All workers gather the same units in the same order, whichever of them their share of the batch uses. That order is
recorded the first time: a worker with samples leads, and tells the others each unit that it gathers. From then on all
keep to it, and the next unit is on its way while one computes.

Autograd keeps no weights from forward to backward, nor what autocast made of them, but a note of where in which unit
they lie, and they are gathered when a backward asks for them (``torch.autograd.graph.saved_tensors_hooks``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tricorn.dp.shard_units import Unit, absent
from tricorn.errors import PlanError

if TYPE_CHECKING:
    from tricorn.comm.group import Group
    from tricorn.comm.lane import Handle
    from tricorn.state.flat import Entry

_END = -1  # in place of a unit's number: this phase gathers no more


class Saved(NamedTuple):
    """A view of a unit's weights, or of a ``cast`` of one of its parameters, that a backward will ask for."""

    unit: Unit
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    cast: tuple[Entry, torch.dtype] | None = None


class Ahead(NamedTuple):
    """The next unit, on its way."""

    whole_n: Tensor
    handle: Handle


class Gatherer:
    """Between ``begin`` and ``end`` of a phase, blocks find their weights when they run.

    Raises PlanError if a block runs that the lead's share did not run, or in another order.
    """

    def __init__(self, blocks: Sequence[tuple[nn.Module, Unit]], rest: Unit | None) -> None:
        """``rest``: what belongs to no block, and is here from ``open`` to ``close``."""
        self._rest = rest
        self._units = [unit for _, unit in blocks]
        self._places = {
            parameter: (unit, entry)
            for unit in self._units for parameter, entry in zip(unit.parameters, unit.entries, strict=True)
        }  # fmt: skip
        self._orders: dict[str, list[int]] = {}  # what each phase gathers, by unit's number
        self._group: Group | None = None
        self._phase = ""
        self._lead = 0
        self._at = 0
        self._ahead: Ahead | None = None
        self.waited = 0.0  # seconds for peers, altogether
        for module, unit in blocks:
            module.register_forward_pre_hook(partial(self._before, unit))
            module.register_forward_hook(partial(self._after, unit))

    def join(self, group: Group) -> None:
        """A new membership epoch: what was recorded is forgotten, for a new worker knows nothing of it."""
        self._group = group
        self._orders = {}

    def open(self) -> None:
        """A batch begins."""
        if self._rest is not None:
            arriving = self._start(self._rest)
            self._wait(arriving)
            self._rest.show(arriving.whole_n)

    def close(self) -> None:
        """The batch is over, well or not: nothing is under way any more."""
        self._phase, self._ahead = "", None
        for unit in self._units if self._rest is None else (*self._units, self._rest):
            self.release(unit)

    def begin(self, phase: str, lead: int) -> None:
        """A phase begins in which rank ``lead`` has samples."""
        self._phase, self._lead, self._at = phase, lead, 0
        self._recorded: list[int] = []

    def end(self) -> None:
        """This worker's share has run; gather what others still need."""
        order = self._orders.get(self._phase)
        if order is None:
            if self._leads:
                self._tell(_END)
            else:
                while (number := self._hear()) != _END:
                    self._gather(number)
                    self.release(self._units[number])
            self._orders[self._phase] = self._recorded
        else:
            while self._at < len(order):
                self.release(self._units[self._next(order)])
        self._phase = ""

    def need(self, unit: Unit) -> None:
        """Have the weights of a unit here."""
        if unit.whole_n is not None:
            return
        wanted = self._units.index(unit)
        order = self._orders.get(self._phase)
        while True:
            number = self._record(wanted) if order is None else self._next(order)
            if number == wanted:
                return
            if number == _END:
                raise PlanError(
                    f"the block with {unit.entries[0].name!r} runs in an order that differs between the workers or "
                    "from step to step, so its weights cannot be gathered; use zero=2"
                )
            self.release(self._units[number])

    def served(self, unit: Unit) -> None:
        """A backward has done with a unit."""
        if unit in self._units:
            self.release(unit)

    def release(self, unit: Unit) -> None:
        """The weights are not needed any more for now."""
        if unit.whole_n is not None:
            unit.show(None)

    def pack(self, saved: Tensor) -> Tensor | Saved:
        """What autograd is to keep of a tensor until backward."""
        if not saved.is_floating_point():
            return saved
        at, cast = saved.untyped_storage().data_ptr(), self._cast(saved)
        if at == absent(saved).untyped_storage().data_ptr() or (cast is not None and cast[0].whole_n is None):
            raise PlanError("the model uses a weight of a block outside of the block's forward; use zero=2")
        if cast is not None:
            unit, entry = cast
            return Saved(unit, saved.shape, saved.stride(), int(saved.storage_offset()), (entry, saved.dtype))
        for unit in self._units:
            if unit.whole_n is not None and unit.whole_n.untyped_storage().data_ptr() == at:
                return Saved(unit, saved.shape, saved.stride(), int(saved.storage_offset()))
        return saved

    def unpack(self, kept: Tensor | Saved) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.need(kept.unit)
        flat = kept.unit.whole_n
        assert flat is not None
        if kept.cast is not None:
            entry, dtype = kept.cast
            flat = flat[entry.start : entry.stop].to(dtype)
        return flat.as_strided(kept.shape, kept.stride, kept.offset)

    def _cast(self, saved: Tensor) -> tuple[Unit, Entry] | None:
        parameter = cast_of(saved)
        return None if parameter is None else self._places.get(parameter)

    def _before(self, unit: Unit, *_: Any) -> None:
        if self._phase:
            self.need(unit)

    def _after(self, unit: Unit, *_: Any) -> None:
        if self._phase not in ("", "backward"):  # there a block runs again to be differentiated just then
            self.release(unit)
            torch.clear_autocast_cache()  # it holds the casts of weights that this block has used

    @property
    def _leads(self) -> bool:
        assert self._group is not None
        return self._group.rank == self._lead

    def _record(self, wanted: int) -> int:
        """Gather what the lead says, which is this worker itself or another; its number."""
        if self._leads:
            self._tell(wanted)
            number = wanted
        else:
            number = self._hear()
        if number != _END:
            self._gather(number)
        return number

    def _gather(self, number: int) -> None:
        self._recorded.append(number)
        self._arrive(number, self._start(self._units[number]))

    def _next(self, order: list[int]) -> int:
        """Gather the next unit of a recorded order, and send for the one after it; its number."""
        if self._at == len(order):
            return _END
        number = order[self._at]
        self._at += 1
        arriving = self._ahead or self._start(self._units[number])
        self._ahead = self._start(self._units[order[self._at]]) if self._at < len(order) else None
        self._arrive(number, arriving)
        return number

    def _start(self, unit: Unit) -> Ahead:
        assert self._group is not None
        whole_n = unit.filled()
        return Ahead(whole_n, self._group.all_gather(whole_n, unit.bounds))

    def _arrive(self, number: int, arriving: Ahead) -> None:
        self._wait(arriving)
        if self._units[number].whole_n is None:
            self._units[number].show(arriving.whole_n)

    def _wait(self, arriving: Ahead) -> None:
        began = time.perf_counter()
        arriving.handle.wait()
        self.waited += time.perf_counter() - began

    def _tell(self, number: int) -> None:
        assert self._group is not None
        self._group.broadcast(torch.tensor([number], dtype=torch.int64), self._lead)

    def _hear(self) -> int:
        assert self._group is not None
        number = torch.zeros(1, dtype=torch.int64)
        self._group.broadcast(number, self._lead)
        return int(number)


def cast_of(saved: Tensor) -> nn.Parameter | None:
    """The parameter that a tensor is a cast of to another dtype, in one piece, or a view of such; None if of none."""
    made = saved if saved._base is None else saved._base
    step = made.grad_fn
    if step is None or step.name() != "ToCopyBackward0" or not made.is_contiguous() or made.storage_offset():
        return None
    parameter: nn.Parameter | None = getattr(step.next_functions[0][0], "variable", None)
    return parameter
