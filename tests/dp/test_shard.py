"""State spread over workers: the same numbers as one process, less memory in each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tricorn.dp import shard_sum, shard_units
from tricorn.dp.shard_gather import Gatherer, Saved
from tricorn.dp.shard_sum import ShardSum
from tricorn.dp.shard_units import blocks
from tricorn.errors import Diverged, PeerLost, PlanError
from tricorn.state.shards import write_shard

from .conftest import cut
from .test_numbers import OPTIMIZERS, Branching, job, language_job

ADAM = OPTIMIZERS["adam"]


def whole(team) -> dict[str, torch.Tensor]:
    """The weights that the workers' pieces add up to, flat, by name."""
    pieces = [piece for trainer in team.trainers for piece in trainer.pieces() if piece.key.startswith("param/")]
    names = dict.fromkeys(piece.key for piece in pieces)
    return {
        name.removeprefix("param/"): torch.cat(
            [piece.data for piece in sorted(pieces, key=lambda piece: piece.start) if piece.key == name]
        )
        for name in names
    }


def distance(team, expected: dict[str, torch.Tensor]) -> float:
    found = whole(team)
    assert {name: len(flat) for name, flat in found.items()} == {name: p.numel() for name, p in expected.items()}
    ours, theirs = (torch.cat([each[name].flatten().double() for name in expected]) for each in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())


def deep() -> nn.Module:
    """Blocks in sequences in sequences."""
    inner = [nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(nn.Linear(6, 16), nn.Sequential(*inner), nn.Linear(16, 4))


class Recurrent(nn.Module):
    """Runs a block twice, keeps a weight of its own, returns a dict, and has its blocks in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(8))
        self.cell = nn.Linear(8, 8)
        self.first = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) * self.scale
        return self.last(torch.tanh(self.cell(torch.tanh(self.cell(x)))))


class Checkpointed(nn.Module):
    """Blocks that run again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        x = checkpoint(lambda x: torch.tanh(self.layers[1](torch.tanh(self.layers[0](x)))), x, use_reentrant=False)
        return self.layers[2](x)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_same_numbers(crew, plain_loop, zero, workers, microbatches):
    this = job(model=deep, optimizer=ADAM[0], precision="float64", clip_norm=0.3, schedule=lambda step: 1 / (1 + step))
    expected, losses = plain_loop(this, ADAM[1])
    team = crew(this, workers, zero=zero, microbatches=microbatches)
    team.join("initial")
    assert team.train() == pytest.approx(losses, rel=1e-10)
    assert distance(team, expected) <= 1e-10


@pytest.mark.parametrize("zero", [1, 2])
def test_backward_waits_where_many_gradients_are_under_way(crew, plain_loop, zero, monkeypatch):
    """The last batch leaves a worker without samples."""
    monkeypatch.setattr(shard_units, "BUCKET_BYTES", 1)
    monkeypatch.setattr(shard_sum, "UNDER_WAY", 0)
    launch, most = ShardSum._launch, [0]

    def launched(self: ShardSum) -> None:
        launch(self)
        most[0] = max(most[0], len(self._sending))

    monkeypatch.setattr(ShardSum, "_launch", launched)
    this = job(model=deep, precision="float64", epochs=2)
    expected, _ = plain_loop(this, OPTIMIZERS["sgd"][1])
    team = crew(this, 3, zero=zero, microbatches=2)
    team.join("initial")
    team.train()
    assert len(team.trainers[0]._units) > 3
    assert most == [1]
    assert distance(team, expected) <= 1e-10


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_same_numbers_in_float32(crew, plain_loop, zero):
    this = job(optimizer=OPTIMIZERS["sgd"][0])
    expected, _ = plain_loop(this, OPTIMIZERS["sgd"][1])
    team = crew(this, 2, zero=zero)
    team.join("initial")
    team.train()
    assert distance(team, expected) <= 1e-5


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_counted_tokens_tied_frozen_and_unused_weights(crew, plain_loop, zero, workers, microbatches):
    this = language_job(optimizer=ADAM[0], precision="float64")
    expected, losses = plain_loop(this, ADAM[1])
    team = crew(this, workers, zero=zero, microbatches=microbatches)
    team.join("initial")
    assert team.train() == pytest.approx(losses, rel=1e-10)
    assert distance(team, {name: p for name, p in expected.items() if "frozen" not in name}) <= 1e-10


@pytest.mark.parametrize("model", [Recurrent, Checkpointed])
def test_blocks_that_run_twice_or_in_an_order_of_their_own(crew, plain_loop, model):
    this = job(model=model, precision="float64")
    expected, _ = plain_loop(this, OPTIMIZERS["sgd"][1])
    team = crew(this, 3, zero=3)
    team.join("initial")
    team.train()
    assert distance(team, expected) <= 1e-10


def test_workers_that_use_different_blocks(crew, plain_loop):
    """With zero=3 the lead's first share decides which blocks there are; a block beyond is an error on its worker."""
    this = job(model=Branching, precision="float64", batch_size=3)
    expected, _ = plain_loop(this, OPTIMIZERS["sgd"][1])
    team = crew(this, 3, zero=2)
    team.join("initial")
    team.train()
    assert distance(team, expected) <= 1e-10
    team = crew(this, 3, zero=3)
    team.join("initial")
    inputs = torch.tensor([[1.0], [-1.0], [1.0]], dtype=torch.float64).expand(3, 6).contiguous()
    errors = team.step(0, inputs, torch.zeros(3, dtype=torch.int64))
    assert sorted(type(error).__name__ for error in errors) == ["PeerLost", "PeerLost", "PlanError"]
    assert "use zero=2" in str(next(error for error in errors if isinstance(error, PlanError)))


class Outside(nn.Module):
    """Uses a weight of a block without running the block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.first(x)) @ self.last.weight.T


def test_a_weight_used_outside_of_its_block_is_an_error(crew):
    team = crew(job(model=Outside), 1, zero=3)
    team.join("initial")
    (error,) = team.step(0, *(tensor[:13] for tensor in team.job.train.tensors))
    assert isinstance(error, PlanError)
    assert "outside of the block's forward; use zero=2" in str(error)


def test_under_bfloat16_autograd_keeps_no_casts_of_weights(crew, monkeypatch):
    kept, pack = [], Gatherer.pack
    monkeypatch.setattr(Gatherer, "pack", lambda self, saved: kept.append(pack(self, saved)) or kept[-1])
    teams = [crew(job(model=deep, precision="bfloat16"), 2, zero=zero) for zero in (2, 3)]
    for team in teams:
        team.join("initial")
        team.train(0, 3)
    assert {note.cast[1] for note in kept if isinstance(note, Saved) and note.cast} == {torch.bfloat16}
    shapes = {tuple(sorted(tensor.shape)) for tensor in kept if isinstance(tensor, torch.Tensor)}
    assert not shapes & {(16, 16), (4, 16)}
    assert distance(teams[1], whole(teams[0])) <= 1e-7


def test_memory_falls(crew):
    """Elements that a worker holds between steps, of N weights: gradients are none of them."""

    def held(trainer) -> int:
        units = trainer._units
        kept = [t for unit in units for t in (unit.whole_n, unit.own_s, unit.grad_s, *unit.slots.values())]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t is not None}
        return sum(storages.values()) // 4

    this = job(model=deep, optimizer=ADAM[0])
    elements = sum(p.numel() for p in deep().parameters())
    share = -(-elements // 2)
    for zero, expected in ((2, elements + 3 * share), (3, 4 * share)):
        team = crew(this, 2, zero=zero)
        team.join("initial")
        team.train(0, 2)
        for trainer in team.trainers:
            assert held(trainer) == pytest.approx(expected, abs=40)
            assert all(parameter.grad is None for parameter in trainer._module.parameters())


def test_blocks():
    model = nn.Module()
    model.token = nn.Parameter(torch.zeros(3))
    model.embed = nn.Embedding(7, 4)
    model.layers = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8, batch_first=True) for _ in range(2)])
    model.head = nn.Linear(4, 7, bias=False)
    model.norm = nn.LayerNorm(4)
    model.head.weight = model.embed.weight
    found, rest = blocks(model)
    assert [type(block).__name__ for block, _ in found] == ["TransformerEncoderLayer"] * 2 + ["LayerNorm"]
    assert sorted(rest) == ["embed.weight", "token"]
    assert sorted(rest + [name for _, names in found for name in names]) == sorted(dict(model.named_parameters()))


@pytest.mark.parametrize("zero", [1, 3])
def test_any_plan_goes_on_from_any_checkpoint(crew, plain_loop, tmp_path, zero):
    this = job(model=deep, optimizer=ADAM[0], precision="float64")
    expected, _ = plain_loop(this, ADAM[1])
    team = crew(this, 3, zero=zero)
    team.join("initial")
    team.train(0, 7)
    for rank, trainer in enumerate(team.trainers):
        write_shard(tmp_path, f"worker-{rank}.safetensors", trainer.pieces())
    for workers, other in ((2, 0), (2, 2), (3, 3)):
        again = crew(this, workers, zero=other)
        again.join("checkpoint", 7, checkpoint=tmp_path)
        again.train(7)
        assert (max(again.distances(expected)) if other == 0 else distance(again, expected)) <= 1e-10


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_step_that_fails_is_run_again_with_the_same_result(crew, plain_loop, zero):
    this = job(model=deep, optimizer=ADAM[0], precision="float64", clip_norm=1.0)
    expected, _ = plain_loop(this, ADAM[1])
    team = crew(this, 3, zero=zero)
    team.join("initial")
    team.train(0, 3)
    batch = [tensor[39:52] for tensor in this.train.tensors]
    before = whole(team)
    team.trainers[1].interrupt()
    assert [type(error) for error in team.step(3, *batch)] == [PeerLost] * 3
    assert [trainer.held() for trainer in team.trainers] == [3] * 3
    team.join("keep", 3)
    poisoned = batch[0].clone()
    poisoned[12] = float("nan")
    assert [type(error) for error in team.step(3, poisoned, batch[1])] == [Diverged] * 3
    assert all(torch.equal(flat, before[name]) for name, flat in whole(team).items())
    team.train(3)
    assert distance(team, expected) <= 1e-10


@pytest.mark.parametrize("zero", [1, 3])
def test_evaluation(crew, zero):
    team = crew(job(model=deep, precision="float64"), 3, zero=zero)
    team.join("initial")
    inputs, target = (tensor[:2] for tensor in team.job.train.tensors)
    model = deep().double()
    for name, flat in whole(team).items():
        model.get_parameter(name).data = flat.view(model.get_parameter(name).shape)
    expected = model(inputs)

    def run(_: int, trainer) -> list[torch.Tensor]:
        judged: list[torch.Tensor] = []
        trainer.evaluate(cut(team.job, inputs, target, *trainer.share(2)), 2, lambda output, _: judged.append(output))
        return judged

    for _ in range(2):  # the order of blocks is recorded, then known
        outputs = [output for judged in team.each(run) for output in judged]
        torch.testing.assert_close(torch.cat(outputs), expected)
