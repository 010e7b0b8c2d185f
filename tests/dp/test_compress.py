"""Gradients that travel encoded: equal bits everywhere, less to send, nothing lost for good, and trained as well."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tricorn import optim
from tricorn.dp import buckets, powersgd_kernels
from tricorn.dp.compress import Compressor, compressor
from tricorn.dp.powersgd import RANK, matrices
from tricorn.errors import PeerLost
from tricorn.job import Job
from tricorn.state.flat import layout
from tricorn.strategy import Batch, Wishes

NAMES = ("bf16", "fp16", "int8", "topk", "powersgd")
SAMPLES, BATCH, EPOCHS = 13 * 4 + 1, 13, 8  # the last batch of each epoch has one sample


def job(**fields: Any) -> Job:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 24, generator=generator)
    target = (inputs @ torch.randn(24, 4, generator=generator)).argmax(1)
    given = {
        "model": lambda: nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 4)),
        "loss": F.cross_entropy,
        "optimizer": optim.SGD(lr=0.1, momentum=0.9),
        "train": torch.utils.data.TensorDataset(inputs, target),
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "device": "cpu",
    }
    return Job(**(given | fields))


class Room:
    """A wire between threads of the test: everyone lays down what it has, everyone takes what it needs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.table: list[Any] = [None] * size
        self.meet = threading.Barrier(size, timeout=10)
        self.sent = [0] * size

    def exchange(self, rank: int, item: Any) -> list[Any]:
        self.table[rank] = item
        self.meet.wait()
        found = list(self.table)
        self.meet.wait()
        return found


class Place:
    """One rank's end of a room."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank, self.size = room, rank, room.size

    def all_reduce(self, flat: torch.Tensor) -> None:
        flat.copy_(sum(self.room.exchange(self.rank, flat.clone())))

    def all_to_all(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor]) -> None:
        self.room.sent[self.rank] += sum(data.numel() for rank, data in enumerate(sends) if rank != self.rank)
        for theirs, mine in zip(self.room.exchange(self.rank, sends), receives, strict=True):
            mine.copy_(theirs[self.rank])

    def all_gather(self, flat: torch.Tensor, bounds: Sequence[int]) -> None:
        own = flat[bounds[self.rank] : bounds[self.rank + 1]].clone()
        self.room.sent[self.rank] += (self.size - 1) * own.numel()
        flat.copy_(torch.cat(self.room.exchange(self.rank, own)))


def summed(compressors: list[Compressor], flats: list[torch.Tensor], start: int, step: int) -> list[torch.Tensor]:
    """What each rank makes of its flat tensor."""
    room = Room(len(flats))
    found = [flat.clone() for flat in flats]
    threads = [
        threading.Thread(target=each.sum, args=(Place(room, rank), found[rank], start, step))
        for rank, each in enumerate(compressors)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


ENTRIES = layout([("bias", (7,)), ("matrix", (40, 60)), ("small", (3, 4)), ("kernel", (32, 8, 3, 3)), ("last", (5,))])
SIZE = ENTRIES[-1].stop


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_sent_and_what_is_kept_back_make_up_the_sum(name, dtype, size):
    generator = torch.Generator().manual_seed(0)
    compressors = [compressor(name, ENTRIES, dtype) for _ in range(size)]
    given_sum, got_sum = torch.zeros(SIZE, dtype=dtype), torch.zeros(SIZE, dtype=dtype)
    slices = [(ENTRIES[2].start, SIZE), (0, ENTRIES[2].start)]
    for step in range(5):
        for start, stop in slices:
            flats = [torch.randn(stop - start, generator=generator, dtype=dtype) for _ in range(size)]
            found = summed(compressors, flats, start, step)
            assert all(torch.equal(found[0], other) for other in found)
            given_sum[start:stop] += sum(flats)
            got_sum[start:stop] += found[0]
    kept = torch.zeros(SIZE, dtype=dtype)
    for each in compressors:
        kept += each._kept_N if name == "powersgd" else each._parts.lost_N + each._sums.lost_N
    exact = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(got_sum + kept, given_sum, rtol=exact, atol=100 * exact)
    assert kept.any()
    for each in compressors:
        each.forget()
    first = summed(compressors, flats, slices[-1][0], 9)
    fresh = summed([compressor(name, ENTRIES, dtype) for _ in range(size)], flats, slices[-1][0], 9)
    assert torch.equal(first[0], fresh[0])


def test_powersgd_is_exact_for_a_sum_of_low_rank_and_follows_it():
    generator = torch.Generator().manual_seed(0)
    (matrix,) = (m for m in matrices(ENTRIES, RANK) if m.rows == 40)
    factors = [torch.randn(n, RANK, generator=generator, dtype=torch.float64) for n in (40, 60)]
    flats = [torch.zeros(SIZE, dtype=torch.float64) for _ in range(2)]
    for flat, part in zip(flats, (0.25, 0.75), strict=True):
        flat[matrix.start : matrix.stop] = part * (factors[0] @ factors[1].T).flatten()
    found = summed([compressor("powersgd", ENTRIES, torch.float64) for _ in range(2)], flats, 0, 0)
    torch.testing.assert_close(found[0], sum(flats), rtol=1e-9, atol=1e-9)


def test_powersgd_leaves_what_is_small_as_it_is():
    flats = [torch.randn(SIZE, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    found = summed([compressor("powersgd", ENTRIES, torch.float32) for _ in range(2)], flats, 0, 0)[0]
    for entry in ENTRIES:
        same = torch.equal(found[entry.start : entry.stop], sum(flats)[entry.start : entry.stop])
        assert same == (entry.name in ("bias", "small", "last"))


def test_powersgd_goes_on_after_a_gradient_of_zero():
    compressors = [compressor("powersgd", ENTRIES, torch.float32) for _ in range(2)]
    zeros = [torch.zeros(SIZE)] * 2
    assert not summed(compressors, zeros, 0, 0)[0].any()
    ones = [torch.ones(SIZE)] * 2
    torch.testing.assert_close(summed(compressors, ones, 0, 1)[0], torch.full((SIZE,), 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_become_orthonormal_or_zero(dtype):
    rows = torch.randn(5, 30, generator=torch.Generator().manual_seed(0), dtype=dtype)
    rows[3] = 2 * rows[0] - rows[1]
    powersgd_kernels.orthogonalise(rows.numpy())
    expected = torch.diag(torch.tensor([1, 1, 1, 0, 1], dtype=dtype))
    torch.testing.assert_close(rows @ rows.T, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.fixture(params=["few buckets", "many buckets"])
def bucket_size(request, monkeypatch) -> None:
    if request.param == "many buckets":
        monkeypatch.setattr(buckets, "BUCKET_BYTES", 300)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_replicas_stay_equal(crew, bucket_size, name, workers):
    team = crew(job(epochs=2), workers, compress=name)
    team.join("initial")
    team.train()
    first, *others = team.states()
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_as_well(crew, plain_loop, name):
    this = job(epochs=30)
    _, losses = plain_loop(this, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    team = crew(this, 2, compress=name)
    team.join("initial")
    assert sum(team.train()[-10:]) < sum(losses[-10:]) + 10 * 0.01


def test_one_worker_sends_nothing_and_loses_nothing(crew, plain_loop):
    expected, _ = plain_loop(job(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    team = crew(job(), 1, compress="topk")
    team.join("initial")
    team.train()
    assert max(team.distances(expected)) <= 1e-5


def test_a_sum_kept_back_does_not_outweigh_a_small_batch(crew):
    """Each batch has the same mean gradient, one has 1 sample and the other 13: so has every update."""
    inputs, target = torch.ones(14, 2), torch.ones(14, 1)
    this = job(
        model=lambda: nn.Linear(2, 1, bias=False), loss=lambda output, target: (output * target).mean(),
        optimizer=optim.SGD(lr=1.0), train=torch.utils.data.TensorDataset(inputs, target),
    )  # fmt: skip
    team = crew(this, 2, compress="topk")
    team.join("initial")
    before = team.states()[0]["param"].clone()
    team.train()
    moved = before - team.states()[0]["param"]
    steps = 2 * EPOCHS
    # One of two elements is sent each time, with all that was kept back of it: in all, what was asked for, up to two
    # steps that are still kept back.
    assert moved.sum() <= 2 * steps + 1e-4
    assert (moved >= steps - 3 - 1e-4).all()


@pytest.mark.parametrize(("name", "share"), [("bf16", 0.51), ("int8", 0.27), ("topk", 0.05), ("powersgd", 0.35)])
def test_less_is_sent(crew, name, share):
    this = job(model=lambda: nn.Sequential(nn.Linear(24, 2048), nn.Tanh(), nn.Linear(2048, 4)), epochs=1)
    plain, compressed = crew(this, 3), crew(this, 3, compress=name)
    for team in (plain, compressed):
        team.join("initial")
        team.train()
    sent = [sum(trainer.bytes_sent for trainer in team.trainers) for team in (plain, compressed)]
    assert sent[1] < share * sent[0]


class Elementwise(nn.Module):
    """A model without matrix products: the last bit of those depends on where in memory their operands lie."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.1, 0.1, 40 * 24).view(40, 24).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.weight * x[:, None, :]).sum(2)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "powersgd"])  # which multiplies matrices itself
def test_a_death_leaves_equal_replicas_that_have_counted_nothing_twice(crew, name):
    this = job(model=Elementwise)
    team = crew(this, 3, compress=name)
    team.join("initial")
    team.train(0, 6)
    before = {key: tensor.clone() for key, tensor in team.states()[0].items()}
    team.replace(2)
    batch = [tensor[13:26] for tensor in this.train.tensors]

    def lost(rank: int, trainer: Any) -> Any:
        if rank == 2:
            return None
        return trainer.step(6, Batch(batch[0][:4], batch[1][:4], 4, 4), 13, Wishes())

    assert [type(error) for error in team.each(lost)[:2]] == [PeerLost] * 2
    for state in team.states()[:2]:
        assert all(torch.equal(state[key], before[key]) for key in before)
    team.join("peer", 6, peer=0)
    team.train(6)
    # All began again with nothing kept back: so does a team that takes the state of step 6 and goes on from there.
    other = crew(this, 3, compress=name)
    other.join("initial")
    for trainer in other.trainers:
        for key, tensor in trainer._state.tensors().items():
            tensor.copy_(before[key])
        trainer._state.step = 6
    other.train(6)
    for state in team.states():
        assert all(torch.equal(state[key], other.states()[0][key]) for key in before)
