from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tricorn.job import Job

from .cluster import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    with contextlib.ExitStack() as stack:

        def build(job: Job, *, workers: int = 2, servers: int = 1, **plan: Any) -> Cluster:
            built = Cluster(job, workers=workers, servers=servers, folder=tmp_path, **plan)
            stack.callback(built.close)
            return built

        yield build
