"""Trials of real plans: what fails leaves the next one alone, and nothing behind."""

from pathlib import Path

import pytest

from tricorn.engine.local import LocalEngine
from tricorn.errors import UserCodeError
from tricorn.plan import Plan
from tricorn.planner.trying import FEWEST_STEPS
from tricorn.trials import Trials

JOB = str(Path(__file__).with_name("mistakes.py")), "whole_batches"


def test_a_plan_that_fails_is_out_and_the_next_is_tried():
    with Trials(JOB, LocalEngine) as trial:
        with pytest.raises(UserCodeError, match="part of a batch"):
            trial(Plan(strategy="dp", workers=2, threads=1))
        found = trial(Plan(strategy="dp", workers=1, threads=1))
    assert found.steps >= FEWEST_STEPS
    assert found.measured["step"] > 0


def test_a_trial_that_is_interrupted_leaves_nothing(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with Trials(JOB, LocalEngine) as trial:
        monkeypatch.setattr("tricorn.trials._between", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trial(Plan(strategy="dp", workers=1, threads=1))
        monkeypatch.undo()
        assert trial(Plan(strategy="dp", workers=1, threads=1)).steps >= FEWEST_STEPS
