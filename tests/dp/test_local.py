"""Rounds of several updates: what they come to, when they are agreed, and what becomes of one that fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tricorn import optim
from tricorn.errors import Diverged, PeerLost
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.state.flat import build_model
from tricorn.state.shards import write_shard
from tricorn.strategy import Batch, Outcome, Wishes
from tricorn.worker.rounds import OUTER, round_ends

from .conftest import batches, cut

SAMPLES, BATCH, EPOCHS = 13 * 4 + 1, 13, 6  # 5 steps an epoch; the last has one sample: fewer than workers
STEPS = 5 * EPOCHS


class Counting(nn.Module):
    """A buffer that forward changes, besides weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.detach().sum(0)
        return self.last(torch.tanh(self.first(x)))


def job(**fields: Any) -> Job:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    target = (inputs @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(1)
    given = {
        "model": Counting,
        "loss": F.cross_entropy,
        "optimizer": optim.SGD(lr=0.1, momentum=0.9),
        "train": torch.utils.data.TensorDataset(inputs, target),
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "precision": "float64",
        "device": "cpu",
    }
    return Job(**(given | fields))


def train(team: Any, start: int = 0, stop: int = STEPS) -> list[tuple[int, Outcome]]:
    """Steps [start, stop): the agreed outcomes, each with the step after it."""
    found = []
    for step, (inputs, target) in enumerate(batches(team.job)):
        if start <= step < stop:
            first, *others = team.step(step, inputs, target)
            assert isinstance(first, Outcome), first
            assert [other.agreed for other in others] == [first.agreed] * len(others)
            if first.agreed:
                assert others == [first] * len(others)
                found.append((step + 1, first))
    return found


def agreed_state(team: Any) -> dict[str, torch.Tensor]:
    """What all hold alike: weights, outer momentum and buffers."""
    found = []
    for trainer in team.trainers:
        buffers = dict(trainer._state.module.named_buffers())
        found.append({"param": trainer._state.weights_N, **trainer._outer_slots, **buffers})
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in found[0])
    return {key: tensor.clone() for key, tensor in found[0].items()}


def by_hand(this: Job, workers: int, local_steps: int, outer: str) -> torch.Tensor:
    """The same in plain PyTorch: a copy of the model for each worker, and ``torch.optim.SGD`` as outer optimizer."""
    weights = [p.detach().clone().requires_grad_() for p in build_model(this).parameters()]
    declared = OUTER[outer]
    outer_optim = torch.optim.SGD(weights, lr=declared.lr, momentum=declared.momentum, nesterov=declared.nesterov)
    models = [build_model(this) for _ in range(workers)]
    optims = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    counts = [0] * workers
    for step, (inputs, target) in enumerate(batches(this)):
        for rank, (model, inner) in enumerate(zip(models, optims, strict=True)):
            batch = cut(this, inputs, target, len(target) * rank // workers, len(target) * (rank + 1) // workers)
            if batch.samples:
                inner.zero_grad()
                this.loss(model(batch.inputs), batch.target).backward()
                inner.step()
                counts[rank] += batch.samples
        if round_ends(step, 5, local_steps):
            for index, weight in enumerate(weights):
                far = [c * (weight - list(m.parameters())[index]) for m, c in zip(models, counts, strict=True)]
                weight.grad = (sum(far) / sum(counts)).detach()
            outer_optim.step()
            for model in models:
                for parameter, weight in zip(model.parameters(), weights, strict=True):
                    parameter.data.copy_(weight)
            counts = [0] * workers
    return torch.cat([weight.detach().flatten() for weight in weights])


@given(st.integers(1, 40), st.integers(1, 50))
def test_rounds_end_with_each_epoch_and_have_no_more_steps_than_asked_for(steps_per_epoch, local_steps):
    ends = [step for step in range(3 * steps_per_epoch) if round_ends(step, steps_per_epoch, local_steps)]
    assert all(epoch * steps_per_epoch - 1 in ends for epoch in (1, 2, 3))
    lengths = [after - before for before, after in zip([-1, *ends], ends, strict=False)]
    assert max(lengths) <= local_steps
    assert len(ends) == 3 * -(-steps_per_epoch // local_steps)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize(("workers", "local_steps"), [(1, 2), (2, 2), (3, 3), (2, 100)])
def test_the_weights_are_those_of_plain_pytorch(crew, workers, local_steps, outer):
    team = crew(job(), workers, local_steps=local_steps, outer=outer)
    team.join("initial")
    outcomes = train(team)
    assert sum(outcome.samples for _, outcome in outcomes) == SAMPLES * EPOCHS
    expected = by_hand(job(), workers, local_steps, outer)
    assert (agreed_state(team)["param"] - expected).norm() <= 1e-12 * expected.norm()


def test_rounds_of_one_step_averaged_are_plain_data_parallel(crew, plain_loop):
    """With SGD without momentum: weights of workers, averaged by their counts, are those of the summed gradient."""
    this = job(optimizer=optim.SGD(lr=0.1), batch_size=SAMPLES)
    expected, losses = plain_loop(this, lambda p: torch.optim.SGD(p, lr=0.1))
    team = crew(this, 3, local_steps=4, outer="average")
    team.join("initial")
    assert [o.loss_sum / o.count for _, o in train(team)] == pytest.approx(losses, rel=1e-10)
    assert max(team.distances(expected)) <= 1e-12


def test_only_the_end_of_a_round_is_agreed_and_honours_all_wishes_of_it(crew):
    team = crew(job(), 2, local_steps=3)
    team.join("initial")
    held, seen = [], []
    for step, (inputs, target) in enumerate(batches(team.job)):
        outcomes = team.step(step, inputs, target, checkpoint=int(step == 1), stop=int(step == 6))
        held.append({trainer.held() for trainer in team.trainers})
        if outcomes[0].agreed:
            seen.append((step + 1, outcomes[0].samples, *outcomes[0].wishes))
    assert seen[:4] == [(3, 39, 1, 0), (5, 14, 0, 0), (8, 39, 0, 1), (10, 14, 0, 0)]
    assert held[:6] == [{0}, {0}, {3}, {3}, {5}, {5}]


@pytest.mark.parametrize("compress", ["none", "int8", "powersgd"])
def test_less_is_sent_and_all_stay_equal(crew, compress):
    plain, local = crew(job(), 2), crew(job(), 2, local_steps=5, compress=compress)
    for team in (plain, local):
        team.join("initial")
        train(team)
    agreed_state(local)
    assert local.trainers[0].bytes_sent < plain.trainers[0].bytes_sent / (4 if compress == "none" else 5)


@pytest.fixture
def undisturbed(crew) -> dict[str, torch.Tensor]:
    team = crew(job(), 2, local_steps=3)
    team.join("initial")
    train(team)
    return agreed_state(team)


def test_a_round_that_lost_a_peer_is_run_again_with_the_same_result(crew, undisturbed):
    team = crew(job(), 2, local_steps=3)
    team.join("initial")
    train(team, 0, 6)
    team.trainers[1].interrupt()
    train(team, 6, 7)  # nobody meets, so nobody sees that the group is gone
    inputs, target = list(batches(team.job))[7]
    assert [type(error) for error in team.step(7, inputs, target)] == [PeerLost] * 2
    assert [trainer.held() for trainer in team.trainers] == [5, 5]
    team.join("keep", 5)
    train(team, 5)
    assert all(torch.equal(found, undisturbed[key]) for key, found in agreed_state(team).items())


def test_a_regrouping_in_the_midst_of_a_round_goes_back_to_its_beginning(crew, undisturbed):
    team = crew(job(), 2, local_steps=3)
    team.join("initial")
    train(team, 0, 7)
    team.join("keep", 5)
    train(team, 5)
    assert all(torch.equal(found, undisturbed[key]) for key, found in agreed_state(team).items())


@pytest.mark.parametrize("peer", [0, 1])
def test_a_worker_that_replaces_a_dead_one_copies_the_state(crew, peer):
    """The state of the job's optimizer it has from its peer; weights and outer momentum are what they were."""
    this = job(optimizer=optim.SGD(lr=0.1))  # without a state of the job's optimizer, the result is the same
    calm = crew(this, 2, local_steps=3)
    calm.join("initial")
    train(calm)
    team = crew(this, 2, local_steps=3)
    team.join("initial")
    train(team, 0, 6)
    team.replace(1 - peer)
    assert team.trainers[1 - peer].held() is None
    team.join("peer", 5, peer=peer)
    train(team, 5)
    assert all(torch.equal(found, agreed_state(calm)[key]) for key, found in agreed_state(team).items())


def test_who_has_the_state_keeps_its_own_optimizer_state(crew):
    team = crew(job(), 3, local_steps=5)
    team.join("initial")
    train(team, 0, 7)
    team.replace(2)
    team.join("peer", 5, peer=0)
    own = [trainer._state.slots["momentum_buffer"].clone() for trainer in team.trainers]
    assert torch.equal(own[2], own[0])
    assert not torch.equal(own[1], own[0])
    agreed_state(team)


def test_who_is_a_round_behind_copies_from_who_is_ahead(crew):
    """The last message of a round can reach one peer and not the other."""
    team = crew(job(), 2, local_steps=3)
    team.join("initial")
    train(team, 0, 8)
    behind = team.trainers[1]
    behind._held = 5
    team.join("peer", 8, peer=0)
    assert [trainer.held() for trainer in team.trainers] == [8, 8]
    agreed_state(team)


@pytest.mark.parametrize(("options", "step"), [({"local_steps": 3}, 10), ({"local_steps": 2}, 9), ({}, 9)])
def test_any_plan_goes_on_from_a_checkpoint(crew, tmp_path, options, step):
    team = crew(job(), 2, local_steps=3)
    team.join("initial")
    train(team, 0, 8)
    assert [len(trainer.pieces()) > 0 for trainer in team.trainers] == [True, False]
    write_shard(tmp_path, "model.safetensors", team.trainers[0].pieces())
    saved = agreed_state(team)
    other = crew(job(), 2, **options)
    other.join("checkpoint", 8, checkpoint=tmp_path)
    for trainer in other.trainers:
        assert torch.equal(trainer._state.weights_N, saved["param"])
    if options:
        assert torch.equal(agreed_state(other)["momentum_buffer"], saved["momentum_buffer"])
    assert train(other, 8)[0][0] == step


def test_a_run_without_local_steps_goes_on_with_them(crew, tmp_path):
    team = crew(job(), 2)
    team.join("initial")
    train(team, 0, 7)
    write_shard(tmp_path, "model.safetensors", team.trainers[0].pieces())
    local = crew(job(), 2, local_steps=3)
    local.join("checkpoint", 7, checkpoint=tmp_path)
    assert [step for step, _ in train(local, 7, 15)] == [8, 10, 13, 15]


def test_initial_starts_over(crew):
    team = crew(job(), 2, local_steps=3)
    team.join("initial")
    fresh = agreed_state(team)
    train(team, 0, 2)
    team.join("initial")
    assert all(torch.equal(found, fresh[key]) for key, found in agreed_state(team).items())
    train(team, 0, 6)
    team.join("initial")
    assert all(torch.equal(found, fresh[key]) for key, found in agreed_state(team).items())


def test_a_loss_that_is_not_a_number_ends_the_round_for_all(crew):
    team = crew(job(), 2, local_steps=2)
    team.join("initial")
    train(team, 0, 2)
    before = agreed_state(team)
    inputs, target = list(batches(team.job))[2]
    first, second = team.step(2, torch.cat([inputs[:-1], inputs[-1:] * float("nan")]), target)
    assert (first.agreed, type(second)) == (False, Diverged)
    assert str(second) == "the loss of step 2 is nan"
    batch = cut(team.job, inputs, target, 0, 6)
    assert isinstance(team.pool.submit(team.trainers[0].step, 3, batch, 13, Wishes()).exception(10), PeerLost)
    assert all(torch.equal(found, before[key]) for key, found in agreed_state(team).items())


def test_an_exception_of_the_users_code_comes_out_as_it_was_raised_and_the_others_are_told(crew):
    def fail(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("in the user's loss")

    team = crew(job(), 2, local_steps=2)
    team.join("initial")
    inputs, target = next(batches(team.job))
    team.trainers[1]._job = job(loss=fail)
    first, second = team.step(0, inputs, target)
    assert (first.agreed, type(second)) == (False, ZeroDivisionError)
    batch = Batch(inputs[:6], target[:6], 6, 6)
    assert isinstance(team.pool.submit(team.trainers[0].step, 1, batch, 13, Wishes()).exception(10), PeerLost)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"local_steps": 2, "balance": True}, "balance"),
        ({"local_steps": 2, "zero": 1}, "zero"),
        ({"local_steps": 2, "microbatches": 2}, "microbatches"),
        ({"compress": "int8", "zero": 2}, "zero"),
    ],
)
def test_why_not(options, why):
    from tricorn.dp import strategy

    reason = strategy.why_not(job(), Plan(strategy="dp", workers=2, **options))
    assert reason is not None
    assert why in reason
    assert "leave one of the two out" in reason


def test_why_not_with_statistics_of_the_batch():
    from tricorn.dp import strategy

    this = job(model=lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)))
    reason = strategy.why_not(this, Plan(strategy="dp", workers=2, local_steps=2))
    assert reason is not None
    assert "layer '1'" in reason
