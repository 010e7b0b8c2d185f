"""A worker's rows: which server has which, and what is said of them to each.

Legend: U ids of one table, of which a server has V; D elements of a row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tricorn.errors import UsageError
from tricorn.ps.blocks import DIGEST, ENCODINGS, KEEP, MAX_IDS, MAX_ROWS, Ids, Kept, Writer, codec_of, digest_of
from tricorn.ps.wire import as_bytes

if TYPE_CHECKING:
    from tricorn.ps.sparse.spec import TableSpec

_WORTH = 64  # ids from which a digest is shorter than the time it takes
_SPLITS = 8  # id lists that are known to be split, newest


class Wanted(NamedTuple):
    """Rows to read: ``out_UD[u]`` becomes the row of ``ids_U[u]`` of that table (its place among the tables).

    The ids are int64, each there once. They are sorted out by server once, and known again by being the same tensor,
    unless that was changed in place; of one that shares NumPy's memory, changes there are not seen.
    """

    table: int
    ids_U: Tensor
    out_UD: Tensor


class RowGradients(NamedTuple):
    """The gradients of rows, best with the very ``ids_U`` that they were read with: those need not be sent again."""

    table: int
    ids_U: Tensor
    grads_UD: Tensor


class Split(NamedTuple):
    """The ids of one table by server: server s has ``grouped_U[edges[s]:edges[s + 1]]``."""

    ids_U: Tensor
    changes: int  # how often the tensor had been changed in place
    grouped_U: Ids
    order_U: Tensor | None  # grouped_U is ids_U[order_U]; None where they are the same
    edges: tuple[int, ...]
    digests: dict[int, bytes]  # by server, those that were needed

    def of(self, server: int) -> Ids:
        return self.grouped_U[self.edges[server] : self.edges[server + 1]]

    def digest(self, server: int) -> bytes:
        if server not in self.digests:
            self.digests[server] = digest_of(self.of(server))
        return self.digests[server]


class Rows:
    """What a client has to know of its sparse tables. ``stops``: for each server the end of its buckets.

    ``encodings``: for each table how gradients of its rows travel.
    """

    def __init__(self, specs: Sequence[TableSpec], stops: Sequence[int], encodings: Sequence[str]) -> None:
        self.specs = tuple(specs)
        self._stops_S = np.array(stops, np.int64)
        self._kept = [Kept() for _ in stops]
        self._encodings = [ENCODINGS.index(name) for name in encodings]
        self._splits: OrderedDict[int, Split] = OrderedDict()

    def check(self, asked: Sequence[Wanted | RowGradients]) -> None:
        """Raise UsageError for ids and rows of a wrong type or shape, and for more than one message holds."""
        size = 0
        for table, ids_U, rows_UD in asked:
            if not 0 <= table < len(self.specs):
                raise UsageError(f"there is no table {table}, only {len(self.specs)}")
            spec = self.specs[table]
            check_ids(spec.name, ids_U)
            due, form = (len(ids_U), spec.dim), (rows_UD.dtype, rows_UD.shape, rows_UD.is_cpu, rows_UD.is_contiguous())
            if form != (_dtype(spec), due, True, True):
                raise UsageError(
                    f"rows of table {spec.name!r} are {rows_UD.dtype} of shape {tuple(rows_UD.shape)} on "
                    f"{rows_UD.device}",
                    remedy=f"Give a contiguous tensor of {spec.dtype} on the CPU with the shape {due}.",
                )
            size += len(ids_U) * 8 + rows_UD.numel() * rows_UD.element_size()
            if len(ids_U) > MAX_IDS or size > MAX_ROWS:
                raise UsageError(
                    f"a request speaks of {len(ids_U)} rows of table {spec.name!r} and {size >> 20} MiB in all, more "
                    f"than {MAX_IDS} rows or {MAX_ROWS >> 20} MiB",
                    remedy="Make the batch smaller, or give more workers.",
                )
        if len(asked) > 1 and len({table for table, _, _ in asked}) < len(asked):
            raise UsageError("a request speaks of one table twice", remedy="Put the ids of a table into one list.")

    def write(
        self,
        writer: Writer,
        server: int,
        asked: Sequence[Wanted | RowGradients],
        *,
        whole: bool,
        always: bool = False,
        seed: int = 0,
    ) -> None:
        """Add a block for each table if there are rows, or ``always``; with ``whole``, no id list is left out.

        A list that is read is kept at the server for the push that follows, whose gradients come with it. ``seed``
        decides which way an encoding rounds what is between.
        """
        if not asked and not always:
            return
        by_table = {each.table: each for each in asked}
        for table in range(len(self.specs)):
            each = by_table.get(table)
            if each is None:
                writer.block(np.empty(0, np.int64))
                continue
            split = self.split(each.ids_U)
            digest, flags = self._named(server, table, split, whole=whole, reads=isinstance(each, Wanted))
            encoding = self._encodings[table] if isinstance(each, RowGradients) else 0
            writer.block(split.of(server), digest=digest, flags=flags, encoding=encoding)
            if isinstance(each, RowGradients):
                flat = self._part(split, each.grads_UD, server).flatten()
                codec = codec_of(encoding)
                writer.add(as_bytes(codec.encode(flat, seed * len(self.specs) + table) if codec else flat))

    def places(self, server: int, wanted: Sequence[Wanted]) -> Iterator[tuple[Wanted, Ids, Tensor]]:
        """For each that is wanted, in the order of the tables: its ids of this server, and where their rows go.

        ``put`` has to be called when the rows are there.
        """
        for each in sorted(wanted, key=lambda each: each.table):
            split = self.split(each.ids_U)
            ids_V = split.of(server)
            direct = split.order_U is None
            yield each, ids_V, each.out_UD if direct else each.out_UD.new_empty(len(ids_V), each.out_UD.shape[1])

    def put(self, server: int, each: Wanted, rows_VD: Tensor) -> None:
        """Bring rows from where ``places`` had them to where they are wanted."""
        split = self.split(each.ids_U)
        if split.order_U is not None:
            each.out_UD[split.order_U[split.edges[server] : split.edges[server + 1]]] = rows_VD

    def forget(self, server: int) -> None:
        """The server does not keep what it should."""
        self._kept[server] = Kept()

    def split(self, ids_U: Tensor) -> Split:
        known = self._splits.get(id(ids_U))
        if known is None or known.changes != _changes(ids_U):
            known = self._splits[id(ids_U)] = self._new_split(ids_U)
            if len(self._splits) > _SPLITS:
                self._splits.popitem(last=False)
        return known

    def _new_split(self, ids_U: Tensor) -> Split:
        # The split holds the tensor, so that no other can get its id().
        array = ids_U.detach().numpy()
        if len(self._stops_S) == 1:
            return Split(ids_U, _changes(ids_U), array, None, (0, len(array)), {})
        from tricorn.ps.sparse.ids import split

        order_U, ends_S = split(array, self._stops_S)
        return Split(ids_U, _changes(ids_U), array[order_U], torch.from_numpy(order_U), (0, *map(int, ends_S)), {})

    def _named(self, server: int, table: int, split: Split, *, whole: bool, reads: bool) -> tuple[bytes, int]:
        kept, count = self._kept[server], split.edges[server + 1] - split.edges[server]
        if whole or count < _WORTH or not (reads or server in split.digests):
            return b"", 0
        digest = split.digest(server)
        if kept.find(table, digest) is not None:
            return digest, DIGEST
        if not reads:
            return b"", 0
        kept.keep(table, digest, split.of(server))
        return digest, KEEP

    @staticmethod
    def _part(split: Split, rows_UD: Tensor, server: int) -> Tensor:
        if split.order_U is None:
            return rows_UD
        return rows_UD[split.order_U[split.edges[server] : split.edges[server + 1]]]


def check_ids(table: str, ids_U: Tensor) -> None:
    """Raise UsageError for ids of a wrong type or shape."""
    if ids_U.dtype != torch.int64 or ids_U.dim() != 1 or not ids_U.is_contiguous() or not ids_U.is_cpu:
        raise UsageError(
            f"ids of table {table!r} are {ids_U.dtype} of shape {tuple(ids_U.shape)} on {ids_U.device}",
            remedy="Give ids as a contiguous one-dimensional int64 tensor on the CPU (ids.long()).",
        )


def _changes(tensor: Tensor) -> int:
    """How often it has been changed in place; one of inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _dtype(spec: TableSpec) -> torch.dtype:
    return torch.float64 if spec.dtype == "float64" else torch.float32
