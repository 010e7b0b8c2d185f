"""A run is interrupted in the midst of an epoch, again and again, and goes on each time under another plan.

TRICORN_ROUNDS says how many random sequences of plans are run; the first is fixed.
"""

import os
import signal
from random import Random

import numpy as np
import pytest

from . import harness

ROUNDS = int(os.environ.get("TRICORN_ROUNDS", "1"))
PLANS = {
    "single": ["--strategy", "dp", "--workers", "1"],
    "dp2": ["--strategy", "dp", "--workers", "2"],
    "zero3 x 2": ["--strategy", "dp", "--workers", "2", "--zero", "3"],
    "pp2": ["--strategy", "mp", "--workers", "2"],
    "tp2": ["--strategy", "mp", "--workers", "2", "--tensor", "2"],
    "dp2 x pp2": ["--strategy", "mp", "--workers", "4", "--replicas", "2"],
    "ps": ["--strategy", "ps", "--workers", "2", "--servers", "2"],
}


def sequence(seed: int) -> list[str]:
    return ["ps", "tp2", "dp2 x pp2"] if seed == 0 else Random(seed).choices(list(PLANS), k=6)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_run_goes_on_under_other_plans(tmp_path, seed):
    plans = sequence(seed)
    run = harness.start(tmp_path, "long", *PLANS[plans[0]])
    done = 0
    for plan in plans[1:]:
        run.reach(done + 20 + seed % 7)
        run.process.send_signal(signal.SIGINT)
        code, _, err = run.end()
        assert code == 130, err
        done = run.steps()
        run = harness.resume(tmp_path, *PLANS[plan], "--threads", "1")
    summary = run.summary()
    assert summary["exactly_once"]
    assert summary["steps"] == summary["total_steps"] == 420
    with run.ledger() as ledger:
        for epoch in range(60):
            assert np.array_equal(ledger.times_committed(epoch), np.ones(163)), f"epoch {epoch} of {plans}"
    assert harness.distance(run.weights("long"), harness.plain("long")) <= 1e-10, plans
