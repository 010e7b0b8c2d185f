import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.planner.figures import Curve, Figure, Point


def test_a_figure_is_the_median_and_half_of_the_middle_half() -> None:
    figure = Figure.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert figure.seconds == 3.0
    assert figure.scatter == pytest.approx(0.5)


def test_one_duration_has_no_scatter() -> None:
    assert Figure.of([2.0]) == Figure(2.0, 0.0)


def curve(*points: tuple[float, float]) -> Curve:
    return Curve(tuple(Point(x, seconds, 0.1) for x, seconds in points))


@pytest.mark.parametrize(
    ("x", "seconds"), [(0.0, 1.0), (10.0, 1.0), (15.0, 2.0), (20.0, 3.0), (40.0, 4.0), (80.0, 6.0)]
)
def test_between_points_lie_straight_lines_and_the_last_goes_on(x: float, seconds: float) -> None:
    assert curve((10, 1.0), (20, 3.0), (60, 5.0)).at(x) == pytest.approx(seconds)


@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(1e-6, 10)), min_size=1, max_size=6, unique_by=lambda p: p[0]))
def test_no_size_takes_less_than_the_quickest_measured(points: list[tuple[float, float]]) -> None:
    measured = curve(*sorted(points))
    for x in (0.5, 1e3, 1e12, *(x for x, _ in points)):
        found = measured.at(x)
        assert math.isfinite(found)
        assert found >= min(seconds for _, seconds in points) * (1 - 1e-9)
