"""Whatever dies, and at whatever point of a step, the run goes on to the same weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tricorn import optim
from tricorn.control import messages as m
from tricorn.control.resume import LOST, Source, resume_point
from tricorn.errors import ClusterError, PeerLost, ProtocolError, UsageError
from tricorn.ps.trainer import BspTrainer
from tricorn.ps.wire import Header, Op
from tricorn.state.gradient import clip_factor
from tricorn.state.shards import write_shard

from .cluster import Cluster, batches, distance, make_job, net, plain, share_of, step_of

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
        trainer._pull()
        batch = share_of(inputs, target, *trainer.share(len(target)))
        loss_sum, _ = trainer._gradient(batch, trainer._lookups.ahead(batch.inputs))
        statuses.append((loss_sum, batch.count, batch.samples, 0, 0))
    pushed: dict[int, list[int]] = {0: [], 1: []}
    norms: dict[int, float] = {}
    for what, worker, server in events:
        trainer = run.trainers[worker]
        client = trainer._client
        transport, part = client._wire.servers[server], client._wire.part(trainer._grads_N, server)
        if what == "push":
            transport.send(Header(Op.PUSH, step=FIRST, numbers=statuses[worker]), [part])
            pushed[server].append(worker)
            if len(pushed[server]) < 2:  # no reply yet: the reply to a later request shows that it has arrived
                transport.send(Header(Op.STATUS, step=FIRST - 1))
                transport.receive(Op.ACK)
            else:
                for each in run.trainers:
                    norms[server] = each._client._wire.servers[server].receive(Op.ACK).numbers[5]
        else:
            numbers = (clip_factor(run.job, norms[0] + norms[1]), run.job.schedule(FIRST) if run.job.schedule else 1.0)
            transport.send(Header(Op.PULL, version=FIRST + 1, numbers=numbers))
            assert transport.receive(Op.WEIGHTS).version == FIRST + 1
            transport.receive_into(memoryview(bytearray(len(part))))


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
    assert run.regroup() == [[FIRST + 1, FIRST + 2], []]  # complete, and not pulled yet
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
    trainer._pull()  # so that what fails is the push, after the forward
    trainer.interrupt()
    with pytest.raises(PeerLost):
        step_of(trainer, FIRST, *batches(job)[FIRST])
    assert disturbed.regroup() == [[trainer.held()]] == [[FIRST]]
    disturbed.join("keep", FIRST)
    for run in (disturbed, calm):
        run.train(FIRST, LAST)
    for got, expected in zip(*(run.trainers[0]._flat.module.buffers() for run in (disturbed, calm)), strict=True):
        assert torch.equal(got, expected)


class Counting(torch.nn.Module):
    """Counts its forward passes in training, in a buffer that is saved and in one that a state dict does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("also", torch.zeros(2), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
            self.also += 1
        return self.net(inputs)


def counted(trainer: BspTrainer) -> list[float]:
    return [float(buffer.sum()) for buffer in trainer._flat.module.buffers()]


def resume(run: Cluster) -> Source:
    """What the coordinator decides from what the roles say they hold."""
    said = {f"server-{i}": (f"server{i}", held) for i, held in enumerate(run.regroup())}
    for rank, trainer in enumerate(run.trainers):
        held = trainer.held()
        said[f"worker-{rank}"] = (trainer.part, [] if held is None else [held])
    return resume_point(
        {role: m.Ready(epoch=1, part=part, held=held, address=("", 1)) for role, (part, held) in said.items()}
    )


@pytest.mark.parametrize("saved", [0, FIRST], ids=["no-checkpoint", "checkpoint"])
@pytest.mark.parametrize("model", [Counting, net], ids=["buffers", "no-buffers"])
def test_the_first_worker_dies_and_with_it_the_buffers(
    cluster: Build, model: type[torch.nn.Module], saved: int
) -> None:
    job = make_job(model=model)
    run = cluster(job, workers=2, servers=2)
    assert [trainer.held() for trainer in run.trainers] == [None, None]
    run.join("initial")
    run.train(0, FIRST)
    write_shard(run.folder / str(FIRST), "worker-0.safetensors", run.trainers[0].pieces())
    run.train(FIRST, FIRST + 2)
    run.replace_worker(0)
    if model is net:
        assert [trainer.part for trainer in run.trainers] == [None, None]
        assert resume(run) == Source("keep", FIRST + 2, {})
        return
    assert [trainer.part for trainer in run.trainers] == ["buffers", None]
    assert [trainer.held() for trainer in run.trainers] == [None, None]
    assert resume(run) is LOST
    run.join("checkpoint" if saved else "initial", saved)
    run.train(saved, LAST)
    assert [counted(trainer) for trainer in run.trainers] == [[LAST, 2 * LAST]] * 2
    assert resume(run) == Source("keep", LAST, {})
    run.join("keep", LAST)
    assert distance(run.weights(), plain(job, LAST, torch.optim.SGD, momentum=0.9)) <= 1e-10


def test_another_worker_dies_before_a_step_is_decided_and_the_buffers_stay(cluster: Build) -> None:
    job = make_job(model=Counting)
    run = cluster(job, workers=2, servers=2)
    run.join("initial")
    run.train(0, FIRST)
    waiting = run.pool.submit(step_of, run.trainers[0], FIRST, *batches(job)[FIRST])
    run.replace_worker(1)
    while counted(run.trainers[0])[0] == FIRST:  # until its forward has run
        assert not waiting.done()
    assert resume(run) == Source("keep", FIRST, {})
    with pytest.raises(PeerLost):
        waiting.result(10)
    run.join("keep", FIRST)
    assert counted(run.trainers[0]) == [FIRST, 2 * FIRST]
    run.train(FIRST, LAST)
    assert counted(run.trainers[0]) == [LAST, 2 * LAST]
    assert distance(run.weights(), plain(job, LAST, torch.optim.SGD, momentum=0.9)) <= 1e-10


@pytest.mark.parametrize("pulled", [set(), {0}, {1}], ids=["nobody", "first", "other"])
def test_a_decided_step_is_kept_with_its_buffers_whoever_has_pulled_it(cluster: Build, pulled: set[int]) -> None:
    job = make_job(model=Counting)
    run = cluster(job, workers=2, servers=2)
    run.join("initial")
    run.train(0, FIRST + 1)
    for rank in pulled:
        run.trainers[rank]._pull()
    assert resume(run) == Source("keep", FIRST + 1, {})
    for trainer in run.trainers:
        with pytest.raises(PeerLost):
            step_of(trainer, FIRST + 1, *batches(job)[FIRST + 1])
    run.join("keep", FIRST + 1)
    run.train(FIRST + 1, LAST)
    assert counted(run.trainers[0]) == [LAST, 2 * LAST]
    assert distance(run.weights(), plain(job, LAST, torch.optim.SGD, momentum=0.9)) <= 1e-10


def test_buffers_that_were_being_replaced_are_not_held(cluster: Build) -> None:
    run = cluster(make_job(model=Counting), workers=1)
    run.join("initial")
    run.train(0, FIRST)
    assert run.trainers[0].held() == FIRST
    seat = run.begin("initial")
    run.servers[0].stop()
    with pytest.raises(PeerLost):
        run.trainers[0].join(seat)
    assert run.trainers[0].held() is None


def hidden(width: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.Tanh(), torch.nn.Linear(width, 3))


@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("servers", [1, 2])
def test_a_checkpoint_of_another_model_is_refused(cluster: Build, width: int, servers: int) -> None:
    saved = cluster(make_job(model=lambda: hidden(16)), workers=1, servers=servers)
    saved.join("initial")
    saved.train(0, FIRST)
    saved.trainers[0].pieces()
    changed = cluster(make_job(model=lambda: hidden(width)), workers=1, servers=servers)
    message = (
        rf"a parameter server says: param/0.weight has the shape \(16, 6\) in the checkpoint .*, but \({width}, 6\)"
    )
    with pytest.raises(UsageError, match=message) as refusal:
        changed.join("checkpoint", FIRST)
    assert "Resume with the model that the run was started with" in refusal.value.remedy


def test_what_an_encoding_lost_of_undone_steps_is_owed_no_more(cluster: Build) -> None:
    run = cluster(make_job(), compress="topk")
    run.join("initial")
    run.train(0, 2)
    run.each(lambda trainer: trainer.pieces())
    run.regroup()
    run.join("keep", 2)
    assert all(trainer._feedback.lost_N.any() for trainer in run.trainers)
    run.regroup()
    run.join("checkpoint", 2)
    assert not any(trainer._feedback.lost_N.any() for trainer in run.trainers)
