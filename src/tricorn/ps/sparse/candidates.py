"""Ids that were not yet seen often enough to have a row: their count and last use, in memory that is bounded.

Legend: U unique ids.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from tricorn.ps.sparse.arena import Arena, Layout, records_that_fit
from tricorn.ps.sparse.forget import descending, make_room
from tricorn.ps.sparse.ids import Ids
from tricorn.ps.sparse.index import Places
from tricorn.ps.sparse.records import touch
from tricorn.ps.sparse.spec import BUCKETS

_ALL = (0, BUCKETS)
_NONE = np.empty(0, np.int64)


class Candidates:
    """Where there is no room for another, those go that were seen longest ago; they begin anew when seen again."""

    def __init__(self, of: Layout, memory_limit: int, label: str) -> None:
        layout = msgspec.structs.replace(of, numbers=0, dim=0, room=0)
        room = max(1, records_that_fit(memory_limit, layout.width))
        self.arena = Arena.create(msgspec.structs.replace(layout, room=room), label)

    def counts(self, ids_U: Ids) -> NDArray[np.int32]:
        """How often each was seen; 0 for those that are not here."""
        places_U = self._places(ids_U)
        counts_U = np.zeros(len(ids_U), np.int32)
        counts_U[places_U >= 0] = self.arena.counts[places_U[places_U >= 0]]
        return counts_U

    def see(self, ids_U: Ids, step: int) -> None:
        """Count one use of each in that step."""
        touch(self.arena.halves, self.arena.layout.width, self.enter(ids_U), step)

    def enter(self, ids_U: Ids) -> Places:
        """Where these are from now on, -1 for those beyond what there is room for."""
        places_U = self._places(ids_U)
        new_U = places_U < 0
        kept = places_U[~new_U]
        new_U[np.flatnonzero(new_U)[self.arena.layout.room - len(kept) :]] = False
        if make_room(self.arena, int(np.count_nonzero(new_U)), kept, "oldest"):
            places_U = self._places(ids_U)
        start = self.arena.rows
        self.arena.append(ids_U[new_U], 0)
        places_U[new_U] = np.arange(start, self.arena.rows)
        return places_U

    def leave(self, ids_U: Ids) -> None:
        places_U = self._places(ids_U)
        self.arena.remove(descending(places_U[places_U >= 0]))

    def _places(self, ids_U: Ids) -> Places:
        return self.arena.find(ids_U, _ALL)[0]
