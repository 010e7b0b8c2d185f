"""Local updates under the parameter server: what they come to, and from where a run goes on when somebody dies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tricorn import optim
from tricorn.errors import PeerLost, ProtocolError
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.ps import strategy
from tricorn.ps.wire import ROWS_ALONE, Header, Op
from tricorn.state.flat import build_model, call_model
from tricorn.state.rows import row_tables
from tricorn.state.shards import CheckpointReader, write_shard
from tricorn.strategy import Outcome
from tricorn.table import Table
from tricorn.worker.rounds import OUTER, round_ends

from . import tables
from .cluster import Cluster, batches, distance, make_job, step_of

Build = Callable[..., Cluster]
FALLING = {"schedule": lambda step: 1.0 / (1.0 + 0.1 * step), "clip_norm": 0.5}
STEPS = 15  # three epochs of 5, or two and a half of 6


class TableAlone(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Embedding(9, 2))


def by_hand(job: Job, workers: int, local_steps: int, outer: str, steps: int) -> dict[str, torch.Tensor]:
    """Plain PyTorch: a copy of the dense part for each worker, one of the tables for all, and an outer optimizer."""
    tables = {table.parameter for table in row_tables(job, build_model(job))}
    models = [build_model(job) for _ in range(workers)]
    weights = {n: p.detach().clone().requires_grad_() for n, p in models[0].named_parameters() if n not in tables}
    declared, inner = OUTER[outer], job.optimizer
    outer_optim = torch.optim.SGD(
        weights.values(), lr=declared.lr, momentum=declared.momentum, nesterov=declared.nesterov
    )
    optims = [
        torch.optim.SGD([p for n, p in m.named_parameters() if n in weights], lr=inner.lr, momentum=inner.momentum)
        for m in models
    ]
    counts = [0] * workers
    todo = batches(job)
    for step, (inputs, target) in enumerate(todo[:steps]):
        rate = inner.lr * (job.schedule(step) if job.schedule else 1.0)
        row_sums = {name: torch.zeros_like(models[0].get_parameter(name)) for name in tables}
        for rank, (model, optimizer) in enumerate(zip(models, optims, strict=True)):
            low, high = len(target) * rank // workers, len(target) * (rank + 1) // workers
            if low == high:
                continue
            model.zero_grad()
            job.loss(call_model(model, inputs[low:high]), target[low:high]).backward()
            if job.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            counts[rank] += high - low
            for name in tables:
                row_sums[name] += model.get_parameter(name).grad * (high - low)
        for name, total in row_sums.items():
            for model in models:
                model.get_parameter(name).data.add_(total / len(target), alpha=-rate)
        if round_ends(step, len(todo) // job.epochs, local_steps):
            for name, weight in weights.items():
                far = [c * (weight - m.get_parameter(name)) for m, c in zip(models, counts, strict=True)]
                weight.grad = (sum(far) / sum(counts)).detach()
            outer_optim.step()
            for model in models:
                for name, weight in weights.items():
                    model.get_parameter(name).data.copy_(weight)
            counts = [0] * workers
    return {name: parameter.detach() for name, parameter in models[0].named_parameters()}


def flat(expected: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in expected.values()])


def weights(run: Cluster, rank: int = 0) -> torch.Tensor:
    return run.trainers[rank]._state.weights_N.clone()


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize(("workers", "servers", "local_steps"), [(1, 1, 2), (2, 2, 3), (3, 1, 100)])
def test_the_weights_are_those_of_plain_pytorch(
    cluster: Build, workers: int, servers: int, local_steps: int, outer: str
) -> None:
    job = make_job(**FALLING)
    run = cluster(job, workers=workers, servers=servers, local_steps=local_steps, outer=outer)
    run.join("initial")
    outcomes = run.train(0, STEPS)[0]
    assert sum(outcome.samples for outcome in outcomes if outcome.agreed) == 3 * 53
    expected = flat(by_hand(job, workers, local_steps, outer, STEPS))
    for rank in range(workers):
        assert distance(weights(run, rank), expected) <= 1e-12


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("fields", [{}, FALLING])
def test_rows_are_updated_in_every_step(cluster: Build, fields: dict[str, Any]) -> None:
    job = tables.make_job(**fields)
    run = cluster(job, workers=2, servers=2, local_steps=3)
    run.join("initial")
    tables.train(run, 0, 12)
    found = tables.whole(run, 12)
    for name, weight in by_hand(job, 2, 3, "nesterov", 12).items():
        assert distance(found[name], weight) <= 1e-12, name


def test_rows_may_be_asynchronous(cluster: Build) -> None:
    run = cluster(tables.make_job(), workers=2, local_steps=3, sparse_consistency="asp")
    run.join("initial")
    tables.train(run, 0, 12)
    assert run.regroup() == [[12]]
    assert run.servers[0].staleness()[1] > 0


def test_less_is_sent(cluster: Build) -> None:
    plain, local = cluster(make_job()), cluster(make_job(), local_steps=5)
    for run in (plain, local):
        run.join("initial")
        run.train(0, 20)
    assert local.trainers[0].bytes_sent < plain.trainers[0].bytes_sent / 4


def test_a_regrouping_in_the_midst_of_a_round_goes_back_to_its_beginning(cluster: Build) -> None:
    run = cluster(make_job(), local_steps=3)
    run.join("initial")
    run.train(0, 7)
    assert (run.regroup(), [trainer.held() for trainer in run.trainers]) == ([[5]], [5, 5])
    run.join("keep", 5)
    run.train(5, STEPS)
    assert distance(weights(run), flat(by_hand(make_job(), 2, 3, "nesterov", STEPS))) <= 1e-12


def test_a_worker_that_replaces_a_dead_one_copies_the_state_of_its_peers_optimizer(cluster: Build) -> None:
    run = cluster(make_job(), workers=3, local_steps=3)
    run.join("initial")
    run.train(0, 6)
    run.replace_worker(2)
    assert (run.regroup(), [trainer.held() for trainer in run.trainers]) == ([[5]], [5, 5, None])
    run.join("peer", 5, peer=1)
    momentum = [trainer._state.slots["momentum_buffer"] for trainer in run.trainers]
    assert torch.equal(momentum[2], momentum[1])
    assert not torch.equal(momentum[2], momentum[0])
    run.train(5, STEPS)
    assert torch.equal(weights(run, 0), weights(run, 2))


def test_a_round_that_one_worker_saw_decided_is_that_of_all(cluster: Build) -> None:
    """The last reply of a round reaches one worker, which has the servers apply it, and not the other."""
    run = cluster(make_job(optimizer=optim.SGD(lr=0.1)), servers=2, local_steps=5)
    run.join("initial")
    run.train(0, 4)
    late = run.trainers[1]
    late._pull = lambda version: late.interrupt() or (_ for _ in ()).throw(PeerLost("cut"))
    inputs, target = batches(run.job)[4]
    futures = [run.pool.submit(step_of, trainer, 4, inputs, target) for trainer in run.trainers]
    assert isinstance(futures[0].result(10), Outcome)
    assert isinstance(futures[1].exception(10), PeerLost)
    del late._pull
    assert (run.regroup(), [trainer.held() for trainer in run.trainers]) == ([[5], [5]], [5, 0])
    run.join("peer", 5, peer=0)
    run.train(5, STEPS)
    assert distance(weights(run, 1), flat(by_hand(run.job, 2, 5, "nesterov", STEPS))) <= 1e-12


def test_a_round_whose_decision_nobody_saw_is_run_again(cluster: Build) -> None:
    run = cluster(make_job(), servers=2, local_steps=5)
    run.join("initial")
    run.train(0, 4)
    for trainer in run.trainers:
        trainer._pull = lambda version: (_ for _ in ()).throw(PeerLost("cut"))
    inputs, target = batches(run.job)[4]
    futures = [run.pool.submit(step_of, trainer, 4, inputs, target) for trainer in run.trainers]
    assert all(isinstance(future.exception(10), PeerLost) for future in futures)
    for trainer in run.trainers:
        del trainer._pull
    assert (run.regroup(), [trainer.held() for trainer in run.trainers]) == ([[0, 5]] * 2, [0, 0])
    run.join("keep", 0)
    run.train(0, STEPS)
    assert distance(weights(run), flat(by_hand(run.job, 2, 5, "nesterov", STEPS))) <= 1e-12


def test_in_the_midst_of_a_round_with_rows_there_is_only_the_checkpoint(cluster: Build) -> None:
    job = tables.make_job()
    run = cluster(job, servers=2, local_steps=3)
    run.join("initial")
    tables.train(run, 0, 3)
    run.each(lambda trainer: write_shard(run.folder / "3", f"{trainer}.safetensors", trainer.pieces()))
    tables.train(run, 3, 5)
    assert run.regroup() == [[], []]
    run.replace_worker(0)
    run.join("checkpoint", 3)
    tables.train(run, 3, 12)
    found = tables.whole(run, 12)
    for name, weight in by_hand(job, 2, 3, "nesterov", 12).items():
        assert distance(found[name], weight) <= 1e-12, name


@pytest.mark.parametrize("options", [{"local_steps": 3}, {}])
def test_any_plan_goes_on_from_a_checkpoint(cluster: Build, options: dict[str, int]) -> None:
    first = cluster(make_job(), workers=1, servers=2, local_steps=3)
    first.join("initial")
    first.train(0, 8)
    write_shard(first.folder / "8", "worker-0.safetensors", first.trainers[0].pieces())
    keys = {key.rpartition("/")[0] for key in CheckpointReader(first.folder / "8", 8)._stored}
    assert keys == {"param", "optim/momentum_buffer", "outer/momentum_buffer"}
    second = cluster(make_job(), workers=1, **options)
    second.join("checkpoint", 8)
    second.train(8, STEPS)
    if options:
        assert distance(weights(second), flat(by_hand(make_job(), 1, 3, "nesterov", STEPS))) <= 1e-12


def test_initial_starts_over(cluster: Build) -> None:
    run = cluster(make_job(), local_steps=3)
    run.join("initial")
    run.train(0, 7)
    run.regroup()
    run.join("initial")
    run.train(0, STEPS)
    assert distance(weights(run), flat(by_hand(make_job(), 2, 3, "nesterov", STEPS))) <= 1e-12


def test_a_run_without_local_steps_goes_on_with_them(cluster: Build) -> None:
    first = cluster(make_job(), servers=2)
    first.join("initial")
    first.train(0, 5)
    first.each(lambda trainer: trainer.pieces())
    second = cluster(make_job(), local_steps=5)
    second.join("checkpoint", 5)
    second.train(5, 10)
    assert second.regroup() == [[10]]


def test_a_step_beyond_the_round_or_with_half_of_a_gradient_is_refused(cluster: Build) -> None:
    run = cluster(make_job(), local_steps=3)
    run.join("initial")
    client = run.trainers[0]._line.client
    with pytest.raises(ProtocolError, match="step 3, but this server collects steps 0 to 2"):
        client.push_sum(3, (0.0, 1, 1, 0, 0), torch.zeros(1))
    run.join("keep", 0)
    first, second = (trainer._line.client for trainer in run.trainers)
    server = first._wire.servers[0]
    server.send(Header(Op.PUSH, step=1, flags=ROWS_ALONE, numbers=(0.0, 1, 1, 0, 0)))
    server.send(Header(Op.STATUS, step=-1))
    server.receive(Op.DONE)  # so the push has arrived
    with pytest.raises(ProtocolError, match="without from others"):
        second.push_sum(1, (0.0, 1, 1, 0, 0), weights(run))


@pytest.mark.parametrize(
    ("job", "options", "why"),
    [
        (make_job, {"consistency": "asp"}, "asp lends steps to workers one by one"),
        (make_job, {"compress": "powersgd"}, "powersgd"),
        (lambda: tables.make_job(model=TableAlone, tables={"0": Table()}), {}, "all that the model trains"),
    ],
)
def test_why_not(job: Callable[[], Job], options: dict[str, Any], why: str) -> None:
    reason = strategy.why_not(job(), Plan(strategy="ps", servers=1, local_steps=2, **options))
    assert reason is not None
    assert why in reason
