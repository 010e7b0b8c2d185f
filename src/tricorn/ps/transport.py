"""A worker's end of the connection to one server: frames out, frames in (docs/protocol.md)."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tricorn.errors import PeerLost, ProtocolError, TricornError
from tricorn.ps.wire import HEADER, MAX_ERROR, MOST_PARTS, Header, Op, decode_error, unsent

_AHEAD = 1 << 16  # bytes read at once, so that a small frame costs one system call


class InPlace(Protocol):
    """A server's memory, where this process can read it: after a PULL or ROWS with flag IN_PLACE was answered."""

    @property
    def weights(self) -> memoryview:
        """The server's slice of the dense parameters."""

    def gather(self, table: int, ids_U: NDArray[np.int64], out_UD: Tensor) -> None:
        """Fill ``out_UD`` with the rows of these ids of that sparse table."""


class Transport(Protocol):
    """Blocking, for one thread; ``interrupt`` for any. Raises OSError or PeerLost once the server is lost."""

    bytes_sent: int

    @property
    def in_place(self) -> InPlace | None:
        """None where the server is not on this host."""

    def send(self, header: Header, parts: Sequence[memoryview] = ()) -> None:
        """Send a frame with the parts, end to end, as its payload.

        They may be changed when the reply has come; parts that are in no shared memory, when this returns.
        """

    def receive(self, *expected: Op) -> Header:
        """The header of the next reply. Raises the error that an ERROR frame speaks of, ProtocolError for others."""

    def receive_into(self, view: memoryview) -> None:
        """Fill the view with the next bytes of the payload whose header came last."""

    def interrupt(self) -> None:
        """Make a blocked call, and every later one, raise. Safe from any thread."""

    def close(self) -> None: ...


def judged(header: Header, expected: Sequence[Op], receive_into: Callable[[memoryview], None]) -> Header:
    """The header of a reply if it is one of those expected. Raises the error that an ERROR frame speaks of."""
    if header.op in expected:
        return header
    if header.op != Op.ERROR:
        raise ProtocolError(f"a reply of kind {header.op} came where {expected[0].name} was due")
    raise told(header, receive_into)


def told(header: Header, receive_into: Callable[[memoryview], None]) -> TricornError:
    """The error in the payload of a reply. Raises ProtocolError for one that is too long."""
    if header.length > MAX_ERROR:
        raise ProtocolError(f"an error of {header.length} bytes is over the limit of {MAX_ERROR}")
    payload = bytearray(header.length)
    receive_into(memoryview(payload))
    return decode_error(bytes(payload))


class TcpTransport:
    """Frames as bytes of a stream: sent from where the parts lie, received where they belong."""

    in_place = None

    def __init__(self, sock: socket.socket) -> None:
        self.bytes_sent = 0
        self._sock = sock
        self._buffer = memoryview(bytearray(_AHEAD))
        self._ahead = self._buffer[:0]  # what of the buffer is not taken yet

    def send(self, header: Header, parts: Sequence[memoryview] = ()) -> None:
        length = sum(map(len, parts))
        left: Sequence[memoryview] = [memoryview(header.pack(length)), *parts]
        missing = HEADER.size + length
        self.bytes_sent += missing
        while missing := missing - (sent := self._sock.sendmsg(left[:MOST_PARTS])):
            left = unsent(left, sent)

    def receive(self, *expected: Op) -> Header:
        while (known := len(self._ahead)) < HEADER.size:
            self._buffer[:known] = self._ahead
            self._ahead = self._buffer[: known + self._read(self._buffer[known:])]
        header, self._ahead = Header.unpack(self._ahead[: HEADER.size]), self._ahead[HEADER.size :]
        return judged(header, expected, self.receive_into)

    def receive_into(self, view: memoryview) -> None:
        known = min(len(view), len(self._ahead))
        view[:known] = self._ahead[:known]
        self._ahead, view = self._ahead[known:], view[known:]
        while view:
            view = view[self._read(view, socket.MSG_WAITALL) :]

    def interrupt(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def _read(self, view: memoryview, flags: int = 0) -> int:
        got = self._sock.recv_into(view, 0, flags)
        if not got:
            raise PeerLost("the server closed the connection")
        return got


class TlsTransport(TcpTransport):
    """The same bytes, encrypted: there is no way to send parts, or to wait for all of one, in one call."""

    def send(self, header: Header, parts: Sequence[memoryview] = ()) -> None:
        length = sum(map(len, parts))
        self._sock.sendall(header.pack(length))
        for part in parts:
            self._sock.sendall(part)
        self.bytes_sent += HEADER.size + length

    def _read(self, view: memoryview, flags: int = 0) -> int:
        return super()._read(view)
