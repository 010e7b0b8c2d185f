"""Records in shared memory: room for all that there may ever be, of which only what is used takes memory.

A record never moves because the table grows; only the index is built anew then. When records go, the last ones take
their places, and the memory behind is given back.
"""

from __future__ import annotations

import mmap
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from tricorn.comm import segment
from tricorn.comm.segment import Segment
from tricorn.ps.sparse import index
from tricorn.ps.sparse.ids import Ids
from tricorn.ps.sparse.index import COUNT, USED, Places
from tricorn.ps.sparse.records import begin

_PAGE = mmap.PAGESIZE
_ENTRY = 4  # bytes


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where things are: a page for the header, the records, then indices of every size that may be needed.

    A record's numbers are a row's weights, which begin as ``key`` and ``std`` say (initial.py), and its slots.
    """

    dtype: Literal["float32", "float64"]
    numbers: int
    dim: int  # of the numbers, those that are weights
    key: int
    std: float
    room: int  # records

    @property
    def itemsize(self) -> int:
        return 8 if self.dtype == "float64" else 4

    @property
    def width(self) -> int:
        """Words of 64 bits from one record to the next: id, count and last use, numbers."""
        return record_width(self.numbers, self.itemsize)

    @property
    def stride(self) -> int:
        """Numbers from one record to the next."""
        return self.width * 8 // self.itemsize

    @property
    def first(self) -> int:
        """Where in a record its numbers begin, counted in numbers."""
        return 16 // self.itemsize

    @property
    def index_at(self) -> int:
        return _PAGE + whole_pages(self.room * self.width * 8)

    @property
    def index_entries(self) -> int:
        return 2 << index.bits_for(self.room)

    @property
    def size(self) -> int:
        return self.index_at + self.index_entries * _ENTRY


def record_width(numbers: int, itemsize: int) -> int:
    return 2 + -(-numbers * itemsize // 8)


def whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def bytes_of(rows: int, bits: int, width: int) -> int:
    return _PAGE + whole_pages(rows * width * 8) + (_ENTRY << bits)


def records_that_fit(limit: int, width: int) -> int:
    """How many records never take more than ``limit`` bytes, not even while a larger index is built beside the old."""
    fitting = 0
    for bits in range(index.MIN_BITS, index.MAX_BITS + 1):
        smaller = index.holds(bits - 1) if bits > index.MIN_BITS else 0
        if smaller and bytes_of(smaller, bits, width) + (_ENTRY << (bits - 1)) > limit:
            break
        rows = (limit - _PAGE - (_ENTRY << bits)) // _PAGE * _PAGE // (width * 8)
        fitting = max(fitting, min(rows, index.holds(bits)))
    return fitting


class Arena:
    """The records of one segment, as its one writer sees them or, attached, as a reader does."""

    def __init__(self, layout: Layout, memory: Segment) -> None:
        self.layout = layout
        self.ticket = memory.ticket
        self._memory = memory
        words = layout.room * layout.width
        self.header: NDArray[np.int64] = memory.array(np.int64, 0, 3)
        self.words: NDArray[np.int64] = memory.array(np.int64, _PAGE, words)
        self.entries: NDArray[np.uint32] = memory.array(np.uint32, layout.index_at, layout.index_entries)
        self.halves = self.words.view(np.int32)
        self.numbers: NDArray[Any] = self.words.view(layout.dtype)

    @classmethod
    def create(cls, layout: Layout, label: str) -> Arena:
        """Raises ClusterError where there is no room for it."""
        arena = cls(layout, Segment.create(layout.size, label))
        arena.header[index.BITS] = index.MIN_BITS
        return arena

    @classmethod
    def attach(cls, layout: Layout, ticket: segment.Ticket) -> Arena:
        """Raises as ``Segment.attach``."""
        return cls(layout, Segment.attach(ticket))

    @property
    def rows(self) -> int:
        return int(self.header[index.ROWS])

    @property
    def nbytes(self) -> int:
        return bytes_of(self.rows, int(self.header[index.BITS]), self.layout.width)

    # Columns, [rows]: views of what there is now.

    @property
    def ids(self) -> Ids:
        return self.words.reshape(-1, self.layout.width)[: self.rows, 0]

    @property
    def counts(self) -> NDArray[np.int32]:
        return self.halves.reshape(-1, 2 * self.layout.width)[: self.rows, COUNT]

    @property
    def used(self) -> NDArray[np.int32]:
        return self.halves.reshape(-1, 2 * self.layout.width)[: self.rows, USED]

    @property
    def rows_of_numbers(self) -> NDArray[Any]:
        """[rows, numbers]"""
        first = self.layout.first
        return self.numbers.reshape(-1, self.layout.stride)[: self.rows, first : first + self.layout.numbers]

    def find(self, ids_U: Ids, buckets: tuple[int, int]) -> tuple[Places, int]:
        """The places of these records, -1 where there is none, and how many there are not.

        Instead of how many, -1 - u if id u is of no bucket in [first, last).
        """
        places_U = np.empty(len(ids_U), np.int64)
        absent = index.find(self.header, self.entries, self.words, self.layout.width, ids_U, *buckets, places_U)
        return places_U, absent

    def append(self, ids_U: Ids, count: int) -> None:
        """Records of these ids, which are new, seen ``count`` times, with their first numbers."""
        layout, rows, stop = self.layout, self.rows, self.rows + len(ids_U)
        assert stop <= layout.room
        bits = int(self.header[index.BITS])
        needed = max(bits, index.bits_for(stop))
        if needed > bits:
            index.link(self.entries, self.words, layout.width, needed, 0, rows)
            index.announce(self.header, needed)
            self._memory.forget(layout.index_at + (_ENTRY << bits), _ENTRY << bits)
        begin(
            self.words, layout.width, self.numbers, layout.stride, layout.first,
            rows, ids_U, count, layout.dim, np.uint64(layout.key), layout.std,
        )  # fmt: skip
        index.link(self.entries, self.words, layout.width, needed, rows, stop)
        self.header[index.ROWS] = stop

    def remove(self, places_U: Places) -> None:
        """Take these out; descending."""
        index.remove(self.header, self.entries, self.words, self.layout.width, places_U)
        end = _PAGE + whole_pages(self.rows * self.layout.width * 8)
        if end < self.layout.index_at:
            self._memory.forget(end, self.layout.index_at - end)

    def close(self) -> None:
        del self.header, self.words, self.entries, self.halves, self.numbers
        self._memory.close()
