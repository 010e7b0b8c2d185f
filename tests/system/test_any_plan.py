"""A run is interrupted in the midst of an epoch, again and again, and goes on each time under another plan.

With TRICORN_ROUNDS every plan follows every other, in four walks; else a few.
"""

import json
import os
import signal
from itertools import pairwise

import numpy as np
import pytest
import torch

from tricorn.data.order import step_range

from . import harness, jobs

PLANS = {  # what a run that goes on under the same strategy would keep is said
    "single": ["--strategy", "dp", "--workers", "1"],
    "dp2": ["--strategy", "dp", "--workers", "2"],
    "zero3 x 2": ["--strategy", "dp", "--workers", "2", "--zero", "3"],
    "pp2": ["--strategy", "mp", "--workers", "2", "--replicas", "1", "--tensor", "1"],
    "tp2": ["--strategy", "mp", "--workers", "2", "--replicas", "1", "--tensor", "2"],
    "dp2 x pp2": ["--strategy", "mp", "--workers", "4", "--replicas", "2", "--tensor", "1"],
    "ps": ["--strategy", "ps", "--workers", "2", "--servers", "2"],
    "ps+dp": ["--strategy", "ps+dp", "--workers", "2", "--servers", "2"],
}


def circuit(names: list[str]) -> list[str]:
    """A walk from the first back to the first in which every name follows every other once (Hierholzer)."""
    ways = {name: [other for other in names if other != name] for name in names}
    walk, ahead = [], [names[0]]
    while ahead:
        if ways[ahead[-1]]:
            ahead.append(ways[ahead[-1]].pop())
        else:
            walk.append(ahead.pop())
    return walk[::-1]


WALKS = [["ps", "tp2", "ps+dp"]]
if "TRICORN_ROUNDS" in os.environ:
    whole = circuit(list(PLANS))
    WALKS = [whole[start : start + 15] for start in range(0, len(whole) - 1, 14)]


def test_every_plan_follows_every_other():
    walk = circuit(list(PLANS))
    pairs = list(pairwise(walk))
    assert len(pairs) == len(set(pairs)) == 8 * 7
    assert all(before != after for before, after in pairs)


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: f"{walk[0]} to {walk[-1]}")
def test_a_run_goes_on_under_other_plans(tmp_path, walk):
    run, stops = harness.start(tmp_path, "tabled", *PLANS[walk[0]]), [0]
    for after in [*walk[1:], None]:
        run.reach(stops[-1] + 5)
        run.process.send_signal(signal.SIGINT)
        code, _, err = run.end()
        assert code == 130, err
        stops.append(run.steps())
        if after:
            run = harness.resume(tmp_path, *PLANS[after], "--threads", "1")
    steps = stops[-1]
    print(f"{walk} stopped at {stops[1:]}, in an epoch at {[step % 21 for step in stops[1:]]}")
    assert all(before < after for before, after in pairwise(stops))
    losses, weights = harness.trajectory(
        jobs.tabled, lambda model: [torch.optim.Adagrad(model.parameters(), lr=0.1)], steps
    )
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(found) == list(range(steps))
    assert np.allclose(list(found.values()), losses, rtol=1e-8, atol=1e-10)
    assert harness.distance(run.weights("tabled"), weights) <= 1e-10
    epoch, _, stop = step_range(steps - 1, jobs.SAMPLES, 8)
    with run.ledger() as ledger:
        assert ledger.exactly_once(complete=False)
        counted = [ledger.times_committed(number) for number in range(epoch + 1)]
    assert all((times == 1).all() for times in counted[:-1])
    assert (counted[-1].sum(), counted[-1].max()) == (stop, 1)
