"""What docs/consistency.md promises, over a simulated network with a virtual clock, for schedules of any kind.

Every worker's update adds 1 to the worker's own element, of the dense part and of each row. So what a worker reads
says how many updates of each worker are in it. Messages take any time but stay in order on their connection; workers
compute for any time, stand still, begin late, wait for work, and die.
"""

from __future__ import annotations

import heapq
import itertools
import os
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from tricorn import optim
from tricorn.errors import ProtocolError
from tricorn.plan import Consistency
from tricorn.ps.blocks import Writer, aligned
from tricorn.ps.placement import bucket_ranges
from tricorn.ps.rows import RowGradients, Rows, Wanted
from tricorn.ps.service import Beginning
from tricorn.ps.sparse.spec import TableSpec
from tricorn.ps.table import Description
from tricorn.ps.wire import Header, Op, as_bytes, decode_error
from tricorn.table import Table
from tricorn.testing.clock import VirtualClock

from .hub import Host

ROUNDS = int(os.environ.get("TRICORN_ROUNDS", "8"))
IDS = torch.arange(8)  # a few for each server
Reply = tuple[Header, bytes]
Life = Generator[float | None, None, None]  # yields how long it computes, or None until the next reply


class SimulatedHost(Host):
    def __init__(self, world: World, index: int) -> None:
        super().__init__(Path(), f"server-{index}")
        self.world, self.index = world, index

    def send(self, rank: int, header: Header, parts: Sequence[memoryview] = ()) -> None:
        if rank not in self.world.present:  # the tables are being created
            return
        payload = b"".join(parts)
        self.world.deliver((self.index, rank), lambda worker: worker.hear(self.index, header, payload), rank)


class Worker:
    """One life of a worker, as a generator that is resumed by replies and by the passing of time."""

    def __init__(self, world: World, rank: int, life: Callable[[Worker], Life]) -> None:
        self.world, self.rank, self.alive = world, rank, True
        self.replies: dict[int, deque[Reply]] = defaultdict(deque)
        self.rows = Rows(world.specs, world.stops, ["none"] * len(world.specs))
        self.clock = 0  # its pushes
        self.begun = False
        self.steadily = True  # it has begun and not stopped working since
        self._waits = False
        self._life = life(self)
        for host in world.hosts:
            host.enter(rank, deque())

    def go(self) -> None:
        if not self.alive:
            return
        try:
            pause = next(self._life)
        except StopIteration:
            self.world.finished.add(self.rank)
            return
        self._waits = pause is None
        if pause is not None:
            self.world.after(pause, self.go)

    def hear(self, server: int, header: Header, payload: bytes) -> None:
        if header.op == Op.ERROR:
            raise decode_error(payload)
        self.replies[server].append((header, payload))
        if self._waits:
            self._waits = False
            self.go()

    # What a life is made of.

    def say(self, header: Header, *, dense: bool = False, rows: Sequence[Any] = (), bases: Sequence[int] = ()) -> None:
        for server, host in enumerate(self.world.hosts):
            writer = Writer()
            if dense:
                start, stop = self.world.slices[server]
                writer.add(as_bytes(self.ones()[0].repeat(1)[start:stop].clone()))
            self.rows.write(writer, server, rows, whole=False)
            payload = b"".join(writer.parts)
            own = header._replace(length=len(payload), **({"version": bases[server]} if bases else {}))
            frame = own.pack() + payload
            self.world.deliver((self.rank, server, "up"), lambda _, h=host, f=frame: h.feed(self.rank, f), self.rank)

    def ones(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Minus one for this worker's element: of dense parameters, and of each row."""
        flat = torch.zeros(self.world.workers, dtype=torch.float64)
        flat[self.rank] = -1.0
        return flat, flat.repeat(len(IDS), 1)

    def push(self, header: Header, bases: Sequence[int] = ()) -> None:
        self.say(header, dense=True, rows=[RowGradients(0, IDS, self.ones()[1])], bases=bases)

    def read(self, header: Header) -> None:
        wanted = Wanted(0, IDS, torch.empty(len(IDS), self.world.workers, dtype=torch.float64))
        self.say(header, rows=[wanted])

    def replied(self) -> Generator[None, None, list[Reply]]:
        while not all(self.replies[server] for server in range(len(self.world.hosts))):
            yield None
        return [self.replies[server].popleft() for server in range(len(self.world.hosts))]

    def values(self, replies: list[Reply], *, dense: bool) -> tuple[np.ndarray, np.ndarray]:
        """How many updates of each worker are in what was read: [elements] of the dense part, [ids, workers] of rows.

        The dense element of a worker is at one server only.
        """
        weights, rows = [], []
        for server, (_, payload) in enumerate(replies):
            start, stop = self.world.slices[server]
            size = 8 * (stop - start) if dense else 0
            weights.append(np.frombuffer(payload[:size], np.float64))
            rows.append(np.frombuffer(payload[aligned(size) :], np.float64).reshape(-1, self.world.workers))
        return np.concatenate(weights), np.concatenate(rows)


class World:
    def __init__(
        self, random: Random, workers: int, servers: int, consistency: Consistency, staleness: int = 0,
        sparse: Consistency | None = None, **description: Any,
    ) -> None:  # fmt: skip
        self.random, self.workers, self.staleness = random, workers, staleness
        self.clock = VirtualClock()
        self.finished: set[int] = set()
        self.slices = [(workers * s // servers, workers * (s + 1) // servers) for s in range(servers)]
        ranges = bucket_ranges(servers)
        self.stops = [stop for _, stop in ranges]
        sgd = optim.SGD(lr=1.0)
        self.specs = [TableSpec("t", workers, "float64", 0, Table(std=0.0), sgd, (0, 4096))]
        self.descriptions = [
            Description(
                tables=(("w", (workers,)),), dtype="float64", start=start, stop=stop, optimizer=sgd,
                sparse=(TableSpec("t", workers, "float64", 0, Table(std=0.0), sgd, buckets),),
                consistency=consistency, staleness=staleness, sparse_consistency=sparse, **description,
            )
            for (start, stop), buckets in zip(self.slices, ranges, strict=True)
        ]  # fmt: skip
        self.hosts = [SimulatedHost(self, index) for index in range(servers)]
        self.present: dict[int, Worker] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()
        self._last: dict[Any, float] = defaultdict(float)

    def begin(self, source: str, step: int, life: Callable[[Worker], Life], applied: Any = ()) -> None:
        """A membership epoch of new lives; nothing of the one before is still on its way."""
        import msgspec

        self._events.clear()
        self._last.clear()
        self.finished.clear()
        for rank in self.present:
            for host in self.hosts:
                host.leave(rank)
        for host in self.hosts:
            host.service.regroup()
            host.service.begin(Beginning(1, step, source, None, self.workers, 0, applied))
        self.present = {}
        for host, description in zip(self.hosts, self.descriptions, strict=True):
            document = msgspec.json.encode(description)
            host.enter(0, deque())
            host.feed(0, Header(Op.CREATE, length=len(document)).pack() + document)
            if source == "initial":
                size = 8 * (description.stop - description.start)
                host.feed(0, Header(Op.LOAD, length=size).pack() + bytes(size))
        for rank in range(self.workers):
            self.present[rank] = Worker(self, rank, life)
        for worker in self.present.values():
            worker.go()

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock.now() + seconds, next(self._serial), event))

    def deliver(self, line: Any, event: Callable[[Worker], None], rank: int) -> None:
        """Later, but not before what was sent on that line before; lost if the worker dies until then."""
        worker = self.present.get(rank)
        delay = self.random.expovariate(1.0) if self.random.random() < 0.8 else self.random.uniform(0, 20)
        due = max(self._last[line], self.clock.now() + delay)
        self._last[line] = due
        self.after(due - self.clock.now(), lambda: event(worker) if worker and worker.alive else None)

    def kill(self, rank: int) -> None:
        """The worker is gone at once; each server hears of it at a time of its own."""
        self.present[rank].alive = False
        for host in self.hosts:
            self.after(self.random.uniform(0, 10), lambda h=host: h.leave(rank))

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            assert self._events, f"{set(range(self.workers)) - self.finished} wait for ever"
            due, _, event = heapq.heappop(self._events)
            self.clock.advance(due - self.clock.now())
            event()

    def living_are_done(self) -> bool:
        return all(rank in self.finished or not worker.alive for rank, worker in self.present.items())

    def close(self) -> None:
        for host in self.hosts:
            host.service.close()


def clocked(
    world: World, *, steps: int, bound: int | None, row_bound: int | None, prefetch: int = 0, idles: bool = False
) -> Callable[[Worker], Life]:
    """A worker of an asynchronous run, that checks what it reads."""
    lent = itertools.count()

    def steady(bound: int | None, worker: Worker, counts: np.ndarray, ahead: int = 0) -> None:
        for peer in world.present.values():
            if bound is not None and peer.alive and peer.steadily and peer is not worker and worker.steadily:
                assert counts[..., peer.rank].min() >= worker.clock + ahead - bound
        # A worker always reads what it has written itself.
        assert counts[..., worker.rank].min() >= worker.clock

    def life(worker: Worker) -> Life:
        worker.read(Header(Op.PULL))
        yield from worker.replied()
        worker.begun = True
        while any(peer.alive and not peer.begun for peer in world.present.values()):
            yield 1.0
        random = world.random
        for _ in range(steps):
            worker.read(Header(Op.PULL))
            replies = yield from worker.replied()
            weights, rows = worker.values(replies, dense=True)
            strictest = min((b for b in (bound, row_bound) if b is not None), default=None)
            steady(strictest, worker, weights)
            steady(strictest, worker, rows)
            if prefetch:
                worker.read(Header(Op.ROWS, step=prefetch))
                ahead = yield from worker.replied()
                steady(row_bound, worker, worker.values(ahead, dense=False)[1], prefetch)
            yield random.choice([0.0, random.expovariate(1.0), random.uniform(0, 30) * (worker.rank == 0)])
            worker.push(Header(Op.PUSH, step=next(lent), numbers=(1.0,)), [reply.version for reply, _ in replies])
            # The next read may be on its way before the answer to this.
            worker.clock += 1
            pushed = yield from worker.replied()
            assert all(header.op == Op.PUSHED and header.flags == 0 for header, _ in pushed)
            if idles and random.random() < 0.3:
                worker.steadily = False
                worker.say(Header(Op.IDLE))
                yield from worker.replied()
                yield random.uniform(0, 20)
                while worker.rank == 0 and not world.finished >= {*range(1, world.workers)}:
                    assert world.clock.now() < 10_000, "others wait for one who waits for work"
                    yield 10.0
        worker.steadily = False
        worker.say(Header(Op.IDLE))
        yield from worker.replied()

    return life


@pytest.mark.parametrize(
    ("consistency", "sparse", "staleness", "prefetch"),
    [("ssp", None, 0, 0), ("ssp", None, 1, 0), ("ssp", None, 3, 0), ("ssp", None, 1, 1), ("ssp", None, 3, 2),
     ("asp", None, 0, 2), ("asp", "ssp", 2, 1), ("ssp", "asp", 1, 3)],
)  # fmt: skip
@pytest.mark.parametrize("trouble", ["none", "idle", "death"])
def test_no_read_is_older_than_its_bound_and_nobody_waits_for_ever(
    consistency: Consistency, sparse: Consistency | None, staleness: int, prefetch: int, trouble: str
) -> None:
    bounds = {"ssp": staleness, "asp": None}
    for seed in range(ROUNDS):
        random = Random(f"{seed} {consistency} {sparse} {staleness} {prefetch} {trouble}")
        world = World(random, random.randint(2, 4), random.randint(1, 2), consistency, staleness, sparse)
        steps = random.randint(3, 8)
        life = clocked(
            world, steps=steps, bound=bounds[consistency], row_bound=bounds[sparse or consistency], prefetch=prefetch,
            idles=trouble == "idle",
        )  # fmt: skip
        world.begin("initial", 0, life)
        if trouble == "death":
            world.after(random.uniform(0, 60), lambda w=world, r=random: w.kill(r.randrange(w.workers)))
        world.run(world.living_are_done)
        for host in world.hosts:
            applied = host.service.applied
            assert sum(stop - start for start, stop in applied) == sum(host.service.staleness.values())
        world.close()


def stepping(world: World, first: int, last: int, sparse: Consistency) -> Callable[[Worker], Life]:
    """A worker of steps [first, last); where rows may be older, they are read while the step before runs."""

    def life(worker: Worker) -> Life:
        rows = None
        for step in range(first, last + 1):
            pull = Header(Op.PULL, version=step, numbers=(1.0, 1.0))
            if sparse == "bsp":
                worker.read(pull)
            else:
                worker.say(pull)
            weights, fresh = worker.values((yield from worker.replied()), dense=True)
            assert (weights == step).all()
            if rows is None:
                rows = fresh
            assert (rows == step).all() if sparse == "bsp" else (rows >= step - max(world.staleness, 1)).all()
            if step == last:
                return
            if sparse != "bsp":
                worker.read(Header(Op.ROWS, step=1, version=step))
                _, rows = worker.values((yield from worker.replied()), dense=False)
            else:
                rows = None
            yield world.random.expovariate(0.5)
            worker.push(Header(Op.PUSH, step=step, version=step))
            acks = yield from worker.replied()
            assert {header.step for header, _ in acks} == {step}

    return life


@pytest.mark.parametrize(("sparse", "staleness"), [("bsp", 0), ("ssp", 1), ("ssp", 2), ("asp", 0)])
@pytest.mark.parametrize("deaths", [0, 2])
def test_synchronous_steps_count_once_whoever_dies_and_rows_are_as_fresh_as_promised(
    sparse: Consistency, staleness: int, deaths: int
) -> None:
    steps = 6
    for seed in range(ROUNDS):
        random = Random(f"{seed} {sparse} {staleness} {deaths}")
        world = World(random, random.randint(1, 4), random.randint(1, 3), "bsp", staleness, sparse)
        world.begin("initial", 0, stepping(world, 0, steps, sparse))
        for _ in range(deaths):
            deadline = world.clock.now() + random.uniform(0, 60)
            world.after(deadline - world.clock.now(), lambda: None)
            world.run(lambda w=world, d=deadline: w.clock.now() >= d or w.living_are_done())
            if world.living_are_done():
                break
            held = [set(host.service._mode.steps()) for host in world.hosts]
            common = max(set.intersection(*held))
            world.begin("keep", common, stepping(world, common, steps, sparse))
        world.run(world.living_are_done)
        for host in world.hosts:
            table = host.service._mode.table
            assert (table.weights_S == steps).all()
            assert all((rows.weights == steps).all() for rows in table.sparse[0].export(100))
        world.close()


@pytest.mark.parametrize(("consistency", "staleness", "ahead"), [("ssp", 2, 3), ("ssp", 0, 1), ("ssp", 1, -1)])
def test_a_read_that_would_wait_for_its_own_worker_is_refused(
    consistency: Consistency, staleness: int, ahead: int
) -> None:
    world = World(Random(0), 1, 1, consistency, staleness)

    def life(worker: Worker) -> Life:
        worker.read(Header(Op.ROWS, step=ahead))
        yield from worker.replied()

    world.begin("initial", 0, life)
    with pytest.raises(ProtocolError, match=f"a read {ahead} clocks ahead, where {staleness} are the most"):
        world.run(world.living_are_done)
    world.close()


@pytest.mark.parametrize(("sparse", "staleness", "ahead"), [("bsp", 3, 1), ("ssp", 1, 2)])
def test_rows_that_are_not_there_yet_are_refused_in_synchronous_steps(
    sparse: Consistency, staleness: int, ahead: int
) -> None:
    world = World(Random(0), 1, 1, "bsp", staleness, sparse)

    def life(worker: Worker) -> Life:
        worker.read(Header(Op.ROWS, step=ahead, version=0))
        yield from worker.replied()

    world.begin("initial", 0, life)
    with pytest.raises(ProtocolError, match="are asked for before version 1 is pulled"):
        world.run(world.living_are_done)
    world.close()
