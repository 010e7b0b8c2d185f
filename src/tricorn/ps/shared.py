"""A worker's end of a connection through shared memory: no system call while both sides are awake.

The socket stays: as a sign of life, since the kernel closes it whatever happens to the process, and as the bell that
wakes who sleeps.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from tricorn.comm.segment import Segment
from tricorn.errors import PeerLost, ProtocolError
from tricorn.ps.memory import SMALLEST, find, zeros
from tricorn.ps.places import Memory
from tricorn.ps.ring import SIZE, Side, awake, changed, may_sleep
from tricorn.ps.transport import judged
from tricorn.ps.wire import HEADER, IN_PLACE, MAX_DOCUMENT, Header, Op, as_bytes, unsent

_SPINS = 500  # 20 us
_YIELDS = 300  # 150 us or more: to be woken costs about as long, and whoever needs the core has it meanwhile
_SOON = 0.0003  # seconds: where the last answer took longer, the next is slept for at once
_MAX_STAGED = 64 << 20  # bytes; more streams through the ring


def new_segment() -> Segment:
    """What a worker offers to a server. Raises ClusterError when there is no room."""
    return Segment.create(SIZE, "tricorn-ps-ring")


class SharedTransport:
    """Fulfils ``Transport``: parts in memory that ``tricorn.ps.memory`` made are read by the server where they lie,
    so they may be changed only when the reply has come.
    """

    def __init__(self, sock: socket.socket, segment: Segment) -> None:
        self.bytes_sent = 0
        self.in_place = Memory()
        self._sock = sock
        self._side = Side(segment, worker=True)
        self._header = memoryview(bytearray(HEADER.size))
        self._bells = np.array([self._side.own_bell])
        self._arrival = np.array([self._side.reader.head_word])
        self._departure = np.array([self._side.writer.tail_word])
        self._seen = np.zeros(1, np.int64)
        self._stage = memoryview(b"")
        self._unanswered = 0
        self._patient = True
        self._lost = False

    def send(self, header: Header, parts: Sequence[memoryview] = ()) -> None:
        if self._lost:
            raise PeerLost("the connection was closed")
        length = sum(map(len, parts))
        if SMALLEST <= length <= _MAX_STAGED and not self._unanswered and not (len(parts) == 1 and find(parts[0])):
            parts = [self._staged(parts, length)]
        self._unanswered += 1
        left: Sequence[memoryview] = [memoryview(header.pack(length)), *parts]
        missing = HEADER.size + length
        self.bytes_sent += missing
        while missing := missing - (sent := self._side.writer.write(left)):
            left = unsent(left, sent)
            self._wait(self._departure, self._side.writer.tail)
        if self._side.writer.rung:
            self._wake()

    def receive(self, *expected: Op) -> Header:
        self.receive_into(self._header)
        self._unanswered -= 1
        header = judged(Header.unpack(self._header), expected, self.receive_into)
        if header.op != Op.WEIGHTS or not header.flags & IN_PLACE or not header.length:
            return header
        if header.length > MAX_DOCUMENT:
            raise ProtocolError(f"places of {header.length} bytes are over the limit of {MAX_DOCUMENT}")
        document = bytearray(header.length)
        self.receive_into(memoryview(document))
        self.in_place.attach(document)
        return header._replace(length=0)

    def receive_into(self, view: memoryview) -> None:
        reader = self._side.reader
        while (got := reader.read_into(view)) < len(view):
            view = view[got:]
            self._wait(self._arrival, reader.head)
        if reader.rung:
            self._wake()

    def interrupt(self) -> None:
        self._lost = True
        self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()
        self._side.close()
        self.in_place.close()

    def _staged(self, parts: Sequence[memoryview], length: int) -> memoryview:
        """The parts in one piece that the server reads where it lies, until it has answered."""
        if len(self._stage) < length:
            self._stage = as_bytes(zeros(1 << (length - 1).bit_length(), torch.uint8))
        at = 0
        for part in parts:
            self._stage[at : at + len(part)] = part
            at += len(part)
        return self._stage[:length]

    def _wait(self, place: NDArray[np.int64], seen: int) -> None:
        """Until the word is not what it was any more."""
        self._wake()
        self._seen[0] = seen
        if changed(place, self._seen, 0, _SPINS * self._patient, _YIELDS * self._patient) >= 0:
            return
        if self._lost:
            raise PeerLost("the server closed the connection")
        slept = time.monotonic()
        if may_sleep(self._bells, place, self._seen):
            self._lost = not self._sock.recv(256)  # what was said before the end is heard first
        awake(self._bells)
        self._patient = time.monotonic() - slept < _SOON

    def _wake(self) -> None:
        if self._side.owes():
            with suppress(BlockingIOError):  # it has not read so many bytes that it will wake anyhow
                self._sock.send(b"\0", socket.MSG_DONTWAIT)
