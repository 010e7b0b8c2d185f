"""Every synchronous strategy, at any number of processes, ends with the weights of one plain loop.

All plans with TRICORN_ROUNDS, else one of each kind, with an optimizer and a precision of its own: test_matrix has them
all, with threads, and test_exactly_once SGD in float64, with deaths.
"""

import os

import pytest

from . import harness

PLANS = {
    **{f"dp x {w}": ["--strategy", "dp", "--workers", str(w)] for w in (1, 2, 3, 4)},
    **{
        f"ps x {w} of {s}": ["--strategy", "ps", "--workers", str(w), "--servers", str(s)]
        for w in (1, 2, 3)
        for s in (1, 2)
    },
    **{f"mp x {w}": ["--strategy", "mp", "--workers", str(w)] for w in (2, 3)},
    "mp 2 x 2 replicas": ["--strategy", "mp", "--workers", "4", "--replicas", "2"],
    "mp 2 x 2 shards": ["--strategy", "mp", "--workers", "4", "--tensor", "2"],
}


BOUNDS = {"sgd64": 1e-10, "sgd32": 1e-5, "adam64": 1e-10, "adam32": 1e-4}
CASES = [("dp x 2", "sgd32"), ("ps x 3 of 2", "adam64"), ("mp 2 x 2 shards", "adam32")]
if "TRICORN_ROUNDS" in os.environ:
    CASES = [(plan, "sgd64") for plan in PLANS]
    CASES += [(plan, job) for plan in ("dp x 3", "ps x 2 of 2", "mp x 3") for job in BOUNDS if job != "sgd64"]


@pytest.mark.parametrize(("plan", "job"), CASES)
def test_same_weights(tmp_path, plan, job):
    run = harness.start(tmp_path, job, *PLANS[plan])
    summary = run.summary()
    assert harness.distance(run.weights(job), harness.plain(job)) <= BOUNDS[job]
    assert summary["exactly_once"]
    assert summary["steps"] == 56
    assert summary["metrics"]["accuracy"] > 0.8
