"""What benchmarks/planner.py says of predictions: every figure on cases whose truth is known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tricorn.plan import Plan
from tricorn.planner.prediction import Prediction

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from planner_judged import ARITHMETIC, DDP, FSDP, PS, SPARSE, THUMB, Case, Run, baselines

MB = 10**6
DDP_PLAN, ZERO, SERVED = Plan(strategy="dp"), Plan(strategy="dp", zero=3), Plan(strategy="ps", servers=1)
PLANS = {"ddp": DDP_PLAN, "zero": ZERO, "ps": SERVED}


def predicted(plan: Plan, seconds: float, *, memory: int = 100 * MB, link: float = 0.0) -> Prediction:
    terms = {"compute": seconds / 2, "exchange": seconds / 2}
    return Prediction(plan=plan, terms=terms, scatter=0.1, memory={"worker": memory}, links={"host0": link})


def case(seconds: dict[str, float], found: list[Run], chosen: str = "ddp", **more: Any) -> Case:
    return Case({key: predicted(PLANS[key], each, **more) for key, each in seconds.items()}, chosen, (), found)


def runs(**seconds: float) -> list[Run]:
    return [Run(plan=key, steps=10, seconds=each, memory=100 * MB) for key, each in seconds.items()]


def test_order_is_judged_without_ties() -> None:
    said = {"ddp": 1.0, "zero": 2.0, "ps": 3.0}
    assert case(said, runs(ddp=1.0, zero=2.0, ps=3.0)).tau() == 1.0
    assert case(said, runs(ddp=3.0, zero=2.0, ps=1.0)).tau() == -1.0
    assert case(said, runs(ddp=1.01, zero=1.0, ps=3.0)).tau() == 1.0


def test_a_choice_is_beside_the_best_and_one_that_fails_is_as_bad_as_can_be() -> None:
    said = {"ddp": 1.0, "zero": 2.0, "ps": 3.0}
    regrets = case(said, runs(ddp=1.2, zero=1.0, ps=3.0)).regrets()
    assert regrets["planner"] == pytest.approx(0.2)
    assert regrets[FSDP] == 0.0
    assert regrets[PS] == pytest.approx(2.0)
    failed = case(said, [*runs(zero=1.0, ps=2.0), Run(plan="ddp", steps=10, error="killed")])
    assert failed.regrets()["planner"] == float("inf")
    assert [*failed.failed] == ["ddp"]


def test_what_was_run_again_at_the_end_decides() -> None:
    said = {"ddp": 1.0, "zero": 2.0}
    at_the_end = [Run(plan=key, steps=10, seconds=each, closing=True) for key, each in (("ddp", 1.0), ("zero", 1.1))]
    regrets = case(said, [*runs(ddp=1.5, zero=1.2), *at_the_end]).regrets()
    assert regrets["planner"] == 0.0
    assert regrets[FSDP] == pytest.approx(0.1)
    early = case(said | {"ps": 3.0}, [*runs(ddp=1.5, zero=1.2, ps=0.9), *at_the_end]).regrets()
    assert early["planner"] == 0.0


def test_errors_can_be_told_from_how_fast_cores_were() -> None:
    found = [Run(plan="ddp", steps=10, seconds=seconds, pace=pace) for seconds, pace in ((1.5, 3e-4), (1.0, 2e-4))]
    failed = [Run(plan="ddp", steps=10, error="killed")]
    judged = Case({"ddp": predicted(DDP_PLAN, 1.1)}, "ddp", (), [*found, *failed], pace=2e-4)
    assert judged.paced_errors() == [pytest.approx(0.1)]


def test_errors_are_of_the_median_run_and_of_what_a_longer_run_sends_more() -> None:
    found = [Run(plan="ddp", steps=steps, seconds=seconds, memory=80 * MB, link=5 * MB + steps * 1_000_000)
             for steps, seconds in ((10, 1.0), (20, 1.25), (10, 9.0))]  # fmt: skip
    each = case({"ddp": 1.0}, found, link=1_020_000.0).measured["ddp"]
    assert each.time_error == pytest.approx(-0.2)
    assert each.memory_error == pytest.approx(0.25)
    assert each.link_error == pytest.approx(0.02)
    assert case({"ddp": 1.0}, found[:1]).measured["ddp"].link_error is None


def test_a_plan_that_needs_more_than_was_said_fits_falsely() -> None:
    said = {"ddp": 1.0, "ps": 1.0}
    found = [Run(plan=key, steps=10, seconds=1.0, memory=size * MB) for key, size in (("ddp", 50), ("ps", 210))]
    wrong, words = case(said, found).false_fits()
    assert 0 < wrong < words
    assert case(said, found, memory=400 * MB).false_fits()[0] == 0


def test_others_choose_by_name_by_rule_and_by_arithmetic() -> None:
    predictions = {key: predicted(PLANS[key], seconds) for key, seconds in (("ps", 1.0), ("zero", 2.0), ("ddp", 3.0))}
    plain = baselines(predictions, ())
    assert plain == {DDP: "ddp", FSDP: "zero", PS: "ps", THUMB: "ddp", ARITHMETIC: "ps"}
    assert baselines(predictions, [SPARSE])[THUMB] == "ps"
