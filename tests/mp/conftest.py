from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tricorn.job import Job

from .crew import Crew


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def crew() -> Iterator[Callable[..., Crew]]:
    """Builds the stages of a run; no thread of theirs may be left afterwards."""
    before = set(threading.enumerate())
    made: list[Crew] = []

    def make(job: Job, workers: int, cuts: tuple[int, ...] | None = None, **options: Any) -> Crew:
        made.append(Crew(job, workers, cuts, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert set(threading.enumerate()) <= before
