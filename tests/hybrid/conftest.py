from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tricorn.job import Job
from tricorn.plan import Plan

from .crew import Crew

torch.set_num_threads(1)


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Callable[..., Crew]]:
    """Builds the roles of a run; each run has a folder of its own."""
    with contextlib.ExitStack() as stack:
        made = 0

        def build(job: Job, **plan: Any) -> Crew:
            nonlocal made
            made += 1
            built = Crew(job, Plan(**plan), tmp_path / f"run{made}")
            stack.callback(built.close)
            return built

        yield build
