"""How many steps a worker of an asynchronous run asks for."""

from __future__ import annotations

from tricorn.worker.leased import AHEAD, Credit


def test_what_it_holds_lasts_until_it_reports_again() -> None:
    credit = Credit(steps_per_epoch=10_000, workers=2)
    assert credit.ask(0) == AHEAD
    credit.lent([0, 1, 2, 3])
    assert credit.ask(3) == AHEAD + 3 - 1
    assert credit.ask(7) == AHEAD + 7
    assert credit.ask(1) == 0  # it reports more often now than it has steps for


def test_near_the_end_of_an_epoch_it_holds_little() -> None:
    credit = Credit(steps_per_epoch=100, workers=2)
    credit.ask(0)
    credit.lent([40])
    assert credit.ask(4) == 4 + AHEAD
    credit.lent([79])  # 20 are left, of which 10 are its own
    assert credit.ask(8) == 20 // 4
    credit.lent([99])
    assert credit.ask(5) == AHEAD
    credit.lent([120])
    assert credit.ask(4) == 4 + AHEAD
