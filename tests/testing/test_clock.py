from __future__ import annotations

import pytest

from tricorn.testing.clock import VirtualClock


def test_time_moves_only_when_told() -> None:
    clock = VirtualClock(start=10.0)
    assert (clock.now(), clock.now()) == (10.0, 10.0)
    clock.advance(2.5)
    assert clock.now() == 12.5


def test_time_does_not_run_backwards() -> None:
    with pytest.raises(ValueError, match="go back by 1"):
        VirtualClock().advance(-1.0)
