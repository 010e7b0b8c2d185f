"""Runs over several hosts: the same numbers, through a slow link, a frozen host and a cut one."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tricorn.engine.base import Timing
from tricorn.engine.hosts import on_hosts
from tricorn.plan import Plan
from tricorn.run import execute
from tricorn.testing.hosts import Host, RunningHost, hosts, hosts_unavailable

from . import harness

PLAN = Plan(strategy="dp", workers=2, threads=1)


@pytest.fixture(autouse=True)
def possible() -> None:
    if reason := hosts_unavailable():
        pytest.skip(reason)


def train(places: tuple[RunningHost, ...], name: str, runs: Path, heartbeat_timeout: float = 10.0) -> dict[str, Any]:
    timing = Timing(heartbeat_timeout=heartbeat_timeout)
    return execute(on_hosts(*places), (str(harness.JOBS), name), PLAN, timing, runs=runs, folder=None)[0]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + harness.PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_numbers_of_one_host_over_a_link_of_100_mbit(tmp_path):
    with hosts(Host(mbit=100), Host(mbit=100)) as (a, b):
        summary = train((a, b), "sgd64", tmp_path)
        crossed = b.traffic().sent
    run = harness.Run(None, tmp_path)
    assert harness.distance(run.weights("sgd64"), harness.plain("sgd64")) <= 1e-10
    assert summary["exactly_once"]
    # Both workers send as much. What the second sends beside its half are headers, acknowledgements and heartbeats.
    half = summary["bytes_sent"] / 2
    assert half < crossed < 1.5 * half + 100_000


def test_a_run_goes_on_without_a_host_that_freezes_and_one_that_is_cut_off(tmp_path):
    run = harness.Run(None, tmp_path)
    with hosts(Host(), Host(), Host()) as (a, b, c), ThreadPoolExecutor(1) as pool:
        running = pool.submit(train, (a, b, c), "long", tmp_path, heartbeat_timeout=0.5)

        def trained_with(host: RunningHost, steps: int) -> None:
            until(lambda: run.pids().get("worker-1") in host.pids() and (running.done() or run.steps() >= steps))
            assert not running.done(), running.result()

        trained_with(b, 10)
        b.freeze()
        trained_with(c, run.steps() + 10)
        c.cut()
        summary = running.result(harness.PATIENCE)
    assert summary["exactly_once"]
    assert summary["restarts"] == 2
    assert harness.distance(run.weights("long"), harness.plain("long")) <= 1e-10
