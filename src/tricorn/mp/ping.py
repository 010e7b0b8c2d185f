"""How fast values travel between the stages, and how fast workers are, tried before the model is cut for them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from tricorn.mp.cut import SHARED, Link

if TYPE_CHECKING:
    from tricorn.comm.group import Group

SMALL, LARGE = 8, 1 << 18  # bytes; the large one is more than links let pass in a burst
ROUNDS = 3
TRIED = 0.3  # seconds: three periods, in each of which Linux grants a limited host its part of a core
WIDTH = 256
ALIKE = 1.25  # times as long as the fastest: moments of one machine differ by as much


def slowest_link(line: Group, everyone: Group) -> Link:
    """The slowest of all links between neighbouring stages, the same for all workers, who all call it.

    ``line`` is this worker's. Within a host nothing is timed. Raises PeerLost.
    """
    found = torch.zeros(everyone.size, 2, dtype=torch.float64)
    if line.rank > 0:
        _answer(line)
    if line.rank < line.size - 1:
        found[everyone.rank] = torch.tensor(_ask(line))
    everyone.all_reduce_now(found)
    latency, wire = found.max(0).values.tolist()
    return Link(SHARED.copy, wire, latency) if wire or latency else SHARED


def slowness_of_each(everyone: Group, device: torch.device) -> list[float]:
    """How many times as long as the fastest each worker takes for products of matrices; all call it, and compute at
    the same time, as they will in a step. Who takes hardly longer than the fastest is like it. Raises PeerLost.
    """
    factor = torch.ones(WIDTH, WIDTH, device=device)
    found = torch.zeros(everyone.size)
    everyone.barrier()
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < TRIED:
        (factor @ factor).sum().item()  # a device is waited for
        count += 1
    found[everyone.rank] = spent / count
    everyone.all_reduce_now(found)
    return [each if each > ALIKE else 1.0 for each in (found / found.min()).tolist()]


def _ask(line: Group) -> tuple[float, float]:
    """Seconds to the next stage, those of each byte apart; nothing where it is on the same host."""
    before = line.bytes_between
    _there_and_back(line, SMALL)
    if line.bytes_between == before:
        return 0.0, 0.0
    # The mean: a link that lets the first bytes pass at once is as slow as it is in the long run.
    small, large = (sum(_there_and_back(line, size) for _ in range(ROUNDS)) / ROUNDS for size in (SMALL, LARGE))
    return small / 2, max(0.0, large - small) / 2 / (LARGE - SMALL)


def _there_and_back(line: Group, size: int) -> float:
    message, began = torch.zeros(size, dtype=torch.uint8), time.perf_counter()
    sent = line.send(message, line.rank + 1)
    sent.wait()
    line.receive(message, line.rank + 1)
    return time.perf_counter() - began


def _answer(line: Group) -> None:
    """The other side of ``_ask``."""
    before = line.bytes_between
    _echo(line, SMALL)
    if line.bytes_between > before:
        for size in (SMALL, LARGE):
            for _ in range(ROUNDS):
                _echo(line, size)


def _echo(line: Group, size: int) -> None:
    message = torch.empty(size, dtype=torch.uint8)
    line.receive(message, line.rank - 1)
    line.send(message, line.rank - 1).wait()
