"""Ranks on several hosts: shared memory inside each, and Gloo between one leader of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from tricorn.comm import shared_sums as sums
from tricorn.comm.segment import Segment, Ticket
from tricorn.comm.shared import Shared
from tricorn.errors import ClusterError, PeerLost

_GLOO = {
    "sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.SUM, "product": dist.ReduceOp.PRODUCT, "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX, "band": dist.ReduceOp.BAND, "bor": dist.ReduceOp.BOR, "bxor": dist.ReduceOp.BXOR,
}  # fmt: skip
PATIENCE = 2.0  # seconds that a host waits longer for its leader than that one for the others: it knows who is lost


class Hosts:
    """All-reduce, all-gather, reduce-scatter, broadcast and barrier use shared memory within each host, so that what
    is the same for all of its ranks crosses the network once. ``local`` are the ranks of this host, ``gloo`` is a group
    of all ranks for everything else.
    """

    def __init__(
        self, *, store: Store, rank: int, segment: Segment, tickets: Sequence[Ticket], label: str, timeout: float
    ) -> None:
        hosts = list(dict.fromkeys(ticket.host for ticket in tickets))
        self._host_of = [hosts.index(ticket.host) for ticket in tickets]
        self._host = self._host_of[rank]
        self._ranks = [[peer for peer, at in enumerate(self._host_of) if at == host] for host in range(len(hosts))]
        self._near = self._ranks[self._host]
        self._rank = rank
        self._size = len(tickets)
        self._barrier = torch.zeros(1)
        span = timedelta(seconds=timeout)
        self.gloo = gloo_group(PrefixStore("all/", store), rank, self._size, span)
        self._leaders: dist.ProcessGroup | None = None
        if self._near[0] == rank:
            self._leaders = gloo_group(PrefixStore("leaders/", store), self._host, len(hosts), span)
        self.local = Shared(
            rank=self._near.index(rank), segment=segment, tickets=[tickets[peer] for peer in self._near],
            label=label, timeout=timeout + PATIENCE, names=self._near,
        )  # fmt: skip

    def lost(self, what: str, error: BaseException, *, leaders: bool = False) -> str:
        """What to say of an operation over Gloo, which names only addresses, that others did not finish.

        ``leaders``: it was between those, who know that the ranks of their own hosts have come.
        """
        if dead := self.local.dead():
            return f"rank {dead[0]} died in {what}: {error}"
        if leaders or "Timed out" not in str(error):
            return f"{self._named(self._near)}, on another host, was lost in {what}: {error}"
        return f"{self._named([self._rank])} was lost or is late in {what}: {error}"

    def all_reduce(self, tensor: Tensor, operation: str = "sum") -> None:
        """Inside each host, between the leaders, and back. ``avg`` divides by the number of all ranks.

        Raises UsageError, and the group goes on, where ``Shared.all_reduce`` does.
        """
        sums.reduction(tensor.dtype, operation)
        within = "sum" if operation == "avg" else operation
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(_GLOO[within])
        with self._together(f"all_reduce ({tensor.nbytes} bytes)"):
            self.local.reduce(tensor, 0, within)
            if self._leaders:
                self._leaders.allreduce([tensor], options).wait()
                if operation == "avg":
                    tensor /= self._size
            self.local.broadcast(tensor, 0)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Inside the root's host, between the leaders, inside the other hosts."""
        home = self._host_of[root]
        with self._together(f"broadcast ({tensor.nbytes} bytes)"):
            if self._host == home:
                self.local.broadcast(tensor, self._near.index(root))
            if self._leaders:
                self._start_broadcast(tensor, home).wait()
            if self._host != home:
                self.local.broadcast(tensor, 0)

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """``outputs[r]`` becomes the tensor of rank r: inside each host, between the leaders, and back."""
        with self._together(f"all_gather ({tensor.nbytes} bytes)"):
            packed, parts = self._packed(outputs)
            self.local.all_gather([parts[peer] for peer in self._near], tensor.view(-1))
            self._between(packed, parts, self._start_broadcast)
            self.local.broadcast(packed, 0)
        for output, part in zip(outputs, parts, strict=True):
            output.view(-1).copy_(part)

    def reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor], operation: str = "sum") -> None:
        """``output`` becomes everybody's ``inputs[rank]`` reduced: inside each host, between the leaders, and back.

        Raises UsageError, and the group goes on, where ``Shared.reduce_scatter`` does.
        """
        sums.reduction(output.dtype, operation)
        within = "sum" if operation == "avg" else operation
        with self._together(f"reduce_scatter ({output.nbytes} bytes)"):
            packed, parts = self._packed(inputs)
            for part, tensor in zip(parts, inputs, strict=True):
                part.copy_(tensor.view(-1))
            self.local.reduce(packed, 0, within)
            self._between(packed, parts, partial(self._start_reduce, within))
            nothing = [packed[:0]] * len(self._near)
            sends = [parts[peer] for peer in self._near] if self._leaders else nothing
            self.local.all_to_all([output.view(-1), *nothing[1:]], sends)
            if operation == "avg":
                output /= self._size

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Those over Gloo that this rank is in."""
        return [self.gloo, *([self._leaders] if self._leaders else [])]

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self.all_reduce(self._barrier)

    def interrupt(self, reason: str) -> None:
        """Make every call on this host, blocked or yet to come, raise PeerLost, and with it those that wait for this
        host; a leader that is itself waiting for another host learns it at the group's timeout. From any thread.
        """
        self.local.interrupt(reason)

    def _named(self, others_than: Sequence[int]) -> str:
        return " or ".join(f"rank {peer}" for peer in range(self._size) if peer not in others_than)

    def _packed(self, like: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Room for what each rank has, that of a host's ranks side by side; and the part of each rank."""
        order = [rank for ranks in self._ranks for rank in ranks]
        packed = like[0].new_empty(sum(part.numel() for part in like))
        parts = dict(zip(order, packed.split_with_sizes([like[rank].numel() for rank in order]), strict=True))
        return packed, [parts[rank] for rank in range(self._size)]

    def _between(self, packed: Tensor, parts: Sequence[Tensor], start: Callable[[Tensor, int], dist.Work]) -> None:
        """On leaders, do what ``start`` begins with the parts of each host, whose leader is the root."""
        if self._leaders:
            sizes = [sum(parts[rank].numel() for rank in ranks) for ranks in self._ranks]
            blocks = enumerate(packed.split_with_sizes(sizes))
            _wait_for([start(block, host) for host, block in blocks])

    def _start_broadcast(self, tensor: Tensor, root: int) -> dist.Work:
        """To the other leaders. As bytes, for Gloo does not know every dtype."""
        assert self._leaders is not None
        options = dist.BroadcastOptions()
        options.rootRank = root
        return self._leaders.broadcast([tensor.view(-1).view(torch.uint8)], options)

    def _start_reduce(self, operation: str, tensor: Tensor, root: int) -> dist.Work:
        """Of the leaders, to one of them."""
        assert self._leaders is not None
        options = dist.ReduceOptions()
        options.reduceOp, options.rootRank = dist.ReduceOp(_GLOO[operation]), root
        return self._leaders.reduce([tensor], options)

    @contextlib.contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """What one host or the way between them fails in, all fail in, instead of waiting for the timeout."""
        try:
            yield
        except PeerLost:
            self._leaders = None  # its connections close, which the other leaders see
            raise
        except RuntimeError as error:
            reason = self.lost(what, error, leaders=True)
            self.local.interrupt(reason)  # first: to close connections may take a while
            self._leaders = None
            raise PeerLost(reason) from error


def _wait_for(works: list[dist.Work]) -> None:
    """Wait for all; keep none, not even in the traceback of an error: each would keep its group's connections open."""
    try:
        while works:
            works.pop(0).wait()
    finally:
        works.clear()


def gloo_group(store: Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    """A process group over Gloo that ``torch.distributed`` does not know of. ClusterError when ranks cannot connect."""
    group = dist.ProcessGroup(store, rank, size)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    try:
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
    except RuntimeError as error:
        raise ClusterError(
            f"rank {rank} of {size} cannot connect to the other hosts: {error}",
            remedy="Set GLOO_SOCKET_IFNAME to the network interface by which the hosts reach each other.",
        ) from error
    gloo._set_sequence_number_for_group()
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    return group
