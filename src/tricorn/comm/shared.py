"""Collectives and messages between the processes of one host, through memory that they share.

Reductions are taken in rank order, so every rank gets the same bits, and the same bits each time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tricorn.comm import shared_rounds as rounds
from tricorn.comm import shared_sums as sums
from tricorn.comm.lane import Handle, Lane
from tricorn.comm.segment import Segment, Ticket
from tricorn.comm.shared_messages import Arrival, Messages, Then
from tricorn.comm.shared_waiting import Waiting
from tricorn.errors import PeerLost, UsageError

# Up to here every rank reads all of the others: one wait. Beyond, each reduces a share of its own: two, but less to
# read.
SMALL = 1 << 15

# What an all-reduce moves in one round: filling, reducing and taking overlap, and all of it stays in the second-level
# cache. With 1 MB instead, 1 to 16 MB take 1.1 to 1.4 times as long with two ranks and 1.8 to 2.2 times with four.
REDUCED = 1 << 18

KINDS = (
    "", "all_reduce", "all_gather", "reduce", "reduce_scatter", "all_to_all", "broadcast", "gather", "scatter",
    "barrier",
)  # fmt: skip
DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
_FINISHED = Handle().run(lambda: None)
_MASK = (1 << 40) - 1


def new_segment(size: int, label: str) -> Segment:
    """The memory that one rank of a group of ``size`` brings along; its ``ticket`` goes to all the others."""
    return Segment.create(rounds.segment_bytes(size), label)


class Shared:
    """The processes of one host that share a group: rank ``rank`` of as many as there are ``tickets``.

    ``segment`` is this rank's own, the tickets are those of all ranks in their order; whoever makes the group
    exchanges them. ``names``: the numbers by which errors call the ranks, if they are others. The constructor raises
    PeerLost when a peer is gone, ClusterError when one is on another host.

    Every rank must call the same collectives in the same order, with the same sizes, dtypes and roots; when one does
    not, all get UsageError. Collectives are called by one thread; messages and ``interrupt`` by any. Tensors are
    contiguous and on the CPU. With ``later`` a call returns at once, and its handle is waited for; the tensors are
    to be left alone until then.

    A peer that dies, or that interrupts or closes its group while it is waited for, makes the calls that need it
    raise PeerLost within some 10 ms; a peer that is merely slow, or frozen, does so after ``timeout`` seconds. The
    group is of no use then, and the others learn it.
    """

    def __init__(
        self, *, rank: int, segment: Segment, tickets: Sequence[Ticket], label: str, timeout: float = 1800.0,
        names: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.rank = rank
        self.size = len(tickets)
        self._inside = 0  # the lane's thread, once it has begun
        self._lane = Lane(f"tricorn-{label}")
        self._turns = [0, 0]
        with contextlib.ExitStack() as undo:
            self._segments = []
            for peer, ticket in enumerate(tickets):
                self._segments.append(segment if peer == rank else Segment.attach(ticket))
                undo.callback(self._segments[-1].close)
            processes = {peer: ticket.pid for peer, ticket in enumerate(tickets) if peer != rank}
            self._waiting = Waiting(
                rank=rank, segments=self._segments, processes=processes, label=label, timeout=timeout,
                names=range(self.size) if names is None else names,
            )  # fmt: skip
            undo.pop_all()
        self._messages = Messages(self._waiting)

    @property
    def timeout(self) -> float:
        """Seconds that a peer which is alive is waited for."""
        return self._waiting.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._waiting.timeout = seconds

    def all_reduce(self, tensor: Tensor, operation: str = "sum", *, later: bool = False) -> Handle:
        """Replace the tensor by its reduction over all ranks: sum, avg, product, min, max, band, bor or bxor."""
        return self._do(lambda: self._all_reduce(tensor, operation), later)

    def broadcast(self, tensor: Tensor, root: int, *, later: bool = False) -> Handle:
        """Replace the tensor by that of rank ``root``."""
        return self._do(lambda: self._broadcast(tensor, root), later)

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor, *, later: bool = False) -> Handle:
        """Fill ``outputs`` with the tensors of all ranks; they may differ in size."""
        return self._do(lambda: self._all_gather(outputs, tensor), later)

    def reduce(self, tensor: Tensor, root: int, operation: str = "sum", *, later: bool = False) -> Handle:
        """As ``all_reduce``, but only rank ``root`` gets the result."""
        return self._do(lambda: self._reduce(tensor, root, operation), later)

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], operation: str = "sum", *, later: bool = False
    ) -> Handle:
        """Rank r gets the reduction of everybody's ``inputs[r]``; they may differ in size."""
        return self._do(lambda: self._reduce_scatter(output, inputs, operation), later)

    def all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], *, later: bool = False) -> Handle:
        """Rank r gets everybody's ``inputs[r]``. Raises UsageError when a size differs from what is sent."""
        return self._do(lambda: self._all_to_all(outputs, inputs), later)

    def gather(self, outputs: Sequence[Tensor], tensor: Tensor, root: int, *, later: bool = False) -> Handle:
        """Rank ``root`` gets the tensors of all ranks, of one size."""
        return self._do(lambda: self._gather(outputs, tensor, root), later)

    def scatter(self, output: Tensor, inputs: Sequence[Tensor], root: int, *, later: bool = False) -> Handle:
        """Rank r gets the r-th of the inputs of rank ``root``, which are of one size."""
        return self._do(lambda: self._scatter(output, inputs, root), later)

    def barrier(self, *, later: bool = False) -> Handle:
        """Return when every rank has called it."""
        return self._do(lambda: self._pass(self._call("barrier", 0), self._plan(), 0, 1, everyone=True), later)

    def send(self, tensor: Tensor, peer: int, tag: int = 0, *, later: bool = False, then: Then | None = None) -> Handle:
        """Send to a rank. Up to a megabyte does not wait for the receiver. ``then`` is called at the end."""
        _span(tensor)
        return self._messages.send(tensor, self._peer(peer), tag, later, then)

    def room(self, peer: int) -> int:
        """How many bytes can be sent to a rank now without waiting for it."""
        return self._messages.room(self._peer(peer))

    def receive(
        self, tensor: Tensor, peer: int | None = None, tag: int = 0, *, later: bool = False, then: Then | None = None
    ) -> Arrival:
        """Fill the tensor with the first message with that tag of a rank, or of any, ``source`` of what it returns.

        Raises UsageError, when waited for, if the message is of another size.
        """
        _span(tensor)
        return self._messages.receive(tensor, None if peer is None else self._peer(peer), tag, later, then)

    def start(self, work: Callable[[], object]) -> Handle:
        """Begin a function that calls collectives, after all that were begun before it."""

        def inside() -> None:
            self._inside = threading.get_ident()
            work()

        return self._lane.start(inside)

    def run(self, work: Callable[[], Any]) -> None:
        """The same, and wait for it; in the caller's thread when nothing is under way."""
        if self._inside == threading.get_ident():
            work()
        else:
            self._lane.run(work)

    def dead(self) -> list[int]:
        """The ranks whose processes have ended, by the names that errors call them."""
        return self._waiting.dead()

    def interrupt(self, reason: str) -> None:
        """Make every call, blocked or yet to come, here and at the peers, raise PeerLost. From any thread."""
        self._waiting.hang_up(reason)

    def close(self) -> None:
        """Leave, and end the threads; work that is unfinished fails. May be called again."""
        self._waiting.leave()
        self._lane.close()
        self._messages.close()
        self._waiting.close()
        for segment in self._segments:
            segment.close()

    # What follows runs in the lane, or in the caller's thread while the lane is idle.

    def _do(self, work: Callable[[], None], later: bool) -> Handle:
        if later:
            return self.start(work)
        self.run(work)
        return _FINISHED

    def _all_reduce(self, tensor: Tensor, operation: str) -> None:
        data, length = _span(tensor)
        function, number = sums.reduction(tensor.dtype, operation)
        call = self._call("all_reduce", length, tensor.dtype, number)
        if length <= SMALL or self.size == 1:
            plan = self._plan()
            plan[0, 0], plan[1, 0], plan[2, self.rank], plan[3, self.rank] = data, length, data, length
            self._pass(call, plan, length, 1, everyone=True, reduction=(function, number, tensor.itemsize))
            return
        piece = min(REDUCED // self.size & -64, _aligned(-(-length // self.size)))
        count = -(-length // (piece * self.size))
        arguments = (*self._turns, count, piece, data, length, function, number, tensor.itemsize)
        self._run(rounds.all_reduce, call, arguments)
        self._turns[0] += count
        self._turns[1] += count

    def _broadcast(self, tensor: Tensor, root: int) -> None:
        data, length = _span(tensor)
        plan = self._plan()
        if self.rank == root:
            plan[0, 0], plan[1, 0] = data, length
        else:
            plan[2, root], plan[3, root] = data, length
        self._pass(self._call("broadcast", length, tensor.dtype, root=root), plan, length, 1)

    def _all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        plan = self._plan()
        plan[0, 0], plan[1, 0] = _span(tensor)
        self._into(plan, outputs)
        if plan[3, self.rank] != plan[1, 0]:
            raise UsageError(
                f"rank {self.rank} gives {plan[1, 0]} bytes, but has room for {plan[3, self.rank]}",
                remedy="Make the tensor and the output of its own rank equal in size.",
            )
        call = self._call("all_gather", int(plan[3].sum()), tensor.dtype)
        self._pass(call, plan, int(plan[3].max()), 1)

    def _reduce(self, tensor: Tensor, root: int, operation: str) -> None:
        data, length = _span(tensor)
        function, number = sums.reduction(tensor.dtype, operation)
        plan = self._plan()
        plan[0, 0], plan[1, 0] = data, length
        if self.rank == root:
            plan[2, root], plan[3, root] = data, length
        self._pass(
            self._call("reduce", length, tensor.dtype, number, root), plan, length, 1,
            everyone=self.rank == root, reduction=(function, number, tensor.itemsize),
        )  # fmt: skip

    def _reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor], operation: str) -> None:
        function, number = sums.reduction(output.dtype, operation)
        plan = self._plan()
        self._out_of(plan, inputs)
        plan[2, self.rank], plan[3, self.rank] = _span(output)
        if plan[3, self.rank] != plan[1, self.rank]:
            raise UsageError(
                f"rank {self.rank} has {plan[1, self.rank]} bytes, but room for {plan[3, self.rank]}",
                remedy="Make the output and the input of its own rank equal in size.",
            )
        call = self._call("reduce_scatter", int(plan[1].sum()), output.dtype, number)
        reduction = (function, number, output.itemsize)
        self._pass(call, plan, int(plan[1].max()), self.size, everyone=True, reduction=reduction)

    def _all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        plan = self._plan()
        self._out_of(plan, inputs)
        self._into(plan, outputs)
        # Nobody knows the sizes of all: they go round first, so that all see the same mistakes and rounds to make.
        sizes = np.zeros((self.size, 2, self.size), np.int64)
        sizes[self.rank] = plan[1::2]
        self._pass(self._call("all_to_all", 0), self._rows(sizes), sizes[0].nbytes, 1)
        sent, room = sizes[:, 0], sizes[:, 1].T
        if (sent != room).any():
            source, target = map(int, np.argwhere(sent != room)[0])
            raise UsageError(
                f"rank {source} sends {sent[source, target]} bytes to rank {target}, "
                f"which has room for {room[source, target]}",
                remedy="Make the output sizes of each rank equal to the input sizes of the others.",
            )
        self._pass(self._call("all_to_all", int(sent.sum())), plan, int(sent.max()), self.size)

    def _gather(self, outputs: Sequence[Tensor], tensor: Tensor, root: int) -> None:
        plan = self._plan()
        plan[0, 0], plan[1, 0] = _span(tensor)
        if self.rank == root:
            self._into(plan, outputs)
        length = int(plan[1, 0])
        self._pass(self._call("gather", length, tensor.dtype, root=root), plan, length, 1)

    def _scatter(self, output: Tensor, inputs: Sequence[Tensor], root: int) -> None:
        plan = self._plan()
        if self.rank == root:
            self._out_of(plan, inputs)
        plan[2, root], plan[3, root] = _span(output)
        length = int(plan[3, root])
        self._pass(self._call("scatter", length, output.dtype, root=root), plan, length, self.size)

    def _peer(self, rank: int) -> int:
        if rank == self.rank or not 0 <= rank < self.size:
            raise UsageError(f"rank {self.rank} of {self.size} cannot exchange messages with rank {rank}")
        return rank

    def _plan(self) -> Any:
        return np.zeros((4, self.size), np.int64)

    def _rows(self, table: Any) -> Any:
        """To share the rows of a table of which each rank has filled in its own."""
        plan = self._plan()
        plan[2] = table.ctypes.data + table[0].nbytes * np.arange(self.size)
        plan[3] = table[0].nbytes
        plan[0, 0], plan[1, 0] = plan[2, self.rank], plan[3, self.rank]
        return plan

    def _out_of(self, plan: Any, inputs: Sequence[Tensor]) -> None:
        self._count(inputs)
        for peer, tensor in enumerate(inputs):
            plan[0, peer], plan[1, peer] = _span(tensor)

    def _into(self, plan: Any, outputs: Sequence[Tensor]) -> None:
        self._count(outputs)
        for peer, tensor in enumerate(outputs):
            plan[2, peer], plan[3, peer] = _span(tensor)

    def _count(self, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != self.size:
            raise UsageError(f"{len(tensors)} tensors for {self.size} ranks", remedy="Give one for each rank.")

    def _call(self, kind: str, length: int, dtype: torch.dtype | None = None, operation: int = 0, root: int = 0) -> int:
        """What all ranks must agree on, as one number."""
        code = DTYPES.index(dtype) + 1 if dtype else 0
        return KINDS.index(kind) << 58 | operation << 54 | code << 47 | (root & 127) << 40 | length & _MASK

    def _pass(
        self, call: int, plan: Any, length: int, pieces: int, *, everyone: bool = False,
        reduction: tuple[int, int, int] = (0, 0, 1),
    ) -> None:  # fmt: skip
        """``length``: the longest of what any rank sends to any."""
        piece = max(64, min(rounds.SLOT_BYTES // pieces & -64, _aligned(length)))
        count = max(1, -(-length // piece))
        self._run(rounds.pass_round, call, (self._turns[0], count, piece, pieces, everyone, plan, *reduction))
        self._turns[0] += count

    def _run(self, kernel: Callable[..., int], call: int, arguments: tuple[Any, ...]) -> None:
        if self._waiting.lost:
            raise PeerLost(self._waiting.lost)
        group = self._waiting.group
        group[rounds.STAGE] = 0
        state = kernel(group, call, *arguments)
        if state == rounds.BLOCKED:
            state = self._waiting.insist(
                lambda: kernel(group, call, *arguments),
                lambda: (int(group[rounds.BLAMED]), int(group[rounds.STAGE])),
                _name(call),
            )
        if state == rounds.DIFFERS:
            names = self._waiting.names
            other = f"rank {names[group[rounds.BLAMED]]} called {_name(int(group[rounds.OTHER]))}"
            error = UsageError(
                f"rank {names[self.rank]} called {_name(call)}, {other}",
                remedy="Call the same operations in the same order, with the same sizes and dtypes, on every rank.",
            )
            self._waiting.hang_up(str(error))
            raise error


def _span(tensor: Tensor) -> tuple[int, int]:
    """Where the bytes of a tensor are, and how many."""
    if not tensor.is_contiguous() or not tensor.is_cpu:
        raise UsageError("only a contiguous tensor on the CPU can be shared", remedy="Use tensor.contiguous().cpu().")
    return tensor.data_ptr(), tensor.nbytes


def _aligned(length: int) -> int:
    return -(-length // 64) * 64


def _name(call: int) -> str:
    return f"{KINDS[call >> 58]} ({call & _MASK} bytes)"
