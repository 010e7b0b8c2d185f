import pytest

from tricorn.plan import Plan
from tricorn.report.compare import counted, grouped, measured, sentence, worst

TOLD = [
    {"steps": 10.0, "all": 1.0, "data": 0.1, "compute": 0.6},
    {"steps": 10.0, "all": 1.2, "data": 0.1, "compute": 0.8},
]


DP = Plan(strategy="dp")


def test_steps_are_the_mean_of_all_workers_and_wait_for_the_slowest() -> None:
    found = measured(TOLD, DP)
    assert found == pytest.approx({"step": 0.11, "data": 0.01, "compute": 0.07, "waiting": 0.01, "exchange": 0.02})
    assert counted(TOLD) == 10


def test_a_pipeline_takes_as_long_as_its_busiest_stage() -> None:
    found = measured(TOLD, Plan(strategy="mp"))
    assert found == pytest.approx({"step": 0.11, "data": 0.01, "compute": 0.08, "exchange": 0.02})


def test_workers_side_by_side_make_more_updates() -> None:
    assert measured(TOLD, Plan(strategy="ps", servers=1, consistency="asp"))["step"] == pytest.approx(0.055)


def test_without_a_trainer_that_tells_computing_is_with_the_rest() -> None:
    found = measured([{"steps": 4.0, "all": 1.0, "data": 0.2}], DP)
    assert found == pytest.approx({"step": 0.25, "data": 0.05, "exchange": 0.2})


def test_nothing_told_is_nothing_measured() -> None:
    assert measured([], DP) == {}
    assert measured([{"steps": 0.0, "all": 0.0, "data": 0.0}], DP) == {}
    assert counted([]) == 0


def test_terms_are_put_together_as_they_were_measured() -> None:
    terms = {"compute": 5.0, "data": 1.0, "update": 2.0, "wire": 3.0, "waiting": 0.5}
    assert grouped(terms, 11.5, {"compute": 1, "data": 1}) == {"step": 11.5, "compute": 5, "data": 1, "exchange": 5.5}
    assert grouped(terms, 11.5, {"data": 1}) == {"step": 11.5, "data": 1, "exchange": 10.5}


def test_the_worst_term_is_the_furthest_off() -> None:
    predicted, found = {"compute": 5.0, "data": 1.0, "exchange": 2.0}, {"compute": 4.0, "data": 1.0, "exchange": 3.5}
    assert worst(predicted, {**found, "step": 99.0}) == "exchange"


def test_one_line_says_both() -> None:
    summary = {
        "measured": {"step": 0.012, "compute": 0.01, "data": 0.0, "exchange": 0.002},
        "predicted": {"step": 0.01, "compute": 0.007, "data": 0.0, "exchange": 0.003, "low": 0.009, "high": 0.011},
        "worst_term": "compute",
    }
    assert sentence(summary) == (
        "a step took 12 ms, predicted 10 (9 to 11); the largest difference is in computing: 10 ms, predicted 7"
    )
    assert not sentence({"measured": summary["measured"]})
    assert not sentence({})
