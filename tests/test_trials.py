"""What a trial measures: the steps after those in which a run settles."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tricorn.trials import _between

SECONDS = st.floats(1e-4, 10.0)


@given(st.integers(1, 100), SECONDS, st.integers(1, 100), SECONDS)
def test_the_mean_of_the_later_steps_is_found_from_two_means_of_all(
    first: int, before: float, later: int, after: float
) -> None:
    whole = (first * before + later * after) / (first + later)
    found = _between(first, {"step": before}, first + later, {"step": whole, "compute": whole})
    assert abs(found["step"] - after) <= 1e-9 * (before * first + after)
    assert found["compute"] == whole * (first + later) / later  # it was not told before
