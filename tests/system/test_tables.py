"""Tables in real runs: the same numbers under every strategy, and every sample once through ``kill -9``.

TRICORN_ROUNDS says how many seeds are run for each mode.
"""

import os
from functools import cache
from random import Random

import pytest
import torch

from tricorn.data.order import Permutation, step_range
from tricorn.data.sources import as_source
from tricorn.state.flat import build_model

from . import harness, table_jobs

FILE = harness.JOBS.with_name("table_jobs.py")
ROUNDS = int(os.environ.get("TRICORN_ROUNDS", "1"))
PS = ["--strategy", "ps", "--workers", "2", "--servers", "2"]
VICTIMS = ["worker-0", "worker-1", "server-0", "server-1"]
MODES = {"bsp": [], "hybrid": ["--sparse-consistency", "asp"]}
if "TRICORN_ROUNDS" in os.environ:
    MODES |= {mode: ["--consistency", mode] for mode in ("ssp", "asp")}
LOCAL = {FILE: "job", harness.JOBS: "local"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights that local steps come to when nobody dies."""

    @cache
    def train(file):
        run = harness.start(tmp_path_factory.mktemp("calm"), LOCAL[file], *PS, "--local-steps", "3", file=file)
        run.summary()
        return local_weights(run, file)

    return train


def local_weights(run, file):
    return weights(run) if file == FILE else run.weights("local")


def weights(run):
    return harness.flat(harness.trained_model(table_jobs.job, run.folder))


@cache
def expected():
    """The weights that one process comes to: the sum of all updates, in any order."""
    job = table_jobs.job
    model, source = build_model(job), as_source(job.train)
    optimizer = torch.optim.SGD(model.parameters(), lr=job.optimizer.lr)
    for step in range(table_jobs.STEPS):
        epoch, start, stop = step_range(step, len(source), job.batch_size)
        ids = Permutation(job.seed, epoch, source.fingerprint, len(source)).ids(start, stop)
        inputs, target = source.fetch(ids)
        optimizer.param_groups[0]["lr"] = job.optimizer.lr * job.schedule(step)
        optimizer.zero_grad()
        job.loss(model(*inputs), target).backward()
        optimizer.step()
    return harness.flat(model)


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("mode", MODES)
def test_rows_are_updated_once_through_deaths(tmp_path, mode, seed):
    run = harness.start(tmp_path, "job", *PS, *MODES[mode], "--checkpoint-every", "20", file=FILE)
    run.reach(5)
    killed = run.disturb(Random(f"{mode}/{seed}"), VICTIMS, kills=2)
    run.counted_once(killed)
    assert harness.distance(weights(run), expected()) <= 1e-10, f"killed {killed}"


@pytest.mark.skipif("TRICORN_ROUNDS" not in os.environ, reason="a campaign")
@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("file", [FILE, harness.JOBS], ids=["tables", "dense"])
def test_rounds_of_local_steps_are_whole_through_deaths(tmp_path, undisturbed, file, seed):
    """No worker's optimizer has a state of its own, so the weights are those of a run without deaths."""
    run = harness.start(tmp_path, LOCAL[file], *PS, "--local-steps", "3", "--checkpoint-every", "20", file=file)
    run.reach(3)
    killed = run.disturb(Random(f"local/{seed}"), VICTIMS, kills=3)
    run.counted_once(killed)
    assert harness.distance(local_weights(run, file), undisturbed(file)) <= 1e-10, f"killed {killed}"
