"""The demo: jobs by each family, as predicted and as measured; and how its figures are judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tricorn
from tricorn.cli.demo import shortened, verdicts
from tricorn.planner import store

from .world import links

TRICORN = Path(sys.executable).with_name("tricorn")
JOB = """
import torch, tricorn
x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
def network():
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
job = tricorn.Job(
    model=network, loss=torch.nn.functional.mse_loss, optimizer=tricorn.optim.SGD(lr=0.01),
    train=tricorn.data.arrays(x, x.sum(1, keepdim=True)), batch_size=16, epochs=5)
"""


def job(samples: int, *, batch_size: int, epochs: int) -> tricorn.Job:
    x = torch.arange(samples, dtype=torch.float32)[:, None]
    return tricorn.Job(
        model=lambda: torch.nn.Linear(1, 1), loss=torch.nn.functional.mse_loss, optimizer=tricorn.optim.SGD(lr=0.01),
        train=tricorn.data.arrays(x, x), batch_size=batch_size, epochs=epochs,
    )  # fmt: skip


def test_a_long_job_is_shortened_to_whole_epochs_or_to_a_part_of_one() -> None:
    whole = job(100, batch_size=10, epochs=5)
    assert shortened(whole, 50) is whole
    assert shortened(whole, 37).epochs == 3
    assert len(shortened(whole, 37).train) == 100
    few = shortened(whole, 4)
    assert (len(few.train), few.epochs) == (40, 1)


def test_a_verdict_names_who_was_to_be_fastest_and_who_was() -> None:
    def row(job: str, family: str, predicted: float, measured: float) -> dict:
        return {"job": job, "family": family, "predicted": predicted, "summary": {"measured": {"step": measured}}}

    shown = [row("a", "ps", 1.0, 2.0), row("a", "dp", 2.0, 3.0), row("b", "ps", 1.0, 4.0), row("b", "mp", 2.0, 3.0)]
    assert verdicts(shown) == [
        "a: ps was predicted to be the fastest, and was.",
        "b: ps was predicted to be the fastest, mp was.",
    ]


def test_every_family_trains_the_same_steps_to_the_same_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRICORN_CACHE", str(tmp_path / "cache"))
    store.save_links(links())  # as if this machine had been measured
    (tmp_path / "small.py").write_text(JOB)
    done = subprocess.run(
        [TRICORN, "demo", "small.py", "--json"], cwd=tmp_path, env={**os.environ}, capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)["runs"]
    assert [run["family"] for run in runs] == ["ps", "dp", "mp"]
    assert len({run["summary"]["steps"] for run in runs}) == 1
    assert all(run["predicted"] > 0 and run["summary"]["measured"]["step"] > 0 for run in runs)
    assert all(run["summary"]["exactly_once"] for run in runs)
    losses = [run["summary"]["loss"] for run in runs]
    assert max(losses) - min(losses) < 1e-3 * max(losses)
