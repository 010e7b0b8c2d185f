"""A stream of bytes through shared memory, one way: what one process writes, another reads, with no system call.

The stream is a sequence of records, each a descriptor of 24 bytes and what it says:

    kind (4)  number (4)  length (8)  offset (8)      little-endian; every record begins at a multiple of 8

    INLINE   ``length`` bytes of the stream follow
    SEGMENT  a ticket of ``length`` bytes follows: from now on segment ``number`` of this stream
    PLACE    ``length`` bytes of the stream lie in segment ``number`` from ``offset``, and are read there

Two words count the bytes written and read. A record may run over the end of the ring, into a margin made for that,
so none is ever in two parts. Who is about to sleep sets its bell; whoever clears it owes a byte on the socket.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from tricorn.comm import words
from tricorn.comm.kernel import kernel
from tricorn.comm.segment import Segment, Ticket
from tricorn.errors import ProtocolError
from tricorn.ps import memory

CAPACITY = 1 << 20  # bytes of each direction; a larger payload streams through
MAX_RECORD = 1 << 17  # bytes, with its descriptor
_LINE = 64  # bytes; each word has a cache line of its own
_START = 4096  # of the first ring; the words are before it
_SPAN = CAPACITY + MAX_RECORD
SIZE = _START + 2 * _SPAN  # bytes of the segment that one worker and one server share
_MAX_SEGMENTS = 64
_MAX_TICKET = 1024
_RECORD = struct.Struct("<IIQQ")
_MOST = MAX_RECORD - _RECORD.size  # bytes that one record says
_BLOCKED = CAPACITY - MAX_RECORD  # bytes unread beyond which a writer may lack room for a record
_INLINE, _SEGMENT, _PLACE = 1, 2, 3


class Writer:
    """``write`` puts what there is room for; ``rung`` is set when the other side sleeps and is owed a byte.

    ``refers``: parts in memory that is shared are not copied but read where they lie, later, as they are then.
    """

    def __init__(self, segment: Segment, words_at: int, start: int, bell: int, *, refers: bool) -> None:
        self._refers = refers
        self.rung = False
        self.words = self._head_word, self.tail_word = words_at, words_at + _LINE
        self.bell = bell
        self.ring = segment.array(np.uint8, start, _SPAN)
        self._ring = segment.memory[start : start + _SPAN]
        self.head = self.tail = 0  # bytes written, and those of them known to be read
        self._known: dict[int, int] = {}  # serial number of a segment: its number in this stream

    def write(self, parts: Sequence[memoryview]) -> int:
        """Write the parts end to end, as far as there is room; returns how many of their bytes."""
        before, written, small = self.head, 0, []
        for part in parts:
            if len(part) < memory.SMALLEST:
                small.append(part)
                continue
            joined, small = b"".join(small), []
            done = self._copy(joined)
            written += done
            if done < len(joined):
                break
            place = memory.find(part) if self._refers else None
            done = self._refer(*place, len(part)) if place and self._introduce(*place[:2]) else self._copy(part)
            written += done
            if done < len(part):
                break
        else:
            written += self._copy(small[0] if len(small) == 1 else b"".join(small))
        if self.head != before:
            self.rung |= publish(self._head_word, self.head, self.bell)
        return written

    def _copy(self, part: memoryview | bytes) -> int:
        done = 0
        while done < len(part):
            piece = part[done : done + _MOST] if len(part) > _MOST else part
            if not self._put(_INLINE, 0, len(piece), 0, piece):
                break
            done += len(piece)
        return done

    def _introduce(self, serial: int, segment: Segment) -> bool:
        """Make the segment known to the reader, unless there is no room for it."""
        if serial in self._known:
            return True
        number, ticket = len(self._known), msgspec.json.encode(segment.ticket)
        if number >= _MAX_SEGMENTS or not self._put(_SEGMENT, number, len(ticket), 0, ticket):
            return False
        self._known[serial] = number
        return True

    def _refer(self, serial: int, segment: Segment, offset: int, length: int) -> int:
        return length if self._put(_PLACE, self._known[serial], length, offset, b"") else 0

    def _put(self, kind: int, number: int, length: int, offset: int, content: memoryview | bytes) -> bool:
        size = _RECORD.size + _aligned(len(content))
        if self.head + size - self.tail > CAPACITY:
            self.tail = words.load(self.tail_word)
            if self.head + size - self.tail > CAPACITY:
                return False
        at = self.head % CAPACITY
        _RECORD.pack_into(self._ring, at, kind, number, length, offset)
        self._ring[at + _RECORD.size : at + _RECORD.size + len(content)] = content
        self.head += size
        return True


class Reader:
    """``lend`` and ``read_into`` take what is there; ``rung`` as the writer's."""

    def __init__(self, segment: Segment, words_at: int, start: int, bell: int) -> None:
        self.rung = False
        self.words = self.head_word, self._tail_word = words_at, words_at + _LINE
        self._bell = bell
        self.ring = segment.array(np.uint8, start, _SPAN)
        self._ring = segment.memory[start : start + _SPAN]
        self.head = self._tail = 0  # bytes known to be written, and those of them read
        self._record = memoryview(b"")  # what is left of the present record
        self._end = 0  # where it ends
        self._segments: dict[int, Segment] = {}

    def lend(self, count: int) -> memoryview | None:
        """The next bytes where they lie, until the next call; None if they are not there, or not in one part."""
        if not self._more() or len(self._record) < count:
            return None
        lent, self._record = self._record[:count], self._record[count:]
        return lent

    def read_into(self, view: memoryview) -> int:
        """Copy what is there into the view; returns how many bytes. Raises ProtocolError when the stream is broken."""
        record, done = self._record, len(view)
        if len(record) >= done:  # mostly: a small frame is one record
            view[:] = record[:done]
            self._record = record[done:]
            return done
        done = 0
        while done < len(view) and self._more():
            piece = self._record[: len(view) - done]
            view[done : done + len(piece)] = piece
            self._record = self._record[len(piece) :]
            done += len(piece)
        return done

    @property
    def between(self) -> bool:
        """Whether all of the records that were begun is taken."""
        return not self._record

    def settle(self) -> int:
        """Give back what is read, where no record is begun; returns how many bytes these are."""
        if self._end > self._tail:
            before, self._tail = self._tail, self._end
            self.rung |= give_back(self._tail_word, self._tail, self._bell, self.head_word, before)
        return self._tail

    def go_on(self, tail: int) -> None:
        """Up to here somebody else has read, and given back."""
        self._tail = self._end = tail
        self.head = max(self.head, tail)

    def close(self) -> None:
        for segment in self._segments.values():
            segment.close()

    def _more(self) -> bool:
        """Go on to the next record that has bytes, if there is one."""
        while not self._record:
            if self.head == self.settle():
                self.head = words.load(self.head_word)
                if self.head == self._tail:
                    return False
            self._next()
        return True

    def _next(self) -> None:
        # The other process may write anything at any time: what is judged here is a copy.
        at = self._tail % CAPACITY
        kind, number, length, offset = _RECORD.unpack_from(self._ring, at)
        inline = 0 if kind == _PLACE else length
        self._end = self._tail + _RECORD.size + _aligned(inline)
        if inline > _MOST or not self._end <= self.head <= self._tail + CAPACITY:
            raise ProtocolError("a ring in shared memory is broken")
        content = self._ring[at + _RECORD.size : at + _RECORD.size + inline]
        if kind == _INLINE:
            self._record = content
        elif kind == _PLACE and number in self._segments and offset + length <= self._segments[number].ticket.size:
            self._record = self._segments[number].memory[offset : offset + length]
        elif kind == _SEGMENT and number == len(self._segments) < _MAX_SEGMENTS and length <= _MAX_TICKET:
            self._segments[number] = Segment.attach(_read_ticket(bytes(content)))
        else:
            raise ProtocolError(f"a record of kind {kind} in a ring in shared memory")


class Side:
    """What the worker, or its server, uses of the segment that the two share."""

    def __init__(self, segment: Segment, *, worker: bool) -> None:
        base = segment.address
        requests, replies = (base, _START), (base + 2 * _LINE, _START + _SPAN)
        bells = base + 4 * _LINE, base + 5 * _LINE
        self.own_bell, other = bells if worker else bells[::-1]
        out, into = (requests, replies) if worker else (replies, requests)
        # A worker waits for the answer before it changes a gradient; a server changes its weights at any time.
        self.writer = Writer(segment, *out, other, refers=worker)
        self.reader = Reader(segment, *into, other)
        self._segment = segment

    def owes(self) -> bool:
        """Whether the other side has to be woken by a byte on the socket; it is then taken as done."""
        rung = self.writer.rung or self.reader.rung
        self.writer.rung = self.reader.rung = False
        return rung

    def close(self) -> None:
        self.reader.close()
        self._segment.close()


@kernel
def publish(word: int, value: int, bell: int) -> bool:
    """Set the word; returns whether the other side sleeps, and clears its bell."""
    words._store(word, value)
    words._fence()
    if words._load(bell) == 0:
        return False
    return bool(words._compare_exchange(bell, 1, 0) == 1)


@kernel
def give_back(word: int, value: int, bell: int, head: int, before: int) -> bool:
    """As ``publish``, of bytes read up to ``value``; nobody is woken who cannot be waiting for them."""
    words._store(word, value)
    words._fence()
    if words._load(head) - before <= _BLOCKED or words._load(bell) == 0:
        return False
    return bool(words._compare_exchange(bell, 1, 0) == 1)


@kernel
def changed(places: NDArray[np.int64], seen: NDArray[np.int64], first: int, spins: int, yields: int) -> int:
    """Wait for one of the words to differ from what was seen, and see it; returns its index, -1 if none does.

    It looks once, then ``spins`` times (about 40 ns each), then ``yields`` times with other processes between.
    """
    count = len(places)
    for turn in range(1 + spins + yields):
        if turn > spins:
            words._yield()
        elif turn:
            words._pause()
        for step in range(count):
            index = (first + step) % count
            word = words._load(places[index])
            if word != seen[index]:
                seen[index] = word
                return index
    return -1


@kernel
def may_sleep(bells: NDArray[np.int64], places: NDArray[np.int64], seen: NDArray[np.int64]) -> bool:
    """Set the bells; returns whether there is still no news, so that one may sleep until a byte comes."""
    for bell in bells:
        words._store(bell, 1)
    words._fence()
    news = False
    for index in range(len(places)):
        news |= words._load(places[index]) != seen[index]
    return not news


@kernel
def awake(bells: NDArray[np.int64]) -> None:
    """Take the bells back, so that nobody sends a byte for nothing."""
    for bell in bells:
        words._store(bell, 0)


def warm() -> None:
    """Have the machine code at hand, for a process whose forks will use it."""
    segment = Segment.create(SIZE, "tricorn-ps-warm")
    side = Side(segment, worker=True)
    side.writer.write([memoryview(b"warm")])
    words.load(side.reader.head_word)
    give_back(side.writer.tail_word, 0, side.own_bell, side.writer.tail_word, 0)
    place, seen = np.array([side.reader.head_word]), np.zeros(1, np.int64)
    changed(place, seen, 0, 0, 0)
    may_sleep(place, place, seen)
    awake(place)
    side.close()


def _aligned(size: int) -> int:
    return (size + 7) & ~7


def _read_ticket(document: bytes) -> Ticket:
    try:
        return msgspec.json.decode(document, type=Ticket)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"a ticket that cannot be read: {error}") from None
