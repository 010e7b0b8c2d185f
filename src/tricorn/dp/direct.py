"""Gradients of the workers of one host, written where all of them see them; then one update, made by all together.

Nothing runs beside backward, so two workers on two cores keep them to themselves; and the sum is taken block by block
on the way into the update, so it is never written to memory (docs/decisions/0009-gradients-in-shared-memory.md).

Legend: N elements of all trained parameters together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from tricorn.dp.in_place import InPlace
from tricorn.dp.shared_state import SharedState
from tricorn.dp.watching import watch
from tricorn.errors import PeerLost
from tricorn.state.flat import trained_parameters

if TYPE_CHECKING:
    from tricorn.comm.group import Group
    from tricorn.state.flat import Entry, FlatState


class DirectSum:
    """The gradient of a state, summed over a group of one host. ``exposed`` is from ``Group.expose(N, ...)``.

    Call ``begin``, then one forward and backward or none, with ``write`` between them, then ``finish``; a step either
    ends with ``update`` or is abandoned.
    While it lives, backward's gradients are taken from the parameters, which keep none, and the state lies in memory
    that all ranks share. All ranks add in rank order. ``waited``: seconds for which updates have waited for peers.
    """

    def __init__(self, state: FlatState, group: Group, exposed: Sequence[Tensor]) -> None:
        self.waited = 0.0
        self._state = state
        self._group = group
        self._exposed = exposed
        self._shared = SharedState(state, group, exposed)
        self._last = False  # whether what runs is the last backward of the step
        self._writing = False  # whether it has begun
        self._missing: set[Tensor] = set()
        trained = dict(trained_parameters(state.module))
        self._places: dict[Tensor, Entry] = {trained[entry.name]: entry for entry in state.entries}
        self._hooks = []
        for parameter in self._places:
            parameter.grad = None
            self._hooks.append(watch(parameter, self._take))
        self._linear = InPlace(state.module, self)

    def begin(self) -> None:
        """The backward that follows is the last of the step."""
        if self._shared.left and self._group.size > 1:
            raise PeerLost("the group of the last step is lost")  # peers may still read the gradient of that step
        self._last, self._missing = True, set(self._places)

    def write(self) -> None:
        """That backward begins: layers may write their gradients themselves (in_place.py)."""
        self._writing = True

    def claim(self, parameter: Tensor) -> tuple[Tensor, bool] | None:
        """As ``in_place.Places``: not what the user's hooks want to see, nor what is added to earlier microbatches."""
        if (
            not self._writing
            or parameter.grad is not None
            or parameter._backward_hooks
            or parameter not in self._places
        ):
            return None
        more = parameter not in self._missing
        self._missing.discard(parameter)
        return self._place(parameter), more

    def finish(self, status: Tensor) -> None:
        """Return when all ranks' gradients are there and ``status`` is a sum over them. Raises PeerLost."""
        self._writing = False
        for parameter in list(self._missing):
            if parameter.grad is None:
                self._place(parameter).zero_()
            else:
                self._take(parameter)
        self._group.all_reduce_now(status)
        self._last = False

    def squared_norm(self) -> float:
        """The squared L2 norm of the sum. Raises PeerLost."""
        return self._shared.squared_norm()

    def update(self, factor: float, rate: float) -> None:
        """Make the next update with the sum times ``factor`` at that learning rate."""
        self._shared.update(factor, rate)
        began = time.perf_counter()
        self._shared.commit(factor, rate)
        self.waited += time.perf_counter() - began
        self._note_read()

    def abandon(self) -> bool:
        """Forget what the step has computed; fail it for the whole group unless that has agreed on it already.

        Returns whether the state is still what it was before the step.
        """
        if self._last:
            self._group.interrupt()
        self._last = self._writing = False
        for parameter in self._places:
            parameter.grad = None
        return not self._group.over or self._shared.leave()

    def close(self) -> None:
        """Leave the parameters' gradients alone, which become views of the state's again, and the state to itself."""
        untouched = self._shared.leave()
        assert untouched, "no peer makes a step without this one"
        self.release()
        for parameter, entry in self._places.items():
            parameter.grad = self._state.grads_N[entry.start : entry.stop].view(entry.shape)

    def release(self) -> None:
        """Take no gradient any more. The hooks hold this object, and its shared memory, in a hidden circle."""
        for hook in self._hooks:
            hook.remove()
        self._linear.close()

    def _note_read(self) -> None:
        """The others have read their parts of this gradient, and this part of the weights."""
        start, stop = self._shared.parts[self._group.rank]
        weights_N = self._state.weights_N
        others = self._group.size - 1
        self._group.note_read((len(weights_N) + (others - 1) * (stop - start)) * weights_N.itemsize)

    def _take(self, parameter: Tensor) -> None:
        if not self._last or parameter.grad is None:  # None: a layer has written it
            return
        grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        if parameter in self._missing:
            self._missing.remove(parameter)
            self._place(parameter).copy_(grad)
        else:  # another use of it wrote before, or a backward within the backward has come to it again
            self._place(parameter).add_(grad)
        parameter.grad = None

    def _place(self, parameter: Tensor) -> Tensor:
        entry = self._places[parameter]
        return self._exposed[self._group.rank][entry.start : entry.stop].view(entry.shape)
