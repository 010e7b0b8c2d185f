"""The conversation without a socket: who has to wait, and for what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tricorn import optim
from tricorn.errors import PeerLost, ProtocolError
from tricorn.plan import Consistency
from tricorn.ps.service import Beginning, Conversation, Service
from tricorn.ps.table import Description
from tricorn.ps.wire import PEEK, Header, Op
from tricorn.state.shards import Piece

GRADIENT = bytes(8)


class Table:
    """A service of one parameter with two elements, and its workers."""

    def __init__(self, workers: int, consistency: Consistency, staleness: int = 0, *, alone: bool = False) -> None:
        self.replies: dict[int, list[Op]] = defaultdict(list)
        self.service = Service(self)
        self.talks: dict[int, Conversation] = {}
        self.description = msgspec.json.encode(
            Description(
                tables=(("w", (2,)),), dtype="float32", start=0, stop=2, optimizer=optim.SGD(lr=0.1),
                consistency=consistency, staleness=staleness,
            )
        )  # fmt: skip
        self.service.begin(Beginning(1, 0, "initial", None, workers, 0, (), alone))
        for rank in range(workers):
            self.talks[rank] = self.service.converse(rank)

    def create(self) -> None:
        assert self.say(0, Header(Op.CREATE), self.description)
        assert self.say(0, Header(Op.LOAD), GRADIENT)

    def say(self, rank: int, header: Header, payload: bytes = b"") -> bool:
        """Let the worker's request arrive; False if it has to wait."""
        self.talks[rank].close()
        talk = self.talks[rank] = self.service.converse(rank)
        view = next(talk)
        assert view is not None
        view[:] = header._replace(length=len(payload)).pack()
        view = next(talk)
        if view is None:
            return False
        self.finish(rank, view, payload)
        return True

    def again(self, rank: int) -> bool:
        """Ask for one that had to wait, without payload, once more."""
        view = next(self.talks[rank])
        if view is None:
            return False
        self.finish(rank, view, b"")
        return True

    def finish(self, rank: int, view: memoryview, payload: bytes) -> None:
        while payload:
            view[:], payload = payload[: len(view)], payload[len(view) :]
            if payload:
                following = next(self.talks[rank])
                assert following is not None
                view = following
        assert next(self.talks[rank]) is not None  # the next header

    def send(self, rank: int, header: Header, parts: Sequence[memoryview] = ()) -> None:
        self.replies[rank].append(Op(header.op))

    def before_update(self) -> None:
        pass

    def snapshot_taken(self, step: int, pieces: list[Piece]) -> None:
        pass


def test_all_wait_until_the_tables_exist() -> None:
    table = Table(2, "bsp")
    assert not table.say(1, Header(Op.STATUS, step=-1))
    table.create()
    assert table.again(1)
    assert table.replies[1] == [Op.DONE]


@pytest.mark.parametrize("consistency", ["bsp", "ssp", "asp"])
def test_who_waits_for_rank_0_hears_that_it_has_left_and_who_comes_later_waits(consistency: Consistency) -> None:
    table = Table(3, consistency, alone=True)
    assert not table.say(1, Header(Op.IDLE))
    waiting = table.talks[1]
    table.service.leave(0)
    with pytest.raises(PeerLost, match="the client of rank 0 has left, and it had not said what is to be held"):
        next(waiting)
    assert not table.say(2, Header(Op.STATUS if consistency == "bsp" else Op.IDLE, step=-1))
    assert not table.again(2)
    table.create()
    assert table.again(2)


def test_a_step_is_acknowledged_to_all_at_once_and_to_a_repetition_again() -> None:
    table = Table(3, "bsp")
    table.create()
    table.replies.clear()
    push = Header(Op.PUSH, step=0, numbers=(1.0, 1.0, 1.0))
    for rank in (2, 0):
        assert table.say(rank, push, GRADIENT)
    assert not table.say(2, push, GRADIENT)  # a repetition: its answer is not known yet
    assert not table.replies
    assert table.say(1, push, GRADIENT)
    assert table.replies == {rank: [Op.ACK] for rank in range(3)}
    assert table.say(0, push, GRADIENT)
    assert table.replies[0] == [Op.ACK, Op.ACK]
    with pytest.raises(ProtocolError, match="collects step 0"):
        table.say(0, push._replace(step=1), GRADIENT)


@pytest.mark.parametrize("freed_by", ["push", "idle", "death"])
def test_ssp_makes_the_fast_wait_for_the_slow(freed_by: str) -> None:
    table = Table(2, "ssp", staleness=2)
    table.create()
    assert table.say(1, Header(Op.PULL))
    for step in range(3):
        assert table.say(0, Header(Op.PULL))
        assert table.say(0, Header(Op.PUSH, step=step), GRADIENT)
    assert table.say(0, Header(Op.PULL, flags=PEEK))
    assert not table.say(0, Header(Op.PULL))
    assert not table.again(0)
    if freed_by == "push":
        assert table.say(1, Header(Op.PUSH, step=3), GRADIENT)
    elif freed_by == "idle":
        assert table.say(1, Header(Op.IDLE))
    else:
        table.service.leave(1)
    assert table.again(0)


def test_who_waits_after_a_push_changes_nothing_by_waiting() -> None:
    """Or the server would ask the one who waits again and again, and never hear the one that is waited for."""
    table = Table(2, "ssp")
    table.create()
    assert table.say(1, Header(Op.PULL))
    assert table.say(0, Header(Op.PULL))
    talk = table.service.converse(0)
    for part in (Header(Op.PUSH_PULL, step=0, length=len(GRADIENT)).pack(), GRADIENT):
        view = next(talk)
        assert view is not None
        view[:] = part
    assert next(talk) is None
    assert table.service.changed  # the push
    table.service.changed = False
    assert next(talk) is None
    assert not table.service.changed
    assert table.say(1, Header(Op.PUSH, step=1), GRADIENT)
    assert next(talk) is not None
    assert table.replies[0][-1] == Op.WEIGHTS


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), max_size=60))
def test_each_asynchronous_step_is_applied_once(pushes: list[tuple[int, int]]) -> None:
    table = Table(3, "asp")
    table.create()
    for rank, step in pushes:
        assert table.say(rank, Header(Op.PUSH, step=step), GRADIENT)
    applied = table.service.take_applied()
    assert len(applied) == len(set(applied))
    assert set(applied) == {step for _, step in pushes}
    assert sum(table.service.staleness.values()) == len(applied)
    assert table.service.take_applied() == []
