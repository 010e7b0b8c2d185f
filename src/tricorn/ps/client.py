"""One worker's side to all servers: the operations of the protocol (docs/protocol.md).

Legend: N elements of all dense parameters, of which each server holds one slice [start, stop); U ids of one sparse
table; D elements of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from torch import Tensor

from tricorn.comm.sockets import Address
from tricorn.errors import Diverged, PeerLost, ProtocolError, TableFull
from tricorn.ps.dial import dial
from tricorn.ps.exchange import Exchange, Slice, lost_peers
from tricorn.ps.rows import RowGradients, Wanted
from tricorn.ps.table import Description
from tricorn.ps.wire import ANY_AGE, PEEK, PROTOCOL, REFUSED, ROWS_ALONE, VOID, WANTED, Header, Op, as_bytes

if TYPE_CHECKING:
    import ssl

    from tricorn.comm.codecs import ErrorFeedback
    from tricorn.ps.sparse.spec import TableSpec

_LOAD_BYTES = 4 << 20  # of the rows of one LOAD


class Ack(NamedTuple):
    """What a complete step came to: the sums of all workers' statuses, and the mean gradient's squared L2 norm."""

    status: tuple[float, ...]
    squared_norm: float


class Pushed(NamedTuple):
    """What became of an asynchronous push: each server's version, and whether any refused it as too old."""

    versions: list[int]
    refused: bool


class Reading:
    """Rows, and it may be weights, that were asked for and are on their way."""

    def __init__(self, client: Client, receive: Callable[[], Pushed]) -> None:
        self.receive = receive
        self.answer: Pushed | None = None
        self._client = client

    def wait(self) -> list[int]:
        """Until all is where it is wanted; returns each server's version. May be called again."""
        return self.pushed().versions

    def pushed(self) -> Pushed:
        """As ``wait``, with what became of the push that this was asked for with."""
        if self.answer is None:
            self._client.finish_reading()
        assert self.answer is not None, "the request failed"
        return self.answer


class Client:
    """Blocking requests to the servers of one membership epoch, from one thread; ``interrupt`` from any.

    Flat tensors have N elements, lie on the CPU and are sent from, and received into, where they lie; a gradient may be
    overwritten by being pushed. ``tables``
    are the sparse tables in the order in which requests number them, whatever their ``buckets`` say. ``compress``
    is how gradients travel, ``compress_tables``, by name, how those of a table's rows do where it differs; ``feedback``
    adds to a dense gradient what earlier ones lost (its owner says when to ``keep``). With ``share``, servers of this
    host are reached through shared memory; ``tls`` encrypts connections.

    Every request raises PeerLost when a server is lost or the client interrupted, and the error that a server
    reports; after these the client is of no more use. UsageError for ids and rows that do not fit is raised before
    anything is sent.
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
        tables: Sequence[TableSpec] = (),
        compress: str = "none",
        compress_tables: Mapping[str, str] = MappingProxyType({}),
        feedback: ErrorFeedback | None = None,
        share: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._addresses = tuple(servers)
        self._secret = secret
        self._claim = {
            "channel": "ps", "rank": rank, "incarnation": incarnation, "epoch": epoch, "protocol": PROTOCOL
        }  # fmt: skip
        self._share, self._tls = share, tls
        self._wire = Exchange(slices, tables, compress, compress_tables, feedback)
        self._interrupted = False
        self._version = 0  # the synchronous version that was pulled last
        self._reading: Reading | None = None

    @property
    def bytes_sent(self) -> int:
        return sum(server.bytes_sent for server in self._wire.servers)

    def connect(self) -> None:
        """Dial all servers. Raises PeerLost, AuthenticationError or ProtocolError."""
        for address in self._addresses:
            self._wire.servers.append(dial(address, self._secret, self._claim, share=self._share, tls=self._tls))
            if self._interrupted:
                raise PeerLost("interrupted while connecting")

    def check(self, rows: Sequence[Wanted | RowGradients]) -> None:
        """Raise UsageError for rows that a request cannot speak of."""
        self._wire.rows.check(rows)

    def create(
        self,
        descriptions: Sequence[Description],
        initial: Callable[[], Tensor],
        prefilled: Sequence[Tensor | None] = (),
    ) -> None:
        """Say what each server has to hold; rank 0 brings the initial weights to those that want them.

        Another rank waits until that has happened. Raises ProtocolError if a server holds something else.
        ``prefilled``: for each sparse table the rows that the model gives it, [rows, D], None if it gives none.
        """
        servers = self._wire.servers
        with lost_peers():
            for server, description in zip(servers, descriptions, strict=True):
                server.send(Header(Op.CREATE), [memoryview(msgspec.json.encode(description))])
            replies = [server.receive(Op.CREATED) for server in servers]
            wanting = [index for index, reply in enumerate(replies) if reply.flags & WANTED]
            if not wanting:
                return
            for table, weights_RD in enumerate(prefilled):
                chunk = 0 if weights_RD is None else max(1, _LOAD_BYTES // max(1, weights_RD[:1].nbytes))
                for start in range(0, 0 if weights_RD is None else len(weights_RD), chunk or 1):
                    assert weights_RD is not None
                    part = as_bytes(weights_RD[start : start + chunk].flatten())
                    self._load(wanting, Header(Op.LOAD, step=1 + table, version=start), [part] * len(servers))
            weights_N = initial()
            self._load(wanting, Header(Op.LOAD), [self._wire.part(weights_N, index) for index in range(len(servers))])

    def _load(self, wanting: Sequence[int], header: Header, parts: Sequence[memoryview]) -> None:
        for index in wanting:
            self._wire.servers[index].send(header, [parts[index]])
        for index in wanting:
            self._wire.servers[index].receive(Op.DONE)

    # Synchronous steps.

    def push_sum(
        self,
        step: int,
        status: Sequence[float],
        gradient_N: Tensor | None,
        rows: Sequence[RowGradients] = (),
        *,
        bases: Sequence[int] | None = None,
    ) -> Ack:
        """Contribute gradient sums and five numbers to a step; returns when all workers have, on all servers.

        With local steps there may be no ``gradient_N``, and a sixth number is the count of rows where it is another.
        ``bases``: by server, the oldest version that rows were read from, where that is not the step's own. Raises,
        on every worker, Diverged if the gradient is not finite and TableFull if a server has no room for its rows; the
        step is applied nowhere then.
        """
        self.finish_reading()
        bases = bases or [step] * len(self._wire.servers)
        headers = [Header(Op.PUSH, step=step, version=base, numbers=tuple(status)) for base in bases]
        return _agreed(self._wire.push(headers, gradient_N, rows, Op.ACK), step)

    def status(self, step: int) -> Ack | None:
        """What a step before this epoch came to, None if the servers did not see it. Raises as ``push_sum``."""
        replies = self._ask(Header(Op.STATUS, step=step), Op.ACK, Op.DONE)
        acks = [reply for reply in replies if reply.op == Op.ACK]
        if acks and len(acks) < len(replies):
            raise ProtocolError(f"{len(acks)} of {len(replies)} servers remember step {step}")
        return _agreed(acks, step) if acks else None

    def pull_version(
        self,
        version: int,
        weights_N: Tensor | None,
        wanted: Sequence[Wanted] = (),
        *,
        scale: float,
        factor: float,
        void: bool = False,
    ) -> None:
        """Receive the weights and rows of that version, having the servers apply the decided step before it.

        The gradient is multiplied by ``scale``, every optimizer's rate by ``factor``. A step for which ``push_sum`` has
        raised is ``void``: the version has nothing of it, on any server. Without ``weights_N``, which is for local
        steps, rows are received alone.
        """
        self.finish_reading()
        flags = VOID * void | (0 if weights_N is not None else ROWS_ALONE)
        self._wire.pull(Header(Op.PULL, version=version, flags=flags, numbers=(scale, factor)), weights_N, wanted)
        self._version = version

    def snapshot(self, step: int) -> None:
        """Rank 0: have all servers add the state of that step, which all workers have pulled, to a checkpoint."""
        self._ask(Header(Op.SNAPSHOT, step=step), Op.DONE)

    # Asynchronous steps.

    def push(
        self,
        step: int,
        bases: Sequence[int],
        gradient_N: Tensor,
        rows: Sequence[RowGradients] = (),
        *,
        factor: float,
        any_age: bool = False,
    ) -> Pushed:
        """Have mean gradients applied once as that step; ``bases``: the versions, by server, they were computed from.

        Every optimizer's rate is multiplied by ``factor``. A push that is refused as too old by a server has had no
        effect there; pushing the step again with ``any_age``, from newer weights, takes effect at those servers only.
        Raises Diverged if a gradient is not finite; it has then no effect at the server that found it.
        """
        self.finish_reading()
        headers = _push_headers(Op.PUSH, step, bases, factor, any_age)
        return _pushed(self._wire.push(headers, gradient_N, rows, Op.PUSHED))

    def push_pull(
        self,
        step: int,
        bases: Sequence[int],
        gradient_N: Tensor,
        rows: Sequence[RowGradients],
        weights_N: Tensor,
        wanted: Sequence[Wanted] = (),
        *,
        factor: float,
    ) -> tuple[Pushed, list[int]]:
        """``push``, then ``pull``, in one round trip."""
        self.finish_reading()
        headers = _push_headers(Op.PUSH_PULL, step, bases, factor, any_age=False)
        self._wire.send_push_pull(headers, gradient_N, rows, wanted)
        pushed = _pushed(self._wire.receive_push_pull(headers, gradient_N, rows, weights_N, wanted))
        return pushed, pushed.versions

    def ask_push_pull(
        self,
        step: int,
        bases: Sequence[int],
        gradient_N: Tensor,
        rows: Sequence[RowGradients],
        weights_N: Tensor,
        wanted: Sequence[Wanted] = (),
        *,
        factor: float,
    ) -> Reading:
        """As ``push_pull``, without waiting: until then nothing that is given may be changed.

        The next request waits first, if ``wait`` was not called before it, and raises what the push came to.
        """
        self.finish_reading()
        headers = _push_headers(Op.PUSH_PULL, step, bases, factor, any_age=False)
        self._wire.send_push_pull(headers, gradient_N, rows, wanted)
        self._reading = Reading(
            self, lambda: _pushed(self._wire.receive_push_pull(headers, gradient_N, rows, weights_N, wanted))
        )
        return self._reading

    def pull(self, weights_N: Tensor, wanted: Sequence[Wanted] = (), *, peek: bool = False) -> list[int]:
        """Receive the newest weights and rows when the clocks allow, or at once to ``peek``.

        Returns each server's version.
        """
        self.finish_reading()
        return self._wire.pull(Header(Op.PULL, flags=PEEK * peek), weights_N, wanted)

    def newest(self, weights_N: Tensor) -> int:
        """The newest synchronous version, which all servers then have; waits until they know what they hold.

        A client that was lost between its servers may have left some behind. The step that these lack is decided, so
        they apply it, at the optimizers' own rate, or drop it, as the others did.
        """
        versions = [reply.version for reply in self._ask(Header(Op.STATUS, step=-1), Op.DONE)]
        newest, void = max(versions), False
        if min(versions) < newest:
            try:
                self.status(newest - 1)
            except (Diverged, TableFull):
                void = True
            self.pull_version(newest, weights_N, scale=1.0, factor=1.0, void=void)
        return newest

    def barrier(self) -> None:
        """Wait until every worker of this epoch has come to its barrier, or has left."""
        self._ask(Header(Op.BARRIER), Op.DONE)

    def idle(self) -> None:
        """Say that this worker waits for work."""
        self._ask(Header(Op.IDLE), Op.DONE)

    # Rows alone, in all modes.

    def read_rows(self, wanted: Sequence[Wanted], *, ahead: int = 0, peek: bool = False) -> list[int]:
        """Receive rows when the consistency of the tables allows, or at once to ``peek``.

        ``ahead``: they are for so many steps after the present one, and bound by what will hold then; that has to
        be possible now (BSP: not ahead; SSP: at most the staleness). Returns each server's version.
        """
        return self.ask_rows(wanted, ahead=ahead, peek=peek).wait()

    def ask_rows(self, wanted: Sequence[Wanted], *, ahead: int = 0, peek: bool = False) -> Reading:
        """As ``read_rows``, without waiting. The next request waits first, if ``wait`` was not called before it."""
        self.finish_reading()
        header = Header(Op.ROWS, step=ahead, version=self._version, flags=PEEK * peek)
        self._wire.send_reads(header, wanted)
        self._reading = Reading(self, lambda: Pushed(self._wire.receive_reads(header, None, wanted), refused=False))
        return self._reading

    def finish_reading(self) -> None:
        """Receive what is on its way, if anything is."""
        if reading := self._reading:
            self._reading = None
            reading.answer = reading.receive()

    def interrupt(self) -> None:
        """Make a blocked request, and every later one, raise PeerLost. Safe from any thread."""
        self._interrupted = True
        for server in [*self._wire.servers]:
            with suppress(OSError):  # it was lost or closed before
                server.interrupt()

    def close(self) -> None:
        for server in self._wire.servers:
            server.close()

    def _ask(self, header: Header, *expected: Op) -> list[Header]:
        self.finish_reading()
        return self._wire.ask([header] * len(self._wire.servers), *expected)


def _push_headers(op: Op, step: int, bases: Sequence[int], factor: float, any_age: bool) -> list[Header]:
    return [Header(op, step, base, ANY_AGE * any_age, (factor,)) for base in bases]


def _pushed(replies: Sequence[Header]) -> Pushed:
    return Pushed([reply.version for reply in replies], any(reply.flags & REFUSED for reply in replies))


def _agreed(acks: Sequence[Header], step: int) -> Ack:
    # All servers add the same numbers in the same order; each knows the norm of its own part only.
    norm, loss_sum = sum(ack.numbers[5] for ack in acks), acks[0].numbers[0]
    if not math.isfinite(norm) and math.isfinite(loss_sum):  # of the loss, the caller says so
        raise Diverged(f"the gradient of step {step} is not finite")
    return Ack(acks[0].numbers[:5], norm)
