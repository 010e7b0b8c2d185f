"""Every synchronous strategy, at any number of processes, ends with the weights of one plain loop.

All plans with TRICORN_ROUNDS, else some of each kind: test_matrix has them all, with threads.
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


CAMPAIGN = "TRICORN_ROUNDS" in os.environ
OTHERS = [("dp x 3", "sgd32", 1e-5), ("mp x 3", "adam32", 1e-4), ("ps x 2 of 2", "adam64", 1e-10)]
if CAMPAIGN:
    OTHERS = [(plan, name, bound) for plan, _, _ in OTHERS for _, name, bound in OTHERS]


@pytest.mark.parametrize("plan", PLANS if CAMPAIGN else ["dp x 2", "ps x 3 of 2", "mp 2 x 2 shards"])
def test_same_weights(tmp_path, plan):
    run = harness.start(tmp_path, "sgd64", *PLANS[plan])
    summary = run.summary()
    assert harness.distance(run.weights("sgd64"), harness.plain("sgd64")) <= 1e-10
    assert summary["exactly_once"]
    assert summary["steps"] == 56
    assert summary["metrics"]["accuracy"] > 0.8


@pytest.mark.parametrize(("plan", "name", "bound"), OTHERS)
def test_same_weights_with_other_optimizers(tmp_path, plan, name, bound):
    run = harness.start(tmp_path, name, *PLANS[plan])
    run.summary()
    assert harness.distance(run.weights(name), harness.plain(name)) <= bound
