"""What a payload says of rows: one block for each sparse table, in the order of the description (docs/protocol.md).

    count (4)  flags (1)  encoding (1)  zero (2)    8 bytes, little-endian
    digest (16)                                     with flag KEEP or DIGEST
    ids (8 x count)                                 without flag DIGEST
    rows (count x dim, encoded)                     in a PUSH or LOAD

Every block begins at a multiple of 8 of the payload; what lies between is zero. Blocks may be left out altogether:
then no table is spoken of.

Legend: U ids of one table, D elements of a row.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tricorn.errors import ProtocolError

if TYPE_CHECKING:
    from tricorn.comm.codecs import Codec
    from tricorn.ps.sparse.spec import TableSpec

BLOCK = struct.Struct("<IBBxx")
DIGEST_SIZE = 16
DIGEST = 1  # the ids are those that came under this digest before, on this connection
KEEP = 2  # keep the ids under the digest that comes with them
MAX_IDS = 1 << 22  # of one table in one message
MAX_ROWS = 256 << 20  # bytes of all blocks of one message
ENCODINGS = ("none", "bf16", "fp16", "int8", "topk")

Ids = NDArray[np.int64]


class Block(NamedTuple):
    """One table's part of a payload that has arrived; its rows lie in the payload."""

    ids_U: Ids
    rows: memoryview  # U x D, encoded; empty in a request to read
    encoding: int


class UnknownDigest(Exception):
    """The ids under a digest are not kept (any more)."""


class Kept:
    """The id lists that one end remembers of the other, by digest: the newest few, bounded in number and size.

    Both ends of a connection keep the same lists by the same rule, so that the sender knows what the receiver has.
    """

    LISTS = 8  # of all tables together
    IDS = 1 << 21  # of all lists together

    def __init__(self) -> None:
        self._lists: OrderedDict[tuple[int, bytes], Ids] = OrderedDict()
        self._ids = 0

    def keep(self, table: int, digest: bytes, ids_U: Ids) -> None:
        self._forget(self._lists.pop((table, digest), None))
        if len(ids_U) > self.IDS:
            return
        self._lists[table, digest] = ids_U
        self._ids += len(ids_U)
        while len(self._lists) > self.LISTS or self._ids > self.IDS:
            self._forget(self._lists.popitem(last=False)[1])

    def find(self, table: int, digest: bytes) -> Ids | None:
        return self._lists.get((table, digest))

    def _forget(self, ids_U: Ids | None) -> None:
        self._ids -= 0 if ids_U is None else len(ids_U)


def digest_of(ids_U: Ids) -> bytes:
    """A name of the list that no other list has. SHA-256 because processors have instructions for it."""
    return hashlib.sha256(ids_U.view(np.uint8).data).digest()[:DIGEST_SIZE]


def aligned(offset: int) -> int:
    return (offset + 7) & ~7


def codec_of(encoding: int) -> Codec | None:
    """None where elements travel as they are; raises ProtocolError for an encoding that there is not."""
    if encoding == 0:
        return None
    if encoding >= len(ENCODINGS):
        raise ProtocolError(f"there is no encoding {encoding}")
    from tricorn.comm.codecs import CODECS

    return CODECS[ENCODINGS[encoding]]


def encoded_size(encoding: int, elements: int, itemsize: int) -> int:
    codec = codec_of(encoding)
    return codec.size(elements) if codec else elements * itemsize


def decoded(data: memoryview, encoding: int, elements: int, dtype: torch.dtype) -> Tensor:
    """The elements of an encoding: flat, and where they lie if they travelled as they are (and are aligned)."""
    raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    codec = codec_of(encoding)
    if codec is None:
        return raw.view(dtype)
    out = torch.empty(elements, dtype=dtype)
    codec.decode(raw, out)
    return out


def read_blocks(
    payload: memoryview, start: int, specs: Sequence[TableSpec], kept: Kept, *lists: bool
) -> list[list[Block]]:
    """The blocks of each table, of a payload whose blocks begin at ``start`` or the next multiple of 8.

    ``lists``: for each list of blocks whether they bring rows. Raises ProtocolError unless the payload is exactly that,
    UnknownDigest if ids are not kept.
    """
    if start == len(payload):
        return [[Block(np.empty(0, np.int64), payload[:0], 0) for _ in specs] for _ in lists]
    reader = _Reader(payload, start)
    found = [_read_list(reader, specs, kept, rows=rows) for rows in lists]
    reader.end()
    if any(unknown for _, unknown in found):
        raise UnknownDigest
    return [blocks for blocks, _ in found]


def _read_list(reader: _Reader, specs: Sequence[TableSpec], kept: Kept, *, rows: bool) -> tuple[list[Block], bool]:
    """A block of each table, and whether ids were not known."""
    blocks, unknown = [], False
    for table, spec in enumerate(specs):
        reader.align()
        count, flags, encoding = BLOCK.unpack(reader.take(BLOCK.size))
        if count > MAX_IDS or flags not in (0, DIGEST, KEEP):
            raise ProtocolError(f"a block of {count} ids with flags {flags}, of which there are at most {MAX_IDS}")
        digest = bytes(reader.take(DIGEST_SIZE)) if flags else b""
        if flags == DIGEST:
            found = kept.find(table, digest)
            unknown |= found is None
            ids_U = np.empty(0, np.int64) if found is None else found
            if found is not None and len(found) != count:
                raise ProtocolError(f"a digest of {count} ids where {len(found)} were sent")
        else:
            ids_U = np.frombuffer(reader.take(8 * count), np.int64).copy()  # a worker may write to its memory
            if flags == KEEP:
                kept.keep(table, digest, ids_U)
        itemsize = 8 if spec.dtype == "float64" else 4
        size = encoded_size(encoding, count * spec.dim, itemsize) if rows else 0
        blocks.append(Block(ids_U, reader.take(size), encoding))
    return blocks, unknown


class _Reader:
    """Takes a payload apart from its beginning to its end."""

    def __init__(self, payload: memoryview, start: int) -> None:
        self._payload = payload
        self._at = start

    def take(self, count: int) -> memoryview:
        taken = self._payload[self._at : self._at + count]
        if len(taken) != count:
            raise ProtocolError(f"a payload of {len(self._payload)} bytes where at least {self._at + count} are due")
        self._at += count
        return taken

    def align(self) -> None:
        self.take(aligned(self._at) - self._at)

    def end(self) -> None:
        if self._at != len(self._payload):
            raise ProtocolError(f"a payload of {len(self._payload)} bytes where {self._at} are due")


class Writer:
    """Puts a payload together from parts that stay where they are."""

    def __init__(self) -> None:
        self.parts: list[memoryview] = []
        self.length = 0

    def add(self, part: memoryview | bytes) -> None:
        if len(part):
            self.parts.append(memoryview(part))
            self.length += len(part)

    def align(self) -> None:
        self.add(bytes(aligned(self.length) - self.length))

    def block(self, ids_U: Ids, *, digest: bytes = b"", flags: int = 0, encoding: int = 0) -> None:
        """Begin a table's block: everything but its rows."""
        self.align()
        self.add(BLOCK.pack(len(ids_U), flags, encoding) + digest)
        if flags != DIGEST:
            self.add(ids_U.view(np.uint8).data)
