"""Which records go: the same ones whatever the order in which they lie."""

from __future__ import annotations

from typing import Literal

import numpy as np

from tricorn.ps.sparse.arena import Arena
from tricorn.ps.sparse.index import Places

Evict = Literal["oldest", "rarest"]

# When an arena is full, a sixteenth of it goes at once: so the look at all records is not made each step. And records
# that were unused for too long are looked for each sixteenth of that time.
PART = 16


def make_room(arena: Arena, needed: int, kept: Places, evict: Evict) -> bool:
    """Remove what has to go for ``needed`` records more, which ``kept`` and those fit; whether any record moved."""
    if arena.rows + needed <= arena.layout.room:
        return False
    left = max(len(kept), arena.layout.room - needed - arena.layout.room // PART)
    arena.remove(least(arena, arena.rows - left, kept, evict))
    return True


def least(arena: Arena, number: int, kept: Places, evict: Evict) -> Places:
    """The ``number`` records that go first, in descending order, none of them among ``kept``.

    Those used longest ago, and among these the least often (``oldest``), or the other way round (``rarest``); where
    both are equal, those with the lowest ids.
    """
    leading, other = (arena.used, arena.counts) if evict == "oldest" else (arena.counts, arena.used)
    ranks = leading.astype(np.int64)
    ranks[kept] = np.iinfo(np.int64).max
    limit = np.partition(ranks, number - 1)[number - 1]
    below, ties = np.flatnonzero(ranks < limit), np.flatnonzero(ranks == limit)
    ties = ties[np.lexsort((arena.ids[ties], other[ties]))[: number - len(below)]]
    return descending(np.concatenate([below, ties]))


def remove_unused(arena: Arena, before: int) -> int:
    """Remove the records that were last used before that step, and count them."""
    gone = np.flatnonzero(arena.used < before)
    if len(gone):
        arena.remove(descending(gone))
    return len(gone)


def descending(places: Places) -> Places:
    return np.sort(places)[::-1].copy()
