"""The parameter server's event loop: one thread, sockets that never block, memory that is bounded.

A stranger has five seconds to prove the secret, and at most ``MAX_STRANGERS`` try at once; whoever breaks the
protocol is told so, read out for a second (or the reset would destroy the message) and dropped. Neither is
noticed by anybody else. Workers of this host are served through shared memory and the others through sockets, in
turns: while there is something to do the loop only looks from one to the other, then it sleeps.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from ssl import SSLContext
from typing import Any, TypeVar

import msgspec

from tricorn.comm.sockets import HANDSHAKE_SECONDS, Address, listen
from tricorn.errors import ClusterError, PeerLost, ProtocolError, TricornError
from tricorn.ps.connection import Claim, Connection, handshake
from tricorn.ps.meter import Meter
from tricorn.ps.service import Beginning, Conversation, Service, discard
from tricorn.ps.watch import READ, WRITE, Watch
from tricorn.ps.wire import HEADER, IN_PLACE, PROTOCOL, Header, Op
from tricorn.state.shards import Piece

MAX_STRANGERS = 64
_FAREWELL_SECONDS = 1.0
_REPORT_SECONDS = 0.1  # how long an applied step may go unreported; as long as a worker's (worker/leased.py)

T = TypeVar("T")


class Server:
    """Holds a slice of the parameters for the workers that dial ``address``.

    ``on_snapshot(step, pieces)`` gets copies of the slice for a checkpoint; ``on_applied(steps)`` the steps newly
    in the weights of an asynchronous run. Both are called by the thread that runs ``serve_forever`` and should
    return soon. ``memory_limit``, in bytes, is for the rows of sparse tables; ``tls`` encrypts what comes by sockets.
    The other methods are for any other thread, and return when the loop has done what they say.
    """

    def __init__(
        self,
        secret: bytes,
        host: str = "127.0.0.1",
        *,
        on_snapshot: Callable[[int, list[Piece]], None],
        on_applied: Callable[[list[int]], None],
        port: int = 0,
        memory_limit: int | None = None,
        tls: SSLContext | None = None,
    ) -> None:
        self._meter = Meter()
        self._secret = secret
        self._on_snapshot = on_snapshot
        self._on_applied = on_applied
        self._tls = tls
        self._listener = listen(host, port)
        self._listener.setblocking(False)
        self.address: Address = self._listener.getsockname()[:2]
        self._service = Service(self, memory_limit=memory_limit)
        self._epoch = -1  # the last that was begun
        self._watch = Watch()
        self._strangers: dict[Connection, None] = {}  # not admitted, or being turned away; oldest first
        self._workers: dict[int, Connection] = {}
        self._attended: Connection | None = None
        self._unreported_since: float | None = None
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._lock = threading.Lock()
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running = True
        self._closed = False

    @property
    def bytes_sent(self) -> int:
        return self._meter.bytes_sent

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
        alone: bool = False,
    ) -> None:
        """Serve the workers of this membership epoch, going on from ``step``.

        ``source`` is "initial" (the worker of rank 0 brings the weights), "keep" or "checkpoint" (of that folder).
        An asynchronous run that does not keep its state takes ``generation`` as the name of what it becomes, and
        ``applied``, intervals [start, stop), as the steps that are in it. ``alone``: nobody will regroup, so whoever
        waits for a worker that has left is told. Raises ClusterError or ProtocolError if
        there is nothing to keep, or not that step.
        """
        beginning = Beginning(epoch, step, source, checkpoint, workers, generation, applied, alone)
        self._call(lambda: self._begin(beginning))

    def snapshot(self, step: int) -> None:
        """Have ``on_snapshot`` called with what is held now, as the state of ``step``."""
        self._call(lambda: self._service.snapshot(step))

    def applied(self) -> list[tuple[int, int]]:
        """Asynchronous: the steps in the weights, as intervals [start, stop)."""
        return self._call(lambda: self._service.applied)

    def staleness(self) -> dict[int, int]:
        """How many gradients were computed from weights so many versions old. Any thread may ask at any time."""
        return self._service.staleness

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
        self._watch.call(self._listener, self._accept)
        self._watch.call(self._woken, self._obey)
        try:
            while self._running:
                self._turn()
        finally:
            self._close()

    def _turn(self) -> None:
        going_on = [(connection, WRITE) for connection in self._workers.values() if connection.more]
        ready = self._watch.ready(going_on, self._patience())
        for connection_or_task, events in ready:
            if isinstance(connection_or_task, Connection):
                self._attend(connection_or_task, events)
            else:
                connection_or_task()
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
        elif now - self._unreported_since >= _REPORT_SECONDS:
            self._report()

    def _patience(self) -> float | None:
        moments = [connection.deadline for connection in self._strangers]
        if self._unreported_since is not None:
            moments.append(self._unreported_since + _REPORT_SECONDS)
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _attend(self, connection: Connection, events: int) -> None:
        """Do what the connection is ready for; a worker that waited may go on with no event at all."""
        if connection.closed:  # earlier in this turn
            return
        self._attended = connection
        try:
            if events & READ:
                connection.arrived()
            if not events:
                connection.advance()
            elif connection.rank is not None and connection.between:
                self._serve_hot(connection, connection.rank)
            self._meter.bytes_received += connection.receive()
            self._meter.bytes_sent += connection.flush()
        except (OSError, EOFError):
            self._drop(connection)
        except TricornError as error:
            self._turn_away(connection, error)
        else:
            self._watch.adjust(connection)
        self._attended = None

    def _serve_hot(self, connection: Connection, rank: int) -> None:
        if not (mode := self._service.hot(rank)):
            return
        others, patience = self._watch.descriptor, self._watch.patience
        served = mode.serve(rank, lambda *of_mode: connection.serve(of_mode, others, patience))
        size = mode.table.description.bytes
        self._meter.bytes_received += len(served.log) * (HEADER.size + size)
        if connection.side:
            mode.bytes_in_place += len(served.log) * size
        self._meter.bytes_sent += len(served.log) * (HEADER.size + (0 if connection.side else size))
        for seconds in served.seconds:
            self._meter.answered(seconds)

    # Coming and going.

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:  # the caller has given up
            return
        except OSError:  # out of descriptors: the caller stays in the backlog, and the loop must not spin on it
            time.sleep(0.05)
            return
        connection = Connection(sock, time.monotonic() + HANDSHAKE_SECONDS, self._tls)
        connection.begin(self._meet(connection))
        self._strangers[connection] = None
        self._watch.adjust(connection)
        self._limit_strangers()

    def _meet(self, connection: Connection) -> Conversation:
        claimed = yield from handshake(connection, self._secret)
        connection.proved = True
        if (spoken := claimed.get("protocol", PROTOCOL)) != PROTOCOL:
            raise ProtocolError(f"the worker speaks version {spoken} of the protocol, this server version {PROTOCOL}")
        if claimed == {"channel": "stats"}:
            document = msgspec.json.encode(self._meter.read() | self._service.stats() | {"workers": len(self._workers)})
            connection.queue([memoryview(Header(Op.STATS, length=len(document)).pack()), memoryview(document)])
            yield from discard(1 << 62)
        try:
            claim = msgspec.convert(claimed, Claim)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"a claim that cannot be read: {error}") from None
        if claim.segment:
            connection.share(claim.segment)
            if connection.side:
                self._watch.share(connection)
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
        self._attend(connection, WRITE)

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
        self._watch.forget(connection)
        connection.close()

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
        self._watch.close()
        for sock in (self._listener, self._wake, self._woken):
            sock.close()
        for _, future in self._commands:
            future.set_exception(ClusterError("this server has stopped"))

    # What the service needs of the world.

    def send(self, rank: int, header: Header, parts: Sequence[memoryview] = ()) -> None:
        if not (connection := self._workers.get(rank)):
            return
        if header.flags & IN_PLACE and header.op == Op.WEIGHTS and not connection.informed:
            connection.informed = True
            parts = [memoryview(self._service.places())]
        connection.queue([memoryview(header.pack(sum(map(len, parts)) if parts else 0)), *parts])
        self._meter.answered(time.monotonic() - connection.asked)
        if connection is not self._attended:  # who is attended to gets all replies at once
            with suppress(OSError):  # whoever is gone is noticed where it is read from
                self._meter.bytes_sent += connection.flush()
            self._watch.adjust(connection)

    def before_update(self) -> None:
        for connection in self._workers.values():
            connection.own_unsent()

    def snapshot_taken(self, step: int, pieces: list[Piece]) -> None:
        self._on_snapshot(step, pieces)
