from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tricorn import optim
from tricorn.errors import Diverged
from tricorn.ps.wire import Header, Op, as_bytes

from .cluster import Cluster, batches, distance, make_job, plain, step_of

Build = Callable[..., Cluster]
pytestmark = pytest.mark.usefixtures("transport")


@pytest.mark.parametrize("consistency", ["ssp", "asp"])
@pytest.mark.parametrize("servers", [1, 2])
def test_one_worker_is_one_process(cluster: Build, consistency: str, servers: int) -> None:
    job = make_job(optimizer=optim.Adam(lr=1e-2), clip_norm=0.3, schedule=lambda step: 1 / (1 + step))
    run = cluster(job, workers=1, servers=servers, consistency=consistency)
    run.join("initial")
    run.train(0, 20)
    run.trainers[0].refresh()
    assert distance(run.weights(), plain(job, 20, torch.optim.Adam)) <= 1e-10
    assert [server.staleness() for server in run.servers] == [{0: 20}] * servers
    run.regroup()
    assert run.applied == [list(range(20))] * servers


def test_steps_of_several_workers_are_applied_once_each(cluster: Build) -> None:
    """Gradients of a constant slope add up to the same weights in any order, so a lost or doubled one would show."""
    job = make_job(loss=lambda output, target: output.sum() / len(output), model=lambda: torch.nn.Linear(6, 3),
                   optimizer=optim.SGD(lr=0.1))  # fmt: skip
    run = cluster(job, workers=3, servers=2, consistency="asp")
    run.join("initial")
    todo = batches(job)

    def work(trainer: Any, steps: list[int]) -> None:
        for step in steps:
            step_of(trainer, step, *todo[step])

    run.each(work, [[0, 1, 2, 3, 9, 10], [3, 4, 5, 6, 0, 1], [6, 7, 8, 9, 2, 10]])  # seven of them twice
    run.trainers[0].refresh()
    assert distance(run.weights(), plain(job, 11, torch.optim.SGD)) <= 1e-10
    assert run.regroup() == [[0], [0]]
    assert [sorted(steps) for steps in run.applied] == [list(range(11))] * 2
    assert [sum(server.staleness().values()) for server in run.servers] == [11, 11]


def test_staleness_is_versions_between_pull_and_push(cluster: Build) -> None:
    job = make_job()
    run = cluster(job, workers=2, consistency="asp")
    run.join("initial")
    slow, fast = run.trainers
    slow._pull()
    for step in range(3):
        step_of(fast, step, *batches(job)[step])
    slow._client.push(3, slow._versions, slow._grads_N, factor=1.0)
    assert run.servers[0].staleness() == {0: 3, 3: 1}


def test_a_peek_waits_for_nobody(cluster: Build) -> None:
    job = make_job()
    run = cluster(job, workers=2, consistency="ssp", staleness=0)
    run.join("initial")
    fast, slow = run.trainers
    slow._pull()
    step_of(fast, 0, *batches(job)[0])
    fast.refresh()
    assert fast._versions == [1]


def test_keeping_and_going_back(cluster: Build) -> None:
    job = make_job(optimizer=optim.Adam(lr=1e-2))
    run = cluster(job, workers=1, servers=2, consistency="asp")
    run.join("initial", generation=5)
    run.train(0, 4)
    assert run.regroup() == [[5], [5]]
    assert run.applied == [[0, 1, 2, 3]] * 2
    run.join("keep", 4, generation=5)
    run.train(2, 6)  # steps 2 and 3 are lent again
    for server in run.servers:
        server.snapshot(6)
    run.train(6, 8)
    run.replace_server(0)
    assert run.regroup() == [[], [5]]
    run.join("checkpoint", 6, generation=9, applied=[(0, 6)])
    run.train(5, 10)
    run.trainers[0].refresh()
    assert distance(run.weights(), plain(job, 10, torch.optim.Adam)) <= 1e-10
    assert run.regroup() == [[9], [9]]


def test_a_loss_that_is_not_a_number_is_not_pushed(cluster: Build) -> None:
    run = cluster(make_job(loss=lambda output, target: output.sum() / 0.0), workers=1, consistency="asp")
    run.join("initial")
    with pytest.raises(Diverged, match="step 0 is "):
        run.train(0, 1)
    run.regroup()
    assert run.applied == [[]]


def test_large_payloads_both_ways_at_once(cluster: Build) -> None:
    """The server reads on while its reply is stuck, so a worker may send without having read."""
    job = make_job(model=lambda: torch.nn.Linear(6, 400_000, bias=False), optimizer=optim.SGD(lr=1.0),
                   precision="float32")  # fmt: skip
    run = cluster(job, workers=1, consistency="asp")
    run.join("initial")
    (trainer,) = run.trainers
    (transport,) = trainer._client._wire.servers
    gradient = as_bytes(trainer._grads_N)
    transport.send(Header(Op.PULL))
    transport.send(Header(Op.PUSH, step=0, numbers=(1.0,)), [gradient])
    assert transport.receive(Op.WEIGHTS).length == len(gradient)
    transport.receive_into(as_bytes(trainer._weights_N))
    assert transport.receive(Op.PUSHED).version == 1


def test_unsent_weights_are_of_one_version(cluster: Build) -> None:
    """A reply that is on its way while others push is not torn between versions."""
    job = make_job(model=lambda: torch.nn.Linear(6, 400_000, bias=False), optimizer=optim.SGD(lr=1.0),
                   precision="float32")  # fmt: skip
    run = cluster(job, workers=2, consistency="asp")
    run.join("initial")
    reader, writer = run.trainers
    before = run.weights()
    (transport,) = reader._client._wire.servers
    transport.send(Header(Op.PULL))
    transport.receive(Op.WEIGHTS)  # of 9.6 MB, more than a socket holds, and not read yet
    writer._grads_N.fill_(1.0)
    for step in range(3):
        writer._client.push(step, [0], writer._grads_N, factor=1.0)
    after = torch.empty_like(before)
    transport.receive_into(as_bytes(after))
    assert torch.equal(after, before)
