"""Rings in shared memory: they carry any stream, and what the other side writes into them is not trusted."""

from __future__ import annotations

import gc
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tricorn.comm.segment import Segment
from tricorn.errors import ProtocolError
from tricorn.ps import memory, ring, streaming
from tricorn.ps.bells import Bells
from tricorn.ps.ring import CAPACITY, MAX_RECORD, SIZE, Side
from tricorn.ps.wire import as_bytes, unsent


class Pair:
    """Both ends of one segment, in one process."""

    def __init__(self) -> None:
        self.segment = Segment.create(SIZE, "tricorn test")
        self.worker, self.server = Side(self.segment, worker=True), Side(self.segment, worker=False)

    def close(self) -> None:
        self.worker.close()
        self.server.close()


@pytest.fixture
def pair():
    made = Pair()
    yield made
    made.close()


sizes = st.one_of(st.integers(0, 200), st.integers(MAX_RECORD - 9, MAX_RECORD + 9), st.integers(0, 3 * CAPACITY))


@settings(max_examples=25)
@given(st.lists(st.tuples(sizes, st.booleans()), min_size=1, max_size=6), st.integers(1, 1 << 19), st.booleans())
def test_any_stream_arrives_as_it_was_sent(parts: list[tuple[int, bool]], gulp: int, backwards: bool) -> None:
    pair = Pair()
    writer, reader = (pair.server.writer, pair.worker.reader) if backwards else (pair.worker.writer, pair.server.reader)
    noise = torch.randint(0, 256, (4 * CAPACITY,), dtype=torch.uint8, generator=torch.Generator().manual_seed(gulp))
    lying = memory.zeros(len(noise), torch.uint8)
    lying.copy_(noise)
    left = [as_bytes((lying if shared else noise)[size % 7 : size % 7 + size]) for size, shared in parts]
    expected = b"".join(bytes(part) for part in left)
    got = bytearray()
    room = memoryview(bytearray(gulp))
    while left or len(got) < len(expected):
        left = unsent(left, writer.write(left)) if left else []
        while count := reader.read_into(room):
            got += room[:count]
    pair.close()
    assert bytes(got) == expected


@pytest.mark.parametrize("backwards", [True, False])
def test_the_longest_record_may_begin_at_the_last_place_of_the_ring(pair: Pair, backwards: bool) -> None:
    writer, reader = (pair.server.writer, pair.worker.reader) if backwards else (pair.worker.writer, pair.server.reader)
    room = memoryview(bytearray(MAX_RECORD))
    left, record = CAPACITY - 8, 24  # descriptor
    while left:  # up to the last 8 bytes of the ring, by records that are read at once
        size = min(left, MAX_RECORD) - record
        size -= record if 0 < left - size - record < record + 8 else 0  # or the rest would hold no record
        assert writer.write([memoryview(bytes(size))]) == size
        assert reader.read_into(room[:size]) == size
        left -= size + record
    noise = memoryview(bytes(index % 251 for index in range(MAX_RECORD)))
    assert writer.write([noise]) == MAX_RECORD
    assert reader.read_into(room) == MAX_RECORD
    assert room == noise


def test_memory_that_is_known_to_both_is_not_copied(pair: Pair) -> None:
    gradient = memory.zeros(1 << 20, torch.float32)
    view = as_bytes(gradient[16:])
    assert pair.worker.writer.write([memoryview(b"head"), view]) == 4 + len(view)
    head = memoryview(bytearray(4))
    assert pair.server.reader.read_into(head) == 4
    lent = pair.server.reader.lend(len(view))
    assert lent is not None
    gradient[16] = 7.0
    assert struct.unpack("<f", lent[:4]) == (7.0,)
    lent.release()


def test_shared_memory_goes_with_its_last_view() -> None:
    gc.collect()  # what earlier tests left in cycles
    before = len(memory._segments)
    view = memory.zeros(1000, torch.float64)[10:20]
    assert memory.find(as_bytes(view)) is not None
    assert memory.find(memoryview(bytearray(8))) is None
    assert len(memory._segments) == before + 1
    del view
    gc.collect()
    assert len(memory._segments) == before


def test_more_segments_than_a_stream_introduces_are_copied(pair: Pair) -> None:
    size = memory.SMALLEST
    room = memoryview(bytearray(size))
    for number in range(70):
        tensor = memory.zeros(size, torch.uint8)
        tensor.fill_(number)
        assert pair.worker.writer.write([as_bytes(tensor)]) == size
        assert pair.server.reader.read_into(room) == size
        assert room[0] == room[-1] == number


records = st.tuples(*[st.integers(0, 2**32 - 1)] * 2, *[st.integers(0, 2**64 - 1)] * 2)
likely = st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 2**18), st.integers(0, 2**18))


@settings(max_examples=100)
@given(st.one_of(records, likely), st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**20)), st.binary())
def test_a_ring_full_of_lies_is_a_protocol_error_or_bytes(
    record: tuple[int, int, int, int], head: int, content: bytes
) -> None:
    pair = Pair()
    pair.segment.memory[4096 : 4096 + 24] = struct.pack("<IIQQ", *record)
    pair.segment.memory[4096 + 24 : 4096 + 24 + len(content)] = content
    pair.segment.memory[:8] = struct.pack("<q", head)
    room = memoryview(bytearray(1 << 20))
    try:
        got = pair.server.reader.read_into(room)
    except ProtocolError:
        got = 0
    pair.close()
    assert got <= CAPACITY


def test_a_bell_is_rung_once_and_only_for_who_sleeps(pair: Pair) -> None:
    bells = Bells()
    bells.watch([pair.server])
    while bells.changed(patient=False) is not None:
        pass
    pair.worker.writer.write([memoryview(b"awake")])
    assert not pair.worker.owes()
    assert bells.changed(patient=True) == 0
    assert bells.may_sleep()
    pair.worker.writer.write([memoryview(b"asleep")])
    pair.worker.writer.write([memoryview(b"asleep")])
    assert pair.worker.owes()
    assert not pair.worker.owes()
    assert not bells.may_sleep()
    bells.awake()
    pair.worker.writer.write([memoryview(b"awake again")])
    assert not pair.worker.owes()


def test_who_is_watched_has_turns(pair: Pair) -> None:
    other = Pair()
    bells = Bells()
    bells.watch([pair.server, other.server])
    while bells.changed(patient=False) is not None:
        pass
    for each in (pair, other):
        each.worker.writer.write([memoryview(b"x")])
    first = bells.changed(patient=False)
    pair.worker.writer.write([memoryview(b"x")])
    other.worker.writer.write([memoryview(b"x")])
    assert {first, bells.changed(patient=False)} == {0, 1}
    other.close()


def test_waiting_ends_with_the_change_and_sees_it() -> None:
    words = np.zeros(4, np.int64)
    places, seen = words.ctypes.data + 8 * np.arange(4), np.zeros(4, np.int64)
    assert ring.changed(places, seen, 0, 10, 2) == -1
    words[3] = 5
    assert ring.changed(places, seen, 1, 0, 0) == 3
    assert seen[3] == 5
    assert ring.changed(places, seen, 1, 0, 0) == -1


@pytest.mark.parametrize("size", [0, 100, streaming.LEAST, streaming.LEAST + 1, streaming.LEAST + 200])
@pytest.mark.parametrize(("to", "of"), [(0, 0), (1, 0), (63, 64), (8, 3)])
def test_a_copy_past_the_cache_is_a_copy(size: int, to: int, of: int) -> None:
    source = torch.randint(0, 256, (size + 64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size + to))
    target = torch.zeros(size + 200, dtype=torch.uint8)
    streaming.copy(as_bytes(target)[to : to + size], as_bytes(source)[of : of + size])
    assert torch.equal(target[to : to + size], source[of : of + size])
    assert not target[:to].any()
    assert not target[to + size :].any()
    with pytest.raises(ValueError, match="do not fill"):
        streaming.copy(as_bytes(target), as_bytes(source)[:1])
