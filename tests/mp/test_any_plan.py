"""A state saved under one plan goes on under any other, in the midst of an epoch, as if nothing had happened.

With TRICORN_ROUNDS in the environment under every other, else under one.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tricorn import data, optim
from tricorn.job import Job
from tricorn.state.flat import build_model
from tricorn.state.shards import CheckpointReader

from . import models
from .crew import Crew, distance, run_plain_loop

SAMPLES, BATCH, EPOCHS = 29, 8, 2  # 4 steps an epoch, the last of 5 samples
SAVED, STEPS = 3, 8
PLANS = {
    "single": {"strategy": "dp", "workers": 1}, "dp2": {"strategy": "dp", "workers": 2},
    "zero3 x 2": {"strategy": "dp", "workers": 2, "zero": 3}, "pp2": {"workers": 2, "cuts": (3,)},
    "tp2": {"workers": 2, "tensor": 2}, "dp2 x pp2": {"workers": 4, "replicas": 2, "cuts": (3,)},
    "dp2 x pp2 zero 1": {"workers": 4, "replicas": 2, "cuts": (3,), "zero": 1},
    "tp3": {"workers": 3, "tensor": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def job() -> Job:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(SAMPLES, 8, generator=generator)
    return Job(
        model=models.sequential, loss=F.cross_entropy, optimizer=optim.Adam(lr=0.01), precision="float64",
        train=data.arrays(x, torch.randint(0, 4, (SAMPLES,), generator=generator)), device="cpu", seed=1,
        batch_size=BATCH, epochs=EPOCHS, clip_norm=0.5, schedule=lambda step: 1 / (1 + step / 10),
    )  # fmt: skip


def everything(reader: CheckpointReader, job: Job) -> dict[str, torch.Tensor]:
    """Weights and slots by key, whole."""
    shapes = {name: p.shape for name, p in build_model(job).named_parameters()}
    prefixes = ["param", *(f"optim/{slot}" for slot in job.optimizer.slots)]
    return {f"{p}/{name}": reader.read_whole(f"{p}/{name}", shape) for p in prefixes for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def saved(job, tmp_path_factory):
    """Makes the checkpoint of a plan in the midst of its first epoch."""

    @cache
    def save(plan: str) -> Path:
        crew = Crew(job, **PLANS[plan])
        try:
            assert crew.join("initial") == [None] * len(crew.trainers)
            crew.train(0, SAVED)
            return crew.save(tmp_path_factory.mktemp("saved"))
        finally:
            crew.close()

    return save


NAMES = list(PLANS)
CIRCLE = [(before, NAMES[number - 3]) for number, before in enumerate(NAMES)]
PAIRS = list(product(NAMES, NAMES)) if "TRICORN_ROUNDS" in os.environ else CIRCLE[:6]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_goes_on_under_another_plan(crew, job, saved, tmp_path, before, after):
    expected = run_plain_loop(job, lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True))
    team = crew(job, **PLANS[after])
    folder = saved(before)
    assert team.join("checkpoint", SAVED, folder) == [None] * len(team.trainers)
    written = everything(CheckpointReader(folder, SAVED), job)
    resumed = everything(CheckpointReader(team.save(tmp_path / "resumed"), SAVED), job)
    assert [key for key in written if not torch.equal(written[key], resumed[key])] == []
    team.train(SAVED, STEPS)
    ended = everything(CheckpointReader(team.save(tmp_path / "ended"), STEPS), job)
    weights = {name: ended[f"param/{name}"].view(shape.shape) for name, shape in expected.items()}
    assert distance(weights, expected) <= 1e-10
