"""Hybrids in real runs: every sample once through ``kill -9`` of any role, and the weights of one process.

TRICORN_ROUNDS says how many seeds are run for each mode; with one, only those modes that differ most.
"""

import os
from functools import cache
from random import Random

import pytest
import torch

from . import harness, jobs, test_tables

ROUNDS = int(os.environ.get("TRICORN_ROUNDS", "1"))
TWO = ["--workers", "2"]
MODES = {
    "ps+dp": ["--strategy", "ps+dp", *TWO, "--servers", "2"],
    "ps+mp": ["--strategy", "ps+mp", *TWO, "--servers", "2"],
}
LAYERED: dict[str, list[str]] = {}  # what a model of one small layer cannot be trained under
if ROUNDS > 1:
    MODES |= {
        "older rows": [*MODES["ps+dp"], "--sparse-consistency", "asp"],
        **{how: ["--strategy", "dp", *TWO, "--embeddings", how] for how in ("rows", "columns", "tables")},
    }
    LAYERED = {
        "ps+mp x 2": ["--strategy", "ps+mp", "--workers", "4", "--replicas", "2", "--servers", "2"],
        "ps+mp split": ["--strategy", "ps+mp", *TWO, "--tensor", "2", "--servers", "2"],
        "mp x rows": ["--strategy", "mp", "--workers", "4", "--replicas", "2", "--embeddings", "rows"],
        "dp2 x pp2 x tp2": ["--strategy", "mp", "--workers", "8", "--replicas", "2", "--tensor", "2"],
    }


@cache
def expected():
    """The weights of the job with layers after one plain loop."""
    return harness.trajectory(jobs.layered, adagrad, 7 * jobs.layered.epochs)[1]


def adagrad(model):
    return [torch.optim.Adagrad(model.parameters(), lr=jobs.layered.optimizer.lr)]


def disturbed(folder, mode, seed, options, job, file):
    """A run of a job of the file in which two roles have died and each sample counted once, and who died."""
    servers = ["server-0", "server-1"] if "--servers" in options else []
    workers = [f"worker-{rank}" for rank in range(int(options[options.index("--workers") + 1]))]
    run = harness.start(folder, job, *options, "--checkpoint-every", "20", file=file)
    run.reach(5)
    killed = run.disturb(Random(f"{mode}/{seed}"), [*workers, *servers, "coordinator"], kills=2)
    run.counted_once(killed)
    return run, killed


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("mode", MODES)
def test_every_sample_counts_once_through_deaths(tmp_path, mode, seed):
    run, killed = disturbed(tmp_path, mode, seed, MODES[mode], "job", test_tables.FILE)
    assert harness.distance(test_tables.weights(run), test_tables.expected()) <= 1e-10, f"killed {killed}"


@pytest.mark.skipif(not LAYERED, reason="a campaign")
@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("mode", LAYERED)
def test_layers_that_are_cut_and_split_go_on_after_deaths(tmp_path, mode, seed):
    run, killed = disturbed(tmp_path, mode, seed, LAYERED[mode], "layered", harness.JOBS)
    weights = harness.flat(harness.trained_model(jobs.layered, run.folder))
    assert harness.distance(weights, expected()) <= 1e-10, f"killed {killed}"
