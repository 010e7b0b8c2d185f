"""The parameter server's event loop: one thread, sockets that never block, memory that is bounded.

A stranger has five seconds to prove the secret, and at most ``MAX_STRANGERS`` try at once; whoever breaks the
protocol is told so, read out for a second (or the reset would destroy the message) and dropped. Neither is
noticed by anybody else.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from tricorn.comm.sockets import HANDSHAKE_SECONDS, Address, listen
from tricorn.errors import ClusterError, PeerLost, ProtocolError, TricornError
from tricorn.ps.connection import Connection, handshake
from tricorn.ps.service import Beginning, Conversation, Service
from tricorn.ps.wire import Header
from tricorn.state.shards import Piece

MAX_STRANGERS = 64
_FAREWELL_SECONDS = 1.0
_REPORT_SECONDS = 0.02  # how long an applied step may go unreported while the server is busy

T = TypeVar("T")


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who a worker proves to be: its rank among the workers, and the membership epoch it belongs to."""

    channel: Literal["ps"]
    rank: int
    incarnation: int
    epoch: int


class Server:
    """Holds a slice of the parameters for the workers that dial ``address``.

    ``on_snapshot(step, pieces)`` gets copies of the slice for a checkpoint; ``on_applied(steps)`` the steps newly
    in the weights of an asynchronous run. Both are called by the thread that runs ``serve_forever`` and should
    return soon. The other methods are for any other thread, and return when the loop has done what they say.
    """

    def __init__(
        self,
        secret: bytes,
        host: str = "127.0.0.1",
        *,
        on_snapshot: Callable[[int, list[Piece]], None],
        on_applied: Callable[[list[int]], None],
    ) -> None:
        self.bytes_sent = 0
        self._secret = secret
        self._on_snapshot = on_snapshot
        self._on_applied = on_applied
        self._listener = listen(host)
        self._listener.setblocking(False)
        self.address: Address = self._listener.getsockname()[:2]
        self._service = Service(self)
        self._epoch = -1  # the last that was begun
        self._selector = selectors.DefaultSelector()
        self._strangers: dict[Connection, None] = {}  # not admitted, or being turned away; oldest first
        self._workers: dict[int, Connection] = {}
        self._unreported_since: float | None = None
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._lock = threading.Lock()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running = True
        self._closed = False

    # For the thread that controls the server.

    def regroup(self) -> list[int]:
        """Drop all workers, report all that is applied, and return the steps this server could go on from.

        Nothing yet: []. Synchronous: [k], or [k, k + 1] when the sum of step k is complete but not applied.
        Asynchronous: [generation], as given to ``begin``. No worker is welcome until the next ``begin``.
        """
        return self._call(self._regroup)

    def begin(
        self,
        *,
        epoch: int,
        step: int,
        source: str,
        checkpoint: Path | None,
        workers: int,
        generation: int = 0,
        applied: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Serve the workers of this membership epoch, going on from ``step``.

        ``source`` is "initial" (the worker of rank 0 brings the weights), "keep" or "checkpoint" (of that folder).
        An asynchronous run that does not keep its state takes ``generation`` as the name of what it becomes, and
        ``applied``, intervals [start, stop), as the steps that are in it. Raises ClusterError or ProtocolError if
        there is nothing to keep, or not that step.
        """
        beginning = Beginning(epoch, step, source, checkpoint, workers, generation, applied)
        self._call(lambda: self._begin(beginning))

    def snapshot(self, step: int) -> None:
        """Have ``on_snapshot`` called with what is held now, as the state of ``step``."""
        self._call(lambda: self._service.snapshot(step))

    def applied(self) -> list[tuple[int, int]]:
        """Asynchronous: the steps in the weights, as intervals [start, stop)."""
        return self._call(lambda: self._service.applied)

    def staleness(self) -> dict[int, int]:
        """Asynchronous: how many gradients were computed from weights so many versions old."""
        return self._call(lambda: self._service.staleness)

    def stop(self) -> None:
        """Have ``serve_forever`` close every connection and return. A server that has stopped stays stopped."""
        with suppress(ClusterError):
            self._call(self._stop)

    def _call(self, command: Callable[[], T]) -> T:
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise ClusterError("this server has stopped")
            self._commands.append((command, future))
            self._wake.send(b"\0")
        return future.result()

    # The loop.

    def serve_forever(self) -> None:
        """Serve until ``stop``. An exception of ``on_snapshot`` or ``on_applied`` ends it."""
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, self._obey)
        try:
            while self._running:
                self._turn()
        finally:
            self._close()

    def _turn(self) -> None:
        ready = self._selector.select(self._patience())
        for key, events in ready:
            if isinstance(key.data, Connection):
                self._attend(key.data, events)
            else:
                key.data()
        while self._service.changed:
            self._service.changed = False
            for connection in [c for c in (*self._workers.values(), *self._strangers) if c.waiting]:
                self._attend(connection, 0)
        now = time.monotonic()
        for connection in [c for c in self._strangers if c.deadline <= now]:
            self._drop(connection)
        if not self._service.unreported:
            self._unreported_since = None
        elif self._unreported_since is None:
            self._unreported_since = now
        elif not ready or now - self._unreported_since >= _REPORT_SECONDS:
            self._report()

    def _patience(self) -> float | None:
        if self._unreported_since is not None:
            return 0.0
        if not self._strangers:
            return None
        return max(0.0, min(c.deadline for c in self._strangers) - time.monotonic())

    def _attend(self, connection: Connection, events: int) -> None:
        """Do what the connection is ready for; a worker that waited may go on with no event at all."""
        if connection.closed:  # earlier in this turn
            return
        try:
            if not events:
                connection.advance()
            if events & selectors.EVENT_READ:
                connection.receive()
            self.bytes_sent += connection.flush()
        except (OSError, EOFError):
            self._drop(connection)
        except TricornError as error:
            self._turn_away(connection, error)
        else:
            self._watch(connection)

    def _watch(self, connection: Connection) -> None:
        events = selectors.EVENT_READ * connection.reading | selectors.EVENT_WRITE * connection.writing
        if events == connection.watched:
            return
        if not events:
            self._selector.unregister(connection.sock)
        elif connection.watched:
            self._selector.modify(connection.sock, events, connection)
        else:
            self._selector.register(connection.sock, events, connection)
        connection.watched = events

    # Coming and going.

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:  # the caller has given up
            return
        except OSError:  # out of descriptors: the caller stays in the backlog, and the loop must not spin on it
            time.sleep(0.05)
            return
        connection = Connection(sock, time.monotonic() + HANDSHAKE_SECONDS)
        connection.begin(self._meet(connection))
        self._strangers[connection] = None
        self._watch(connection)
        self._limit_strangers()

    def _meet(self, connection: Connection) -> Conversation:
        claimed = yield from handshake(connection, self._secret)
        connection.proved = True
        try:
            claim = msgspec.convert(claimed, Claim)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"a claim that cannot be read: {error}") from None
        while not (beginning := self._service.beginning) or claim.epoch > beginning.epoch:
            if claim.epoch <= self._epoch:
                break
            yield None  # the worker has heard of its membership epoch before this server has
        self._admit(connection, claim, beginning)
        yield from self._service.converse(claim.rank)

    def _admit(self, connection: Connection, claim: Claim, beginning: Beginning | None) -> None:
        if beginning is None or claim.epoch != beginning.epoch:
            raise PeerLost(f"membership epoch {claim.epoch} is over")
        if not 0 <= claim.rank < beginning.workers:
            raise ProtocolError(f"there are {beginning.workers} workers, none of rank {claim.rank}")
        if former := self._workers.get(claim.rank):
            if former.incarnation >= claim.incarnation:
                raise ProtocolError(f"the worker of rank {claim.rank} is connected already")
            self._drop(former)
        connection.rank, connection.incarnation = claim.rank, claim.incarnation
        self._workers[claim.rank] = connection
        del self._strangers[connection]

    def _turn_away(self, connection: Connection, error: TricornError) -> None:
        self._forget(connection)
        if not connection.proved:
            self._drop(connection)
            return
        connection.turn_away(error, time.monotonic() + _FAREWELL_SECONDS)
        self._strangers[connection] = None
        self._attend(connection, selectors.EVENT_WRITE)

    def _limit_strangers(self) -> None:
        # A real worker proves the secret within a millisecond, so the oldest of many that have not is not one.
        unproved = [connection for connection in self._strangers if not connection.proved]
        if len(unproved) > MAX_STRANGERS:
            self._drop(unproved[0])

    def _forget(self, connection: Connection) -> None:
        self._strangers.pop(connection, None)
        if connection.rank is not None and self._workers.get(connection.rank) is connection:
            del self._workers[connection.rank]
            self._service.leave(connection.rank)

    def _drop(self, connection: Connection) -> None:
        self._forget(connection)
        if connection.watched:
            self._selector.unregister(connection.sock)
            connection.watched = 0
        connection.closed = True
        connection.sock.close()

    # Commands.

    def _obey(self) -> None:
        self._woken.recv(4096)
        while self._commands:
            command, future = self._commands.popleft()
            try:
                future.set_result(command())
            except Exception as error:
                future.set_exception(error)

    def _regroup(self) -> list[int]:
        self._drop_workers()
        self._report()
        return self._service.regroup()

    def _drop_workers(self) -> None:
        for connection in [*self._workers.values()]:
            self._drop(connection)

    def _begin(self, beginning: Beginning) -> None:
        self._drop_workers()
        self._service.begin(beginning)
        self._epoch = beginning.epoch

    def _report(self) -> None:
        self._unreported_since = None
        if steps := self._service.take_applied():
            self._on_applied(steps)

    def _stop(self) -> None:
        self._running = False

    def _close(self) -> None:
        with self._lock:
            self._closed = True
        for connection in [*self._workers.values(), *self._strangers]:
            self._drop(connection)
        self._selector.close()
        for sock in (self._listener, self._wake, self._woken):
            sock.close()
        for _, future in self._commands:
            future.set_exception(ClusterError("this server has stopped"))

    # What the service needs of the world.

    def send(self, rank: int, header: Header, payload: memoryview | None = None) -> None:
        if connection := self._workers.get(rank):
            connection.queue(header._replace(length=len(payload) if payload else 0).pack(), payload)
            with suppress(OSError):  # whoever is gone is noticed where it is read from
                self.bytes_sent += connection.flush()
            self._watch(connection)

    def before_update(self) -> None:
        for connection in self._workers.values():
            connection.own_unsent()

    def snapshot_taken(self, step: int, pieces: list[Piece]) -> None:
        self._on_snapshot(step, pieces)
