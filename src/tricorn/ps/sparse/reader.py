"""Reading rows: by the server that holds them, and by other processes of its host, without a lock.

A reader sees each row as it is at that moment; one that is just being updated may be read half new and half old, as
asynchronous reads may. What rows there are is read from one state of the table.
"""

from __future__ import annotations

import os
import time
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tricorn.comm import segment
from tricorn.comm.kernel import kernel
from tricorn.errors import PeerLost, ProtocolError
from tricorn.ps.sparse.arena import Arena, Layout
from tricorn.ps.sparse.ids import Ids, bucket_of_hash
from tricorn.ps.sparse.index import AHEAD, BITS, GENERATION, Entries, Words, fetch_entry, fetch_record, hashed, place
from tricorn.ps.sparse.initial import write_initial
from tricorn.ps.sparse.kernel import fence
from tricorn.ps.sparse.spec import BUCKETS, TableSpec

_PATIENCE = 60.0  # seconds for a writer that moves records: ten million take about one
_MOVING = 1


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """What a process of the same host needs to read a table."""

    spec: TableSpec
    layout: Layout
    memory: segment.Ticket


@kernel
def _read(
    header: Words, entries: Entries, words: Words, width: int, numbers: NDArray[Any], stride: int, first: int,
    ids_U: Ids, low: int, high: int, out_UD: NDArray[Any], key: Any, std: float,
) -> Any:  # fmt: skip
    """0, or 1 if records moved meanwhile, or -1 - u if id u is of no bucket in [low, high)."""
    generation = header[GENERATION]
    fence()
    if generation & 1:
        return 1
    bits = header[BITS]
    dim = out_UD.shape[1]
    mask = (1 << bits) - 1
    hashes_U = hashed(ids_U)
    for ahead in range(len(ids_U) + 2 * AHEAD):
        if ahead < len(ids_U):
            fetch_entry(entries, mask, hashes_U[ahead])
        if AHEAD <= ahead < len(ids_U) + AHEAD:
            fetch_record(entries, words, width, mask, hashes_U[ahead - AHEAD])
        u = ahead - 2 * AHEAD
        if u < 0:
            continue
        if not low <= bucket_of_hash(hashes_U[u]) < high:
            return -1 - u
        at = place(entries, words, width, bits, ids_U[u], hashes_U[u])
        if at >= 0:
            out_D, row_D = out_UD[u], numbers[at * stride + first : at * stride + first + dim]
            for d in range(dim):
                out_D[d] = row_D[d]
        else:
            write_initial(out_UD[u], key, ids_U[u], std)
    fence()
    return np.int64(header[GENERATION] != generation)


def checked(spec: TableSpec, ids_U: Ids, rows_UD: NDArray[Any]) -> Ids:
    """The ids as the kernels take them; raises ProtocolError unless both are arrays for this table."""
    if not (isinstance(ids_U, np.ndarray) and ids_U.dtype == np.int64 and ids_U.ndim == 1):
        raise ProtocolError(f"ids of table {spec.name!r} have to be one row of int64")
    if not (isinstance(rows_UD, np.ndarray) and rows_UD.dtype == spec.dtype):
        raise ProtocolError(f"rows of table {spec.name!r} have to be an array of {spec.dtype}")
    if rows_UD.shape != (len(ids_U), spec.dim):
        raise ProtocolError(
            f"rows of table {spec.name!r} have the shape {rows_UD.shape}; for {len(ids_U)} ids it is "
            f"{(len(ids_U), spec.dim)}"
        )
    return plain(ids_U)


def plain(array: NDArray[Any]) -> NDArray[Any]:
    """The array, or a copy that lies and may be used as the kernels are compiled for."""
    return array if array.flags.carray else np.require(array, requirements=["C", "A", "W"])


def foreign(spec: TableSpec, id: int) -> ProtocolError:
    return ProtocolError(
        f"id {id} of table {spec.name!r} is in none of the buckets {spec.buckets[0]} to {spec.buckets[1] - 1} "
        f"(of {BUCKETS}) that this server has"
    )


class RowView:
    """The rows of a table, to be read."""

    def __init__(self, spec: TableSpec, arena: Arena) -> None:
        self._spec = spec
        self._arena = arena

    def gather(self, ids_U: Ids, out_UD: NDArray[Any]) -> bool:
        """Whether no record moved meanwhile; if one did, ``out_UD`` is of no use."""
        arena, layout, spec = self._arena, self._arena.layout, self._spec
        ids_U = checked(spec, ids_U, out_UD)
        if not out_UD.flags.carray:
            raise ProtocolError(f"rows of table {spec.name!r} can only be read into a contiguous array")
        done = _read(
            arena.header, arena.entries, arena.words, layout.width, arena.numbers, layout.stride, layout.first,
            ids_U, *spec.buckets, out_UD, np.uint64(layout.key), layout.std,
        )  # fmt: skip
        if done < 0:
            raise foreign(spec, int(ids_U[-1 - done]))
        return bool(done != _MOVING)


class RowReader:
    """Reads a table that another process of this host holds, while that one goes on writing.

    Raises PeerLost when that process is gone, ClusterError when it is on another host.
    """

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._arena = Arena.attach(ticket.layout, ticket.memory)
        self._rows = RowView(ticket.spec, self._arena)

    @property
    def rows(self) -> int:
        return self._arena.rows

    def gather(self, ids_U: Ids, out_UD: NDArray[Any]) -> None:
        """Fill ``out_UD`` [U, dim] with these rows; ids without a row are read as their first value.

        Raises ProtocolError for arrays of another form or ids of another server, PeerLost if the writer ended (or
        stopped for a minute) in the midst of moving records.
        """
        deadline = 0.0
        while not self._rows.gather(ids_U, out_UD):
            os.sched_yield()
            deadline = deadline or time.monotonic() + _PATIENCE
            if time.monotonic() > deadline or not os.path.exists(f"/proc/{self._ticket.memory.pid}"):
                raise PeerLost(f"the server that holds table {self._ticket.spec.name!r} no longer answers")

    def close(self) -> None:
        self._arena.close()
