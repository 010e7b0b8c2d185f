"""The durable record of which samples became part of the model, and how often (SQLite in the run's folder).

A row of ``commits`` is one step: the positions [start, stop) of its epoch's permutation, and the membership
epoch that committed it. A row is never deleted: when the run goes back to a checkpoint, the rows of the lost
steps are marked with the membership epoch that undid them, and the steps get new rows when they are run again.
What counts is what is not undone.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np

from tricorn.control.intervals import Intervals
from tricorn.data.order import Permutation, step_range, steps_per_epoch
from tricorn.documents import UNREADABLE
from tricorn.errors import UsageError

_TABLES = """
create table if not exists meta (key text primary key, value text not null);
create table if not exists commits (
    id integer primary key, step integer not null, epoch integer not null, start integer not null,
    stop integer not null, membership integer not null, undone integer);
create unique index if not exists live on commits (step) where undone is null;
create table if not exists evaluations (step integer primary key, measured text not null);
create table if not exists members (at real not null, membership integer not null, event text not null);
"""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What fixes the samples of every step."""

    seed: int
    fingerprint: str
    samples: int
    batch_size: int
    epochs: int


class Ledger:
    """One run's ledger. Commits of a step that is committed already change nothing."""

    def __init__(self, path: Path, order: Order | None = None) -> None:
        """Open the ledger, or create it for ``order``.

        Raises UsageError if there is none, if it cannot be read, or if it was made for another order.
        """
        if order is None and not path.exists():
            raise UsageError(f"there is no ledger at {path}", remedy="Name the folder of a run.")
        self._db = _connected(path, reads=order is None)
        try:
            self.order = self._open(order)
        except (sqlite3.DatabaseError, *UNREADABLE) as error:
            self.close()
            raise UsageError(
                f"the ledger {path} cannot be read: {error}", remedy="Restore it, or start a new run."
            ) from None
        except UsageError:
            self.close()
            raise

    def _open(self, order: Order | None) -> Order:
        self._db.execute("pragma journal_mode = wal")
        self._db.execute("pragma synchronous = normal")
        self._db.executescript(_TABLES)
        stored = msgspec.json.decode(self._meta("order") or "null", type=Order | None)
        if order is None and stored is None:
            raise UsageError("the ledger is empty: its run never began", remedy="Name the folder of a run.")
        if order is None or order == stored:
            return stored
        if stored is not None and (mistake := _difference(stored, order)):
            raise UsageError(
                f"the run was started with another order of samples: {mistake}",
                remedy="Resume with the same data, seed and batch size, or start a new run.",
            )
        done, steps = len(self.committed()), order.epochs * steps_per_epoch(order.samples, order.batch_size)
        if done > steps:
            raise UsageError(
                f"the run has done {done} steps already, and {order.epochs} epochs have only {steps}",
                remedy="Give the job more epochs, or start a new run.",
            )
        self._set_meta("order", msgspec.json.encode(order).decode())
        return order

    def _meta(self, key: str) -> str | None:
        row = self._db.execute("select value from meta where key = ?", (key,)).fetchone()
        return row[0] if row else None

    def _set_meta(self, key: str, value: str) -> None:
        self._db.execute("insert or replace into meta values (?, ?)", (key, value))

    def launched(self, launch: str, at: float, committed: int) -> tuple[float, int]:
        """When this launch of the run began and with how many steps: as first told, whatever is told later."""
        stored = None
        with contextlib.suppress(*UNREADABLE):
            stored = msgspec.json.decode(self._meta("launch") or "null", type=tuple[str, float, int] | None)
        if stored is None or stored[0] != launch:
            stored = (launch, at, committed)
            self._set_meta("launch", msgspec.json.encode(stored).decode())
        return stored[1:]

    @property
    def membership(self) -> int:
        """The newest membership epoch that was ever begun."""
        return int(self._meta("membership") or 0)

    def begin(self, membership: int, committed: Intervals, event: str, at: float) -> None:
        """Start a membership epoch whose model holds exactly the steps ``committed``."""
        with self._transaction():
            self._set_meta("membership", str(membership))
            self._db.execute("insert into members values (?, ?, ?)", (at, membership, event))
            live = self.committed()
            lost = [step for low, high in live.pairs for step in committed.missing(low, high)]
            self._db.executemany(
                "update commits set undone = ? where step = ? and undone is null", ((membership, s) for s in lost)
            )
            self._db.executemany("delete from evaluations where step > ?", [(len(committed),)] if lost else [])
            self._insert((s for low, high in committed.pairs for s in live.missing(low, high)), membership)

    def commit(self, steps: Iterable[int], membership: int) -> None:
        """Record that these steps are in the model."""
        with self._transaction():
            self._insert(steps, membership)

    def _insert(self, steps: Iterable[int], membership: int) -> None:
        order = self.order
        self._db.executemany(
            "insert or ignore into commits (step, epoch, start, stop, membership) values (?, ?, ?, ?, ?)",
            ((step, *step_range(step, order.samples, order.batch_size), membership) for step in steps),
        )

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        # Not msgspec, which would turn a value that is not a number into null.
        self._db.execute("insert or replace into evaluations values (?, ?)", (step, json.dumps(values)))

    def evaluations(self) -> dict[int, dict[str, float]]:
        """Step -> what was measured of the model of that step; without what is damaged."""
        found: dict[int, dict[str, float]] = {}
        for step, measured in self._db.execute("select step, measured from evaluations order by step"):
            with contextlib.suppress(json.JSONDecodeError, *UNREADABLE):
                found[step] = msgspec.convert(json.loads(measured), dict[str, float])
        return found

    def committed(self) -> Intervals:
        """The steps that are in the model."""
        numbered = "select step, step - row_number() over (order by step) as run from commits where undone is null"
        return Intervals(self._db.execute(f"select min(step), max(step) + 1 from ({numbered}) group by run order by 1"))

    def times_committed(self, epoch: int) -> np.ndarray:
        """How often each sample of the epoch is in the model: an int64 array, indexed by sample."""
        order = self.order
        per_position = np.zeros(order.samples + 1, dtype=np.int64)
        query = "select start, stop from commits where epoch = ? and undone is null"
        for start, stop in self._db.execute(query, (epoch,)):
            per_position[start] += 1
            per_position[stop] -= 1
        counts = np.empty(order.samples, dtype=np.int64)
        ids = Permutation(order.seed, epoch, order.fingerprint, order.samples).ids(0, order.samples)
        counts[ids] = np.cumsum(per_position[:-1])
        return counts

    def exactly_once(self, *, complete: bool = True) -> bool:
        """Whether every sample of every epoch is in the model once; of a run that is not complete, at most once."""
        query = "select epoch, start, stop from commits where undone is null order by epoch, start"
        rows = np.array(self._db.execute(query).fetchall(), dtype=np.int64).reshape(-1, 3)
        epoch, start, stop = rows.T
        follows = (epoch[1:] == epoch[:-1]) & (start[1:] >= stop[:-1])
        if not (follows | (epoch[1:] > epoch[:-1])).all():
            return False  # two steps took the same sample
        samples, epochs = self.order.samples, self.order.epochs
        inside = bool(((start >= 0) & (stop <= samples) & (epoch >= 0) & (epoch < epochs)).all())
        return inside and (not complete or int((stop - start).sum()) == samples * epochs)

    def undone(self) -> int:
        """How many commits were taken back, with the checkpoint that the run went back to, to be done again."""
        return int(self._db.execute("select count(*) from commits where undone is not null").fetchone()[0])

    def restarts(self) -> int:
        """How many membership epochs followed the first."""
        return int(self._db.execute("select max(0, count(*) - 1) from members").fetchone()[0])

    def _transaction(self) -> sqlite3.Connection:
        self._db.execute("begin immediate")
        return self._db  # as a context manager it commits, or rolls back on an error

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _connected(path: Path, *, reads: bool) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    if reads and not path.with_name(f"{path.name}-wal").exists():
        try:
            db.execute("select 1 from sqlite_master")
        except sqlite3.DatabaseError:
            # Where nothing can be written SQLite has no place for its locks; with no log beside it the file is whole.
            db.close()
            return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None)
    return db


def _difference(stored: Order, given: Order) -> str:
    names = ("seed", "fingerprint", "samples", "batch_size")
    return "; ".join(
        f"{n} was {getattr(stored, n)} and is now {getattr(given, n)}"
        for n in names
        if getattr(stored, n) != getattr(given, n)
    )
