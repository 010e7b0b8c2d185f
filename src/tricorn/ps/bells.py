"""What a server watches of the memory that it shares with workers: whose words have changed, and how to sleep."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import numpy as np

from tricorn.ps.ring import Side, awake, changed, may_sleep

_SPINS = 250  # 10 us
_YIELDS = 200  # 100 us or more, unless somebody else has something to do
# Where news came later than that, the next is slept for at once: the wait took half of a server's time beside two
# workers that compute for 4 ms, and who sleeps is given a core before those when it wakes.
_SOON = 0.0003  # seconds


class Bells:
    """Watches the sides of connections, in turn."""

    def __init__(self) -> None:
        self.count = 0
        self._next = 0
        self._patient = True
        self._slept = 0.0  # since when
        self.watch([])

    def watch(self, sides: Iterable[Side]) -> None:
        """Watch these, whose words may have changed already."""
        sides = [*sides]
        self.count = len(sides)
        self._idle_core = self.count < (os.cpu_count() or 1)  # else waiting takes from a worker's time
        words = [word for side in sides for word in (side.reader.head_word, side.writer.tail_word)]
        self._words = np.array(words, np.int64)
        self._seen = np.full(len(words), -1, np.int64)
        self._bells = np.array([side.own_bell for side in sides], np.int64)

    @property
    def turns(self) -> tuple[int, int]:
        """How often to look again where nothing has changed: at once, and with other processes between."""
        return (_SPINS, _YIELDS) if self.count == 1 and self._idle_core else (0, 0)

    def changed(self, *, patient: bool) -> int | None:
        """The number of a side whose words have changed since this was last said of them; may wait a moment."""
        patient = patient and self._patient and self._idle_core
        index: int = changed(self._words, self._seen, self._next, _SPINS * patient, _YIELDS * patient)
        if index < 0:
            return None
        self._next = index + 1
        return index // 2

    def may_sleep(self) -> bool:
        """Whether nothing has changed; whoever changes something from now on sends a byte."""
        self._slept = time.monotonic()
        return bool(may_sleep(self._bells, self._words, self._seen))

    def awake(self) -> None:
        """Call after ``may_sleep``, when there are news."""
        self._patient = time.monotonic() - self._slept < _SOON
        awake(self._bells)
