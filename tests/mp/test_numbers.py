"""Any number of stages follows the trajectory of an ordinary PyTorch loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tricorn import data, optim
from tricorn.job import Job

from . import models
from .crew import distance, run_plain_loop

# Nothing divides 13, and the last batch of each epoch has 2 samples: fewer than there are microbatches.
SAMPLES, BATCH, EPOCHS = 13 * 4 + 2, 13, 4

OPTIMIZERS = {
    "sgd": (optim.SGD(lr=0.05, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
    "adam": (optim.Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01, fused=True)),
}
BOUNDS = {("sgd", "float32"): 1e-5, ("adam", "float32"): 1e-4, ("sgd", "float64"): 1e-10, ("adam", "float64"): 1e-10}


def token_loss(output_BVL: torch.Tensor, target_BL: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output_BVL, target_BL, ignore_index=-100)


@pytest.fixture
def job():
    def make(name: str = "sequential", **fields) -> Job:
        generator = torch.Generator().manual_seed(1)
        shape = (1, 8, 8) if name == "Chain" else (8,)
        given = {
            "model": getattr(models, name),
            "loss": F.cross_entropy,
            "optimizer": OPTIMIZERS["sgd"][0],
            "train": data.arrays(
                torch.randn(SAMPLES, *shape, generator=generator), torch.randint(0, 4, (SAMPLES,), generator=generator)
            ),
            "batch_size": BATCH,
            "epochs": EPOCHS,
            "device": "cpu",
        }
        return Job(**(given | fields))

    return make


@pytest.fixture
def language_job(job):
    """Sentences of unequal length; some microbatches hold no token that counts."""

    def make(**fields) -> Job:
        generator = torch.Generator().manual_seed(2)
        tokens = torch.randint(0, 11, (SAMPLES, 7), generator=generator)
        target = tokens.roll(-1, 1)
        target[torch.arange(7) >= torch.tensor([7, 0, 0, 6, 0, 2, 1]).repeat(SAMPLES)[:SAMPLES, None]] = -100
        return job(
            "Language",
            loss=token_loss,
            train=data.arrays({"tokens": tokens, "offset": torch.randn(SAMPLES, 7, generator=generator)}, target),
            count=lambda _, target: int((target != -100).sum()),
            **fields,
        )

    return make


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_numbers(crew, job, name, precision, stages):
    declared, made = OPTIMIZERS[name]
    this = job(optimizer=declared, precision=precision)
    team = crew(this, stages)
    team.join("initial")
    losses = team.train()
    assert losses[-1] < losses[0]
    assert distance(team.weights(), run_plain_loop(this, made)) <= BOUNDS[name, precision]


@pytest.mark.parametrize("microbatches", [1, 3, 100])
@pytest.mark.parametrize("model", ["nested", "Chain", "Residual", "Listed", "Wide"])
def test_same_numbers_for_every_kind_of_model(crew, job, model, microbatches):
    declared, made = OPTIMIZERS["sgd"]
    this = job(model, optimizer=declared, precision="float64", epochs=2)
    team = crew(this, 3, microbatches=microbatches)
    team.join("initial")
    team.train()
    assert distance(team.weights(), run_plain_loop(this, made)) <= 1e-10


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clip_norm_and_schedule(crew, job, name, stages):
    declared, made = OPTIMIZERS[name]
    this = job(optimizer=declared, precision="float64", clip_norm=0.3, schedule=lambda step: 1.0 / (1 + step))
    team = crew(this, stages)
    team.join("initial")
    team.train()
    unclipped = job(optimizer=declared, precision="float64", schedule=this.schedule)
    assert distance(team.weights(), run_plain_loop(this, made)) <= 1e-10
    assert distance(team.weights(), run_plain_loop(unclipped, made)) > 1e-3


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_counted_tokens(crew, language_job, name, stages):
    declared, made = OPTIMIZERS[name]
    this = language_job(optimizer=declared, precision="float64")
    team = crew(this, stages, microbatches=BATCH)
    team.join("initial")
    team.train()
    assert distance(team.weights(), run_plain_loop(this, made)) <= 1e-10


def test_a_stage_without_weights(crew, job):
    this = job("Listed", precision="float64", epochs=1)
    team = crew(this, 3, (1, 3))  # the first stage only doubles its input
    team.join("initial")
    assert team.trainers[0]._state.weights_N.numel() == 0
    team.train()
    assert distance(team.weights(), run_plain_loop(this, OPTIMIZERS["sgd"][1])) <= 1e-10


def test_bfloat16_keeps_float32_weights_and_learns(crew, job):
    team = crew(job(precision="bfloat16"), 2)
    team.join("initial")
    losses = team.train()
    assert sum(losses[-5:]) < sum(losses[:5])
    assert {trainer._state.weights_N.dtype for trainer in team.trainers} == {torch.float32}


def test_nothing_slow_is_imported_to_train(job):
    """Start-up and recovery wait for every import."""
    program = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from mp.crew import Crew
from mp.models import sequential
from tricorn import data, optim
from tricorn.job import Job
job = Job(model=sequential, loss=torch.nn.functional.cross_entropy, optimizer=optim.SGD(lr=0.1), batch_size=8, epochs=1,
          train=data.arrays(torch.randn(8, 8), torch.zeros(8, dtype=torch.int64)), device="cpu", clip_norm=1.0)
crew = Crew(job, 2)
crew.join("initial")
crew.train()
crew.close()
print([name for name in ("sympy", "torch._dynamo") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
