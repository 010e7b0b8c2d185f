"""Requests to all servers at once and their replies: flat tensors cut into slices, rows sorted out by server.

Legend: N elements of all dense parameters, of which each server holds one slice [start, stop); V rows of one server
in one table, of D elements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, dtype

from tricorn.errors import PeerLost, ProtocolError
from tricorn.ps.blocks import ENCODINGS, Writer, aligned, codec_of
from tricorn.ps.memory import SMALLEST
from tricorn.ps.placement import bucket_stops
from tricorn.ps.rows import RowGradients, Rows, Wanted
from tricorn.ps.transport import Transport, told
from tricorn.ps.wire import ENCODING_SHIFT, IN_PLACE, ROWS_ALONE, Header, Op, as_bytes

if TYPE_CHECKING:
    from tricorn.comm.codecs import ErrorFeedback
    from tricorn.ps.sparse.spec import TableSpec

Slice = tuple[int, int]
_VIEWS = 64


class Exchange:
    """What one worker sends to its ``servers``, which are connected later, and what it gets from them.

    A server that answers UNKNOWN has not done what was asked, and is asked again with nothing left out.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        tables: Sequence[TableSpec],
        compress: str,
        by_table: Mapping[str, str],
        feedback: ErrorFeedback | None,
    ) -> None:
        self.slices = tuple(slices)
        self.servers: list[Transport] = []
        self.rows = Rows(tables, bucket_stops(len(slices)), [by_table.get(table.name, compress) for table in tables])
        self._encoding = ENCODINGS.index(compress)
        self._feedback = feedback
        self._last: dict[int, memoryview] = {}  # by server, the dense gradient as it was encoded
        self._whole: set[int] = set()  # servers whose memory cannot be read in place after all
        self._views: dict[tuple[int, int, dtype], memoryview] = {}  # of small tensors, by address, elements and type

    def ask(self, headers: Sequence[Header], *expected: Op) -> list[Header]:
        """Send a request without payload to each server; returns the replies, or raises as ``push``."""
        with lost_peers():
            for server, header in zip(self.servers, headers, strict=True):
                server.send(header)
            replies = [server.receive(*expected) for server in self.servers]
            self._check_acks(replies)
        return replies

    def push(
        self, headers: Sequence[Header], gradient_N: Tensor | None, rows: Sequence[RowGradients], reply: Op
    ) -> list[Header]:
        """Send each server its part of the gradients, of rows alone without ``gradient_N``; returns the replies.

        Raises, when all have replied, what an acknowledgement says against the step.
        """
        self.rows.check(rows)
        with lost_peers():
            for index, header in enumerate(headers):
                self._send_push(index, header, gradient_N, rows)
            replies = [server.receive(reply, Op.UNKNOWN) for server in self.servers]
            for index in [index for index, each in enumerate(replies) if each.op == Op.UNKNOWN]:
                self.rows.forget(index)
                self._send_push(index, headers[index], gradient_N, rows, again=True)
                replies[index] = self.servers[index].receive(reply)
            self._check_acks(replies)
        return replies

    def _check_acks(self, replies: Sequence[Header]) -> None:
        acks = [(each, server) for each, server in zip(replies, self.servers, strict=True) if each.op == Op.ACK]
        against = [told(ack, server.receive_into) for ack, server in acks if ack.length]
        if against:
            raise against[0]

    def pull(self, header: Header, weights_N: Tensor | None, wanted: Sequence[Wanted]) -> list[int]:
        """Have each server's part of the weights and rows brought where they belong; returns the versions."""
        self.send_reads(header, wanted)
        return self.receive_reads(header, weights_N, wanted)

    def send_push_pull(
        self, headers: Sequence[Header], gradient_N: Tensor, rows: Sequence[RowGradients], wanted: Sequence[Wanted]
    ) -> None:
        """Push and pull in one request to each server; the gradients may be needed again until it is answered."""
        if rows or wanted:
            self.rows.check(rows)
            self.rows.check(wanted)
        with lost_peers():
            for index, header in enumerate(headers):
                self._send_push(index, header, gradient_N, rows, wanted)

    def receive_push_pull(
        self,
        headers: Sequence[Header],
        gradient_N: Tensor,
        rows: Sequence[RowGradients],
        weights_N: Tensor,
        wanted: Sequence[Wanted],
    ) -> list[Header]:
        """The replies to ``send_push_pull`` of the same."""
        replies = []
        with lost_peers():
            for index, server in enumerate(self.servers):
                reply = server.receive(Op.WEIGHTS, Op.UNKNOWN)
                if reply.op == Op.UNKNOWN:
                    self._tell_all(index)
                    self._send_push(index, headers[index], gradient_N, rows, wanted, again=True)
                    reply = server.receive(Op.WEIGHTS)
                self._receive_weights(index, reply, weights_N, wanted)
                replies.append(reply)
        return replies

    def send_reads(self, header: Header, wanted: Sequence[Wanted]) -> None:
        self.rows.check(wanted)
        with lost_peers():
            for index in range(len(self.servers)):
                self._send_read(index, header, wanted)

    def receive_reads(self, header: Header, weights_N: Tensor | None, wanted: Sequence[Wanted]) -> list[int]:
        """The replies to ``send_reads`` of the same header; no ``weights_N`` where rows alone were asked for."""
        with lost_peers():
            return [self._receive_read(index, header, weights_N, wanted) for index in range(len(self.servers))]

    def part(self, flat_N: Tensor, index: int) -> memoryview:
        """What of a flat tensor is that server's."""
        if len(self.slices) > 1:
            start, stop = self.slices[index]
            flat_N = flat_N[start:stop]
        key = flat_N.data_ptr(), flat_N.numel(), flat_N.dtype
        if (known := self._views.get(key)) is not None:
            return known
        view = as_bytes(flat_N)
        if len(view) < SMALLEST:  # to make a view takes longer than to copy it, and it keeps the memory
            if len(self._views) >= _VIEWS:
                self._views.clear()
            self._views[key] = view
        return view

    def _send_push(
        self,
        index: int,
        header: Header,
        gradient_N: Tensor | None,
        rows: Sequence[RowGradients],
        wanted: Sequence[Wanted] = (),
        *,
        again: bool = False,
    ) -> None:
        """``wanted``: the rows that a PUSH_PULL reads; ``again``: the server did not take it the first time."""
        in_place = self._in_place(index)
        if gradient_N is None:
            writer = Writer()
            self.rows.write(writer, index, rows, whole=in_place, seed=header.step)
            self.servers[index].send(header._replace(flags=header.flags | ROWS_ALONE), writer.parts)
            return
        if not (rows or wanted or self._encoding):
            op, step, version, flags, numbers, _ = header
            if in_place and op == Op.PUSH_PULL:
                flags |= IN_PLACE
            self.servers[index].send(Header(op, step, version, flags, numbers), (self.part(gradient_N, index),))
            return
        asks = header.op == Op.PUSH_PULL and not in_place and bool(rows or wanted)
        flags = header.flags | self._encoding << ENCODING_SHIFT
        if header.op == Op.PUSH_PULL and in_place:
            flags |= IN_PLACE
        writer = Writer()
        writer.add(self._last[index] if again and self._encoding else self._encoded(header.step, gradient_N, index))
        self.rows.write(writer, index, rows, whole=in_place, always=asks, seed=header.step)
        if asks:
            self.rows.write(writer, index, wanted, whole=False, always=True)
        self.servers[index].send(header._replace(flags=flags), writer.parts)

    def _encoded(self, step: int, gradient_N: Tensor, index: int) -> memoryview:
        start, stop = self.slices[index]
        codec = codec_of(self._encoding)
        if codec is None:
            return self.part(gradient_N, index)
        gradient_S = gradient_N[start:stop]
        data = self._feedback.encode(gradient_S, step, start) if self._feedback else codec.encode(gradient_S, step)
        self._last[index] = as_bytes(data)
        return self._last[index]

    def _in_place(self, index: int) -> bool:
        return self.servers[index].in_place is not None and index not in self._whole

    def _send_read(self, index: int, header: Header, wanted: Sequence[Wanted]) -> None:
        if self._in_place(index):
            self.servers[index].send(header._replace(flags=header.flags | IN_PLACE))
            return
        writer = Writer()
        self.rows.write(writer, index, wanted, whole=False)
        self.servers[index].send(header, writer.parts)

    def _receive_read(self, index: int, header: Header, weights_N: Tensor | None, wanted: Sequence[Wanted]) -> int:
        server = self.servers[index]
        reply = server.receive(Op.WEIGHTS, Op.UNKNOWN)
        if reply.op == Op.UNKNOWN:
            self._tell_all(index)
            self._send_read(index, header, wanted)
            reply = server.receive(Op.WEIGHTS)
        self._receive_weights(index, reply, weights_N, wanted)
        return reply.version

    def _tell_all(self, index: int) -> None:
        """A server did not know something, or let nothing be read in place: ask it again with all that there is."""
        if self._in_place(index):
            self._whole.add(index)
        self.rows.forget(index)

    def _receive_weights(self, index: int, reply: Header, weights_N: Tensor | None, wanted: Sequence[Wanted]) -> None:
        if self._in_place(index):
            self._read_in_place(index, weights_N, wanted)
        else:
            self._receive_parts(index, reply, weights_N, wanted)

    def _read_in_place(self, index: int, weights_N: Tensor | None, wanted: Sequence[Wanted]) -> None:
        from tricorn.ps.streaming import copy

        place = self.servers[index].in_place
        assert place
        if weights_N is not None:
            part = self.part(weights_N, index)
            copy(part, place.weights[: len(part)])  # a segment has a byte at least, and a slice may have none
        for each, ids_V, rows_VD in self.rows.places(index, wanted) if wanted else ():
            place.gather(each.table, ids_V, rows_VD)
            self.rows.put(index, each, rows_VD)

    def _receive_parts(self, index: int, reply: Header, weights_N: Tensor | None, wanted: Sequence[Wanted]) -> None:
        server, places = self.servers[index], [*self.rows.places(index, wanted)] if wanted else []
        parts = [self.part(weights_N, index)] if weights_N is not None else []
        length = sum(map(len, parts))
        for _, _, rows_VD in places:
            padding = aligned(length) - length
            parts += [memoryview(bytearray(padding)), as_bytes(rows_VD.flatten())]
            length += padding + len(parts[-1])
        if reply.length != length:
            raise ProtocolError(f"weights of {reply.length} bytes came where {length} are due")
        for part in parts:
            server.receive_into(part)
        for each, _, rows_VD in places:
            self.rows.put(index, each, rows_VD)


class lost_peers:
    """A context in which an OSError, of a connection, is a lost peer."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise PeerLost(f"a parameter server is lost: {error}") from None
