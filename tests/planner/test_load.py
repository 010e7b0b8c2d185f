"""How busy others keep the machine: told from seconds of processors alone, and measured again when it is too much."""

from __future__ import annotations

import pytest

from tricorn.planner import load
from tricorn.planner.load import Moment, Quiet, taken


@pytest.mark.parametrize(
    ("others", "cores", "machine", "share"),
    [
        (0.0, 2, 2, 0.0),
        (1.0, 2, 2, 0.5),
        (9.0, 2, 2, 1.0),
        (1.0, 2, 4, 0.0),  # two cores are to spare
        (3.0, 2, 4, 0.5),
        (-0.5, 2, 2, 0.0),  # the kernel's counts are rounded
    ],
)
def test_what_others_take_is_what_is_not_ones_own(others: float, cores: float, machine: int, share: float) -> None:
    before, after = Moment(10.0, 100.0, 7.0), Moment(12.0, 100.0 + 3.0 + 2 * others, 10.0)
    assert taken(before, after, cores, machine) == pytest.approx(share)


def test_no_time_at_all_is_quiet() -> None:
    assert taken(Moment(1.0, 1.0, 1.0), Moment(1.0, 2.0, 1.0), 2, 2) == 0.0


def test_what_was_disturbed_is_measured_again_and_the_quietest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one core, of which others take a share of each second."""
    shares = {"a": 0.0, "b": 0.9, "c": 0.3, "d": 0.05, "e": 0.8, "f": 0.6, "g": 0.7, "h": 0.5}
    now, left = [Moment(0.0, 0.0, 0.0)], list(shares)
    monkeypatch.setattr(load, "moment", lambda: now[0])
    monkeypatch.setattr(load.os, "cpu_count", lambda: 1)

    def work() -> str:
        now[0] = Moment(now[0].clock + 1.0, now[0].all + shares[left[0]], 0.0)
        return left.pop(0)

    quiet = Quiet(1, patience=4.0)
    assert quiet.measure(work) == "a"
    assert quiet.measure(work) == "d"  # the third time; of patience two seconds are left
    assert quiet.measure(work) == "f"
    assert quiet.measure(work) == "h"  # once: nothing is left of it
    assert not left
    assert quiet.busy == pytest.approx((0.0 + 0.05 + 0.6 + 0.5) / 4)
