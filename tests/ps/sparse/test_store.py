"""The sparse table beside a dict, over random sequences of all that is done to one; its limits and its errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tricorn import optim
from tricorn.errors import Diverged, PlanError, ProtocolError, TableFull, TricornError
from tricorn.ps.sparse.arena import bytes_of, records_that_fit
from tricorn.ps.sparse.forget import PART
from tricorn.ps.sparse.ids import bucket_of
from tricorn.ps.sparse.index import bits_for, holds
from tricorn.ps.sparse.initial import initial_rows
from tricorn.ps.sparse.spec import BUCKETS, TableSpec
from tricorn.ps.sparse.store import Rows, SparseTable
from tricorn.table import Table

ROUNDS = int(os.environ.get("TRICORN_ROUNDS", 12))
DIM = 3
EXTREMES = [-(2**63), 2**63 - 1, 0, -1, 2**32, -(2**32)]
OPTIMIZER = optim.SGD(lr=0.5, momentum=0.5)  # exact in binary: what the model computes is what a kernel must


def spec_of(buckets: tuple[int, int] = (0, BUCKETS), **declared: Any) -> TableSpec:
    return TableSpec("e", DIM, "float64", 7, Table(std=0.5, **declared), OPTIMIZER, buckets)


def table_of(**declared: Any) -> SparseTable:
    return SparseTable(spec_of(**declared))


def ones(ids: np.ndarray) -> np.ndarray:
    return np.ones((len(ids), DIM))


def everything(*tables: SparseTable) -> dict[int, tuple[Any, ...]]:
    return {
        int(id): (rows.weights[n].tolist(), rows.slots["momentum_buffer"][n].tolist(), rows.counts[n], rows.used[n])
        for table in tables
        for rows in table.export(7)
        for n, id in enumerate(rows.ids)
    }


class Modelled(RuleBasedStateMachine):
    """Some servers with a table, and a dict of id -> [weights, momentum, count, last use]."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[SparseTable] = []

    @initialize(
        admit=st.sampled_from([1, 1, 3]), ttl=st.sampled_from([None, 4, 40]),
        max_rows=st.sampled_from([None, None, 40]), evict=st.sampled_from(["oldest", "rarest"]),
    )  # fmt: skip
    def begin(self, **declared: Any) -> None:
        self.declared = Table(std=0.5, **declared)
        self.model: dict[int, list[Any]] = {}
        self.step = self.looked = 0
        self.build(1)

    def build(self, servers: int) -> None:
        edges = np.linspace(0, BUCKETS, servers + 1).astype(int).tolist()
        specs = [spec_of((low, high), **self.options()) for low, high in pairwise(edges)]
        self.tables = [SparseTable(spec) for spec in specs]

    def options(self) -> dict[str, Any]:
        return {name: getattr(self.declared, name) for name in ("admit", "ttl", "max_rows", "evict")}

    def parts(self, ids: np.ndarray) -> Iterator[tuple[SparseTable, np.ndarray]]:
        for table in self.tables:
            low, high = table.spec.buckets
            yield table, np.flatnonzero((low <= bucket_of(ids)) & (bucket_of(ids) < high))

    def first(self, id: int) -> np.ndarray:
        row: np.ndarray = initial_rows(7, "e", np.array([id]), 0.5, DIM, "float64")[0]
        return row

    @rule(
        ids=st.one_of(
            st.sets(st.integers(-15, 15) | st.sampled_from(EXTREMES), max_size=20),
            st.integers(0, 5).map(lambda k: set(range(k * 300, k * 300 + 700))),
        ),
        seed=st.integers(0, 99),
    )
    def update(self, ids: set[int], seed: int) -> None:
        if self.declared.max_rows:
            ids = set(sorted(ids)[:20])
        self.step += 1
        order = np.random.default_rng(seed).permutation(np.array(sorted(ids), np.int64))
        grads = np.random.default_rng(seed).integers(-4, 5, (len(order), DIM)).astype(float)
        for table, part in self.parts(order):
            table.update(order[part], grads[part], step=self.step, lr=0.5)
        self.model_update(order.tolist(), grads)

    def model_update(self, ids: list[int], grads: np.ndarray) -> None:
        admit, room = self.declared.admit, self.declared.max_rows
        due = [id for id in ids if id not in self.rows() and self.model.get(id, [0, 0, 0, 0])[2] >= admit - 1]
        if room and len(self.rows()) + len(due) > room:
            kept = [id for id in ids if id in self.rows()]
            left = max(len(kept), room - len(due) - room // PART)
            for id in self.ranked(kept)[: len(self.rows()) - left]:
                del self.model[id]
        for id, grad in zip(ids, grads, strict=True):
            row = self.model.setdefault(id, [self.first(id), np.zeros(DIM), 0, 0])
            row[2:] = row[2] + 1, self.step
            if row[2] >= admit:
                row[1] = 0.5 * row[1] + grad
                row[0] = row[0] - 0.5 * row[1]

    def rows(self) -> set[int]:
        return {id for id, row in self.model.items() if row[2] >= self.declared.admit}

    def ranked(self, kept: list[int]) -> list[int]:
        """Those that go first, first."""
        places = (3, 2) if self.declared.evict == "oldest" else (2, 3)
        return sorted(self.rows() - set(kept), key=lambda id: (*(self.model[id][place] for place in places), id))

    @rule()
    def tick(self) -> None:
        gone = sum(table.tick(self.step) for table in self.tables)
        before = len(self.rows())
        if ttl := self.declared.ttl:
            period = max(1, ttl // PART)
            if self.step // period > self.looked // period:
                self.looked = self.step
                self.model = {id: row for id, row in self.model.items() if self.step - row[3] < ttl}
        assert gone == before - len(self.rows())

    @rule(ids=st.lists(st.integers(-20, 1500) | st.sampled_from(EXTREMES), max_size=40))
    def gather(self, ids: list[int]) -> None:
        asked = np.array(ids, np.int64)
        for table, part in self.parts(asked):
            out = np.empty((len(part), DIM))
            table.gather(asked[part], out)
            for id, row in zip(asked[part].tolist(), out, strict=True):
                assert row.tolist() == (self.model[id][0] if id in self.model else self.first(id)).tolist()

    @rule(servers=st.integers(1, 3), chunk=st.integers(1, 400))
    def restore(self, servers: int, chunk: int) -> None:
        before = self.tables
        self.build(len(before) if self.declared.max_rows else servers)
        for rows in (rows for table in before for rows in table.export(chunk)):
            for table in self.tables:
                table.load(rows)
                table._looked = self.looked
        for table in before:
            table.close()
        self.compare()

    @precondition(lambda self: self.tables)
    @rule()
    def compare(self) -> None:
        found = everything(*self.tables)
        assert found == {id: (w.tolist(), m.tolist(), count, used) for id, (w, m, count, used) in self.model.items()}
        assert sum(table.rows for table in self.tables) == len(self.rows())

    def teardown(self) -> None:
        for table in self.tables:
            table.close()


TestModelled = Modelled.TestCase
TestModelled.settings = settings(max_examples=ROUNDS, stateful_step_count=30)


def test_the_number_of_servers_and_the_order_of_arrival_change_nothing() -> None:
    ids = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 3000)
    one = SparseTable(spec_of())
    one.update(ids, ones(ids), step=1, lr=0.5)
    three = [SparseTable(spec_of(edges)) for edges in ((0, 1000), (1000, 1001), (1001, BUCKETS))]
    for table in three:
        low, high = table.spec.buckets
        mine = ids[(low <= bucket_of(ids)) & (bucket_of(ids) < high)][::-1].copy()
        table.update(mine, ones(mine), step=1, lr=0.5)
    assert everything(one) == everything(*three)
    for table in (one, *three):
        table.close()


def test_a_row_that_the_model_gave() -> None:
    spec = TableSpec("e", DIM, "float64", 7, Table(), OPTIMIZER, (0, BUCKETS // 2), prefilled=10)
    table = SparseTable(spec)
    weights = np.arange(30.0).reshape(10, DIM)
    table.fill(0, weights[:4])
    table.fill(4, weights[4:])
    mine = np.flatnonzero(bucket_of(np.arange(10)) < BUCKETS // 2)
    out = np.empty((len(mine), DIM))
    table.gather(mine, out)
    assert 0 < len(mine) < 10
    assert out.tolist() == weights[mine].tolist()
    assert table.rows == len(mine)
    table.close()


def test_rows_that_the_model_gave_are_never_forgotten() -> None:
    with pytest.raises(PlanError, match="would be lost"):
        SparseTable(TableSpec("e", DIM, "float64", 7, Table(ttl=3), OPTIMIZER, (0, BUCKETS), prefilled=10))


@pytest.mark.parametrize("limit", [16_384, 100_000, 1_000_000])
def test_a_memory_limit_is_kept(limit: int) -> None:
    """Up to the last row that fits, also while the index grows; then the table is as it was."""
    table = SparseTable(spec_of(), memory_limit=limit)
    fitting = records_that_fit(limit, 2 + 2 * DIM)
    for start in range(0, fitting - 10, 10):
        ids = np.arange(start, start + 10)
        table.update(ids, ones(ids), step=1, lr=0.5)
        assert touched(table) <= limit
    before = everything(table)
    with pytest.raises(TableFull, match=f"{table.rows:,} rows.* no room for 30 more") as caught:
        table.update(np.arange(5, table.rows + 30), ones(np.arange(table.rows + 25)), step=2, lr=0.5)
    assert caught.value.remedy
    assert everything(table) == before
    table.update(np.arange(fitting), ones(np.arange(fitting)), step=2, lr=0.5)
    assert table.nbytes == touched(table) <= limit
    table.close()


def touched(table: SparseTable) -> int:
    """As the kernel counts the pages of the segment."""
    return os.stat(f"/proc/self/fd/{table.ticket.memory.fd}").st_blocks * 512


def test_what_is_said_of_the_memory_is_what_the_kernel_says() -> None:
    table = table_of(ttl=20)
    for step in range(1, 30):
        ids = np.arange(step * 1000, step * 1000 + 1000 * (step % 7))
        table.update(ids, ones(ids), step=step, lr=0.5)
        assert touched(table) == table.nbytes
    assert table.tick(45) > 0
    assert touched(table) == table.nbytes
    table.close()


def test_memory_is_within_a_third_of_keys_rows_and_state() -> None:
    """At the sizes of real rows, whatever their number: the worst is where an index has just grown."""
    for rows in (holds(bits) + 1 for bits in range(14, 28)):
        for numbers, floor in ((16, 1.3), (48, 1.15)):  # SGD and Adam, float32
            assert bytes_of(rows, bits_for(rows), 2 + numbers // 2) <= floor * rows * (8 + 4 * numbers)


def test_records_that_fit_never_take_more_not_even_while_the_index_grows() -> None:
    for limit in (0, 5000, 16384, 10**6, 10**7, 10**9 + 1):
        for width in (2, 5, 40):
            rows = records_that_fit(limit, width)
            peaks = [
                bytes_of(min(rows, holds(bits)), bits, width)
                + (bytes_of(0, bits + 1, width) - 4096 if rows > holds(bits) else 0)
                for bits in range(10, bits_for(rows) + 1)
            ]
            assert rows == 0 or max(peaks) <= limit


def test_under_a_limit_and_with_a_rule_a_table_forgets_and_goes_on() -> None:
    limit = 100_000
    table = SparseTable(spec_of(ttl=10**6), memory_limit=limit)
    for step in range(1, 100):
        ids = np.arange(step * 100, step * 100 + 100)
        table.update(ids, ones(ids), step=step, lr=0.5)
        assert touched(table) == table.nbytes <= limit
    kept = everything(table)
    assert set(kept) == set(range(10_000 - len(kept), 10_000))  # the newest
    table.close()


def test_candidates_are_bounded_too() -> None:
    limit = 200_000
    table = SparseTable(spec_of(admit=2), memory_limit=limit)
    for step in range(1, 100):
        ids = np.arange(step * 500, step * 500 + 500)
        table.update(ids, ones(ids), step=step, lr=0.5)
        assert table.nbytes <= limit
    table.update(ids, ones(ids), step=100, lr=0.5)
    assert table.rows == 500
    table.close()


def test_fewer_rows_than_one_update_needs() -> None:
    table = table_of(max_rows=10)
    table.update(np.arange(10), ones(np.arange(10)), step=1, lr=0.5)
    before = everything(table)
    with pytest.raises(TableFull, match="room for 10 rows") as caught:
        table.update(np.arange(5, 16), ones(np.arange(11)), step=2, lr=0.5)
    assert "max_rows" in caught.value.remedy
    assert everything(table) == before
    table.close()


def test_a_share_smaller_than_what_is_loaded_keeps_some_of_it() -> None:
    table = table_of(max_rows=1000)
    table.update(np.arange(1000), ones(np.arange(1000)), step=1, lr=0.5)
    small = table_of(max_rows=100)
    for rows in table.export(300):
        small.load(rows)
    assert 90 <= small.rows <= 100
    whole = everything(table)
    assert all(whole[id] == row for id, row in everything(small).items())
    table.close()
    small.close()


GRADS = np.ones((2, DIM))
NAN, INF = GRADS.copy(), GRADS.copy()
NAN[1, 2], INF[0, 0] = np.nan, -np.inf


@pytest.mark.parametrize(
    ("ids", "grads", "error", "says"),
    [
        (np.array([1, 2]), NAN, Diverged, "'e' is not finite at id 2 in step 2"),
        (np.array([8, 9]), INF, Diverged, "'e' is not finite at id 8 in step 2"),
        (np.array([1, 2], np.int32), GRADS, ProtocolError, "int64"),
        (np.array([[1, 2]]), GRADS, ProtocolError, "int64"),
        (np.array([1, 2]), GRADS.astype(np.float32), ProtocolError, "float64"),
        (np.array([1, 2]), np.ones((2, DIM + 1)), ProtocolError, r"\(2, 3\)"),
        (np.array([1]), GRADS, ProtocolError, r"\(1, 3\)"),
        (np.array([8, 8]), GRADS, ProtocolError, "unique"),
    ],
)
def test_bad_input_is_refused_and_leaves_the_table_as_it_was(
    ids: Any, grads: Any, error: type[TricornError], says: str
) -> None:
    table = table_of(admit=2)
    start = np.arange(1, 5)
    table.update(start, ones(start), step=1, lr=0.5)
    before = everything(table)
    with pytest.raises(error, match=says):
        table.update(ids, grads, step=2, lr=0.5)
    assert everything(table) == before
    table.close()


def test_ids_of_another_server_are_refused() -> None:
    ids = np.arange(100)
    low = int(bucket_of(ids[99:])[0]) + 1
    table = SparseTable(spec_of((low, BUCKETS)))
    mine = ids[bucket_of(ids) >= low]
    table.update(mine, ones(mine), step=1, lr=0.5)
    before = everything(table)
    asked = np.append(mine, 99)
    for refused in (
        lambda: table.update(asked, ones(asked), step=2, lr=0.5),
        lambda: table.gather(asked, ones(asked)),
    ):
        with pytest.raises(ProtocolError, match=f"id 99 of table 'e' is in none of the buckets {low} to 4095"):
            refused()
    assert everything(table) == before
    table.close()


def test_rows_of_another_optimizer_are_refused() -> None:
    table = table_of()
    none = np.zeros(1, np.int32)
    with pytest.raises(ProtocolError, match="momentum_buffer"):
        table.load(Rows(np.array([1]), np.ones((1, DIM)), {"sum": np.ones((1, DIM))}, none, none))
    table.close()


def test_arrays_that_may_not_be_written_to_or_lie_scattered_can_be_read() -> None:
    table = table_of()
    ids = np.frombuffer(np.arange(10).tobytes(), np.int64)[::2]
    table.update(ids, np.ones((5, 2 * DIM))[:, ::2], step=1, lr=0.5)
    assert table.rows == 5
    with pytest.raises(ProtocolError, match="contiguous"):
        table.gather(ids, np.ones((5, 2 * DIM))[:, ::2])
    table.close()
