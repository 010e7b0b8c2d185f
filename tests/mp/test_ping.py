"""Links between stages, as a worker finds them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener
from tricorn.mp.cut import SHARED
from tricorn.mp.ping import slowest_link, slowness_of_each

SECRET = b"s" * 32


def links(hosts: list[str], find=lambda group: slowest_link(group, group)) -> list:
    """What each of the workers finds, who say to be on these hosts."""
    listeners = [PeerListener(SECRET) for _ in hosts]
    for listener in listeners:
        listener.announce(1)
    addresses = [listener.address for listener in listeners]

    def worker(rank: int):
        group = Group(
            rank=rank, addresses=addresses, listener=listeners[rank], secret=SECRET, epoch=1, channel="line",
            host=hosts[rank],
        )  # fmt: skip
        try:
            return find(group)
        finally:
            group.barrier()
            group.close()

    try:
        with ThreadPoolExecutor(len(hosts)) as pool:
            return list(pool.map(worker, range(len(hosts))))
    finally:
        for listener in listeners:
            listener.close()


def test_within_a_host_a_link_costs_copies():
    assert links(["one"] * 3) == [SHARED] * 3


def test_between_hosts_all_know_what_the_slowest_takes():
    first, *others = links(["one", "one", "two"])
    assert others == [first] * 2
    assert first.copy == SHARED.copy
    assert first.latency > 0


def test_all_know_the_same_of_how_fast_each_is(monkeypatch):
    monkeypatch.setattr("tricorn.mp.ping.TRIED", 0.02)
    first, second = links(["one", "two"], lambda group: slowness_of_each(group, torch.device("cpu")))
    assert first == second
    assert min(first) == 1.0
    assert len(first) == 2


def test_a_single_stage_has_no_links():
    assert links(["one"]) == [SHARED]
