"""A plan is a plain value that knows what is wrong with it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tricorn.errors import PlanError
from tricorn.plan import Plan


@pytest.mark.parametrize(
    "plan",
    [
        Plan(strategy="dp"),
        Plan(strategy="mp", workers=3, microbatches=4, threads=1),
        Plan(strategy="ps", workers=3, servers=2, consistency="ssp", staleness=0),
        Plan(strategy="ps+mp", servers=1, compress_tables={"people": "int8", "films": "none"}),
    ],
    ids=repr,
)
def test_a_good_plan_has_no_mistakes_and_survives_the_wire(plan: Plan) -> None:
    assert plan.mistakes() == []
    back = msgspec.json.decode(msgspec.json.encode(plan), type=Plan)
    assert {back: back == plan}[plan]


@pytest.mark.parametrize(
    ("options", "mistakes"),
    [
        ({"strategy": "dp", "workers": 0}, ["workers is 0; give at least 1"]),
        ({"strategy": "ps"}, ["servers is 0; the parameter server needs at least 1 (--servers 1)"]),
        ({"strategy": "dp", "servers": 1}, ["servers is 1, but only --strategy ps has servers; leave it out"]),
        (
            {"strategy": "mp", "consistency": "asp"},
            ["consistency is asp, but only --strategy ps can be asynchronous; add that"],
        ),
        ({"strategy": "ps", "servers": 1, "staleness": -1}, ["staleness is -1; give at least 0"]),
        ({"strategy": "mp", "microbatches": 0}, ["microbatches is 0; give at least 1"]),
        (
            {"strategy": "ps", "servers": 1, "microbatches": 2},
            ["microbatches is 2, which only --strategy dp or mp has; leave it out"],
        ),
        ({"strategy": "dp", "threads": 0}, ["threads is 0; give at least 1"]),
        ({"strategy": "dp", "hosts": (1, 1)}, ["hosts are (1, 1); give different numbers, from 0"]),
        ({"strategy": "dp", "hosts": ()}, ["hosts are (); give different numbers, from 0"]),
        (
            {"strategy": "ps", "servers": 1, "staleness": 5},
            ["staleness is 5, which only ssp and --stale drop look at; leave it out"],
        ),
        (
            {"strategy": "dp", "outer": "average"},
            ["outer is average, but with one local step nobody goes astray; add --local-steps"],
        ),
    ],
    ids=repr,
)
def test_a_mistake_is_one_sentence_with_its_cure(options: dict[str, Any], mistakes: list[str]) -> None:
    assert Plan(**options).mistakes() == mistakes


def test_all_mistakes_are_told_together() -> None:
    assert len(Plan(strategy="dp", workers=0, servers=1, staleness=-1, threads=0).mistakes()) == 4


@pytest.mark.parametrize(
    ("plan", "synchronous"),
    [
        (Plan(strategy="dp"), True),
        (Plan(strategy="ps", servers=1), True),
        (Plan(strategy="ps", servers=1, consistency="ssp"), False),
        (Plan(strategy="ps", servers=1, consistency="asp"), False),
    ],
)
def test_only_a_parameter_server_can_be_asynchronous(plan: Plan, synchronous: bool) -> None:
    assert plan.synchronous is synchronous


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"strateg": "dp"}, "Plan.strateg: given 'dp' (str); no such field; did you mean strategy?"),
        ({"strategy": "dp", "worker": 3}, "Plan.worker: given 3 (int); no such field; did you mean workers?"),
        ({}, "Plan.strategy: given nothing; it has no default"),
    ],
)
def test_an_unknown_option_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError) as refused:
        Plan(**given)
    assert str(refused.value) == f"the plan has mistakes:\n  - {told}"
    with pytest.raises(msgspec.ValidationError, match="wrokers"):
        msgspec.json.decode(b'{"strategy": "dp", "wrokers": 2}', type=Plan)
