"""The parameter server follows the trajectory of one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tricorn import optim
from tricorn.errors import Diverged, JobFailed
from tricorn.state.flat import build_model
from tricorn.strategy import Batch, Wishes

from .cluster import Cluster, batches, distance, make_job, plain, step_of

STEPS = 20
Build = Callable[..., Cluster]
pytestmark = pytest.mark.usefixtures("transport")
SGD = (optim.SGD(lr=0.1, momentum=0.9), torch.optim.SGD, {"momentum": 0.9})
ADAM = (optim.Adam(lr=1e-2), torch.optim.Adam, {})


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    ("declared", "torchs", "options", "precision", "bound"),
    [
        (*SGD, "float64", 1e-10), (*ADAM, "float64", 1e-10), (*SGD, "float32", 1e-5), (*ADAM, "float32", 1e-4),
    ],
    ids=["sgd-float64", "adam-float64", "sgd-float32", "adam-float32"],
)  # fmt: skip
def test_bsp_equals_one_process(
    cluster: Build, workers: int, servers: int, declared: Any, torchs: Any, options: Any, precision: str, bound: float
) -> None:
    job = make_job(
        optimizer=declared, precision=precision, clip_norm=0.5, schedule=lambda step: 1.0 / (1.0 + 0.1 * step)
    )
    run = cluster(job, workers=workers, servers=servers)
    run.join("initial")
    run.train(0, STEPS)
    expected = plain(job, STEPS, torchs, **options)
    for rank in range(workers):
        assert distance(run.weights(rank), expected) <= bound


def test_each_table_may_cross_servers(cluster: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tricorn.ps.placement.BUCKET", 10)
    job = make_job()
    run = cluster(job, workers=2, servers=3)
    run.join("initial")
    run.train(0, STEPS)
    assert distance(run.weights(), plain(job, STEPS, torch.optim.SGD, momentum=0.9)) <= 1e-10


def test_workers_agree_on_what_a_step_was(cluster: Build) -> None:
    job = make_job()
    run = cluster(job, workers=3)
    run.join("initial")
    inputs, target = batches(job)[0]
    wishes = [Wishes(1, 0), Wishes(0, 0), Wishes(1, 1)]
    outcomes = run.each(lambda t, w: step_of(t, 0, inputs, target, w), wishes)
    assert len(set(outcomes)) == 1
    assert outcomes[0].samples == outcomes[0].count == 11
    assert outcomes[0].wishes == Wishes(2, 1)
    loss = job.loss(build_model(job)(inputs), target)
    assert outcomes[0].loss_sum == pytest.approx(loss.item() * 11, rel=1e-12)


def test_fewer_samples_than_workers(cluster: Build) -> None:
    job = make_job(batch_size=2)
    run = cluster(job, workers=3)
    run.join("initial")
    run.train(0, 5)
    assert distance(run.weights(2), plain(job, 5, torch.optim.SGD, momentum=0.9)) <= 1e-10


def test_a_loss_that_is_not_a_number_is_applied_nowhere(cluster: Build) -> None:
    job = make_job(loss=lambda output, target: output.sum() * math.nan)
    run = cluster(job)
    run.join("initial")
    before = run.weights()
    for trainer in run.trainers[1:]:
        run.pool.submit(step_of, trainer, 0, *batches(job)[0])
    with pytest.raises(Diverged, match="step 0 is nan"):
        step_of(run.trainers[0], 0, *batches(job)[0])
    assert run.regroup() == [[0, 1]]
    assert torch.equal(before, run.weights())


def test_a_gradient_that_is_not_finite_is_applied_nowhere_though_the_loss_is(cluster: Build) -> None:
    job = make_job(loss=lambda output, target: (output * 0.0).sqrt().mean())  # whose slope at 0 is infinite
    run = cluster(job, workers=1, servers=2)
    run.join("initial")
    before = run.weights()
    with pytest.raises(Diverged, match="the gradient of step 0 is not finite"):
        run.train(0, 1)
    assert run.regroup() == [[0, 1]] * 2
    run.join("keep", 0)
    assert torch.equal(before, run.weights())


@pytest.mark.parametrize("consistency", ["bsp", "asp"])
def test_a_schedule_that_is_not_a_number_is_applied_nowhere(cluster: Build, consistency: str) -> None:
    run = cluster(make_job(schedule=lambda step: math.nan), workers=1, consistency=consistency)
    run.join("initial")
    before = run.trainers[0]._flat.weights_N.clone()
    with pytest.raises(JobFailed, match="the schedule gives nan for step 0"):
        run.train(0, 1)
    run.regroup()
    assert torch.equal(before, run.servers[0]._service._mode.table.weights_S)


def test_checkpoint_goes_on_under_other_numbers_of_workers_and_servers(cluster: Build) -> None:
    job = make_job(optimizer=optim.Adam(lr=1e-2))
    first = cluster(job, workers=2, servers=2)
    first.join("initial")
    first.train(0, 8)
    assert [trainer.pieces() for trainer in first.trainers] == [[], []]
    second = cluster(job, workers=3, servers=1)
    second.join("checkpoint", 8)
    second.train(8, STEPS)
    assert distance(second.weights(), plain(job, STEPS, torch.optim.Adam)) <= 1e-10


def test_evaluation_leaves_the_model_in_training(cluster: Build) -> None:
    job = make_job()
    run = cluster(job, workers=1)
    run.join("initial")
    (trainer,) = run.trainers
    seen = []
    inputs, target = batches(job)[0]

    def judge(output: torch.Tensor, batch: Batch) -> None:
        seen.append((output.requires_grad, trainer._flat.module.training, batch.samples))

    trainer.evaluate(Batch(inputs, target, 11, 11), 11, judge)
    trainer.evaluate(Batch(None, None, 0, 0), 0, judge)
    assert seen == [(False, False, 11)]
    assert trainer._flat.module.training


def test_an_exception_of_the_users_code_comes_out_as_it_was_raised(cluster: Build) -> None:
    class Mine(Exception):
        pass

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise Mine

    run = cluster(make_job(loss=loss), workers=1)
    run.join("initial")
    with pytest.raises(Mine):
        run.train(0, 1)
