"""What is drawn, as numbers."""

import re
from itertools import pairwise
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.report.charts import HEIGHT, MOST, WIDTH, Bar, Mark, _axis, _thinned, bars, line, table

FLOATS = st.floats(-1e199, 1e199)


@given(st.tuples(FLOATS, FLOATS).map(sorted))
def test_an_axis_has_few_round_numbers_around_its_values(ends: list[float]) -> None:
    low, high = ends
    axis = _axis(low, high)
    slack = 1e-6 * max(abs(low), abs(high))
    assert axis[0] <= low + slack
    assert axis[-1] >= high - slack
    assert 2 <= len(axis) <= 8
    assert axis == sorted(set(axis))


@pytest.mark.parametrize(("low", "high", "axis"), [(0, 9, [0, 2, 4, 6, 8, 10]), (5, 5, [5, 6]), (0, 0, [0, 0.2])])
def test_round_numbers(low: float, high: float, axis: list[float]) -> None:
    assert _axis(low, high) == pytest.approx(axis)


def test_of_many_points_the_mean_and_the_range_are_drawn() -> None:
    thin = _thinned([(float(x), float(x % 2)) for x in range(10 * MOST)])
    assert len(thin) == MOST
    assert {(t.low, t.mean, t.high) for t in thin} == {(0.0, 0.5, 1.0)}
    assert thin[-1].x == 10 * MOST - 1


@given(st.lists(st.tuples(st.floats(0, 1e11), st.floats(allow_nan=True)), max_size=8))
def test_whatever_is_drawn_is_within_the_picture(points: list[tuple[float, float]]) -> None:
    drawn = line(points, x="x", y="y")
    for pair in drawn.partition('class="line" points="')[2].partition('"')[0].split():
        across, up = map(float, pair.split(","))
        assert 0 <= across <= WIDTH
        assert 0 <= up <= HEIGHT


def test_a_value_holds_until_the_next() -> None:
    drawn = line([(0.0, 0.0), (9.0, 1.0), (10.0, 2.0)], x="x", y="y", steps=True)
    corners = [pair.split(",") for pair in drawn.partition('class="line" points="')[2].partition('"')[0].split()]
    assert len(corners) == 5
    moved = [(a[0] != b[0], a[1] != b[1]) for a, b in pairwise(corners)]
    assert moved == [(True, False), (False, True)] * 2


def test_nothing_to_draw_is_said() -> None:
    assert "nothing to draw" in line([(0.0, nan), (1.0, inf)], x="x", y="y")


def test_texts_are_escaped() -> None:
    assert "<b>" not in line([(0.0, 1.0)], x="<b>", y="<b>", marks=[Mark(0.0, "<b>", True)])
    assert "<b>" not in bars([("<b>", [Bar("", 1.0, "<b>")])])


def test_a_table_leaves_out_empty_columns_and_its_numbers_stand_right() -> None:
    drawn = table(("role", "nothing", "steps", "loss"), [("a", "", 1000, "not finite"), ("b", None, 0, 0.5)])
    rows = [re.findall(r"<t[hd]( class=number)?>(.*?)</t", row) for row in drawn.split("<tr>")[1:]]
    number = " class=number"
    assert rows == [
        [("", "role"), (number, "steps"), (number, "loss")],
        [("", "a"), (number, "1,000"), (number, "not finite")],
        [("", "b"), (number, "0"), (number, "0.5")],
    ]
    assert "<td" not in table(("role",), [])
