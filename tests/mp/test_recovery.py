"""Steps that fail, seats that are taken again, checkpoints at another number of stages, and refusals."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tricorn import data, optim
from tricorn.errors import Diverged, PeerLost, PlanError
from tricorn.job import Job
from tricorn.mp import strategy
from tricorn.mp.choose import choose
from tricorn.plan import Plan
from tricorn.state.flat import FlatState, build_model
from tricorn.state.shards import CheckpointReader
from tricorn.strategy import Batch, Outcome, Seat, Wishes, find

from . import models
from .crew import distance, share_of

SAMPLES, BATCH, STEPS = 60, 10, 6
# Where weights must be equal bit for bit: the kernels of optimizers round by where in memory a weight lies.
CUTS = (2, 4)


class Trap:
    """A loss that, once armed, does something in the last stage, in the midst of its step."""

    def __init__(self) -> None:
        self.action = None
        self.calls = 0

    def arm(self, action) -> None:
        self.action, self.calls = action, 0

    def __call__(self, output, target):
        self.calls += 1
        if self.action and self.calls == 2:  # the first microbatch is on its way back already
            action, self.action = self.action, None
            action()
        return F.cross_entropy(output, target)


@pytest.fixture
def job():
    def make(model="sequential", width=8, **fields) -> Job:
        generator = torch.Generator().manual_seed(3)
        given = {
            "model": getattr(models, model) if isinstance(model, str) else model,
            "loss": F.cross_entropy,
            "optimizer": optim.Adam(lr=0.02),
            "train": data.arrays(
                torch.randn(SAMPLES, width, generator=generator), torch.randint(0, 4, (SAMPLES,), generator=generator)
            ),
            "batch_size": BATCH,
            "epochs": 1,
            "device": "cpu",
        }
        return Job(**(given | fields))

    return make


@pytest.fixture
def undisturbed(crew, job) -> dict[str, torch.Tensor]:
    """The weights of three stages after all steps."""
    team = crew(job(), 3, CUTS)
    team.join("initial")
    team.train()
    return team.weights()


def assert_equal(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def fourth(job: Job):
    """The batch of step 3."""
    return job.train.inputs[30:40], job.train.target[30:40]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_step_that_lost_a_peer_is_run_again_with_the_same_result(crew, job, undisturbed, rank):
    trap = Trap()
    team = crew(job(loss=trap), 3, CUTS)
    team.join("initial")
    team.train(0, 3)
    before = team.weights()
    trap.arm(team.trainers[rank].interrupt)
    assert [type(result) for result in team.step(3, *fourth(team.job))] == [PeerLost] * 3
    assert [trainer.held() for trainer in team.trainers] == [3, 3, 3]
    assert_equal(team.weights(), before)
    assert not any(trainer._state.grads_N.any() for trainer in team.trainers)
    assert team.join("keep", 3) == [None] * 3
    team.train(3)
    assert_equal(team.weights(), undisturbed)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_replaced_stage_takes_the_cuts_in_force_and_a_checkpoint(crew, job, undisturbed, tmp_path, rank):
    team = crew(job(), 3, CUTS)
    team.join("initial")
    team.train(0, 2)
    team.save(tmp_path)
    team.train(2, 3)
    team.replace(rank)
    others = [trainer for trainer in team.trainers if trainer.held() is not None]
    lost = [team.pool.submit(t.step, 3, Batch(*fourth(team.job), BATCH, BATCH), BATCH, Wishes()) for t in others]
    assert [type(future.exception(10)) for future in lost] == [PeerLost] * 2
    assert [trainer.held() for trainer in team.trainers] == [None if r == rank else 3 for r in range(3)]
    assert team.join("checkpoint", 2, tmp_path) == [None] * 3
    assert [trainer._cuts for trainer in team.trainers] == [CUTS] * 3
    assert [trainer.held() for trainer in team.trainers] == [2, 2, 2]
    team.train(2)
    assert_equal(team.weights(), undisturbed)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_any_number_of_stages_goes_on_from_a_checkpoint(crew, job, undisturbed, tmp_path, stages):
    team = crew(job(), 3)
    team.join("initial")
    team.train(0, 4)
    team.save(tmp_path)
    other = crew(job(), stages)
    other.join("checkpoint", 4, tmp_path)
    assert_equal(other.weights(), team.weights())
    other.train(4)
    # The cuts may differ, never the weights by more than the order of a sum.
    assert distance(other.weights(), undisturbed) <= 1e-5


def test_a_plain_model_takes_up_a_checkpoint_of_three_stages_and_gives_one_back(crew, job, tmp_path):
    team = crew(job("Wide"), 3)
    team.join("initial")
    team.train(0, 4)
    reader = CheckpointReader(team.save(tmp_path), 4)
    plain = FlatState(build_model(team.job), team.job.optimizer, torch.device("cpu"))
    plain.load(reader)
    assert_equal(dict(plain.module.named_parameters()), team.weights())
    for piece in plain.pieces():
        assert torch.equal(piece.data, reader.read(piece.key, piece.start, piece.stop))


def test_initial_starts_over(crew, job):
    team = crew(job(), 2)
    team.join("initial")
    fresh = team.weights()
    team.train(0, 2)
    team.join("initial")
    assert_equal(team.weights(), fresh)
    assert [trainer.held() for trainer in team.trainers] == [0, 0]


def test_a_joining_that_fails_half_way_holds_nothing(crew, job, tmp_path):
    team = crew(job(), 2)
    team.join("initial")
    team.train(0, 2)
    assert all("has no param/" in str(error) for error in team.join("checkpoint", 2, tmp_path))
    assert [trainer.held() for trainer in team.trainers] == [None, None]
    team.join("initial")
    assert [trainer.held() for trainer in team.trainers] == [0, 0]


def test_interrupt_while_the_group_is_being_built(crew, job):
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


def test_a_loss_that_is_not_a_number_ends_the_step_on_every_stage(crew, job):
    team = crew(job(), 3)
    team.join("initial")
    team.train(0, 3)
    before = team.weights()
    inputs, target = fourth(team.job)
    poisoned = inputs.clone()
    poisoned[9] = float("nan")
    for error in team.step(3, poisoned, target):
        assert isinstance(error, Diverged)
        assert str(error) == "the loss of step 3 is nan"
    assert_equal(team.weights(), before)
    assert all(isinstance(outcome, Outcome) for outcome in team.step(3, inputs, target))


class Picky(nn.Module):
    def forward(self, x):
        if x.isnan().any():
            raise ZeroDivisionError("in the user's layer")
        return x


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_exception_of_the_users_code_comes_out_as_it_was_raised(crew, job, rank):
    def model() -> nn.Module:
        layers = [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)]
        return nn.Sequential(*layers[:rank], Picky(), *layers[rank:])

    team = crew(job(model), 3, [(2, 3), (1, 3), (1, 2)][rank])
    team.join("initial")
    inputs, target = fourth(team.job)
    failing = next(
        r for r, t in enumerate(team.trainers) if any(isinstance(m, Picky) for m in t._state.module.modules())
    )
    assert failing == rank
    inputs = inputs.clone()
    inputs[5] = float("nan")
    futures = [team.pool.submit(t.step, 0, Batch(inputs, target, BATCH, BATCH), BATCH, Wishes()) for t in team.trainers]
    error = futures[rank].exception(10)
    assert isinstance(error, ZeroDivisionError)
    team.trainers[rank].close()  # as the death of that worker does
    assert [type(f.exception(10)) for r, f in enumerate(futures) if r != rank] == [PeerLost] * 2


def test_wishes_counts_and_bytes_are_agreed(crew, job):
    team = crew(job(), 3)
    team.join("initial")
    outcomes = team.step(0, *fourth(team.job), checkpoint=1)
    assert {(o.count, o.samples, o.wishes) for o in outcomes} == {(10, 10, Wishes(checkpoint=1, stop=0))}
    sent = [trainer.bytes_sent for trainer in team.trainers]
    assert min(sent) > 0
    team.join("keep", 1)
    assert all(now >= before for now, before in zip([t.bytes_sent for t in team.trainers], sent, strict=True))


def test_buffers_are_as_before_a_step_that_failed(crew, job):
    trap = Trap()
    made = crew(
        job(lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)), loss=trap), 2, microbatches=1
    )
    made.join("initial")
    assert all(isinstance(o, Outcome) for o in made.step(0, *fourth(made.job)))
    before = [b.clone() for t in made.trainers for b in t._state.module.buffers()]
    assert before
    trap.arm(made.trainers[0].interrupt)
    trap.calls = 1  # there is one microbatch
    assert [type(error) for error in made.step(1, *fourth(made.job))] == [PeerLost] * 2
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (b for t in made.trainers for b in t._state.module.buffers()), strict=True)
    )


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(F.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 7, 20])
def test_the_last_stage_judges_every_sample_once(crew, job, stages, samples):
    team = crew(job("Residual"), stages)
    team.join("initial")
    inputs, target = team.job.train.inputs[:samples], team.job.train.target[:samples]
    judged: list[tuple[torch.Tensor, Batch]] = []
    team.each(lambda _, t: t.evaluate(share_of(team.job, inputs, target, t), samples, lambda *a: judged.append(a)))
    assert torch.equal(torch.cat([batch.target for _, batch in judged]), target)
    assert sum(batch.samples for _, batch in judged) == sum(batch.count for _, batch in judged) == samples
    with torch.no_grad():
        expected = build_model(team.job).eval()(inputs)
    torch.testing.assert_close(torch.cat([output for output, _ in judged]), expected)
    assert all(stage.training for trainer in team.trainers for stage in trainer._state.stages)
    team.train(0, 1)


def test_first_and_last_stage_load_everything(crew, job):
    assert [trainer.share(10) for trainer in crew(job(), 4).trainers] == [(0, 10), (0, 0), (0, 0), (0, 10)]
    assert [trainer.share(10) for trainer in crew(job(), 1).trainers] == [(0, 10)]


def test_a_value_that_cannot_travel_is_not_cut_at(crew, job):
    team = crew(job("Named", width=6), 2)
    assert team.join("initial") == [None, None]
    assert team.trainers[0]._cuts in [(1,), (3,)]
    with pytest.raises(PlanError) as raised:
        choose(team.job, team.plan, 4, 5, 2, torch.device("cpu"))
    assert str(raised.value) == (
        "_named hands on a dict, which cannot travel from stage to stage; "
        "let it return a tensor or a tuple of tensors, or use at most 3 workers"
    )


def test_why_not(job):
    plan = Plan(strategy="mp", workers=2)
    assert find(plan) is strategy
    assert strategy.why_not(job(), plan) is None
    assert strategy.why_not(job("Tied"), plan) is None
    few = strategy.why_not(job(), Plan(strategy="mp", workers=40))
    assert "blocks for 40 stages" in few
    assert "use at most" in few
    assert "control flow" in strategy.why_not(job("Deciding"), plan)
    reason = strategy.why_not(job("Normalised"), plan)
    assert "layer 'norm' keeps statistics of the batch" in reason
    assert "use GroupNorm or LayerNorm, or set microbatches to 1" in reason
    assert strategy.why_not(job("Normalised"), Plan(strategy="mp", workers=2, microbatches=1)) is None
    assert strategy.why_not(job("Normalised"), Plan(strategy="mp", workers=1)) is None


@pytest.mark.parametrize(("options", "reason"), [
    ({"workers": 11, "replicas": 11}, "replicas is 11, and a batch has 10 samples for them to share; use at most 10"),
    ({"workers": 2, "zero": 1}, "zero is 1, which spreads the optimizer's state over the replicas, and there is one"),
    ({"workers": 2, "tensor": 2, "schedule": "interleaved"}, "schedule is interleaved, and there is one stage"),
    ({"workers": 2, "cuts": (1, 2)}, "cuts are 2, but 2 stages have 1; give that many"),
    ({"workers": 2, "cuts": (99,)}, "no stage can begin with block 99; cut before any of 1 ("),
])  # fmt: skip
def test_why_not_of_a_mesh(job, options, reason):
    assert reason in strategy.why_not(job(), Plan(strategy="mp", **options))


def test_why_not_of_replicas_and_shards(job):
    normed = strategy.why_not(job("Normalised", width=6), Plan(strategy="mp", workers=2, replicas=2))
    assert "layer 'norm' keeps statistics of the batch, and each of 2 replicas sees only its share" in normed
    alone = strategy.why_not(job(lambda: nn.Sequential(nn.Linear(8, 4))), Plan(strategy="mp", workers=2, tensor=2))
    assert "has no layers to split among 2 workers" in alone
