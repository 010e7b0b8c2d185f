"""``kill -9`` of any role at random moments, several times in a run: it ends by itself, every sample counted once.

TRICORN_ROUNDS says how many seeds are run for each strategy; with it, more forms of each are run.
"""

import os
import signal
from random import Random

import pytest

from . import harness

ROUNDS = int(os.environ.get("TRICORN_ROUNDS", "1"))
PS = ["--strategy", "ps", "--workers", "2", "--servers", "2"]
WORKERS, SERVERS = ["worker-0", "worker-1"], ["server-0", "server-1"]
MESH = ["--strategy", "mp", "--workers", "4"]
FOUR = [*WORKERS, "worker-2", "worker-3", "coordinator"]
CASES = {
    "dp x 3": (["--strategy", "dp", "--workers", "3"], [*WORKERS, "worker-2", "coordinator"]),
    "dp zero 3": (["--strategy", "dp", "--workers", "2", "--zero", "3"], [*WORKERS, "coordinator"]),
    "mp dp2 x pp2": ([*MESH, "--replicas", "2"], FOUR),
    "ps bsp": (PS, [*WORKERS, *SERVERS, "coordinator"]),
    "ps asp": ([*PS, "--consistency", "asp"], [*WORKERS, *SERVERS, "coordinator"]),
}
if "TRICORN_ROUNDS" in os.environ:
    CASES |= {
        name: (["--strategy", "dp", "--workers", "2", *options], [*WORKERS, "coordinator"])
        for name, options in {
            "dp": [], "dp balance": ["--balance"], "dp zero 1": ["--zero", "1"], "dp zero 2": ["--zero", "2"],
            "dp microbatches": ["--microbatches", "3"], "dp normed": [],
        }.items()
    } | {
        "ps ssp": ([*PS, "--consistency", "ssp"], [*WORKERS, *SERVERS, "coordinator"]),
        "mp": (["--strategy", "mp", "--workers", "2"], [*WORKERS, "coordinator"]),
        "mp interleaved": ([*MESH[:3], "2", "--schedule", "interleaved"], [*WORKERS, "coordinator"]),
        "mp zero-bubble": ([*MESH[:3], "3", "--schedule", "zero-bubble"], [*WORKERS, "worker-2", "coordinator"]),
        "mp dp2 x tp2": ([*MESH, "--replicas", "2", "--tensor", "2"], FOUR),
        "mp pp2 x tp2": ([*MESH, "--tensor", "2"], FOUR),
        "mp dp2 x pp2 zero 1": ([*MESH, "--replicas", "2", "--zero", "1"], FOUR),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_moments(tmp_path, case, seed):
    options, victims = CASES[case]
    job = "normed" if case == "dp normed" else "long"
    run = harness.start(tmp_path, job, *options, "--checkpoint-every", "20")
    run.reach(5)
    killed = run.disturb(Random(f"{case}/{seed}"), victims, kills=4)
    summary = run.counted_once(killed)
    if case not in ("ps ssp", "ps asp"):
        assert harness.distance(run.weights(job), harness.plain(job)) <= 1e-10, f"killed {killed}"
    assert summary["metrics"]["accuracy"] > 0.9


def test_dropout_is_repeated_in_a_step_that_is_run_again(tmp_path):
    undisturbed = harness.start(tmp_path / "calm", "dropout", "--strategy", "mp")
    undisturbed.summary()
    run = harness.start(tmp_path / "killed", "dropout", "--strategy", "mp", "--checkpoint-every", "20")
    run.reach(70)
    run.disturb(Random(0), ["worker-1"], kills=1)
    run.summary()
    assert harness.distance(run.weights("dropout"), undisturbed.weights("dropout")) <= 1e-10


@pytest.mark.parametrize("case", ["dp x 3", "ps asp"] if "TRICORN_ROUNDS" in os.environ else ["ps asp"])
def test_a_role_that_hangs_is_replaced(tmp_path, case):
    options, _ = CASES[case]
    run = harness.start(tmp_path, "long", *options, "--heartbeat-timeout", "1")
    run.reach(20)
    os.kill(run.pids()["worker-1"], signal.SIGSTOP)
    summary = run.summary()
    assert summary["exactly_once"]
    assert summary["restarts"] >= 1
