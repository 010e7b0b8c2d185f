"""A state that replicas of one host hold once: who dies in the midst of an update, and what the others make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tricorn import optim
from tricorn.dp import shared_state
from tricorn.errors import PeerLost
from tricorn.job import Job
from tricorn.strategy import Outcome

STEPS = 6


class Died(Exception):
    """Stands for the end of a process."""


def job(loss: Any = F.cross_entropy) -> Job:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(10 * STEPS, 5, generator=generator)
    target = torch.randint(0, 3, (10 * STEPS,), generator=generator)
    return Job(
        model=lambda: nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)), loss=loss,
        optimizer=optim.AdamW(lr=0.05), train=torch.utils.data.TensorDataset(inputs, target), batch_size=10, epochs=1,
        device="cpu", clip_norm=0.5,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three workers has 48 or 51 of the 147 weights: three or four blocks."""
    monkeypatch.setattr(shared_state, "ALIGNED", 16)
    monkeypatch.setattr(shared_state, "BLOCK", 16)


def batch(team: Any, step: int) -> tuple[torch.Tensor, ...]:
    return tuple(tensor[10 * step : 10 * step + 10] for tensor in team.job.train.tensors)


def assert_equal(states: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    for state in states:
        assert [key for key in expected if not torch.equal(state[key], expected[key])] == []


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("torn", [False, True])
def test_who_survives_finishes_the_update_of_who_died_in_its_midst(crew, monkeypatch, victim, blocks, torn):
    team, undisturbed = crew(job(), 3), crew(job(), 3)
    for each in (team, undisturbed):
        each.join("initial")
        each.train(0, 3)
    dying = team.trainers[victim]
    shared = dying._direct._shared
    applied, apply = [], shared._apply

    def die(block: Any, factor: float, rate: float) -> None:
        if len(applied) == blocks:
            if torn:
                for tensor in block.tensors:
                    tensor.fill_(float("nan"))
            dying.close()
            raise Died
        applied.append(block)
        apply(block, factor, rate)

    monkeypatch.setattr(shared, "_apply", die)
    results = team.step(3, *batch(team, 3))
    undisturbed.train(3, 4)
    survivors = [rank for rank in range(3) if rank != victim]
    assert [type(results[rank]) for rank in survivors] == [Outcome] * 2
    assert isinstance(results[victim], Died)
    assert [team.trainers[rank].held() for rank in survivors] == [4, 4]
    assert_equal([team.states()[rank] for rank in survivors], undisturbed.states()[0])
    team.replace(victim)
    team.join("peer", 4, peer=survivors[0])
    team.train(4)
    undisturbed.train(4)
    assert_equal(team.states(), undisturbed.states()[0])


def test_after_an_update_finished_alone_nothing_is_written_where_peers_may_read(crew, monkeypatch):
    team = crew(job(), 2)
    team.join("initial")
    dying = team.trainers[1]

    def die(*_: Any) -> None:
        dying.close()
        raise Died

    monkeypatch.setattr(dying._direct._shared, "_apply", die)
    assert [type(result) for result in team.step(0, *batch(team, 0))] == [Outcome, Died]
    gradient = team.trainers[0]._direct._exposed[0].clone()
    (error, _) = team.step(1, *batch(team, 1))
    assert isinstance(error, PeerLost)
    assert torch.equal(team.trainers[0]._direct._exposed[0], gradient)
    assert team.trainers[0].held() == 1


def test_who_gives_up_while_a_peer_is_updating_holds_nothing(crew):
    acting: list[Any] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        while acting:
            acting.pop()()
        return F.cross_entropy(output, target)

    team = crew(job(loss), 2)
    team.join("initial")
    team.train(0, 1)
    acting += [team.trainers[0].interrupt, lambda: team.trainers[1]._direct._shared._note(1)]
    assert [type(result) for result in team.step(1, *batch(team, 1))] == [PeerLost] * 2
    assert [trainer.held() for trainer in team.trainers] == [None, None]


def test_a_state_that_is_left_is_no_longer_shared(crew):
    team = crew(job(), 2)
    team.join("initial")
    team.train(0, 2)
    first, second = (trainer._state for trainer in team.trainers)
    first.weights_N[0] = 7.0
    assert second.weights_N[0] == 7.0
    before = second.weights_N.clone()
    for trainer in team.trainers:
        trainer.interrupt()
        trainer._direct.close()
    first.weights_N.zero_()
    assert torch.equal(second.weights_N, before)
    assert all(not p.any() for p in team.trainers[0]._module.parameters())
