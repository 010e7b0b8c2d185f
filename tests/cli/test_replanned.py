"""Options that are given beside a plan that is there already."""

from __future__ import annotations

import pytest

from tricorn.cli.train import replanned
from tricorn.plan import Plan

PIPELINE = Plan(strategy="mp", workers=2, microbatches=2, cuts=(3,))


@pytest.mark.parametrize(
    "changes", [{"workers": 3}, {"tensor": 2}, {"schedule": "interleaved"}, {"memory": 10**9}, {"strategy": "dp"}]
)
def test_cuts_fall_away_with_the_stages_that_they_are_of(changes: dict[str, object]) -> None:
    assert replanned(PIPELINE, changes).cuts is None


def test_what_leaves_the_stages_as_they_are_leaves_the_cuts() -> None:
    assert replanned(PIPELINE, {"microbatches": 4, "workers": 2}).cuts == (3,)


def test_a_server_comes_with_the_strategy_that_needs_one() -> None:
    assert replanned(Plan(strategy="dp", workers=2, zero=1), {"strategy": "ps"}) == Plan(
        strategy="ps", workers=2, servers=1
    )
