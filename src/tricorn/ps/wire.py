"""The frames between workers and servers: a fixed header, then a payload of raw bytes (docs/protocol.md).

    op (1)  flags (1)  zero (6)  step (8)  version (8)  numbers (6 x 8)  length of payload (8)      80 bytes

The header is big-endian; tensors travel as they lie in memory, little-endian and end to end. Nobody reads a
payload before its length is known to be right for its place.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import msgspec
from torch import Tensor, uint8

from tricorn import errors
from tricorn.errors import ProtocolError, TricornError

PROTOCOL = 2  # what the frames mean; told in the claim, so that another version is refused in words
HEADER = struct.Struct("!BB6xqq6dQ")
MAX_DOCUMENT = 16 << 20  # bytes of a CREATE: the names and shapes of some hundred thousand parameters
MAX_ERROR = 4096
MOST_PARTS = 1024  # that the system sends in one call (IOV_MAX)
PEEK = 1  # flag of PULL and ROWS: read without taking part in the clocks
IN_PLACE = 2  # flag of PULL, ROWS and PUSH_PULL: the worker reads the server's memory itself once this is answered
ANY_AGE = 1  # flag of PUSH and PUSH_PULL: not to be refused as too old
DUPLICATE = 4  # flag of PUSHED, and of WEIGHTS after a PUSH_PULL: the step was in the weights already
REFUSED = 8  # likewise: too old, and not in the weights
VOID = 4  # flag of a synchronous PULL: the step before is applied nowhere
ROWS_ALONE = 8  # flag of PUSH and PULL in local steps: the dense part stays out of it
WANTED = 1  # flag of CREATED: the server waits for the initial weights
ENCODING_SHIFT = 4  # of the dense gradient's encoding in the flags of PUSH and PUSH_PULL

_NO_NUMBERS = (0.0,) * 6

assert sys.byteorder == "little", "tensors travel as they lie in memory"


class Op(IntEnum):
    CREATE = 1
    LOAD = 2
    STATUS = 3
    PUSH = 4
    PULL = 5
    SNAPSHOT = 6
    IDLE = 7
    ROWS = 8
    BARRIER = 9
    PUSH_PULL = 10

    DONE = 64
    CREATED = 65
    ACK = 66
    WEIGHTS = 67
    PUSHED = 68
    UNKNOWN = 69
    STATS = 70
    ERROR = 127


class Header(NamedTuple):
    """What stands before every payload. ``numbers`` has up to six floats; the rest travels as zeros."""

    op: int
    step: int = 0
    version: int = 0
    flags: int = 0
    numbers: tuple[float, ...] = ()
    length: int = 0

    def pack(self, length: int | None = None) -> bytes:
        """The bytes of the header, with its own length of the payload or another."""
        op, step, version, flags, numbers, own = self
        return HEADER.pack(
            op, flags, step, version, *numbers, *_NO_NUMBERS[len(numbers) :], own if length is None else length
        )

    @classmethod
    def unpack(cls, raw: bytes | bytearray | memoryview) -> Header:
        read = HEADER.unpack(raw)
        return cls(read[0], read[2], read[3], read[1], read[4:10], read[10])


class _Trouble(msgspec.Struct, frozen=True):
    kind: str
    message: str
    remedy: str = ""


_KINDS: dict[str, type[TricornError]] = {
    kind.__name__: kind
    for kind in (
        errors.UsageError, errors.PlanError, errors.ClusterError, errors.StorageError, errors.CheckpointDamaged,
        errors.ProtocolError, errors.PeerLost, errors.TableFull, errors.Diverged,
    )
}  # fmt: skip


def encode_error(error: TricornError) -> bytes:
    """The payload of an ERROR frame."""
    kind = type(error).__name__
    known = kind if kind in _KINDS else "ClusterError"
    # JSON may make six bytes of one.
    return msgspec.json.encode(_Trouble(known, _beginning(str(error), 450), _beginning(error.remedy, 200)))


def _beginning(text: str, size: int) -> str:
    return text.encode(errors="replace")[:size].decode(errors="ignore")


def decode_error(payload: bytes) -> TricornError:
    """The error that an ERROR frame speaks of; one that cannot be read is a ProtocolError itself."""
    try:
        trouble = msgspec.json.decode(payload, type=_Trouble)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return ProtocolError(f"an error frame that cannot be read: {error}")
    return _KINDS.get(trouble.kind, errors.ClusterError)(
        f"a parameter server says: {trouble.message}", remedy=trouble.remedy or None
    )


def as_bytes(flat: Tensor) -> memoryview:
    """The memory of a contiguous flat CPU tensor, for reading and writing; nothing is copied."""
    if not flat.numel():  # which may have a stride that no view is made of
        return memoryview(bytearray())
    return flat.detach().view(uint8).numpy().data


def unsent(parts: Sequence[memoryview], sent: int) -> list[memoryview]:
    """What is left of the parts once that many bytes are gone."""
    left = []
    for part in parts:
        if sent < len(part):
            left.append(part[sent:])
        sent = max(0, sent - len(part))
    return left
