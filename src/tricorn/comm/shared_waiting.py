"""What a rank knows of the others of its group on this host, and how it waits for them.

Compiled code waits a slice at a time; between two slices one looks whether the rank that is missing is alive, has
given up, or has been waited for too long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tricorn.comm import shared_rounds as rounds
from tricorn.comm import shared_sums as sums
from tricorn.comm import words
from tricorn.comm.lane import aside
from tricorn.comm.liveness import Liveness
from tricorn.comm.segment import Segment
from tricorn.errors import PeerLost

SLICE = 10_000_000  # nanoseconds
ALIVE, BROKEN, LEFT = range(3)
FRESH = 200  # milliseconds for which a rank counts as waiting after it has said so, as it does each slice
ENDING = 50  # milliseconds that a process may take to end after its connections have closed

# Spins and yields before a waiter sleeps. Who has a core to itself spins: a sleeper is woken after 20 µs and more. It
# yields where ranks outnumber cores, and sleeps at once beside a thread of its own process that computes: spinning
# would take the core from that one, or from the peer that is waited for.
ALONE, CROWDED, ASIDE = (2000, 20), (20, 50), (20, 0)


class Waiting:
    """The group of ``rank``: the memory of all ranks in their order, and the processes of the others by rank.

    ``names`` are the numbers by which errors call the ranks.
    """

    def __init__(
        self, *, rank: int, segments: Sequence[Segment], processes: dict[int, int], label: str, timeout: float,
        names: Sequence[int],
    ) -> None:  # fmt: skip
        self.rank = rank
        self.names = names
        self.label = label
        self.timeout = timeout  # seconds
        self.others = [*processes]
        self.lost = ""  # why the group is of no use any more
        self._segments = segments
        self._liveness = Liveness(processes)
        self._room = np.zeros(sums.BLOCK, np.int64)
        enough = len(os.sched_getaffinity(0)) >= len(segments)
        self._groups = [self._numbers(*patience) for patience in (ALONE if enough else CROWDED, ASIDE)]

    @property
    def group(self) -> Any:
        """What compiled code is told of the group, for the thread that asks."""
        return self._groups[aside()]

    def insist(self, attempt: Callable[[], int], blocked_at: Callable[[], tuple[int, int]], what: str) -> int:
        """Attempt again, until no longer blocked by a peer that is alive and in time; returns the state.

        ``blocked_at`` says by which rank, and how far the operation has come. Raises PeerLost that names the peer; the
        group is of no use then.
        """
        began, state = time.monotonic(), int(rounds.BLOCKED)
        before = blocked_at()
        try:
            while state == rounds.BLOCKED:
                dead = self._liveness.dead()
                state = attempt()
                if state != rounds.BLOCKED:
                    break
                if (now := blocked_at()) != before:  # slow, perhaps, but not stuck
                    before, began = now, time.monotonic()
                rank, waited = now[0], time.monotonic() - began
                self._say_waits_for(rank)
                self._refuse_what_others_gave_up()  # not what is there already: peers may have built on it
                if rank in dead or self._state(rank) == LEFT:
                    how = "died" if rank in dead else "left the group"
                    raise PeerLost(
                        f"rank {self.names[rank]} {how}; {what} of {self.label!r} had waited {waited:.1f} s for it"
                    )
                if waited > self.timeout:
                    name = self.names[self._cause(rank)]
                    raise PeerLost(
                        f"rank {name} has not come to {what} of {self.label!r}; waited {waited:.1f} s for it"
                    )
        except BaseException as error:
            self.hang_up(str(error) or type(error).__name__)
            raise
        return state

    def dead(self) -> list[int]:
        """The names of the ranks whose processes have ended; of one that is ending, too."""
        return sorted(self.names[rank] for rank in self._liveness.dead(ENDING))

    def hang_up(self, why: str) -> None:
        """Make the group of no use, here and at the peers, who are told why. May be called again, by any thread."""
        if self.lost:
            return
        self.lost = why
        own, text = self._segments[self.rank], why.encode()[: rounds.TEXT_BYTES]
        own.memory[rounds.TEXT : rounds.TEXT + len(text)] = text
        words.store(own.address + rounds.STATE, BROKEN)

    def leave(self) -> None:
        """Let peers that wait for this rank know that it will not come. May be called again, by any thread."""
        self.lost = self.lost or "the group is closed"
        if self._state(self.rank) == ALIVE:
            words.store(self._segments[self.rank].address + rounds.STATE, LEFT)

    def close(self) -> None:
        """Forget the processes. May be called again."""
        self._liveness.close()

    def _say_waits_for(self, rank: int) -> None:
        words.store(self._segments[self.rank].address + rounds.WAITS, _milliseconds() << 16 | rank)

    def _cause(self, late: int) -> int:
        """Who holds up a rank that has not come, if that one waits itself; else, or in a circle, that one."""
        rank, seen = late, {self.rank}
        while rank not in seen:
            seen.add(rank)
            when, waits_for = divmod(int(words.load(self._segments[rank].address + rounds.WAITS)), 1 << 16)
            if _milliseconds() - when > FRESH:
                return rank
            rank = waits_for
        return late

    def _state(self, rank: int) -> int:
        return int(words.load(self._segments[rank].address + rounds.STATE))

    def _refuse_what_others_gave_up(self) -> None:
        if self.lost:
            raise PeerLost(self.lost)
        for rank, segment in enumerate(self._segments):
            if rank != self.rank and self._state(rank) == BROKEN:
                text = bytes(segment.memory[rounds.TEXT : rounds.TEXT + rounds.TEXT_BYTES]).rstrip(b"\0")
                raise PeerLost(f"rank {self.names[rank]} gave up: {text.decode(errors='replace')}")

    def _numbers(self, spins: int, yields: int) -> Any:
        size = len(self._segments)
        group = np.zeros(rounds.BASES + 2 * size, np.int64)
        group[rounds.SIZE], group[rounds.RANK] = size, self.rank
        group[rounds.SPINS], group[rounds.YIELDS], group[rounds.SLICE] = spins, yields, SLICE
        group[rounds.ROOM] = self._room.ctypes.data
        group[rounds.SOURCES] = group.ctypes.data + 8 * (rounds.BASES + size)
        group[rounds.BASES : rounds.BASES + size] = [segment.address for segment in self._segments]
        return group


def _milliseconds() -> int:
    """Of the clock that all processes of the host share."""
    return time.monotonic_ns() // 1_000_000
