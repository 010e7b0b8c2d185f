"""A sparse table as one server holds it: rows come into being with their ids, are updated, and go by rules.

Legend: U unique ids, D elements of a row, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray

from tricorn.errors import Diverged, PlanError, ProtocolError, TableFull
from tricorn.ps.sparse.arena import Arena, Layout, records_that_fit
from tricorn.ps.sparse.candidates import Candidates
from tricorn.ps.sparse.forget import PART, make_room, remove_unused
from tricorn.ps.sparse.ids import Ids, bucket_of, unique
from tricorn.ps.sparse.index import Places
from tricorn.ps.sparse.initial import initial_rows, stream_key
from tricorn.ps.sparse.reader import RowView, Ticket, checked, foreign, plain
from tricorn.ps.sparse.records import first_not_finite, touch
from tricorn.ps.sparse.rows import slot_widths, step_of
from tricorn.ps.sparse.spec import BUCKETS, TableSpec

_FOR_CANDIDATES = 4  # the part of the memory that is for ids without a row, where ``admit`` makes them wait
_INFINITE: dict[str, np.int32 | np.int64] = {"float32": np.int32(0x7F800000), "float64": np.int64(0x7FF0000000000000)}


class Rows(NamedTuple):
    """Rows as they are saved. One seen less often than the table's ``admit`` has not come into being yet."""

    ids: Ids  # [R]
    weights: NDArray[Any]  # [R, D]
    slots: dict[str, NDArray[Any]]  # [R, D], or [R, 1] where a row has one number
    counts: NDArray[np.int32]  # [R], the updates that had the id
    used: NDArray[np.int32]  # [R], the step of the last one


class SparseTable:
    """The rows of one server's buckets. It has one writer; others read through ``RowReader(ticket)``.

    ``memory_limit``, in bytes, is not exceeded; None is all memory of the machine. Arrays are of NumPy: ids int64,
    rows of the table's type. Raises PlanError for a declaration that cannot be, TableFull if the limit
    leaves no room for a row, ClusterError if the machine gives no shared memory.

    Every method raises ProtocolError for arrays of another form and for ids of another server, before it changes
    anything.
    """

    def __init__(self, spec: TableSpec, *, memory_limit: int | None = None) -> None:
        declared = spec.declared
        if spec.prefilled and declared.forgetful:
            raise PlanError(
                f"table {spec.name!r} has the model's own weights, which would be lost with its rows",
                remedy="Leave out admit, max_rows and ttl, or declare the table so that its rows begin by themselves.",
            )
        self.spec = spec
        self._widths = slot_widths(spec.optimizer, spec.dim)
        self._looked = 0  # the step of the last look for rows that were unused for too long
        limit = psutil.virtual_memory().total if memory_limit is None else memory_limit
        for_candidates = limit // _FOR_CANDIDATES if declared.admit > 1 else 0
        layout = Layout(
            dtype=spec.dtype, numbers=spec.dim + sum(self._widths.values()), dim=spec.dim,
            key=int(stream_key(spec.seed, spec.name)), std=float(declared.std), room=0,
        )  # fmt: skip
        room = records_that_fit(limit - for_candidates, layout.width)
        if declared.max_rows is not None:
            first, last = spec.buckets
            room = min(room, max(1, declared.max_rows * (last - first) // BUCKETS))
        if room < 1:
            raise TableFull(f"table {spec.name!r} has no room for a row in its memory limit of {limit:,} bytes")
        self._arena = Arena.create(msgspec.structs.replace(layout, room=room), f"tricorn table {spec.name}")
        self._candidates: Candidates | None = None
        if declared.admit > 1:
            self._candidates = Candidates(layout, for_candidates, f"tricorn candidates {spec.name}")
        self._view = RowView(spec, self._arena)
        self.ticket = Ticket(spec=spec, layout=self._arena.layout, memory=self._arena.ticket)

    @property
    def rows(self) -> int:
        return self._arena.rows

    @property
    def nbytes(self) -> int:
        """The memory taken, with that of ids that have no row yet."""
        return self._arena.nbytes + (self._candidates.arena.nbytes if self._candidates else 0)

    def gather(self, ids_U: Ids, out_UD: NDArray[Any]) -> None:
        """Fill ``out_UD`` with these rows. Ids without a row are read as their first value, and get none by it."""
        still = self._view.gather(ids_U, out_UD)
        assert still, "a table has one writer"

    def update(self, ids_U: Ids, grads_UD: NDArray[Any], *, step: int, lr: float) -> None:
        """One optimizer step on the rows of these ids, which are unique; rows that are not there yet begin first.

        ``step`` counts from 1 and ``lr`` has the schedule in it, as for ``tricorn.optim``. Raises Diverged for a
        gradient that is not finite and TableFull at the limits; the table is then as it was.
        """
        arena, layout = self._arena, self._arena.layout
        ids_U, grads_UD = checked(self.spec, ids_U, grads_UD), plain(grads_UD)
        places_U, absent = self._find(ids_U)
        infinite = _INFINITE[self.spec.dtype]
        if (n := first_not_finite(grads_UD.reshape(-1).view(infinite.dtype), infinite)) >= 0:
            id = ids_U[n // self.spec.dim]
            raise Diverged(f"the gradient of table {self.spec.name!r} is not finite at id {id} in step {step}")
        if absent:
            self._must_be_unique(ids_U[places_U < 0])
            places_U = self._begin(ids_U, places_U, step)
        touch(arena.halves, layout.width, places_U, step)
        kernel, constants = step_of(self.spec.optimizer, step, lr)
        kernel(arena.numbers, layout.stride, layout.first, places_U, grads_UD, np.array(constants, layout.dtype))

    def check_buckets(self, ids_U: Ids) -> None:
        """Raise ProtocolError for an id of another server, as an update would."""
        first, last = self.spec.buckets
        if last - first < BUCKETS and len(ids_U):
            buckets_U = bucket_of(ids_U)
            if len(wrong := np.flatnonzero((buckets_U < first) | (buckets_U >= last))):
                raise foreign(self.spec, int(ids_U[wrong[0]]))

    def check_room(self, ids_U: Ids) -> None:
        """Raise TableFull if an update of these ids would: several tables are then updated all or not at all."""
        if self._arena.rows + len(ids_U) <= self._arena.layout.room:  # all may be new
            return
        ids_U = np.require(ids_U, requirements=["C", "A", "W"])
        places_U, absent = self._find(ids_U)
        if absent:
            due_U = self._due(ids_U, places_U)
            self._must_fit(int(np.count_nonzero(due_U)), int(np.count_nonzero(places_U[due_U] < 0)))

    def fill(self, start: int, weights_RD: NDArray[Any]) -> None:
        """Rows ``start`` to ``start`` + R - 1 have these weights; those of other buckets are left out."""
        count = len(weights_RD)
        none = np.zeros(count, np.int32)
        slots = {name: np.zeros((count, width), self.spec.dtype) for name, width in self._widths.items()}
        self.load(Rows(np.arange(start, start + count), weights_RD, slots, none, none))

    def tick(self, step: int) -> int:
        """After the updates of a step: let rows go that were unused for ``ttl`` steps, and return how many went.

        They are looked for when another sixteenth of ``ttl`` has passed.
        """
        ttl = self.spec.declared.ttl
        if ttl is None or step // (period := max(1, ttl // PART)) <= self._looked // period:
            return 0
        self._looked = step
        if self._candidates:
            remove_unused(self._candidates.arena, step - ttl + 1)
        return remove_unused(self._arena, step - ttl + 1)

    def export(self, chunk: int) -> Iterator[Rows]:
        """Copies of all rows, at most ``chunk`` at a time. The table must not change before the last is taken."""
        arenas = [self._arena, self._candidates.arena] if self._candidates else [self._arena]
        for arena in arenas:
            for start in range(0, arena.rows, chunk):
                part = slice(start, start + chunk)
                ids, counts, used = arena.ids[part].copy(), arena.counts[part].copy(), arena.used[part].copy()
                numbers = arena.rows_of_numbers[part] if arena is self._arena else self._first_numbers(ids)
                weights, *slots = np.split(numbers, np.cumsum([self.spec.dim, *self._widths.values()])[:-1], axis=1)
                named = {name: slot.copy() for name, slot in zip(self._widths, slots, strict=True)}
                yield Rows(ids, weights.copy(), named, counts, used)

    def load(self, rows: Rows) -> None:
        """Have these rows as they were saved, by any number of servers; those of other buckets are left out.

        Beyond ``max_rows`` some go, as in training. Raises TableFull as ``update`` does.
        """
        spec = self.spec
        ids_R = checked(spec, rows.ids, rows.weights)
        self._must_be_unique(ids_R)
        for name, width in self._widths.items():
            slot = rows.slots.get(name)
            if slot is None or slot.shape != (len(ids_R), width) or slot.dtype != spec.dtype:
                raise ProtocolError(f"slot {name!r} of table {spec.name!r} is missing or of another form")
        buckets_R = bucket_of(ids_R)
        taken_R = (spec.buckets[0] <= buckets_R) & (buckets_R < spec.buckets[1])
        if self._candidates:
            early_R = taken_R & (rows.counts < spec.declared.admit)
            taken_R &= ~early_R
            places = self._candidates.enter(ids_R[early_R])
            arena, early = self._candidates.arena, np.flatnonzero(early_R)[places >= 0]
            arena.counts[places[places >= 0]] = rows.counts[early]
            arena.used[places[places >= 0]] = rows.used[early]
        numbers = np.concatenate([rows.weights, *(rows.slots[name] for name in self._widths)], axis=1)
        taken = np.flatnonzero(taken_R)
        at_once = max(1, self._arena.layout.room // 2)  # so that what is loaded displaces the rest, never itself
        for part in (taken[start : start + at_once] for start in range(0, len(taken), at_once)):
            places = self._enter(ids_R[part], self._find(ids_R[part])[0])
            self._arena.rows_of_numbers[places] = numbers[part]
            self._arena.counts[places] = rows.counts[part]
            self._arena.used[places] = rows.used[part]

    def hottest(self, count: int) -> list[tuple[int, int]]:
        """The ids that were in most steps, with how many, most first."""
        arena = self._arena
        counts = arena.counts[: arena.rows]
        top = np.argpartition(counts, -count)[-count:] if len(counts) > count else np.arange(len(counts))
        top = top[np.argsort(-counts[top], kind="stable")]
        return [(int(arena.ids[place]), int(counts[place])) for place in top]

    def close(self) -> None:
        """Give the memory back, as soon as the last reader has let go of it."""
        self._arena.close()
        if self._candidates:
            self._candidates.arena.close()

    def _find(self, ids_U: Ids) -> tuple[Places, int]:
        places_U, absent = self._arena.find(ids_U, self.spec.buckets)
        if absent < 0:
            raise foreign(self.spec, int(ids_U[-1 - absent]))
        return places_U, absent

    def _must_be_unique(self, ids: Ids) -> None:
        if len(unique(ids)[0]) < len(ids):
            raise ProtocolError(f"ids of table {self.spec.name!r} come twice; they have to be unique")

    def _must_fit(self, rows: int, new: int) -> None:
        """Raise TableFull unless an update of so many rows, some of them new, leaves a table within its limits."""
        arena, spec = self._arena, self.spec
        if arena.rows + new > arena.layout.room:
            if not (spec.declared.max_rows or spec.declared.ttl):
                raise TableFull(
                    f"table {spec.name!r} has {arena.rows:,} rows, and its memory limit leaves no room for {new:,} more"
                )
            if rows > arena.layout.room:
                raise TableFull(
                    f"table {spec.name!r} has room for {arena.layout.room:,} rows on this server, but one update has "
                    f"{rows:,}",
                    remedy="Raise its max_rows (or the memory limit), add servers, or make batches smaller.",
                )

    def _due(self, ids_U: Ids, places_U: Places) -> NDArray[np.bool_]:
        """Which ids have a row, or get one by their next update."""
        due_U = places_U >= 0
        if not self._candidates:
            return np.ones_like(due_U)
        due_U[~due_U] = self._candidates.counts(ids_U[~due_U]) >= self.spec.declared.admit - 1
        return due_U

    def _begin(self, ids_U: Ids, places_U: Places, step: int) -> Places:
        """Give rows to the ids that have none and are due for one; where all are then, -1 for those that wait."""
        if not self._candidates:
            return self._enter(ids_U, places_U)
        absent_U, due_U = places_U < 0, self._due(ids_U, places_U)
        places_U[due_U] = self._enter(ids_U[due_U], places_U[due_U])
        self._candidates.leave(ids_U[due_U & absent_U])
        self._candidates.see(ids_U[~due_U], step)
        return places_U

    def _enter(self, ids_U: Ids, places_U: Places) -> Places:
        """Where these rows are, after those that were not there have begun."""
        arena, spec = self._arena, self.spec
        new_U = places_U < 0
        new_ids, kept = ids_U[new_U], places_U[~new_U]
        self._must_fit(len(ids_U), len(new_ids))
        if make_room(arena, len(new_ids), kept, spec.declared.evict):
            places_U, _ = self._find(ids_U)
        start = arena.rows
        arena.append(new_ids, spec.declared.admit - 1)
        places_U[new_U] = np.arange(start, arena.rows)
        return places_U

    def _first_numbers(self, ids: Ids) -> NDArray[Any]:
        """What rows have that did not come into being yet."""
        spec = self.spec
        numbers = np.zeros((len(ids), self._arena.layout.numbers), spec.dtype)
        numbers[:, : spec.dim] = initial_rows(spec.seed, spec.name, ids, spec.declared.std, spec.dim, spec.dtype)
        return numbers
