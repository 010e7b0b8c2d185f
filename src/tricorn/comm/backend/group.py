"""A process group of ``torch.distributed`` whose ranks on one host talk through shared memory.

Ranks on several hosts: an all-reduce, an all-gather, a reduce-scatter, a broadcast and a barrier go through shared
memory inside each host and between one leader of each over Gloo; the other operations over Gloo. Tensors on a GPU go
over NCCL.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import msgspec
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from tricorn.comm.backend.hosts import PATIENCE, Hosts
from tricorn.comm.backend.operations import Operations
from tricorn.comm.segment import Ticket, here
from tricorn.comm.shared import Shared, new_segment
from tricorn.documents import UNREADABLE
from tricorn.errors import PeerLost, ProtocolError


def create(options: Any) -> Any:
    """What ``torch.distributed`` calls for each new group."""
    return _group(options.store, options.group_rank, options.group_size, options.timeout, options.group_id)


def _group(store: Store, rank: int, size: int, timeout: timedelta, name: str) -> Any:
    shared, hosts = _meet(store, rank, size, timeout.total_seconds(), name)
    return TricornGroup(name, store=store, rank=rank, size=size, timeout=timeout, shared=shared, hosts=hosts)


class _Group(Operations):
    """Who it is, and its life. See ``docs/collectives.md``."""

    def __init__(self: Any, name: str, *, rank: int, size: int, **others: Any) -> None:
        base: Any = dist.ProcessGroup  # declared without the form for subclasses
        base.__init__(self, rank, size)
        Operations.__init__(self, rank=rank, size=size, **others)
        self._name = name
        self._description = "undefined"
        self._children = 0

    def getBackendName(self) -> str:
        return "tricorn"

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_desc(self) -> str:
        return self._description

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    @property
    def pg_name(self) -> str:
        return self._name

    def get_group_store(self) -> Store:
        return self._store

    def split_group(
        self, ranks: Sequence[int], timeout: timedelta | None = None, opts: object = None,
        group_name: str | None = None, group_desc: str | None = None, device_types: object = None,
    ) -> Any:  # fmt: skip
        """A group of some of the ranks; every rank of this one calls it, None for who is not among them."""
        self._children += 1
        if self._rank not in ranks:
            return None
        name = group_name or f"{self._name}:split:{self._children}:{'-'.join(map(str, ranks))}"
        store = PrefixStore(f"{name}/", self._store)
        group = _group(store, [*ranks].index(self._rank), len(ranks), timeout or self._timeout, name)
        group._set_group_desc(group_desc or "undefined")
        return group

    def shutdown(self) -> None:
        for other in self._others():
            other.shutdown()
        self._shared.close()

    def abort(self) -> None:
        self._wide.interrupt(f"rank {self._rank} aborted the group")
        for other in self._others():
            other.abort()

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout
        self._shared.timeout = timeout.total_seconds() + (PATIENCE if self._hosts else 0.0)
        for other in self._others():
            other.set_timeout(timeout)

    _set_default_timeout = set_timeout

    def _others(self) -> list[dist.ProcessGroup]:
        """Who does what does not go through shared memory alone."""
        far = self._hosts.groups if self._hosts else []
        return [*far, *([self._accelerated] if self._accelerated else [])]

    def _start_coalescing(self, device: object) -> None:
        pass


# Composed rather than declared: the annotations of ProcessGroup ask of a subclass that it take each operation in a
# second form as well, which torch.distributed never calls.
TricornGroup = types.new_class("TricornGroup", (_Group, dist.ProcessGroup))


def _meet(store: Store, rank: int, size: int, timeout: float, name: str) -> tuple[Shared, Hosts | None]:
    """Learn where the other ranks are, through the store, and connect to them the best way."""

    def all_say(what: str, own: str) -> list[str]:
        store.set(f"{what}/{rank}", own)
        said = []
        for peer in range(size):
            try:
                store.wait([f"{what}/{peer}"], timedelta(seconds=timeout))
            except RuntimeError:
                raise PeerLost(
                    f"rank {peer} has not joined the group {name!r} of {size} in {timeout:g} s",
                    remedy="See that all ranks are started, and what that one says; or give a longer timeout.",
                ) from None
            said.append(store.get(f"{what}/{peer}").decode())
        return said

    with contextlib.ExitStack() as undo:
        segment = new_segment(size, name)
        undo.callback(segment.close)
        own = msgspec.json.encode(segment.ticket).decode()
        said = all_say("segment", own)
        try:
            tickets = [msgspec.json.decode(ticket, type=Ticket) for ticket in said]
        except UNREADABLE as error:
            raise ProtocolError(f"where a rank of the group {name!r} has its memory cannot be read: {error}") from None
        hosts = None
        if all(ticket.host == here() for ticket in tickets):
            shared = Shared(rank=rank, segment=segment, tickets=tickets, label=name, timeout=timeout)
        else:
            hosts = Hosts(store=store, rank=rank, segment=segment, tickets=tickets, label=name, timeout=timeout)
            shared = hosts.local
        undo.callback(shared.close)
        all_say("attached", "yes")  # before that, nobody may leave: its memory would be gone
        undo.pop_all()
    return shared, hosts
