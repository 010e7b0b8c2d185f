"""What a user sees when something is wrong: one message, last, with the place and the cure; the right exit code.

With TRICORN_ROUNDS under every strategy, else under one or two.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tricorn.control import checkpoints
from tricorn.engine import loading
from tricorn.errors import PlanError
from tricorn.plan import Plan

from . import harness

MISTAKES = Path(__file__).with_name("mistakes.py")
STRATEGIES = ["dp", "ps", "mp"]
CAMPAIGN = "TRICORN_ROUNDS" in os.environ
RAISING = [("raising_block", "mp"), ("raising", "dp"), *([("raising", "ps")] if CAMPAIGN else [])]


def failure(run: harness.Run) -> tuple[int, str]:
    code, _, err = run.end()
    assert "Traceback" not in err
    return code, err[err.rindex("error: ") :]


@pytest.mark.parametrize(("job", "strategy"), RAISING)
def test_a_raise_in_forward(tmp_path, job, strategy):
    code, said = failure(harness.start(tmp_path, job, "--strategy", strategy, file=MISTAKES))
    assert code == 1
    assert "ValueError: my own mistake" in said
    assert "mistakes.py:" in said
    assert 'raise ValueError("my own mistake")' in said
    assert "tricorn train --resume" in said


@pytest.mark.parametrize("strategy", STRATEGIES if CAMPAIGN else ["mp"])
def test_a_loss_that_is_not_a_number(tmp_path, strategy):
    code, said = failure(harness.start(tmp_path, "diverging", "--strategy", strategy, file=MISTAKES))
    assert code == 1
    assert "the loss of step " in said
    assert "learning rate" in said


def test_an_item_of_another_shape(tmp_path):
    code, said = failure(harness.start(tmp_path, "misshapen", "--strategy", "dp", file=MISTAKES))
    assert code == 1
    assert "inputs of sample 33" in said
    assert "(5,)" in said
    assert "mistakes.py" in said


@pytest.mark.skipif(not CAMPAIGN, reason="tests/worker/test_batches.py has it, without a run")
def test_a_file_that_cannot_be_read(tmp_path):
    code, said = failure(harness.start(tmp_path, "unreadable", "--strategy", "ps", file=MISTAKES))
    assert code == 1
    assert "sample 33 cannot be read: FileNotFoundError" in said
    assert "/nowhere/33.png" in said


@pytest.mark.parametrize("options", [[], ["--strategy", "dp"]])
def test_a_job_with_mistakes(tmp_path, monkeypatch, options):
    """Also where the planner loads it, to which nothing is known: before it measures the machine."""
    monkeypatch.setenv("TRICORN_CACHE", str(tmp_path / "cache"))
    code, out, err = harness.start(tmp_path, "wrong", *options, file=MISTAKES).end()
    assert code == 2
    assert err.startswith("\nerror: the job has 2 mistakes")
    assert "batch_size" in err
    assert "optimizer.lr" in err
    assert "mistakes.py:" in err
    assert json.loads(out)["exit_code"] == 2


def test_a_metric_that_is_not_a_number_and_a_job_file_with_a_process_of_its_own(tmp_path):
    summary = harness.start(tmp_path, "with_a_child", "--strategy", "dp", file=MISTAKES).summary()
    assert summary["outcome"] == "done"
    assert summary["exactly_once"]
    assert summary["metrics"]["score"] is None  # JSON knows no nan
    assert summary["metrics"]["loss"] > 0


def test_user_code_that_exits(tmp_path):
    code, said = failure(harness.start(tmp_path, "exiting", "--strategy", "dp", file=MISTAKES))
    assert code == 1
    assert "SystemExit: enough" in said
    assert 'sys.exit("enough")' in said
    code, _, err = harness.start(tmp_path, "leaving", "--strategy", "dp", file=MISTAKES).end()
    assert code == 2
    assert "error: the job cannot be loaded: SystemExit: no job today" in err[err.index("\nerror:") :]


def test_a_model_that_cannot_be_cut():
    with pytest.raises(PlanError, match="mp cannot run this job") as caught:
        loading.warm(loading.load(str(MISTAKES), "single", None), Plan(strategy="mp"))
    assert caught.value.exit_code == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("strategy", STRATEGIES if CAMPAIGN else ["ps"])
def test_a_full_disk(tmp_path, strategy):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1700k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("this machine does not mount a tmpfs")
    try:
        options = ["--strategy", strategy, "--checkpoint-every", "10"]
        code, said = failure(harness.start(tmp_path, "large", *options, file=MISTAKES))
        assert code == 3
        assert "No space left on device" in said
        assert "tricorn train --resume" in said
        whole, damages = checkpoints.newest_whole(tmp_path / "latest" / "checkpoints")
        assert not damages
        assert whole is not None
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The runs of one that was killed after it had published at least two checkpoints."""
    runs = tmp_path_factory.mktemp("stopped")
    run = harness.start(runs, "long", "--strategy", "ps", "--servers", "2", "--checkpoint-every", "20")
    run.reach(70)
    run.process.kill()
    run.end()
    return runs


@pytest.fixture
def folder(stopped, tmp_path) -> Path:
    """The folder of that run, as a test's own."""
    shutil.copytree(stopped, tmp_path, symlinks=True, dirs_exist_ok=True)
    return (tmp_path / "latest").resolve()


def test_damaged_checkpoints(tmp_path, folder):
    """Each file of the newest one truncated, and one bit of each flipped: it is named, and the previous one is used."""
    newest, previous = checkpoints.published(folder / "checkpoints")
    files = sorted(newest.iterdir())
    assert len(files) == 3
    for file in files:
        content = file.read_bytes()
        for damage in (truncate, flip_a_bit):
            damage(file)
            used, damages = checkpoints.newest_whole(folder / "checkpoints")
            assert used == previous
            assert str(newest) in damages[0]
            file.write_bytes(content)
    flip_a_bit(files[-1])
    run = harness.resume(tmp_path, "--strategy", "dp", "--threads", "1")
    assert run.summary()["exactly_once"]
    rows = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    events = [row["event"] for row in rows if "event" in row]
    assert events[-1].endswith(f"from a checkpoint at step {int(previous.name)}")


def test_no_checkpoint_is_left(tmp_path, folder):
    for path in (folder / "checkpoints").rglob("*.safetensors"):
        truncate(path)
    code, said = failure(harness.resume(tmp_path, "--strategy", "dp"))
    assert code == 3
    assert "no checkpoint of the run can be read" in said
    assert ".safetensors has" in said


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
