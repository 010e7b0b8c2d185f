"""The autoencoder of examples/anomaly.py, and the same result however unequally its data lie on the workers.

TRICORN_ROUNDS says for how many seeds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tricorn
from tricorn.comm.listener import PeerListener
from tricorn.data.order import steps_per_epoch
from tricorn.dp import strategy
from tricorn.engine.loading import load
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.strategy import Batch, Context, Seat, Wishes
from tricorn.worker.batches import Batches

FILE = Path(__file__).parents[2] / "examples" / "anomaly.py"
SECRET = b"s" * 32


def example() -> tuple[Job, dict]:
    job = load(str(FILE), "job", None)
    return job, job.loss.__globals__


def trained(job: Job, assign: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """The model after all steps of two workers; ``assign(target)`` says which samples of a batch the second one has."""
    batches = Batches(job)
    listeners = [PeerListener(SECRET) for _ in range(2)]
    plan = Plan(strategy="dp", workers=2)
    trainers = [strategy.trainer(Context(job, plan, rank, 1, SECRET, listeners[rank])) for rank in range(2)]
    seat = Seat(1, tuple(listener.address for listener in listeners), (), 0, "initial", 0, None)

    def run(rank: int) -> None:
        trainers[rank].join(seat)
        for step, whole in enumerate(wholes):
            second = assign(whole.target)
            mine = second if rank else ~second
            inputs, target, samples = whole.inputs[mine], whole.target[mine], int(mine.sum())
            batch = Batch(inputs, target, samples, job.count(inputs, target))
            trainers[rank].step(step, batch, whole.samples, Wishes())

    steps = job.epochs * steps_per_epoch(len(job.train), job.batch_size)
    wholes = [batches.training(step, 0, batches.samples(step)) for step in range(steps)]
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, range(2)))
    finally:
        for each in (*trainers, *listeners):
            each.close()
    return trainers[0]._state.module.eval()


def test_it_finds_anomalies(tmp_path):
    job, names = example()
    result = tricorn.train(job, strategy="dp", workers=2, threads=1, runs=tmp_path)
    assert names["roc_auc"](result.model) >= 0.93
    assert result.summary["exactly_once"]


@pytest.mark.parametrize("seed", range(int(os.environ.get("TRICORN_ROUNDS", "1"))))
def test_the_result_is_the_same_for_equal_and_for_badly_unequal_parts(seed):
    job, names = example()
    job = replace(job, seed=seed)

    def equal(target: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(target)) >= len(target) // 2

    def unequal(target: torch.Tensor) -> torch.Tensor:
        """The second worker has one in eleven, and never a benign case: nothing that counts."""
        malignant = target[:, 1, 0] == 0
        return malignant & (malignant.cumsum(0) <= len(target) // 11)

    models = [trained(job, assign) for assign in (equal, unequal)]
    weights = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]
    assert (weights[0] - weights[1]).norm() <= 1e-3 * weights[0].norm()
    aucs = [names["roc_auc"](model) for model in models]
    assert min(aucs) >= 0.93
    assert abs(aucs[0] - aucs[1]) <= 1e-3
