"""Slices of batches, loaded ahead or not: the same samples, in the same order of calls."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from tricorn import data, optim
from tricorn.errors import DataError
from tricorn.job import Job
from tricorn.worker import batches as module
from tricorn.worker.batches import Batches

SAMPLES, BATCH = 64, 8


class Slow(torch.utils.data.Dataset):
    """Notes who asks for what; samples that are ``late`` wait for ``hold``."""

    def __init__(self, broken: int = -1, random: bool = False) -> None:
        self.calls: list[tuple[int, bool]] = []
        self.broken, self.random = broken, random
        self.late: list[int] = []
        self.hold = threading.Event()
        self.inside = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        here = threading.current_thread() is threading.main_thread()
        assert index not in self.late or self.hold.wait(10)
        self.inside += 1
        assert self.inside == 1
        self.calls.append((index, here))
        self.inside -= 1
        if index == self.broken:
            raise ValueError("unreadable")
        return torch.full((2,), float(index)) + (torch.rand(1).item() if self.random else 0), index


def job(train: Any, **fields: Any) -> Job:
    return Job(
        model=lambda: nn.Linear(2, 2), loss=nn.functional.cross_entropy, optimizer=optim.SGD(lr=0.1), train=train,
        batch_size=BATCH, epochs=2, **fields,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def all_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOW", 0.0)


def read(batches: Batches, steps: range, low: int = 2, high: int = 6) -> list[list[int]]:
    return [batches.training(step, low, high).target.tolist() for step in steps]


def test_the_same_samples_as_without_and_most_of_them_by_a_thread():
    slow = Slow()
    found = read(Batches(job(slow)), range(16))
    ahead = [index for index, here in slow.calls if not here]
    assert len(ahead) == 4 * (16 - module.JUDGED)
    assert [len(set(part)) for part in found] == [4] * 16
    asked = [index for index, _ in slow.calls]
    assert asked[-64:] == [index for part in found for index in part]


def test_the_order_of_calls_is_that_of_the_slices():
    slow, direct = Slow(), Slow()
    found = read(Batches(job(slow)), range(16))
    assert [read(Batches(job(direct)), range(step, step + 1))[0] for step in range(16)] == found
    # Each of those looks at the first sample once, to know its form.
    assert [index for index, _ in slow.calls[1:]] == [
        index for step in range(16) for index, _ in direct.calls[5 * step : 5 * step + 5][1:]
    ]


def test_another_slice_than_the_next_is_loaded_directly():
    slow = Slow()
    batches = Batches(job(slow))
    read(batches, range(5))
    expected = Batches(job(Slow()))
    assert read(batches, range(9, 10), 0, 3) == read(expected, range(9, 10), 0, 3)
    assert read(batches, range(5, 6)) == read(expected, range(5, 6))


def test_a_slice_is_loaded_while_the_one_before_is_in_use():
    slow = Slow()
    (slow.late,) = read(Batches(job(Slow())), range(4, 5))
    batches = Batches(job(slow))
    read(batches, range(4))  # ends although the thread that loads the next one is held up
    slow.hold.set()
    assert batches.training(4, 2, 6).target.tolist() == slow.late
    assert [here for index, here in slow.calls if index in slow.late] == [False] * 4


def test_an_error_comes_out_where_the_slice_is_asked_for():
    order = [index for part in read(Batches(job(Slow())), range(8)) for index in part]
    batches = Batches(job(Slow(broken=order[4 * 5])))
    read(batches, range(5))
    with pytest.raises(DataError, match=f"sample {order[20]} cannot be read"):
        batches.training(5, 2, 6)
    assert len(read(batches, range(6, 8))) == 2


def test_data_that_draw_random_numbers_are_loaded_where_they_are_asked_for():
    slow = Slow(random=True)
    read(Batches(job(slow)), range(8))
    assert all(here for _, here in slow.calls)


def test_data_that_are_there_at_once_are_not_loaded_ahead(monkeypatch):
    monkeypatch.setattr(module, "SLOW", 1.0)
    batches = Batches(job(data.arrays(torch.zeros(SAMPLES, 2), torch.arange(SAMPLES))))
    read(batches, range(8))
    assert batches._loading is None


def test_evaluation_does_not_meet_a_load_in_progress():
    slow = Slow()
    batches = Batches(job(slow, evaluate=slow))
    read(batches, range(5))
    for low in range(0, SAMPLES, 16):
        assert batches.evaluation(low, low + 16).target.tolist() == [*range(low, low + 16)]
    assert read(batches, range(5, 6)) == read(Batches(job(Slow())), range(5, 6))
