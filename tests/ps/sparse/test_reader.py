"""Reading a table from another process while it is written, grows and forgets."""

from __future__ import annotations

import subprocess
import sys
import time
from select import select

import msgspec
import numpy as np
import pytest

from tricorn import optim
from tricorn.errors import PeerLost, ProtocolError
from tricorn.ps.sparse.index import GENERATION
from tricorn.ps.sparse.initial import initial_rows
from tricorn.ps.sparse.reader import RowReader, Ticket
from tricorn.ps.sparse.spec import BUCKETS, TableSpec
from tricorn.ps.sparse.store import SparseTable
from tricorn.table import Table

DIM = 4
_MOST = 50_000  # updates

# Every update takes 1 from all elements of a row, so what a row has lost is a whole number, and the row of another id
# would be told by its first value. Elements of one row may differ: it may be read while it is written.
READER = """
import sys, msgspec, numpy as np
from tricorn.ps.sparse.initial import initial_rows
from tricorn.ps.sparse.reader import RowReader, Ticket
reader = RowReader(msgspec.json.decode(sys.stdin.readline(), type=Ticket))
ids = np.arange(20_000)
first = initial_rows(0, "e", ids, 1.0, 4, "float64")
out, reads, highest = np.empty((len(ids), 4)), 0, 0
reader.gather(ids, out)
print("ready", flush=True)
while True:
    reader.gather(ids, out)
    taken = np.round(first - out)
    wrong = (abs(first - taken - out) > 1e-9) | (taken < 0) | (taken > TOP)
    if wrong.any():
        sys.exit(f"no state of the table: {(first - out)[wrong][:9]}")
    reads, highest = reads + 1, max(highest, int(taken.max()))
    if reads == 2:
        print("reads", flush=True)
    if (out[-1] != first[-1]).all():  # the last id is given only at the end
        print(reads, highest, flush=True)
        break
reader.close()
"""


def table_of(ttl: int | None = None) -> SparseTable:
    return SparseTable(TableSpec("e", DIM, "float64", 0, Table(std=1.0, ttl=ttl), optim.SGD(lr=1.0), (0, BUCKETS)))


def test_another_process_reads_while_rows_come_change_and_go() -> None:
    table = table_of(ttl=4)
    script = READER.replace("TOP", str(_MOST))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as reader:
        assert reader.stdin
        assert reader.stdout
        reader.stdin.write(msgspec.json.encode(table.ticket) + b"\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == b"ready\n"
        went, step, random = 0, 0, np.random.default_rng(0)
        while step < 300 or not select([reader.stdout], [], [], 0)[0]:  # until it has read in the midst of this
            step += 1
            assert step < _MOST
            ids = random.choice(19_999, 2000, replace=False)
            table.update(ids, np.ones((len(ids), DIM)), step=step, lr=1.0)
            went += table.tick(step)
        assert reader.stdout.readline() == b"reads\n"
        table.update(np.array([19_999]), np.ones((1, DIM)), step=step + 1, lr=1.0)
        reads, highest = map(int, reader.stdout.readline().split())
    assert reader.returncode == 0
    assert reads > 2
    assert highest >= 1
    assert went > 10_000
    table.close()


def test_a_reader_sees_what_the_server_sees() -> None:
    table = table_of()
    reader = RowReader(msgspec.json.decode(msgspec.json.encode(table.ticket), type=Ticket))
    ids = np.array([5, -7, 2**62])
    out = np.empty((3, DIM))
    reader.gather(ids, out)
    assert np.array_equal(out, initial_rows(0, "e", ids, 1.0, DIM, "float64"))
    table.update(np.arange(5000), np.ones((5000, DIM)), step=1, lr=1.0)  # the index grows twice
    reader.gather(ids, out)
    assert np.array_equal(out, initial_rows(0, "e", ids, 1.0, DIM, "float64") - [[1], [0], [0]])
    assert reader.rows == table.rows == 5000
    with pytest.raises(ProtocolError, match="int64"):
        reader.gather(ids.astype(np.int32), out)
    reader.close()
    table.close()


def test_a_writer_that_stops_while_records_move(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of()
    reader = RowReader(table.ticket)
    table._arena.header[GENERATION] += 1
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(PeerLost, match="table 'e' no longer answers"):
        reader.gather(np.array([1]), np.empty((1, DIM)))
    reader.close()
    table.close()
