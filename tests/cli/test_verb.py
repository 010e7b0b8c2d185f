"""What all verbs share, in this process: options that belong to the job, and Ctrl-C."""

from __future__ import annotations

import re
import sys

import pytest
from typer.main import get_command

from tricorn.cli import main as cli
from tricorn.cli import train as verb


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tricorn", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("option", "where"),
    [
        ("--epochs", "tricorn.Job(epochs=...)"),
        ("--batchsize", "tricorn.Job(batch_size=...)"),
        ("--learning-rate", "tricorn.Job(optimizer=tricorn.optim.SGD(lr=...))"),
    ],
)
def test_what_belongs_to_the_job_is_said_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, where: str
) -> None:
    assert run(monkeypatch, "train", "job.py", option, "3") == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"error: no such option: {option}; it belongs to the job",
        f"what to do: Set {where} in the job's file.",
    ]


@pytest.mark.parametrize("option", ["--schedul", "--wrokers"])  # the first is like an option, and like a job's field
def test_a_misspelt_option_is_not_looked_for_in_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert run(monkeypatch, "train", "job.py", option, "3") == 2
    assert f"No such option: {option}" in capsys.readouterr().err


def test_a_verb_without_a_job_knows_nothing_of_jobs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "doctor", "--device", "cuda") == 2
    assert "No such option: --device" in capsys.readouterr().err


VERBS = get_command(cli.app).commands


@pytest.mark.parametrize("verb", [*sorted(VERBS.keys() - {"ps"}), "ps stats"])
def test_help_tells_every_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # so that each option has one line
    assert run(monkeypatch, *verb.split(), "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    command = VERBS["ps"].commands["stats"] if verb == "ps stats" else VERBS[verb]
    options = [parameter for parameter in command.params if parameter.opts[-1].startswith("--")]
    assert options
    for option in options:
        (line,) = (each for each in lines if each.strip("│* ").startswith(f"{option.opts[-1]} "))
        if option.default is not False:  # one that is there or not tells by itself that it is not
            assert re.search(r"\[[^\[\]]+\][ │]*$", line), line


def test_ctrl_c_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(where: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "job_in", interrupted)
    assert run(monkeypatch, "train", "my job.py") == 130
    assert capsys.readouterr().err.splitlines()[1:] == [
        "interrupted by the user",
        "Start again with `tricorn train 'my job.py'`.",
    ]
