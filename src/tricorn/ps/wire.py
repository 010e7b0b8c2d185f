"""The frames between workers and servers: a fixed header, then a payload of raw bytes (docs/protocol.md).

    op (1)  flags (1)  zero (6)  step (8)  version (8)  numbers (6 x 8)  length of payload (8)      80 bytes

The header is big-endian; tensors travel as they lie in memory, little-endian and end to end. Nobody reads a
payload before its length is known to be right for its place.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import msgspec
from torch import Tensor, uint8

from tricorn import errors
from tricorn.comm.sockets import receive_exactly
from tricorn.errors import ProtocolError, TricornError

HEADER = struct.Struct("!BB6xqq6dQ")
MAX_DOCUMENT = 16 << 20  # bytes of a CREATE: the names and shapes of some hundred thousand parameters
MAX_ERROR = 4096
PEEK = 1  # flag of PULL: read without taking part in the clocks
DUPLICATE = 1  # flag of PUSHED: the step was in the weights already
WANTED = 1  # flag of CREATED: the server waits for the initial weights

assert sys.byteorder == "little", "tensors travel as they lie in memory"


class Op(IntEnum):
    CREATE = 1
    LOAD = 2
    STATUS = 3
    PUSH = 4
    PULL = 5
    SNAPSHOT = 6
    IDLE = 7

    DONE = 64
    CREATED = 65
    ACK = 66
    WEIGHTS = 67
    PUSHED = 68
    ERROR = 127


class Header(NamedTuple):
    """What stands before every payload. ``numbers`` has up to six floats; the rest travels as zeros."""

    op: int
    step: int = 0
    version: int = 0
    flags: int = 0
    numbers: tuple[float, ...] = ()
    length: int = 0

    def pack(self) -> bytes:
        padded = self.numbers + (0.0,) * (6 - len(self.numbers))
        return HEADER.pack(self.op, self.flags, self.step, self.version, *padded, self.length)

    @classmethod
    def unpack(cls, raw: bytes | bytearray | memoryview) -> Header:
        op, flags, step, version, *numbers, length = HEADER.unpack(raw)
        return cls(op, step, version, flags, tuple(numbers), length)


class _Trouble(msgspec.Struct, frozen=True):
    kind: str
    message: str
    remedy: str = ""


_KINDS: dict[str, type[TricornError]] = {
    kind.__name__: kind
    for kind in (
        errors.UsageError, errors.PlanError, errors.ClusterError, errors.StorageError, errors.CheckpointDamaged,
        errors.ProtocolError, errors.PeerLost,
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
    return flat.detach().view(uint8).numpy().data


def unsent(parts: Sequence[memoryview], sent: int) -> list[memoryview]:
    """What is left of the parts once that many bytes are gone."""
    left = []
    for part in parts:
        if sent < len(part):
            left.append(part[sent:])
        sent = max(0, sent - len(part))
    return left


def send(sock: socket.socket, header: Header, payload: memoryview | None = None) -> int:
    """Send a frame on a blocking socket without joining its parts; returns how many bytes it had."""
    length = len(payload) if payload else 0
    parts = [memoryview(header._replace(length=length).pack())]
    if payload:
        parts.append(payload)
    while parts:
        parts = unsent(parts, sock.sendmsg(parts))
    return HEADER.size + length


def receive_header(sock: socket.socket, *expected: Op) -> Header:
    """Read the header of a reply; an ERROR frame is raised as the error it speaks of."""
    header = Header.unpack(receive_exactly(sock, HEADER.size))
    if header.op == Op.ERROR:
        if header.length > MAX_ERROR:
            raise ProtocolError(f"an error frame of {header.length} bytes is over the limit of {MAX_ERROR}")
        raise decode_error(receive_exactly(sock, header.length))
    if header.op not in expected:
        raise ProtocolError(f"a reply of kind {header.op} came where {expected[0].name} was due")
    return header
