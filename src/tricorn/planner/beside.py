"""By how much computing and exchanging over connections slow each other when a process does both at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from tricorn.comm.auth import new_secret
from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener
from tricorn.planner.crew import Line, crew, gather, tell

WIDTH = 192  # of a product of matrices: some tenths of a millisecond
ELEMENTS = 1 << 16  # of a sum over the ranks
ROUNDS = 60  # of sums
RANKS = 2


def beside() -> dict[str, float]:
    """How many times as long ``computing`` and ``exchanging`` take at once as each alone; the median of the ranks."""
    secret = new_secret()
    with crew([partial(_rank, rank, secret) for rank in range(RANKS)]) as lines:
        tell(lines, gather(lines))
        found = gather(lines)
        tell(lines, "end")
        gather(lines)
    return {name: max(1.0, median(each[name] for each in found)) for name in found[0]}


def _rank(rank: int, secret: bytes, line: Line) -> None:
    torch.set_num_threads(1)
    listener = PeerListener(secret)
    line.say(listener.address)
    addresses = [(host, port) for host, port in line.hear()]
    group = Group(
        rank=rank, addresses=addresses, listener=listener, secret=secret, epoch=1, channel="beside", host=str(rank)
    )
    flat, left, right = torch.zeros(ELEMENTS), torch.ones(WIDTH, WIDTH), torch.ones(WIDTH, WIDTH)
    compute, exchange = partial(torch.mm, left, right), partial(group.all_reduce_now, flat)
    _each(exchange, ROUNDS // 4)
    group.barrier()
    exchanging = _each(exchange, ROUNDS)
    alone = _each(compute, ROUNDS)
    group.barrier()
    took: list[float] = []
    others = threading.Thread(target=lambda: took.append(_each(exchange, ROUNDS)))
    others.start()
    products: list[float] = []
    while others.is_alive():
        products.append(_each(compute, 1))
    others.join()
    line.say({"computing": sum(products) / len(products) / alone, "exchanging": took[0] / exchanging})
    line.hear()
    group.close()
    listener.close()
    line.say("ended")


def _each(work: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times
