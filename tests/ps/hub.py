"""Servers without sockets: real services and real clients in one process, whose frames are handed over at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tricorn import optim
from tricorn.errors import ProtocolError, TricornError
from tricorn.optim import RowOptimizer
from tricorn.ps.client import Client
from tricorn.ps.placement import bucket_ranges
from tricorn.ps.rows import RowGradients, Wanted
from tricorn.ps.service import Beginning, Service
from tricorn.ps.sparse.initial import initial_rows
from tricorn.ps.sparse.spec import TableSpec
from tricorn.ps.table import Description
from tricorn.ps.wire import Header, Op, decode_error, encode_error
from tricorn.state.shards import Piece, write_shard
from tricorn.table import Table

F64 = torch.float64


def spec(
    name: str = "emb", dim: int = 4, optimizer: RowOptimizer | None = None, *, prefilled: int = 0,
    dtype: str = "float64", **declared: Any,
) -> TableSpec:  # fmt: skip
    return TableSpec(
        name, dim, dtype, 7, Table(**declared), optimizer or optim.SGD(lr=0.5), (0, 4096), prefilled
    )  # fmt: skip


class Line:
    """Fulfils ``Transport``. Whoever waits for a reply waits until another thread's request brings it."""

    in_place = None

    def __init__(self, host: Host, rank: int) -> None:
        self.bytes_sent = 0
        self.frames: list[Header] = []  # all that were sent
        self._host = host
        self._rank = rank
        self._replies: deque[bytes] = deque()
        self._payload = b""
        host.enter(rank, self._replies)

    def send(self, header: Header, parts: Sequence[memoryview] = ()) -> None:
        payload = b"".join(parts)
        self.frames.append(header._replace(length=len(payload)))
        self.bytes_sent += 80 + len(payload)
        self._host.feed(self._rank, self.frames[-1].pack() + payload)

    def receive(self, *expected: Op) -> Header:
        with self._host.arrived:
            assert self._host.arrived.wait_for(lambda: self._replies, 10), "no reply"
            frame = self._replies.popleft()
        header, self._payload = Header.unpack(frame[:80]), frame[80:]
        if header.op == Op.ERROR:
            raise decode_error(self._payload)
        if header.op not in expected:
            raise ProtocolError(f"a reply of kind {header.op}")
        return header

    def receive_into(self, view: memoryview) -> None:
        view[:], self._payload = self._payload[: len(view)], self._payload[len(view) :]

    def close(self) -> None:
        self._host.leave(self._rank)


class Host:
    """One server: a service, and its conversations with workers that hand it bytes. Fulfils ``Outlet``."""

    def __init__(self, folder: Path, name: str, memory_limit: int | None = None) -> None:
        self.service = Service(self, memory_limit=memory_limit)
        self.arrived = threading.Condition(threading.RLock())
        self.copied = 0  # times that unsent replies would have been copied
        self._folder = folder
        self._name = name
        self._replies: dict[int, deque[bytes]] = {}
        self._talks: dict[int, Any] = {}
        self._wanted: dict[int, memoryview | None] = {}
        self._inbox: dict[int, bytes] = {}

    def enter(self, rank: int, replies: deque[bytes]) -> None:
        with self.arrived:
            self._replies[rank] = replies
            self._inbox[rank] = b""
            self._talks[rank] = self.service.converse(rank)
            self._wanted[rank] = next(self._talks[rank])

    def leave(self, rank: int) -> None:
        with self.arrived:
            self._replies.pop(rank, None)
            self._talks.pop(rank, None)
            self.service.leave(rank)
            self._settle()

    def feed(self, rank: int, data: bytes) -> None:
        with self.arrived:
            self._inbox[rank] += data
            self._advance(rank)
            self._settle()

    def waiting(self, rank: int) -> bool:
        """Whether that worker's request waits for others."""
        return self._wanted[rank] is None

    def _settle(self) -> None:
        while self.service.changed:
            self.service.changed = False
            for rank in [rank for rank in self._talks if self._wanted[rank] is None]:
                self._wanted[rank] = memoryview(b"")
                self._advance(rank)
        self.arrived.notify_all()

    def _advance(self, rank: int) -> None:
        try:
            while (wanted := self._wanted[rank]) is not None and (not len(wanted) or self._inbox[rank]):
                part = self._inbox[rank][: len(wanted)]
                if part:  # an empty view need not be writable
                    wanted[: len(part)] = part
                self._inbox[rank] = self._inbox[rank][len(part) :]
                self._wanted[rank] = wanted[len(part) :] if len(part) < len(wanted) else next(self._talks[rank])
        except TricornError as error:
            payload = encode_error(error)
            self.send(rank, Header(Op.ERROR), [memoryview(payload)])
            del self._talks[rank]
            self.service.leave(rank)

    def send(self, rank: int, header: Header, parts: Sequence[memoryview] = ()) -> None:
        if rank in self._replies:
            payload = b"".join(parts)
            self._replies[rank].append(header._replace(length=len(payload)).pack() + payload)

    def before_update(self) -> None:
        self.copied += 1

    def snapshot_taken(self, step: int, pieces: list[Piece]) -> None:
        write_shard(self._folder / str(step), f"{self._name}.safetensors", pieces)


class Hub:
    """The servers of one run and the clients of its workers; ``weights_N`` are three dense elements, at first zero."""

    N = 3

    def __init__(
        self, folder: Path, *specs: TableSpec, servers: int = 1, workers: int = 1, memory_limit: int | None = None,
        **description: Any,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.specs = specs
        self.workers = workers
        self.hosts = [Host(folder, f"server-{index}", memory_limit) for index in range(servers)]
        self.slices = [(self.N * s // servers, self.N * (s + 1) // servers) for s in range(servers)]
        fields = {"dtype": "float64", "optimizer": optim.SGD(lr=1.0), "consistency": "bsp", "staleness": 0}
        self.descriptions = [
            Description(
                tables=(("w", (self.N,)),), start=start, stop=stop,
                sparse=tuple(_with_buckets(each, buckets) for each in specs), **fields | description,
            )
            for (start, stop), buckets in zip(self.slices, bucket_ranges(servers), strict=True)
        ]  # fmt: skip
        self.clients: list[Client] = []

    def begin(
        self, source: str = "initial", step: int = 0, *, prefilled: Sequence[torch.Tensor | None] = (),
        applied: Sequence[tuple[int, int]] = (), **options: Any,
    ) -> list[Client]:  # fmt: skip
        """A membership epoch; its clients, all connected, the tables created."""
        folder = self.folder / str(step) if source == "checkpoint" else None
        for client in self.clients:
            client.close()
        for host in self.hosts:
            host.service.regroup()
            host.service.begin(Beginning(1, step, source, folder, self.workers, 0, applied))
        self.come(**options)
        self.clients[0].create(self.descriptions, lambda: torch.zeros(self.N, dtype=torch.float64), prefilled)
        return self.clients

    def come(self, **options: Any) -> list[Client]:
        """New lives of all clients, within the same epoch."""
        self.clients = []
        for rank in range(self.workers):
            client = Client(
                [("", 0)] * len(self.hosts), self.slices, b"", rank=rank, incarnation=1, epoch=1, tables=self.specs,
                **options,
            )  # fmt: skip
            client._wire.servers = [Line(host, rank) for host in self.hosts]
            self.clients.append(client)
        return self.clients

    def replace_host(self, index: int) -> None:
        self.hosts[index].service.close()
        self.hosts[index] = Host(self.folder, f"server-{index}")

    def close(self) -> None:
        for host in self.hosts:
            host.service.close()


Build = Callable[..., Hub]


def _with_buckets(each: TableSpec, buckets: tuple[int, int]) -> TableSpec:
    return TableSpec(
        each.name, each.dim, each.dtype, each.seed, each.declared, each.optimizer, buckets, each.prefilled
    )  # fmt: skip


def wanted(ids: Any, table: int = 0, dim: int = 4) -> Wanted:
    """What a client reads these rows into; nobody has filled it yet."""
    ids_U = torch.as_tensor(ids, dtype=torch.int64)
    return Wanted(table, ids_U, torch.full((len(ids_U), dim), torch.nan, dtype=F64))


def read(client: Client, ids: Any, table: int = 0, **options: Any) -> torch.Tensor:
    """The rows as the servers give them now."""
    asked = wanted(ids, table)
    client.read_rows([asked], **options)
    return asked.out_UD


def gradients(ids: Any, value: float | torch.Tensor, table: int = 0) -> RowGradients:
    """Of rows of four, all of one value unless that has the rows' shape."""
    ids_U = torch.as_tensor(ids, dtype=torch.int64)
    return RowGradients(table, ids_U, torch.zeros(len(ids_U), 4, dtype=F64) + value)


def initial(ids: Any, name: str = "emb", std: float = 1.0) -> torch.Tensor:
    """What rows are before their first gradient, by the table's name and ``std``."""
    return torch.from_numpy(initial_rows(7, name, np.asarray(ids), std, 4, "float64"))


def dense(value: float = 0.0) -> torch.Tensor:
    """Weights or gradient of the dense part."""
    return torch.full((Hub.N,), value, dtype=F64)
