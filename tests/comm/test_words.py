from __future__ import annotations

import os
import signal
import time

from tricorn.comm import words
from tricorn.comm.segment import Segment

WORD, BELL, OTHER, OTHER_BELL = 0, 64, 128, 192
SLICE = 20_000_000


def test_each_operation_on_a_word() -> None:
    segment = Segment.create(4096, "words")
    word = segment.address
    assert words.load(word) == 0
    words.store(word, 5)
    assert words.load(word) == 5


def test_waiting_ends_after_the_time_given() -> None:
    segment = Segment.create(4096, "words")
    began = time.monotonic()
    assert not words.wait_at_least(segment.address, 1, segment.address + BELL, 10, 2, SLICE)
    assert SLICE / 1e9 <= time.monotonic() - began < 5


def test_no_wake_is_lost() -> None:
    """Two processes answer each other, always asleep: a lost wake costs the whole slice, here ten minutes."""
    segment = Segment.create(4096, "words")
    base, forever = segment.address, 600 * 10**9
    child = os.fork()
    mine, theirs = ((WORD, BELL), (OTHER, OTHER_BELL)) if child else ((OTHER, OTHER_BELL), (WORD, BELL))
    signal.alarm(60)
    for turn in range(1, 3001):
        if child:
            words.store(base + mine[0], turn)
            words.wake(base + theirs[1])
        assert words.wait_at_least(base + theirs[0], turn, base + mine[1], 0, 0, forever)
        if not child:
            words.store(base + mine[0], turn)
            words.wake(base + theirs[1])
    signal.alarm(0)
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
