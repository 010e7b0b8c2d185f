"""One connection of the server: bytes into the memory a conversation wants, and replies out; it never blocks."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Generator, Sequence
from ssl import SSLContext, SSLSocket
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from tricorn.comm import auth
from tricorn.comm.segment import Segment, Ticket
from tricorn.errors import TricornError
from tricorn.ps.channel import Channel, SharedChannel, StreamChannel, TlsChannel
from tricorn.ps.dial import REFUSED, SHARED
from tricorn.ps.memory import SMALLEST
from tricorn.ps.ring import SIZE, Side
from tricorn.ps.service import Conversation, discard
from tricorn.ps.wire import HEADER, PROTOCOL, Header, Op, encode_error, unsent

if TYPE_CHECKING:
    from tricorn.ps.hot import Served, Slice

_MAX_UNSENT = 8  # parts of replies beyond which no further request is read
_READS = 32  # in a row, before other connections have their turn
_NOTHING = memoryview(b"")


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who a worker proves to be: its rank among the workers, and the membership epoch it belongs to."""

    channel: Literal["ps"]
    rank: int
    incarnation: int
    epoch: int
    protocol: int = PROTOCOL
    segment: Ticket | None = None  # memory that it offers to share


class Connection:
    """Conducts a conversation over a channel.

    ``rank`` is None until the server has admitted the worker; ``deadline`` is the moment at which a stranger, or
    one that is being turned away, is dropped.
    """

    def __init__(self, sock: socket.socket, deadline: float, tls: SSLContext | None = None) -> None:
        if tls:
            sock = tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.deadline = deadline
        self.rank: int | None = None
        self.incarnation = -1
        self.proved = False
        self.watched = 0  # the events that the selector watches
        self.closed = False
        self.more = False  # whether ``receive`` has left something for the next turn
        self.asked = 0.0  # when the newest bytes came
        self.informed = False  # whether the worker knows where it can read parameters in place
        self._channel: Channel = TlsChannel(sock) if isinstance(sock, SSLSocket) else StreamChannel(sock)
        self._leaving = False
        self._wanted: memoryview | None = _NOTHING  # what the next bytes belong in; None: wait
        self._listening = False  # whether the end of who waits would be noticed
        self._outbox: deque[memoryview] = deque()
        self._unsent = 0  # bytes of it
        self._lent = 0  # bytes that were read where they lie, and not counted yet

    def begin(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self.advance()

    @property
    def waiting(self) -> bool:
        """Whether the conversation waits for others and not for bytes."""
        return self._wanted is None

    @property
    def reading(self) -> bool:
        if self._wanted is None:
            return self._listening
        return len(self._outbox) < _MAX_UNSENT

    @property
    def writing(self) -> bool:
        return bool(self._outbox)

    @property
    def between(self) -> bool:
        """Whether all replies are sent, and as many bytes are wanted as a header has, none of which is read."""
        wanted = self._wanted
        return wanted is not None and len(wanted) == HEADER.size and not self._outbox and self._channel.between

    def serve(
        self, work: tuple[Slice, int, Sequence[tuple[int, int]]], others: int, patience: tuple[int, int, int]
    ) -> Served:
        """Have dense requests served as long as they come soon and nothing is to be read from ``others``.

        ``patience``: turns of spinning and yielding where memory is shared, and milliseconds where it is not.
        """
        dense, version, applied = work
        *turns, milliseconds = patience
        if isinstance(self._channel, SharedChannel):
            served = dense.serve_ring(self._channel.side, version, applied, *turns)
            self._channel.wake()
        else:
            assert isinstance(self._channel, StreamChannel)
            served, left, late = dense.serve_socket(self.sock.fileno(), others, version, applied, milliseconds)
            self._channel.put_back(left)
            self.queue([memoryview(bytes(late))])
        return served

    @property
    def side(self) -> Side | None:
        """The memory that is shared with the worker."""
        return self._channel.side if isinstance(self._channel, SharedChannel) else None

    def share(self, ticket: Ticket) -> None:
        """Go over to the worker's memory, if this process can reach it; the worker is told on the socket."""
        try:
            segment = Segment.attach(ticket) if ticket.size == SIZE else None
        except TricornError:
            segment = None
        if segment is None:
            self.queue([memoryview(REFUSED)])
            return
        self.queue([memoryview(SHARED)])
        self.flush()
        self._channel = SharedChannel(self.sock, segment)

    def advance(self) -> None:
        """Go on with the conversation until it wants bytes or has to wait; raises what the conversation raises."""
        wanted = next(self._conversation)
        while wanted is not None:
            if not len(wanted):
                wanted = next(self._conversation)
            elif len(wanted) >= SMALLEST and (lent := self._channel.lend(len(wanted))):
                self._lent += len(lent)
                wanted = self._conversation.send(lent)
            else:
                break
        self._wanted = wanted

    def receive(self) -> int:
        """Take what has arrived; returns how many bytes. Raises EOFError at the end, OSError, TricornError."""
        total = self._receive() + self._lent
        self._lent = 0
        return total

    def _receive(self) -> int:
        total = 0
        for _ in range(_READS):
            if self._wanted is None:
                self._listening = self._channel.listen()
                break
            if not self.reading:
                break
            got = self._channel.read_into(self._wanted)
            if not got:
                break
            if not total:
                self.asked = time.monotonic()
            total += got
            self._wanted = self._wanted[got:]
            if not self._wanted:
                self.advance()
        else:
            self.more = True
            return total
        self.more = False
        return total

    def arrived(self) -> None:
        """The socket can be read."""
        self._channel.arrived()

    def queue(self, parts: Sequence[memoryview]) -> None:
        for part in parts:
            if part:
                self._outbox.append(part)
                self._unsent += len(part)

    def flush(self) -> int:
        """Send what can be sent now; returns how many bytes. Raises OSError."""
        if not self._outbox:
            return 0
        sent = self._channel.write(self._outbox)
        self._unsent -= sent
        if self._unsent:
            self._outbox = deque(unsent(self._outbox, sent))
        else:
            self._outbox.clear()
        if self._leaving and not self._outbox:
            self.sock.shutdown(socket.SHUT_WR)
        return sent

    def own_unsent(self) -> None:
        """Copy what is not sent yet, because the memory it lies in is about to change."""
        self._outbox = deque(memoryview(bytes(part)) for part in self._outbox)

    def turn_away(self, error: TricornError, deadline: float) -> None:
        """Say why, and read what still comes, or the reset that follows a close would destroy the message."""
        payload = encode_error(error)
        self.queue([memoryview(Header(Op.ERROR, length=len(payload)).pack()), memoryview(payload)])
        self.rank, self._leaving, self.deadline = None, True, deadline
        self.begin(_ignore())

    def close(self) -> None:
        self.closed = True
        self._channel.close()


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
                connection.queue([memoryview(wanted)])
                wanted = next(steps)
    except StopIteration as done:
        claim: dict[str, Any] = done.value
        return claim


def _ignore() -> Conversation:
    while True:
        yield from discard(1 << 30)
