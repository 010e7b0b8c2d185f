"""The ledger: what is in the model, through commits, restarts and tampering."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tricorn.control.intervals import Intervals
from tricorn.control.ledger import Ledger, Order
from tricorn.data.order import Permutation
from tricorn.errors import UsageError

ORDER = Order(seed=3, fingerprint="data", samples=10, batch_size=4, epochs=2)  # steps of 4, 4 and 2 samples
STEPS = 6


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path):
    with Ledger(path, ORDER) as ledger:
        ledger.begin(1, Intervals(), "the run begins", 0.0)
        yield ledger


def tamper(path: Path, *statements: str) -> None:
    database = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        database.execute(statement)
    database.close()


def insert(step: int, epoch: int, start: int, stop: int) -> str:
    return (
        "insert into commits (step, epoch, start, stop, membership) "
        f"values ({step}, {epoch}, {start}, {stop}, 1)"
    )  # fmt: skip


def test_committing_again_changes_nothing(ledger):
    ledger.commit([0, 1], 1)
    ledger.commit([1, 0, 2], 2)
    ledger.commit([], 2)
    assert ledger.committed().pairs == [(0, 3)]
    assert ledger.times_committed(0).tolist() == [1] * 10


def test_times_committed_follows_the_permutation(ledger):
    ledger.commit([1, 5], 1)
    for epoch, (start, stop) in enumerate([(4, 8), (8, 10)]):
        expected = np.zeros(10, dtype=np.int64)
        expected[Permutation(3, epoch, "data", 10).ids(start, stop)] = 1
        counted = ledger.times_committed(epoch)
        assert counted.dtype == np.int64
        assert counted.tolist() == expected.tolist()


def test_exactly_once(ledger):
    assert ledger.exactly_once(complete=False)
    assert not ledger.exactly_once()
    ledger.commit(range(STEPS - 1), 1)
    assert ledger.exactly_once(complete=False)
    assert not ledger.exactly_once()
    ledger.commit([STEPS - 1], 1)
    assert ledger.exactly_once()
    assert all((ledger.times_committed(epoch) == 1).all() for epoch in range(ORDER.epochs))


def test_going_back_undoes_and_running_again_counts_once(ledger, path):
    ledger.commit(range(4), 1)
    for step in (0, 2, 4):
        ledger.evaluated(step, {"loss": float(step)})
    ledger.begin(2, Intervals([(0, 2)]), "a worker died", 1.0)
    assert ledger.committed().pairs == [(0, 2)]
    assert ledger.evaluations() == {0: {"loss": 0.0}, 2: {"loss": 2.0}}
    ledger.commit(range(2, STEPS), 2)
    assert ledger.exactly_once()
    assert (ledger.membership, ledger.restarts()) == (2, 1)
    rows = sqlite3.connect(path).execute("select step, membership, undone from commits order by id").fetchall()
    assert rows[:4] == [(0, 1, None), (1, 1, None), (2, 1, 2), (3, 1, 2)], "what was undone is still told of"


def test_a_begin_fills_in_commits_that_were_not_told(ledger):
    ledger.commit([0], 1)
    ledger.evaluated(1, {"loss": 1.0})
    ledger.begin(2, Intervals([(0, 3), (4, 5)]), "the coordinator begins", 1.0)
    assert ledger.committed().pairs == [(0, 3), (4, 5)]
    assert ledger.evaluations() == {1: {"loss": 1.0}}, "nothing was lost, so nothing measured is wrong"


events = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.lists(st.integers(0, STEPS - 1), max_size=4)),
        st.tuples(st.just("begin"), st.lists(st.integers(0, STEPS - 1), max_size=6)),
    ),
    max_size=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events)
def test_any_history_counts_what_the_model_holds(tmp_path_factory, history):
    held: set[int] = set()
    with Ledger(tmp_path_factory.mktemp("ledger") / "ledger.sqlite", ORDER) as ledger:
        for membership, (event, steps) in enumerate(history, 1):
            if event == "commit":
                ledger.commit(steps, membership)
                held |= set(steps)
            else:
                ledger.begin(membership, Intervals((step, step + 1) for step in steps), event, 0.0)
                held = set(steps)
            assert ledger.committed().pairs == Intervals((step, step + 1) for step in held).pairs
            assert ledger.exactly_once(complete=False)
        counted = sum(int(ledger.times_committed(epoch).sum()) for epoch in range(ORDER.epochs))
        assert counted == sum((4, 4, 2)[step % 3] for step in held)
        assert ledger.exactly_once() == (len(held) == STEPS)


@pytest.mark.parametrize(
    "row",
    [
        (6, 0, 3, 4),
        (6, 0, 0, 4),
        (6, 1, 0, 10),
        (6, 1, 9, 10),
        (6, 2, 0, 4),
        (6, -1, 0, 4),
        (6, 1, 10, 14),
        (6, 0, -4, 0),
    ],
)
def test_a_row_that_takes_a_sample_again_or_one_that_is_not_there_is_seen(ledger, path, row):
    ledger.commit(range(STEPS), 1)
    assert ledger.exactly_once()
    tamper(path, insert(*row))
    assert not ledger.exactly_once()
    assert not ledger.exactly_once(complete=False)


def test_a_row_of_another_place_does_not_make_up_for_one_that_is_missing(ledger, path):
    ledger.commit(range(STEPS), 1)
    for row in [(2, -1, 8, 10), (2, 2, 8, 10), (2, 0, 6, 8)]:  # as many samples, but not those of step 2
        tamper(path, "delete from commits where step = 2", insert(*row))
        assert not ledger.exactly_once()


def test_a_doubled_row_is_refused_by_the_table_and_seen_without_it(ledger, path):
    ledger.commit(range(STEPS), 1)
    with pytest.raises(sqlite3.IntegrityError):
        tamper(path, insert(0, 0, 0, 4))
    tamper(path, "drop index live", insert(0, 0, 0, 4))
    assert not ledger.exactly_once()
    assert not ledger.exactly_once(complete=False)
    assert sorted(set(ledger.times_committed(0))) == [1, 2]


@pytest.mark.parametrize("field", ["seed", "fingerprint", "samples", "batch_size"])
def test_another_order_is_refused_by_name(ledger, path, field):
    other = {"seed": 4, "fingerprint": "other", "samples": 11, "batch_size": 5}[field]
    with pytest.raises(UsageError, match=f"{field} was {getattr(ORDER, field)} and is now {other}") as refused:
        Ledger(path, msgspec.structs.replace(ORDER, **{field: other}))
    assert refused.value.remedy
    assert ledger.order == ORDER


def test_more_epochs_are_the_same_order(ledger, path):
    longer = msgspec.structs.replace(ORDER, epochs=5)
    with Ledger(path, longer) as again:
        assert again.order == longer
    with Ledger(path) as read:
        assert read.order == longer


def test_what_was_committed_is_there_after_opening_again(path):
    with Ledger(path, ORDER) as ledger:
        ledger.begin(7, Intervals(), "the run begins", 0.0)
        ledger.commit([0, 1], 7)
    with Ledger(path) as again:
        assert (again.membership, again.committed().pairs) == (7, [(0, 2)])


def test_a_transaction_that_fails_leaves_nothing(ledger):
    def steps():
        yield 0
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        ledger.commit(steps(), 1)
    assert ledger.committed().pairs == []
    ledger.commit([1], 1)
    assert ledger.committed().pairs == [(1, 2)]


def test_a_ledger_that_cannot_be_read(path):
    with pytest.raises(UsageError, match="no ledger at"):
        Ledger(path)
    assert not path.exists(), "looking for one does not make one"
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="never began"):
        Ledger(path)
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(UsageError, match="cannot be read"):
        Ledger(path, ORDER)


def test_values_that_are_damaged(ledger, path):
    ledger.evaluated(1, {"loss": float("nan")})
    ledger.evaluated(2, {"loss": 0.5})
    ledger.evaluated(3, {"loss": 0.25})
    assert ledger.launched("first", 5.0, 1) == (5.0, 1)
    launch = b'["\xff", 5.0, 1]'
    tamper(path, "update evaluations set measured = 'null' where step = 1",
           "update evaluations set measured = x'7b22ff22' where step = 2",
           f"update meta set value = x'{launch.hex()}' where key = 'launch'")  # fmt: skip
    assert ledger.evaluations() == {3: {"loss": 0.25}}
    assert ledger.launched("first", 9.0, 2) == (9.0, 2)
    damaged = msgspec.json.encode(ORDER).replace(b"data", b"\xff")
    tamper(path, f"update meta set value = x'{damaged.hex()}' where key = 'order'")
    with pytest.raises(UsageError, match="cannot be read"):
        Ledger(path)
