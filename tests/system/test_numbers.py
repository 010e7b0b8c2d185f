"""Every synchronous strategy, at any number of processes, ends with the weights of one plain loop."""

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


@pytest.mark.parametrize("plan", PLANS)
def test_same_weights(tmp_path, plan):
    run = harness.start(tmp_path, "sgd64", *PLANS[plan])
    summary = run.summary()
    assert harness.distance(run.weights("sgd64"), harness.plain("sgd64")) <= 1e-10
    assert summary["exactly_once"]
    assert summary["steps"] == 56
    assert summary["metrics"]["accuracy"] > 0.8


@pytest.mark.parametrize("plan", ["dp x 3", "ps x 2 of 2", "mp x 3"])
@pytest.mark.parametrize(("name", "bound"), [("sgd32", 1e-5), ("adam32", 1e-4), ("adam64", 1e-10)])
def test_same_weights_with_other_optimizers(tmp_path, plan, name, bound):
    run = harness.start(tmp_path, name, *PLANS[plan])
    run.summary()
    assert harness.distance(run.weights(name), harness.plain(name)) <= bound
