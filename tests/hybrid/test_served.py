"""Tables on servers beside a dense part in the workers come to the numbers of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tricorn import optim
from tricorn.comm.group import Group
from tricorn.errors import PeerLost
from tricorn.state.flat import build_model
from tricorn.strategy import Outcome

from .crew import Crew, distance, plain
from .jobs import Sums, towers

Build = Callable[..., Crew]
STEPS = 20
CLIPPED = {"clip_norm": 0.5, "schedule": lambda step: 1 / (1 + step / 9)}
PLANS: dict[str, dict[str, Any]] = {
    "dp2": {"strategy": "ps+dp", "workers": 2, "servers": 2},
    "dp3 zero1": {"strategy": "ps+dp", "workers": 3, "servers": 1, "zero": 1},
    "dp2 zero3, microbatches": {"strategy": "ps+dp", "workers": 2, "servers": 1, "zero": 3, "microbatches": 2},
    "mp2": {"strategy": "ps+mp", "workers": 2, "servers": 1, "cuts": (3,)},
    "mp3": {"strategy": "ps+mp", "workers": 3, "servers": 2, "cuts": (1, 4)},
    "shards of layers": {"strategy": "ps+mp", "workers": 2, "servers": 1, "tensor": 2, "cuts": ()},
    "mp2 x 2": {"strategy": "ps+mp", "workers": 4, "servers": 1, "replicas": 2, "cuts": (1,)},
}


def adagrad(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adagrad(model.parameters(), lr=0.1)]


@pytest.mark.parametrize("plan", PLANS)
def test_same_numbers_as_one_process(crew: Build, plan: str) -> None:
    job = towers(**CLIPPED)
    team = crew(job, **PLANS[plan])
    team.join("initial")
    team.train(0, STEPS)
    assert distance(team.weights(STEPS), plain(job, STEPS, adagrad)) <= 1e-10


@pytest.mark.parametrize("consistency", ["ssp", "asp"])
def test_older_rows_are_still_written_once_a_step(crew: Build, consistency: str) -> None:
    """The gradient of what this model sums up does not depend on its weights, so their age does not matter."""
    job = towers(loss=lambda output, target: (output * target).mean(), model=Sums, optimizer=optim.SGD(lr=0.1))
    team = crew(job, strategy="ps+dp", workers=2, servers=2, sparse_consistency=consistency, staleness=1)
    team.join("initial")
    assert all(trainer.foresees for trainer in team.trainers)
    team.train(0, STEPS)
    expected = plain(job, STEPS, lambda model: [torch.optim.SGD(model.parameters(), lr=0.1)])
    assert distance(team.weights(STEPS), expected) <= 1e-10


@pytest.mark.parametrize("agreed", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_step_that_breaks_off_takes_effect_everywhere_or_nowhere(
    crew: Build, agreed: bool, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Group, "expose", lambda *_: None)  # as if the workers were on different hosts
    job = towers(**CLIPPED)
    team = crew(job, strategy="ps+dp", workers=2, servers=2)
    team.join("initial")
    team.train(0, 5)
    behind = team.trainers[1]
    finish = behind._finish_sum

    def lose(status: torch.Tensor) -> None:
        if agreed:  # by the other, while this one never hears of it
            finish(status)
        raise PeerLost("the line is cut")

    behind._finish_sum = lose
    outcomes = team.step(5)
    assert isinstance(outcomes[1], PeerLost)
    assert isinstance(outcomes[0], Outcome) == agreed
    assert team.regroup() == [[5, 6], [5, 6]]  # all had handed over before anyone could agree
    behind._finish_sum = finish
    assert [trainer.held() for trainer in team.trainers] == [6 if agreed else 5, 5]
    if replaced:
        team.replace(1)
    source = "peer" if agreed or replaced else "keep"
    team.join(source, 6 if agreed else 5)
    team.train(6 if agreed else 5, STEPS)
    assert distance(team.weights(STEPS), plain(job, STEPS, adagrad)) <= 1e-10


def test_it_evaluates_with_the_newest_rows(crew: Build) -> None:
    job = towers()
    team = crew(job, strategy="ps+dp", workers=2, servers=1)
    team.join("initial")
    with torch.no_grad():
        expected = build_model(job)(job.train.fetch(torch.arange(31).numpy())[0]).sum().item()
    assert abs(team.judged(31) - expected) <= 1e-12
    team.train(0, 3)
    trained = team.judged(31)
    assert abs(trained - expected) > 1e-3
    team.step(3)
    assert team.judged(31) != trained
