"""Whatever dies, and at whatever point of a step, the run goes on to the same weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tricorn import optim
from tricorn.errors import ClusterError, PeerLost, ProtocolError
from tricorn.ps.wire import Header, Op, receive_header, send

from .cluster import Cluster, batches, distance, make_job, plain, share_of, step_of

Build = Callable[..., Cluster]
FIRST, LAST = 3, 7

# One step, as two workers and two servers may see it: (what, worker, server).
IN_TURN = [("push", 0, 0), ("push", 0, 1), ("push", 1, 0), ("push", 1, 1), ("pull", 0, 0), ("pull", 0, 1),
           ("pull", 1, 0), ("pull", 1, 1)]  # fmt: skip
CROSSED = [("push", 1, 1), ("push", 0, 1), ("push", 0, 0), ("push", 1, 0), ("pull", 1, 1), ("pull", 0, 1),
           ("pull", 0, 0), ("pull", 1, 0)]  # fmt: skip


def play(run: Cluster, events: list[tuple[str, int, int]]) -> None:
    """Let exactly these requests of step FIRST reach their servers."""
    inputs, target = batches(run.job)[FIRST]
    statuses = []
    for trainer in run.trainers:
        start, stop = trainer.share(len(target))
        statuses.append((trainer._gradient(share_of(inputs, target, start, stop)), stop - start, stop - start, 0, 0))
    pushed: dict[int, list[int]] = {0: [], 1: []}
    norms: dict[int, float] = {}
    for what, worker, server in events:
        trainer = run.trainers[worker]
        client = trainer._client
        sock, part = client._sockets[server], client._part(trainer._grads_N, server)
        if what == "push":
            send(sock, Header(Op.PUSH, step=FIRST, numbers=statuses[worker]), part)
            pushed[server].append(worker)
            if len(pushed[server]) < 2:  # no reply yet: the reply to a later request shows that it has arrived
                send(sock, Header(Op.STATUS, step=FIRST - 1))
                receive_header(sock, Op.ACK)
            else:
                for each in run.trainers:
                    norms[server] = receive_header(each._client._sockets[server], Op.ACK).numbers[5]
        else:
            numbers = (trainer._scale(norms[0] + norms[1]), trainer._lr(FIRST))
            send(sock, Header(Op.PULL, version=FIRST + 1, numbers=numbers))
            assert receive_header(sock, Op.WEIGHTS).version == FIRST + 1
            sock.recv(len(part))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("order", [IN_TURN, CROSSED], ids=["in-turn", "crossed"])
@pytest.mark.parametrize("point", range(len(IN_TURN) + 1))
def test_a_worker_dies_at_any_point_of_a_step(
    cluster: Build, order: list[tuple[str, int, int]], point: int, victim: int
) -> None:
    job = make_job(optimizer=optim.Adam(lr=1e-2), clip_norm=0.3, schedule=lambda step: 1 / (1 + step))
    run = cluster(job, workers=2, servers=2)
    run.join("initial")
    run.train(0, FIRST)
    play(run, order[:point])
    held = run.regroup()
    common = max(set.intersection(*map(set, held)))
    assert common == (FIRST + 1 if point >= 4 else FIRST)
    run.replace_worker(victim)
    run.join("keep", common)
    run.train(common, LAST)
    assert distance(run.weights(), plain(job, LAST, torch.optim.Adam)) <= 1e-10


def test_a_pending_step_may_be_dropped_after_all(cluster: Build) -> None:
    job = make_job()
    run = cluster(job, workers=2, servers=2)
    run.join("initial")
    run.train(0, FIRST)
    play(run, IN_TURN[:4])
    assert run.regroup() == [[FIRST, FIRST + 1]] * 2
    run.join("keep", FIRST)
    run.train(FIRST, LAST)
    assert distance(run.weights(), plain(job, LAST, torch.optim.SGD, momentum=0.9)) <= 1e-10


def test_a_death_twice_before_the_pending_step_is_applied(cluster: Build) -> None:
    job = make_job()
    run = cluster(job, workers=2, servers=2)
    run.join("initial")
    run.train(0, FIRST)
    play(run, CROSSED[:5])
    run.regroup()
    run.begin("keep", FIRST + 1)
    assert run.regroup() == [[FIRST, FIRST + 1], [FIRST + 1]]
    run.join("keep", FIRST + 1)
    run.train(FIRST + 1, LAST)
    assert distance(run.weights(), plain(job, LAST, torch.optim.SGD, momentum=0.9)) <= 1e-10


@pytest.mark.parametrize("saved", [0, FIRST], ids=["no-checkpoint", "checkpoint"])
def test_a_server_dies(cluster: Build, saved: int) -> None:
    job = make_job(optimizer=optim.Adam(lr=1e-2))
    run = cluster(job, workers=2, servers=2)
    run.join("initial")
    run.train(0, FIRST)
    run.trainers[0].pieces()
    run.train(FIRST, FIRST + 2)
    run.replace_server(1)
    assert run.regroup() == [[FIRST + 2], []]
    run.join("checkpoint" if saved else "initial", saved)
    run.train(saved, LAST)
    assert distance(run.weights(1), plain(job, LAST, torch.optim.Adam)) <= 1e-10


def test_who_waits_for_a_dead_worker_is_told(cluster: Build) -> None:
    job = make_job()
    run = cluster(job, workers=2)
    run.join("initial")
    waiting = run.pool.submit(step_of, run.trainers[0], 0, *batches(job)[0])
    assert run.regroup() == [[0]]
    with pytest.raises(PeerLost):
        waiting.result(10)


def test_interrupt_frees_who_is_blocked(cluster: Build) -> None:
    job = make_job()
    run = cluster(job, workers=2)
    run.join("initial")
    waiting = run.pool.submit(step_of, run.trainers[0], 0, *batches(job)[0])
    run.trainers[0].interrupt()
    with pytest.raises(PeerLost):
        waiting.result(10)


def test_a_worker_may_hear_of_its_epoch_before_the_server(cluster: Build) -> None:
    job = make_job()
    run = cluster(job, workers=2)
    seat = run.begin("initial")
    early = seat.__class__(**{name: getattr(seat, name) for name in seat.__dataclass_fields__} | {"epoch": 2})
    run.regroup()
    joining = [run.pool.submit(trainer.join, early) for trainer in run.trainers]
    run.begin("initial")
    for join in joining:
        join.result(10)
    run.train(0, 2)


def test_nothing_and_another_step_cannot_be_kept(cluster: Build) -> None:
    run = cluster(make_job(), workers=1)
    assert run.regroup() == [[]]
    with pytest.raises(ClusterError, match="nothing"):
        run.begin("keep", 0)
    run.join("initial")
    with pytest.raises(ProtocolError, match=r"holds the steps \[0\], not 4"):
        run.begin("keep", 4)


def test_other_tables_are_refused(cluster: Build) -> None:
    run = cluster(make_job(), workers=1)
    run.join("initial")
    other = cluster(make_job(model=lambda: torch.nn.Linear(6, 3)), workers=1)
    seat = run.begin("keep", 0)
    with pytest.raises(ProtocolError, match="not those that this server holds"):
        other.trainers[0].join(seat)


def normed() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))


def test_statistics_of_an_abandoned_step_do_not_count(cluster: Build) -> None:
    job = make_job(model=normed)
    disturbed, calm = cluster(job, workers=1), cluster(job, workers=1)
    for run in (disturbed, calm):
        run.join("initial")
        run.train(0, FIRST)
    (trainer,) = disturbed.trainers
    trainer.interrupt()
    with pytest.raises(PeerLost):
        step_of(trainer, FIRST, *batches(job)[FIRST])
    assert disturbed.regroup() == [[trainer.held()]] == [[FIRST]]
    disturbed.join("keep", FIRST)
    for run in (disturbed, calm):
        run.train(FIRST, LAST)
    for got, expected in zip(*(run.trainers[0]._flat.module.buffers() for run in (disturbed, calm)), strict=True):
        assert torch.equal(got, expected)
