from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tricorn.comm.sockets import Address
from tricorn.job import Job
from tricorn.ps.dial import dial
from tricorn.ps.server import Server
from tricorn.ps.transport import Transport

from .cluster import SECRET, Cluster
from .hub import Build, Hub


@pytest.fixture(params=["shared", "tcp"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How workers reach the servers of a cluster; without it they choose shared memory."""
    kind: str = request.param
    if kind == "tcp":
        monkeypatch.setattr("tricorn.ps.client.dial", _by_tcp)
    return kind


def _by_tcp(address: Address, secret: bytes, claim: dict[str, Any], **_: Any) -> Transport:
    return dial(address, secret, claim, share=False)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    with contextlib.ExitStack() as stack:

        def build(job: Job, *, workers: int = 2, servers: int = 1, **plan: Any) -> Cluster:
            built = Cluster(job, workers=workers, servers=servers, folder=tmp_path, **plan)
            stack.callback(built.close)
            return built

        yield build


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Build]:
    with contextlib.ExitStack() as stack:

        def build(*specs: Any, **options: Any) -> Hub:
            built = Hub(tmp_path, *specs, **options)
            stack.callback(built.close)
            return built

        yield build


@pytest.fixture
def server() -> Iterator[Server]:
    """One that serves in a thread, for three workers."""
    made = Server(SECRET, on_snapshot=lambda step, pieces: None, on_applied=lambda steps: None)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    made.begin(epoch=0, step=0, source="initial", checkpoint=None, workers=3)
    yield made
    made.stop()
    thread.join()
