"""Rank processes that live as long as a test module and run the functions of that module that they are told."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tricorn.comm
from tricorn.comm.within import warm

PATIENCE = 60.0


class Ranks:
    """Processes 0 to ``size`` - 1, forked from the test so that they know its functions."""

    def __init__(self, size: int, prepare: Callable[[int, int, Path], Any], folder: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, prepare, rank, size, folder), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *arguments: Any, only: list[int] | None = None) -> None:
        for rank, pipe in enumerate(self.pipes):
            if only is None or rank in only:
                pipe.send((function, arguments))

    def answer(self, rank: int) -> Any:
        """What the function returned in that rank; AssertionError with its traceback if it failed."""
        assert self.pipes[rank].poll(PATIENCE), f"rank {rank} does not answer"
        answer, failure = self.pipes[rank].recv()
        assert not failure, f"rank {rank}: {failure}"
        return answer

    def each(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What it returned in each rank. The first failure counts: the others may well wait for that rank."""
        self.start(function, *arguments)
        answers: dict[int, Any] = {}
        while len(answers) < len(self.pipes):
            missing = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}
            ready = wait([*missing], PATIENCE)
            assert ready, f"ranks {[*missing.values()]} do not answer"
            for pipe in ready:
                answers[missing[pipe]] = self.answer(missing[pipe])
        return [answers[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            with contextlib.suppress(BrokenPipeError):
                pipe.send(None)
            process.join(5)
            process.kill()
            process.join()
            process.close()
            pipe.close()


def _serve(pipe: Connection, prepare: Callable[[int, int, Path], Any], rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    context = prepare(rank, size, folder)
    while True:
        if (order := pipe.recv()) is None:
            os._exit(0)
        function, arguments = order
        try:
            pipe.send((function(context, *arguments), ""))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


def backend(rank: int, size: int, folder: Path) -> None:
    """Every rank in one process group over ``tricorn``."""
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("tricorn", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))


assert tricorn.comm  # imported for the backend


def _ranks(size: int, prepare: Callable[[int, int, Path], Any], folder: Path) -> Iterator[Ranks]:
    ranks = Ranks(size, prepare, folder)
    try:
        yield ranks
    finally:
        ranks.close()


@pytest.fixture(scope="session", autouse=True)
def warmed() -> None:
    """Ranks that are forked have the compiled code already."""
    warm((torch.float32, torch.int64))


@pytest.fixture(scope="session")
def start_ranks() -> Callable[..., Iterator[Ranks]]:
    return _ranks


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    yield from _ranks(4, backend, tmp_path_factory.mktemp("four"))
