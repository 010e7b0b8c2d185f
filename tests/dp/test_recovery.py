"""Steps that fail, seats that are taken again, and state that comes from elsewhere."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tricorn import optim
from tricorn.comm.group import Group
from tricorn.comm.peers import Peers
from tricorn.dp import buckets
from tricorn.errors import Diverged, PeerLost, PlanError
from tricorn.job import Job
from tricorn.state.shards import write_shard
from tricorn.strategy import Batch, Outcome, Seat, Wishes

STEPS = 8


class Counting(nn.Module):
    """Buffers that forward changes, besides weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.scale *= 1.01
        return self.last(torch.tanh(self.first(x))) * self.scale


def job(**fields: Any) -> Job:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(10 * STEPS, 5, generator=generator)
    target = torch.randint(0, 3, (10 * STEPS,), generator=generator)
    given = {
        "model": Counting,
        "loss": F.cross_entropy,
        "optimizer": optim.Adam(lr=0.05),
        "train": torch.utils.data.TensorDataset(inputs, target),
        "batch_size": 10,
        "epochs": 1,
        "device": "cpu",
    }
    return Job(**(given | fields))


def assert_equal(states: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    for state in states:
        assert state.keys() == expected.keys()
        assert [key for key in state if not torch.equal(state[key], expected[key])] == []


@pytest.fixture
def undisturbed(crew) -> dict[str, torch.Tensor]:
    """The state of three workers after all steps."""
    team = crew(job(), 3)
    team.join("initial")
    team.train()
    return team.states()[0]


class Trap:
    """A loss that, once armed, does something in the thread of one worker, in the midst of its step."""

    def __init__(self) -> None:
        self.armed: dict[str, Any] = {}

    def arm(self, action: Any) -> None:
        """The next worker to compute its loss runs the action."""
        self.armed["action"] = action

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if action := self.armed.pop("action", None):
            action()
        return F.cross_entropy(output, target)


@pytest.mark.parametrize("tiny", [False, True])
def test_a_step_that_lost_a_peer_is_run_again_with_the_same_result(crew, undisturbed, request, monkeypatch, tiny):
    if tiny:
        request.getfixturevalue("apart")
        monkeypatch.setattr(buckets, "BUCKET_BYTES", 1)
    trap = Trap()
    team = crew(job(loss=trap), 3)
    team.join("initial")
    team.train(0, 3)
    before = {key: tensor.clone() for key, tensor in team.states()[0].items()}
    trap.arm(team.trainers[1].interrupt)
    inputs, target = (tensor[30:40] for tensor in team.job.train.tensors)
    assert [type(result) for result in team.step(3, inputs, target)] == [PeerLost] * 3
    assert [trainer.held() for trainer in team.trainers] == [3, 3, 3]
    assert_equal(team.states(), before)
    assert all(not trainer._state.grads_N.any() for trainer in team.trainers)
    assert tiny or all(parameter.grad is None for t in team.trainers for parameter in t._module.parameters())
    team.join("keep", 3)
    team.train(3)
    assert_equal(team.states(), undisturbed)


def test_a_step_without_its_peers_fails_and_a_new_worker_copies_the_state(crew, undisturbed):
    team = crew(job(), 3)
    team.join("initial")
    team.train(0, 4)
    team.replace(2)
    inputs, target = (tensor[40:50] for tensor in team.job.train.tensors)
    lost = [
        team.pool.submit(trainer.step, 4, Batch(inputs[:4], target[:4], 4, 4), 10, Wishes()).exception(10)
        for trainer in team.trainers[:2]
    ]
    assert [type(error) for error in lost] == [PeerLost] * 2
    assert [trainer.held() for trainer in team.trainers] == [4, 4, None]
    team.join("peer", 4, peer=1)
    assert [trainer.held() for trainer in team.trainers] == [4, 4, 4]
    team.train(4)
    assert_equal(team.states(), undisturbed)


def test_who_is_a_step_behind_copies_from_who_is_ahead(crew, undisturbed):
    """The last message of a step can reach one peer and not the other."""
    team = crew(job(), 3)
    team.join("initial")
    team.train(0, 5)
    behind = crew(job(), 3)
    behind.join("initial")
    behind.train(0, 4)
    team.trainers[0], behind.trainers[0] = behind.trainers[0], team.trainers[0]
    moved = team.trainers[0]
    moved._peers.leave()
    moved._peers = Peers(moved._context._replace(listener=team.listeners[0]), "dp")
    team.join("peer", 5, peer=2)
    team.train(5)
    assert_equal(team.states(), undisturbed)
    behind.trainers.pop(0).close()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_goes_on_from_a_checkpoint(crew, undisturbed, tmp_path, workers):
    team = crew(job(), 3)
    team.join("initial")
    team.train(0, 5)
    assert [len(trainer.pieces()) > 0 for trainer in team.trainers] == [True, False, False]
    write_shard(tmp_path, "model.safetensors", team.trainers[0].pieces())
    other = crew(job(), workers)
    other.join("checkpoint", 5, checkpoint=tmp_path)
    other.train(5)
    if workers == 3:
        assert_equal(other.states(), undisturbed)
    for state in other.states():
        torch.testing.assert_close(state["param"], undisturbed["param"], rtol=1e-4, atol=1e-5)


def test_a_joining_that_fails_half_way_holds_nothing(crew, tmp_path):
    team = crew(job(), 2)
    team.join("initial")
    team.train(0, 2)
    errors = team.join("checkpoint", 2, checkpoint=tmp_path)
    assert all("has no " in str(error) for error in errors)
    assert [trainer.held() for trainer in team.trainers] == [None, None]
    team.join("initial")
    assert [trainer.held() for trainer in team.trainers] == [0, 0]


def test_initial_starts_over(crew, undisturbed):
    team = crew(job(), 1)
    team.join("initial")
    fresh = {key: tensor.clone() for key, tensor in team.states()[0].items()}
    team.train(0, 2)
    team.join("initial")
    assert_equal(team.states(), fresh)


def test_interrupt_while_the_group_is_being_built(crew):
    team = crew(job(), 2)
    seated = threading.Event()
    announce = team.listeners[0].announce

    def tell(epoch: int) -> None:
        announce(epoch)
        seated.set()

    team.listeners[0].announce = tell
    addresses = tuple(listener.address for listener in team.listeners)
    joining = team.pool.submit(team.trainers[0].join, Seat(1, addresses, (), 0, "initial", 0, None))
    assert seated.wait(5)
    team.trainers[0].interrupt()
    assert isinstance(joining.exception(5), PeerLost)


def test_an_interrupt_just_before_there_is_a_group_is_not_missed(crew):
    team = crew(job(), 1)
    announce = team.listeners[0].announce

    def tell(epoch: int) -> None:
        announce(epoch)
        team.trainers[0].interrupt()

    team.listeners[0].announce = tell
    team.join("initial")
    (error,) = team.step(0, *(tensor[:10] for tensor in team.job.train.tensors))
    assert isinstance(error, PeerLost)


def test_a_loss_that_is_not_a_number_ends_the_step_on_every_rank(crew):
    team = crew(job(), 3)
    team.join("initial")
    team.train(0, 2)
    before = {key: tensor.clone() for key, tensor in team.states()[0].items()}
    inputs, target = (tensor[20:30].clone() for tensor in team.job.train.tensors)
    poisoned = inputs.clone()
    poisoned[9] = float("nan")  # the share of the last rank
    for error in team.step(2, poisoned, target):
        assert isinstance(error, Diverged)
        assert str(error) == "the loss of step 2 is nan"
    assert_equal(team.states(), before)
    assert all(isinstance(outcome, Outcome) for outcome in team.step(2, inputs, target))


def test_an_exception_of_the_users_code_comes_out_as_it_was_raised_and_the_others_are_told(crew):
    def fail() -> None:
        raise ZeroDivisionError("in the user's loss")

    trap = Trap()
    team = crew(job(loss=trap), 3)
    team.join("initial")
    trap.arm(fail)
    inputs, target = (tensor[:10] for tensor in team.job.train.tensors)
    assert sorted(type(error).__name__ for error in team.step(0, inputs, target)) == [
        "PeerLost",
        "PeerLost",
        "ZeroDivisionError",
    ]


def test_wishes_counts_and_bytes_are_agreed(crew):
    team = crew(job(), 3)
    team.join("initial")
    inputs, target = (tensor[:10] for tensor in team.job.train.tensors)
    outcomes = team.step(0, inputs, target, checkpoint=1)
    assert {(o.count, o.samples, o.wishes) for o in outcomes} == {(10, 10, Wishes(checkpoint=1, stop=0))}
    elements = team.trainers[0]._state.weights_N.numel()
    agreed = 2 * 8 * (5 + 1 + 1 + 3 + 3 + 2)  # what is agreed, a norm, times, samples of each, changed buffers
    met = 2 * 2 * 4  # where shared memory begins to be used, and where the update is whole
    told = 2 * (4 * 8 + 8 + 3 * 4)  # by the first rank: the order of four parameters, and two buffers
    # Gradients and weights: so few are all updated by the last, which reads what the others have and they what it has.
    parts = [4 * elements] * 2 + [2 * 4 * elements]
    first, *others = [agreed + met + part for part in parts]
    assert [trainer.bytes_sent for trainer in team.trainers] == [first + told, *others]
    sent = team.trainers[0].bytes_sent
    team.join("keep", 1)
    assert team.trainers[0].bytes_sent == sent + 2 * 4 * 8 + 2 * 4  # the order again, and the first meeting


def test_evaluate_judges_each_share_where_there_is_one(crew):
    team = crew(job(), 3)
    team.join("initial")
    inputs, target = (tensor[:2] for tensor in team.job.train.tensors)
    judged: list[int] = []

    def judge(output: torch.Tensor, batch: Batch) -> None:
        assert output.shape == (batch.samples, 3)
        assert not output.requires_grad
        judged.append(batch.samples)

    def run(_: int, trainer: Any) -> bool:
        start, stop = trainer.share(2)
        batch = Batch(inputs[start:stop], target[start:stop], stop - start, stop - start)
        trainer.evaluate(batch, 2, judge)
        return trainer._state.module.training

    assert team.each(run) == [True] * 3
    assert judged == [1, 1]


@pytest.mark.parametrize("samples", [0, 1, 2, 3, 10, 13])
def test_shares_are_even_and_cover_the_batch(crew, samples):
    team = crew(job(), 4)
    shares = [trainer.share(samples) for trainer in team.trainers]
    assert [index for start, stop in shares for index in range(start, stop)] == list(range(samples))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1


class Reentrant(nn.Module):
    """A shared layer under two checkpoints of the old kind, each with a backward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        x = x.clone().requires_grad_()
        for _ in range(2):
            x = checkpoint(self.shared, x, use_reentrant=True)
        return x


def test_workers_that_no_longer_see_the_same_memory(crew, undisturbed, monkeypatch):
    team = crew(job(), 3)
    team.join("initial")
    team.train(0, 4)
    monkeypatch.setattr(Group, "expose", lambda *_: None)
    team.join("keep", 4)
    team.train(4, 6)
    monkeypatch.undo()
    team.join("keep", 6)
    team.train(6)
    assert_equal(team.states(), undisturbed)


def test_a_gradient_that_comes_twice_is_an_error_not_a_wrong_sum(crew, apart):
    team = crew(job(model=Reentrant), 1)
    team.join("initial")
    (error,) = team.step(0, *(tensor[:10] for tensor in team.job.train.tensors))
    assert isinstance(error, PlanError)
    assert "'shared." in str(error)
    assert "use_reentrant=False" in str(error)


def test_a_gradient_that_comes_twice_is_added_up_in_shared_memory(crew, plain_loop):
    this = job(model=Reentrant, precision="float64")
    expected, _ = plain_loop(this, lambda parameters: torch.optim.Adam(parameters, lr=0.05))
    team = crew(this, 2)
    team.join("initial")
    team.train()
    assert max(team.distances(expected)) <= 1e-10
