"""However a run ends, nothing of it stays behind, and it can go on under any strategy.

With TRICORN_ROUNDS every signal is sent to every strategy, else each to one.
"""

import os
import signal
from itertools import product
from pathlib import Path

import psutil
import pytest

from . import harness

SECONDS = 3.0  # in which everything has to be gone


def processes(run: harness.Run) -> list[psutil.Process]:
    launcher = psutil.Process(run.process.pid)
    return [launcher, *launcher.children(recursive=True)]


ENDS = [("SIGINT", "mp"), ("SIGTERM", "ps"), ("SIGKILL", "dp")]
if "TRICORN_ROUNDS" in os.environ:
    ENDS = list(product(["SIGINT", "SIGTERM", "SIGKILL"], ["dp", "ps", "mp"]))


@pytest.mark.parametrize(("how", "strategy"), ENDS)
def test_a_run_that_is_stopped_leaves_nothing_and_goes_on(tmp_path, how, strategy):
    # By heartbeats nothing would end: they may be missing for longer than SECONDS.
    options = ["--checkpoint-every", "50", "--heartbeat-timeout", "100"]
    run = harness.start(tmp_path, "long", "--strategy", strategy, *options)
    run.reach(60)
    family, segments = processes(run), set(os.listdir("/dev/shm"))
    run.process.send_signal(getattr(signal, how))
    _, alive = psutil.wait_procs(family[1:], SECONDS)
    code, _, err = run.end()
    assert not alive
    assert set(os.listdir("/dev/shm")) <= segments
    assert not [path for path in Path(run.folder).rglob("*") if path.is_socket()]
    if how != "SIGKILL":
        assert code == 130
        who = "the user" if how == "SIGINT" else how
        assert f"\ninterrupted by {who} at step {run.steps()}, and saved\n" in err
        assert f"tricorn train --resume {os.path.relpath(run.folder.resolve())}" in err.splitlines()[-1]
    before = run.steps()
    others = {"dp": ["--strategy", "ps", "--workers", "3"], "ps": ["--strategy", "mp"], "mp": ["--strategy", "dp"]}
    again = harness.resume(tmp_path, *others[strategy], "--threads", "1")
    summary = again.summary()
    assert summary["steps"] == 420
    assert before >= 60
    assert summary["exactly_once"]
    assert harness.distance(again.weights("long"), harness.plain("long")) <= 1e-10


def test_a_run_belongs_to_one_launcher_and_ends_with_the_process_that_starts_its_roles(tmp_path):
    run = harness.start(tmp_path, "long", "--strategy", "ps", "--checkpoint-every", "20", "--heartbeat-timeout", "100")
    run.reach(30)
    for worker in ("worker-0", "worker-1"):
        os.kill(run.pids()[worker], signal.SIGSTOP)
    code, _, err = harness.resume(tmp_path).end()
    assert code == 2
    assert "is in progress" in err
    family = processes(run)
    family[1].kill()
    code, _, err = run.end()
    assert code == 3
    assert "killed by signal 9" in err
    assert "tricorn train --resume" in err.splitlines()[-1]
    assert not psutil.wait_procs(family, SECONDS)[1]
    assert harness.resume(tmp_path, "--strategy", "dp").summary()["exactly_once"]


def test_a_coordinator_that_hangs_is_replaced(tmp_path):
    run = harness.start(tmp_path, "long", "--strategy", "dp", "--heartbeat-timeout", "1")
    run.reach(5)
    os.kill(run.pids()["coordinator"], signal.SIGSTOP)
    summary = run.summary()
    assert summary["exactly_once"]
    assert summary["restarts"] >= 1


def test_a_run_that_is_done_leaves_nothing_and_another_order_of_samples_is_refused(tmp_path):
    run = harness.start(tmp_path, "sgd64", "--strategy", "ps")
    run.reach(1)
    family = processes(run)
    run.summary()
    assert not psutil.wait_procs(family, SECONDS)[1]
    other = harness.Run(
        harness._launch([harness.TRICORN, "train", f"{harness.JOBS}:smaller_batches", "--resume", tmp_path / "latest"]),
        tmp_path,
    )
    code, _, err = other.end()
    assert code == 2
    assert "batch_size was 25 and is now 20" in err
