"""The command line as a person types it: verbs, wrong usage, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tricorn import __version__
from tricorn.engine import loading
from tricorn.errors import UsageError

TRICORN = Path(sys.executable).with_name("tricorn")


def tricorn(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TRICORN, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)


def test_the_version(tmp_path):
    assert tricorn("--version", cwd=tmp_path).stdout.strip() == __version__


def test_an_error_is_told_as_json_too(tmp_path):
    done = tricorn("train", "nowhere.py", "--json", cwd=tmp_path)
    said = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, said["exit_code"], said["kind"]) == (2, 2, "UsageError")
    assert "nowhere.py" in said["error"]
    assert said["what_to_do"]


def test_every_verb_is_listed(tmp_path):
    shown = tricorn("--help", cwd=tmp_path).stdout
    assert all(verb in shown for verb in ("train", "demo", "doctor"))


def test_the_doctor_speaks_json(tmp_path):
    done = tricorn("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "tricorn train FILE.py"),
        (["train", "empty.py", "--strategy", "dp", "--servers", "3"], "only --strategy ps has servers"),
        (["train", "empty.py", "--workers", "0"], "give at least 1"),
        (["train", "empty.py", "--checkpoint-every", "soon"], "such as 30s"),
        (["train", "--resume", "nothing"], "there is no run nothing"),
        (["train", "broken.py"], "1 / 0"),
        (["train", "empty.py", "--heartbeat-timeout", "0"], "at least 0.5"),
        (["train", "--wrokers", "2"], "No such option"),
    ],
)
def test_wrong_usage(tmp_path, arguments, said):
    (tmp_path / "empty.py").touch()
    (tmp_path / "broken.py").write_text("x = 1 / 0\n")
    done = tricorn(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(("file", "name"), [("empty.py", "job"), ("empty.py", "other"), ("nowhere.py", "job")])
def test_a_job_that_is_not_there(tmp_path, file, name):
    (tmp_path / "empty.py").touch()
    with pytest.raises(UsageError, match="there is no " + (name if file == "empty.py" else "file .*nowhere.py")):
        loading.load(str(tmp_path / file), name, None)
