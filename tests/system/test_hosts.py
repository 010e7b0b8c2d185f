"""Runs over several hosts: the same numbers, through a slow link, a frozen host and a cut one."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from planner.world import links

import tricorn
from tricorn.engine.base import Timing
from tricorn.engine.hosts import on_hosts
from tricorn.plan import Plan
from tricorn.planner import store
from tricorn.planner.explain import named
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


def test_roles_live_on_the_hosts_that_the_plan_names(tmp_path):
    plan = Plan(strategy="ps", workers=1, servers=1, threads=1, hosts=(1, 2))
    with hosts(Host(), Host(), Host()) as (a, b, c), ThreadPoolExecutor(1) as pool:
        job = (str(harness.JOBS), "long")
        running = pool.submit(execute, on_hosts(a, b, c), job, plan, Timing(), runs=tmp_path, folder=None)
        run = harness.Run(None, tmp_path)
        for role, host in (("coordinator", a), ("worker-0", b), ("server-0", c)):
            until(lambda role=role, host=host: running.done() or run.pids().get(role) in host.pids())
            assert not running.done(), running.result()
        assert running.result(harness.PATIENCE)[0]["exactly_once"]


def test_hosts_are_measured_and_plans_tried_on_them_before_one_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("TRICORN_CACHE", str(tmp_path / "cache"))
    store.save_links(links())  # as if this machine had been measured
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    job = tricorn.Job(
        model=lambda: torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)),
        loss=torch.nn.functional.mse_loss, optimizer=tricorn.optim.SGD(lr=0.01),
        train=tricorn.data.arrays(x, x.sum(1, keepdim=True)), batch_size=32, epochs=4,
    )  # fmt: skip
    with hosts(Host(mbit=50, cores=1), Host(mbit=50, cores=0.5)) as places:
        found = tricorn.plan(job, engine=on_hosts(*places), strategy="dp", workers=2)
        fast, slow = found.ground.cluster.hosts
        assert (fast.cores, slow.cores) == (1.0, 0.5)
        assert all(
            host.mbit is None or host.mbit < 60 for host in (fast, slow)
        )  # None: processors are as slow as links
        assert found.best in found.planning.tried
        said = f"Tried for some steps where they would run: {named(found.planning.tried[0])}"
        assert any(reason.startswith(said) for reason in found.reasons)
        result = tricorn.train(job, engine=on_hosts(*places), workers=2, runs=tmp_path)
        assert result.summary["exactly_once"]
        assert result.summary["predicted"]["step"] > 0
