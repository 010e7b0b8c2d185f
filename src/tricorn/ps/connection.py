"""One socket of the server: bytes into the memory a conversation wants, and replies out; it never blocks."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Generator
from typing import Any

from tricorn.comm import auth
from tricorn.errors import TricornError
from tricorn.ps.service import Conversation, discard
from tricorn.ps.wire import Header, Op, encode_error, unsent

_MAX_UNSENT = 8  # parts of replies beyond which no further request is read
_READS = 16  # in a row, before other connections have their turn


class Connection:
    """Conducts a conversation over a socket.

    ``rank`` is None until the server has admitted the worker; ``deadline`` is the moment at which a stranger, or
    one that is being turned away, is dropped.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.deadline = deadline
        self.rank: int | None = None
        self.incarnation = -1
        self.proved = False
        self.watched = 0  # the events that the selector watches
        self.closed = False
        self._leaving = False
        self._wanted: memoryview | None = memoryview(b"")  # what the next bytes belong in; None: wait
        self._outbox: deque[memoryview] = deque()

    def begin(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self.advance()

    @property
    def waiting(self) -> bool:
        """Whether the conversation waits for others and not for bytes."""
        return self._wanted is None

    @property
    def reading(self) -> bool:
        return self._wanted is not None and len(self._outbox) < _MAX_UNSENT

    @property
    def writing(self) -> bool:
        return bool(self._outbox)

    def advance(self) -> None:
        """Go on with the conversation until it wants bytes or has to wait; raises what the conversation raises."""
        self._wanted = next(self._conversation)
        while self._wanted is not None and not len(self._wanted):
            self._wanted = next(self._conversation)

    def receive(self) -> int:
        """Take what has arrived; returns how many bytes. Raises EOFError at the end, OSError, TricornError."""
        total = 0
        for _ in range(_READS):
            if self._wanted is None or not self.reading:
                break
            try:
                got = self.sock.recv_into(self._wanted)
            except BlockingIOError:
                break
            if not got:
                raise EOFError
            total += got
            self._wanted = self._wanted[got:]
            if self._wanted:
                break  # there was no more
            self.advance()
        return total

    def queue(self, part: bytes, payload: memoryview | None = None) -> None:
        self._outbox.append(memoryview(part))
        if payload:
            self._outbox.append(payload)

    def flush(self) -> int:
        """Send what can be sent now; returns how many bytes. Raises OSError."""
        if not self._outbox:
            return 0
        try:
            sent = self.sock.sendmsg(self._outbox)
        except BlockingIOError:
            return 0
        self._outbox = deque(unsent(self._outbox, sent))
        if self._leaving and not self._outbox:
            self.sock.shutdown(socket.SHUT_WR)
        return sent

    def own_unsent(self) -> None:
        """Copy what is not sent yet, because the memory it lies in is about to change."""
        self._outbox = deque(memoryview(bytes(part)) for part in self._outbox)

    def turn_away(self, error: TricornError, deadline: float) -> None:
        """Say why, and read what still comes, or the reset that follows a close would destroy the message."""
        payload = encode_error(error)
        self.queue(Header(Op.ERROR, length=len(payload)).pack(), memoryview(payload))
        self.rank, self._leaving, self.deadline = None, True, deadline
        self.begin(_ignore())


def handshake(connection: Connection, secret: bytes) -> Generator[memoryview, None, dict[str, Any]]:
    """Have the other side prove that it knows the secret; returns what it claims to be."""
    steps = auth.answer(secret)
    try:
        wanted = next(steps)
        while True:
            if isinstance(wanted, int):
                buffer = memoryview(bytearray(wanted))
                yield buffer
                wanted = steps.send(bytes(buffer))
            else:
                connection.queue(wanted)
                wanted = next(steps)
    except StopIteration as done:
        claim: dict[str, Any] = done.value
        return claim


def _ignore() -> Conversation:
    while True:
        yield from discard(1 << 30)
