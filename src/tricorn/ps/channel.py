"""The server's end of the bytes of one connection, through a socket or shared memory; neither ever blocks.

``read_into``, ``lend`` and ``listen`` raise EOFError once the other side is gone and all that it said has been read.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from ssl import SSLSocket, SSLWantReadError, SSLWantWriteError
from typing import Protocol

from tricorn.comm.segment import Segment
from tricorn.ps.ring import Side
from tricorn.ps.wire import MOST_PARTS

_AHEAD = 1 << 16  # bytes read at once, so that a small request costs one system call


class Channel(Protocol):
    sock: socket.socket

    def arrived(self) -> None:
        """The socket can be read."""

    def read_into(self, view: memoryview) -> int:
        """Fill the view with what is there; returns how many bytes."""

    def listen(self) -> bool:
        """While nothing is wanted: keep what comes; whether there is room for more, so that an end would be seen."""

    def lend(self, count: int) -> memoryview | None:
        """The next bytes where they lie, until the next call; None if they are not all there in one part."""

    @property
    def between(self) -> bool:
        """Whether nothing is here that has not been taken."""

    def write(self, parts: Sequence[memoryview]) -> int:
        """Send what can be sent now; returns how many bytes. Raises OSError."""

    def close(self) -> None: ...


class StreamChannel:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = memoryview(bytearray(_AHEAD))
        self._ahead = self._buffer[:0]  # what of the buffer is not taken yet
        self._ready = False  # whether the socket may have more

    def arrived(self) -> None:
        self._ready = True

    def read_into(self, view: memoryview) -> int:
        if not self._ahead:
            if len(view) >= _AHEAD:
                return self._receive(view)
            self._ahead = self._buffer[: self._receive(self._buffer)]
        known = min(len(view), len(self._ahead))
        view[:known] = self._ahead[:known]
        self._ahead = self._ahead[known:]
        return known

    def listen(self) -> bool:
        if not self._ahead:
            self._ahead = self._buffer[: self._receive(self._buffer)]
        return not self._ahead

    @property
    def between(self) -> bool:
        return not self._ahead

    def put_back(self, data: memoryview) -> None:
        """All that has come was read by somebody else, of whom these bytes are left."""
        self._buffer[: len(data)] = data
        self._ahead = self._buffer[: len(data)]
        self._ready = False  # the selector tells of more

    def lend(self, count: int) -> memoryview | None:
        return None  # the buffer is used again, and what lies in it is not aligned

    def write(self, parts: Sequence[memoryview]) -> int:
        try:
            return self.sock.sendmsg(islice(parts, MOST_PARTS))
        except BlockingIOError:
            return 0

    def close(self) -> None:
        self.sock.close()

    def _receive(self, view: memoryview) -> int:
        if not self._ready:
            return 0
        try:
            got = self.sock.recv_into(view)
        except BlockingIOError:
            got = -1
        if not got:
            raise EOFError
        self._ready = got == len(view)  # a short read was all; the selector tells of more
        return max(got, 0)


class TlsChannel(StreamChannel):
    """What is encrypted is read until no more comes: the library may hold bytes that the selector does not know of."""

    sock: SSLSocket
    between = False  # the library may hold some, and nobody else can read what it reads

    def write(self, parts: Sequence[memoryview]) -> int:
        sent = 0
        try:
            for part in parts:
                done = self.sock.send(part)
                sent += done
                if done < len(part):
                    break
        except (SSLWantReadError, SSLWantWriteError):
            pass
        return sent

    def _receive(self, view: memoryview) -> int:
        try:
            got = self.sock.recv_into(view)
        except (SSLWantReadError, SSLWantWriteError):
            return 0
        if not got:
            raise EOFError
        return got


class SharedChannel:
    """A worker's segment. The socket says when it has gone, and wakes who sleeps."""

    def __init__(self, sock: socket.socket, segment: Segment) -> None:
        self.sock = sock
        self.side = Side(segment, worker=False)
        self._gone = False

    def arrived(self) -> None:
        with suppress(BlockingIOError):
            self._gone = not self.sock.recv(4096)

    def read_into(self, view: memoryview) -> int:
        got = self.side.reader.read_into(view)
        if self.side.reader.rung:
            self.wake()
        if not got and self._gone:
            raise EOFError
        return got

    def listen(self) -> bool:
        if self._gone:
            raise EOFError
        return True

    @property
    def between(self) -> bool:
        return self.side.reader.between

    def lend(self, count: int) -> memoryview | None:
        return self.side.reader.lend(count)

    def write(self, parts: Sequence[memoryview]) -> int:
        sent = self.side.writer.write(parts)
        if self.side.writer.rung:
            self.wake()
        return sent

    def close(self) -> None:
        self.sock.close()
        self.side.close()

    def wake(self) -> None:
        """Send the worker the byte that it is owed, if it is."""
        if self.side.owes():
            with suppress(BlockingIOError):  # it has not read so many bytes that it will wake anyhow
                self.sock.send(b"\0")
