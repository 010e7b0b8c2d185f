"""One worker's side to all servers: every request goes out to all of them before any reply is read.

Legend: N elements of all trainable parameters; each server holds one slice [start, stop) of them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import msgspec
from torch import Tensor

from tricorn.comm.sockets import Address, connect, receive_into
from tricorn.errors import PeerLost, ProtocolError
from tricorn.ps.table import Description
from tricorn.ps.wire import PEEK, WANTED, Header, Op, as_bytes, receive_header, send

Slice = tuple[int, int]


class Ack(NamedTuple):
    """What a complete step came to: the sums of all workers' statuses, and the mean gradient's squared L2 norm."""

    status: tuple[float, ...]
    squared_norm: float


class Client:
    """Blocking requests to the servers of one membership epoch, from one thread; ``interrupt`` from any.

    Flat tensors have N elements, lie on the CPU and are sent from, and received into, where they lie. Every
    request raises PeerLost when a server is lost or the client interrupted, and the error that a server reports;
    after any error the client is of no more use.
    """

    def __init__(
        self,
        servers: Sequence[Address],
        slices: Sequence[Slice],
        secret: bytes,
        *,
        rank: int,
        incarnation: int,
        epoch: int,
    ) -> None:
        self.slices = tuple(slices)
        self.bytes_sent = 0
        self._servers = tuple(servers)
        self._secret = secret
        self._claim = {"channel": "ps", "rank": rank, "incarnation": incarnation, "epoch": epoch}
        self._sockets: list[socket.socket] = []
        self._interrupted = False

    def connect(self) -> None:
        """Dial all servers. Raises PeerLost, AuthenticationError or ProtocolError."""
        for address in self._servers:
            self._sockets.append(connect(address, self._secret, self._claim))
            if self._interrupted:
                raise PeerLost("interrupted while connecting")

    def create(self, descriptions: Sequence[Description], initial: Callable[[], Tensor]) -> None:
        """Rank 0: say what each server has to hold; bring the initial weights to those that want them."""
        documents = [memoryview(msgspec.json.encode(description)) for description in descriptions]
        with self._lost_peers():
            self._send_all([Header(Op.CREATE)] * len(documents), documents)
            replies = [receive_header(sock, Op.CREATED) for sock in self._sockets]
            wanting = [server for server, reply in enumerate(replies) if reply.flags & WANTED]
            if wanting:
                weights_N = initial()
                for server in wanting:
                    self._send(server, Header(Op.LOAD), self._part(weights_N, server))
                for server in wanting:
                    receive_header(self._sockets[server], Op.DONE)

    # Synchronous steps.

    def push_sum(self, step: int, status: Sequence[float], gradient_N: Tensor) -> Ack:
        """Contribute a gradient sum and five numbers to a step; returns when all workers have, on all servers."""
        with self._lost_peers():
            self._send_all(
                [Header(Op.PUSH, step=step, numbers=tuple(status))] * len(self._sockets), self._parts(gradient_N)
            )
            return _agreed([receive_header(sock, Op.ACK) for sock in self._sockets])

    def status(self, step: int) -> Ack | None:
        """What a step before this epoch came to, None if the servers did not see it."""
        with self._lost_peers():
            self._send_all([Header(Op.STATUS, step=step)] * len(self._sockets))
            replies = [receive_header(sock, Op.ACK, Op.DONE) for sock in self._sockets]
        acks = [reply for reply in replies if reply.op == Op.ACK]
        if acks and len(acks) < len(replies):
            raise ProtocolError(f"{len(acks)} of {len(replies)} servers remember step {step}")
        return _agreed(acks) if acks else None

    def pull_version(self, version: int, weights_N: Tensor, *, scale: float, lr: float) -> None:
        """Receive the weights of that version, having the servers apply the decided step before it, scaled."""
        self._pull([Header(Op.PULL, version=version, numbers=(scale, lr))] * len(self._sockets), weights_N)

    def snapshot(self, step: int) -> None:
        """Rank 0: have all servers add the state of that step, which all workers have pulled, to a checkpoint."""
        with self._lost_peers():
            self._send_all([Header(Op.SNAPSHOT, step=step)] * len(self._sockets))
            for sock in self._sockets:
                receive_header(sock, Op.DONE)

    # Asynchronous steps.

    def push(self, step: int, bases: Sequence[int], gradient_N: Tensor, *, lr: float) -> list[int]:
        """Have a mean gradient applied once as that step; ``bases``: the versions, by server, it was computed from.

        Returns each server's version.
        """
        headers = [Header(Op.PUSH, step=step, version=base, numbers=(lr,)) for base in bases]
        with self._lost_peers():
            self._send_all(headers, self._parts(gradient_N))
            return [receive_header(sock, Op.PUSHED).version for sock in self._sockets]

    def pull(self, weights_N: Tensor, *, peek: bool = False) -> list[int]:
        """Receive the newest weights when the clocks allow, or at once to ``peek``; returns each server's version."""
        return self._pull([Header(Op.PULL, flags=PEEK * peek)] * len(self._sockets), weights_N)

    def idle(self) -> None:
        """Say that this worker waits for work."""
        with self._lost_peers():
            self._send_all([Header(Op.IDLE)] * len(self._sockets))
            for sock in self._sockets:
                receive_header(sock, Op.DONE)

    def interrupt(self) -> None:
        """Make a blocked request, and every later one, raise PeerLost. Safe from any thread."""
        self._interrupted = True
        for sock in [*self._sockets]:
            with suppress(OSError):  # it was lost or closed before
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()

    def _pull(self, headers: Sequence[Header], weights_N: Tensor) -> list[int]:
        versions = []
        with self._lost_peers():
            self._send_all(headers)
            for server, sock in enumerate(self._sockets):
                reply, part = receive_header(sock, Op.WEIGHTS), self._part(weights_N, server)
                if reply.length != len(part):
                    raise ProtocolError(f"weights of {reply.length} bytes came where {len(part)} are due")
                receive_into(sock, part)
                versions.append(reply.version)
        return versions

    def _send_all(self, headers: Sequence[Header], parts: Sequence[memoryview] = ()) -> None:
        for server, header in enumerate(headers):
            self._send(server, header, parts[server] if parts else None)

    def _send(self, server: int, header: Header, part: memoryview | None) -> None:
        self.bytes_sent += send(self._sockets[server], header, part)

    def _parts(self, flat_N: Tensor) -> list[memoryview]:
        return [self._part(flat_N, server) for server in range(len(self.slices))]

    def _part(self, flat_N: Tensor, server: int) -> memoryview:
        start, stop = self.slices[server]
        return as_bytes(flat_N[start:stop])

    @contextmanager
    def _lost_peers(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            raise PeerLost(f"a parameter server is lost: {error}") from None


def _agreed(acks: Sequence[Header]) -> Ack:
    # All servers add the same numbers in the same order; each knows the norm of its own slice only.
    return Ack(acks[0].numbers[:5], sum(ack.numbers[5] for ack in acks))
