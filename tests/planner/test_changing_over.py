"""A run whose plan was a mistake changes over to a better one, and trains as if it had had that from the beginning."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

import tricorn
from tricorn.data.order import Permutation, step_range
from tricorn.data.sources import as_source
from tricorn.engine.base import Timing
from tricorn.engine.local import LocalEngine
from tricorn.plan import Plan
from tricorn.planner import replan
from tricorn.planner.ground import Ground
from tricorn.planner.prediction import Prediction
from tricorn.planner.replan import Outlook
from tricorn.planner.search import predicted
from tricorn.run import execute
from tricorn.state.flat import build_model
from tricorn.state.trained import trained_model

from .world import line, links, machine, profile

SAMPLES, BATCH, EPOCHS = 509, 32, 300  # 16 steps an epoch, the last of them smaller
generator = torch.Generator().manual_seed(1)
x = torch.randn(SAMPLES, 12, generator=generator, dtype=torch.float64)
job = tricorn.Job(
    model=lambda: nn.Linear(12, 3),
    loss=nn.functional.cross_entropy,
    optimizer=tricorn.optim.SGD(lr=0.1, momentum=0.9),
    train=tricorn.data.arrays(x, (x @ torch.randn(12, 3, generator=generator, dtype=torch.float64)).argmax(1)),
    batch_size=BATCH,
    epochs=EPOCHS,
    precision="float64",
)
MISTAKEN = Plan(strategy="ps", workers=2, servers=1, threads=1)
BETTER = Plan(strategy="dp", workers=1, threads=1)


def expected() -> Outlook:
    """As if exchanging with a server took no time at all."""
    known = links()
    fast = {name: line(1e-6, 1e-12) for name in known.curves if name.startswith("exchange/ps")}
    fast["exchange/dp/1"] = line(5e-5, 1e-10)
    on = Ground(
        profile(elements=39, batch=2.2e-3, batch_size=BATCH, samples=SAMPLES, epochs=EPOCHS, slots=1, optimizer="SGD"),
        msgspec.structs.replace(known, curves=known.curves | fast),
        machine(),
    )
    prediction = predicted(MISTAKEN, on)
    assert isinstance(prediction, Prediction)
    return Outlook(prediction, on, {msgspec.json.encode(BETTER).decode(): None})


def undisturbed(steps: int) -> torch.Tensor:
    """The weights after so many steps of a loop of plain PyTorch."""
    source, model = as_source(job.train), build_model(job)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        epoch, start, stop = step_range(step, SAMPLES, BATCH)
        inputs, target = source.fetch(Permutation(job.seed, epoch, source.fingerprint, SAMPLES).ids(start, stop))
        optimizer.zero_grad()
        job.loss(model(inputs), target).backward()
        optimizer.step()
    return flat(model)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_changes_over_without_losing_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRICORN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(replan, "FEWEST_SECONDS", 0.05)
    monkeypatch.setattr(replan, "CHANGE_SECONDS", 0.0)
    summary, folder = execute(
        LocalEngine, job, MISTAKEN, Timing(), runs=tmp_path, folder=None, expected=expected(), replan=True
    )
    told = capsys.readouterr().err
    assert told.count("changing over") == 1, told
    steps = EPOCHS * 16
    assert (summary["outcome"], summary["steps"], summary["samples"]) == ("done", steps, EPOCHS * SAMPLES)
    assert summary["exactly_once"]
    assert (summary["plan"]["strategy"], summary["workers"]) == ("dp", 1)
    (change,) = summary["changes"]
    assert 0 < change["steps"] < steps
    assert change["plan"]["strategy"] == "ps"
    assert 0 < change["bytes_sent"] <= summary["bytes_sent"]
    weights = undisturbed(steps)
    assert (flat(trained_model(job, folder)) - weights).norm() <= 1e-10 * weights.norm()
