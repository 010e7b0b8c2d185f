"""A rank that is killed, for real: every other rank hears of it at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch

from tricorn.comm import within
from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener
from tricorn.errors import PeerLost

SECRET = b"s" * 32
PROMPT = 2.0  # seconds from the kill to the last PeerLost


def small(group: Group) -> None:
    group.all_reduce_now(torch.ones(10))


def large(group: Group) -> None:
    group.all_reduce_now(torch.ones(2_000_000))


def queued(group: Group) -> None:
    for handle in [group.all_reduce(torch.ones(100_000)) for _ in range(8)]:
        handle.wait()


def ring(group: Group) -> None:
    handle = group.send(torch.ones(500_000), (group.rank + 1) % group.size)
    group.receive(torch.ones(500_000), (group.rank - 1) % group.size)
    handle.wait()


def broadcast(group: Group) -> None:
    group.broadcast(torch.ones(500_000), group.size - 1)


def role(rank: int, host: str, work: Callable[[Group], None], rounds: int | None, pipe: Connection) -> None:
    """Work until a peer is lost; after ``rounds`` rounds, stop taking part."""
    torch.set_num_threads(1)
    listener = PeerListener(SECRET)
    pipe.send(listener.address)
    group = Group(
        rank=rank, addresses=pipe.recv(), listener=listener, secret=SECRET, epoch=1, channel="test", host=host
    )
    done = 0
    try:
        while done != rounds:
            work(group)
            done += 1
            if done == 3:
                pipe.send("working")
        pipe.send("stopped")
        pipe.recv()
    except PeerLost:
        pipe.send("lost")
    group.close()
    listener.close()


def last_words_after_a_kill(hosts: str, victim: int, work: Callable[[Group], None], rounds: int | None) -> list[str]:
    """What each survivor says within PROMPT seconds of the kill of the victim, who works ``rounds`` rounds.

    ``hosts`` has a letter for the host of each rank.
    """
    size = len(hosts)
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(size)]
    processes = [
        context.Process(
            target=role, args=(rank, hosts[rank], work, rounds if rank == victim else None, pipes[rank][1]), daemon=True
        )
        for rank in range(size)
    ]
    here = [pipe for pipe, _ in pipes]
    try:
        for process in processes:
            process.start()
        addresses = [pipe.recv() for pipe in here]
        for pipe in here:
            pipe.send(addresses)
        assert [pipe.recv() for pipe in here] == ["working"] * size
        if rounds is not None:
            assert here[victim].recv() == "stopped"
        os.kill(processes[victim].pid, signal.SIGKILL)
        deadline = time.monotonic() + PROMPT
        survivors = [pipe for rank, pipe in enumerate(here) if rank != victim]
        words = [pipe.recv() if pipe.poll(max(0.0, deadline - time.monotonic())) else "silent" for pipe in survivors]
        for process in processes:
            process.join(10)
        assert [process.exitcode for process in processes] == [-9 if rank == victim else 0 for rank in range(size)]
        return words
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()
        for pipe, other in pipes:
            pipe.close()
            other.close()


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    """Once for all forks, as in a run."""
    within.warm({torch.float32})


@pytest.mark.parametrize("work", [small, large, queued, ring, broadcast])
@pytest.mark.parametrize(("hosts", "victim"), [("aaa", 1), ("aaaa", 3), ("abcd", 3), ("aabb", 0), ("aabb", 3)])
def test_killed_in_the_midst_of_it(hosts, victim, work):
    assert last_words_after_a_kill(hosts, victim, work, rounds=None) == ["lost"] * (len(hosts) - 1)


@pytest.mark.parametrize("work", [small, large, ring])
@pytest.mark.parametrize(("hosts", "victim"), [("aaa", 0), ("aaaa", 2), ("abc", 0), ("aabb", 1)])
def test_killed_while_all_others_wait_for_it(hosts, victim, work):
    assert last_words_after_a_kill(hosts, victim, work, rounds=5) == ["lost"] * (len(hosts) - 1)
