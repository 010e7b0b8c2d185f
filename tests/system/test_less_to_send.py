"""``kill -9`` in the midst of rounds whose exchange is compressed: every sample is counted once all the same."""

from random import Random

import numpy as np

from . import harness


def test_killed_inside_rounds(tmp_path):
    options = ["--strategy", "dp", "--workers", "2", "--local-steps", "3", "--compress", "int8"]
    run = harness.start(tmp_path, "long", *options, "--checkpoint-every", "20")
    run.reach(5)
    killed = run.disturb(Random(1), ["worker-0", "worker-1", "coordinator"], kills=3)
    summary = run.summary()
    assert killed
    assert summary["exactly_once"]
    assert summary["steps"] == summary["total_steps"] == 420
    with run.ledger() as ledger:
        for epoch in range(60):
            assert np.array_equal(ledger.times_committed(epoch), np.ones(163)), f"epoch {epoch}, killed {killed}"
    assert summary["metrics"]["accuracy"] > 0.9
