"""Hybrids in real runs: every sample once through ``kill -9``, and the weights of one process.

TRICORN_ROUNDS says how many seeds are run for each mode; with one, only those modes that differ most.
"""

import os
from random import Random

import pytest

from . import harness
from .test_tables import FILE, expected, weights

ROUNDS = int(os.environ.get("TRICORN_ROUNDS", "1"))
MODES = {
    "ps+dp": ["--strategy", "ps+dp", "--workers", "2", "--servers", "2"],
    "ps+mp": ["--strategy", "ps+mp", "--workers", "2", "--servers", "2"],
}
if ROUNDS > 1:
    MODES |= {
        "older rows": [*MODES["ps+dp"], "--sparse-consistency", "asp"],
        "rows": ["--strategy", "dp", "--workers", "2", "--embeddings", "rows"],
    }


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("mode", MODES)
def test_every_sample_counts_once_through_deaths(tmp_path, mode, seed):
    victims = ["worker-0", "worker-1", *(["server-0", "server-1"] if "--servers" in MODES[mode] else [])]
    run = harness.start(tmp_path, "job", *MODES[mode], "--checkpoint-every", "20", file=FILE)
    run.reach(5)
    killed = run.disturb(Random(f"{mode}/{seed}"), victims, kills=2)
    run.counted_once(killed)
    assert harness.distance(weights(run), expected()) <= 1e-10, f"killed {killed}"
