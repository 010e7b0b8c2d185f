"""Measure this machine: what each strategy's steps cost beside computing, and what collectives and copies cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import psutil
import torch
from torch import Tensor

from tricorn import optim
from tricorn.comm.auth import new_secret
from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener
from tricorn.errors import UserCodeError
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.planner.crew import Line, crew, gather, tell
from tricorn.planner.figures import Curve, Figure, Point
from tricorn.planner.links import Links
from tricorn.planner.rehearse import DIM, chain, rehearse, rows

ELEMENTS = (1 << 12, 1 << 18, 1 << 21)  # of made models
ROWS = (64, 1024, 16384)  # of made batches
MICROBATCHES = (1, 8)
STEPS = 24
LONG = 10  # steps of the largest
BYTES = (1 << 10, 1 << 16, 1 << 20, 1 << 23)  # of collectives
ROUNDS = 16
FLOAT = 4  # bytes


class Way(NamedTuple):
    """A plan whose steps are measured, by the name that curves have for it."""

    name: str
    plan: Plan


def ways(cores: int) -> Iterator[Way]:
    """All that are measured on so many cores."""
    for workers in _counts(cores):
        yield Way("dp", Plan(strategy="dp", workers=workers))
        yield Way("ps", Plan(strategy="ps", workers=workers, servers=1))
        yield Way("asp", Plan(strategy="ps", workers=workers, servers=1, consistency="asp"))
        if workers > 1:
            for zero in _ZEROS:
                yield Way(f"zero{zero}", Plan(strategy="dp", workers=workers, zero=zero))


def row_ways(cores: int) -> Iterator[Way]:
    """All by which rows of tables are trained, and measured."""
    for workers in _counts(cores):
        yield Way("ps", Plan(strategy="ps", workers=workers, servers=1))
        yield Way("asp", Plan(strategy="ps", workers=workers, servers=1, consistency="asp"))
        yield Way("served", Plan(strategy="ps+dp", workers=workers, servers=1))
        if workers > 1:
            yield Way("spread", Plan(strategy="dp", workers=workers, embeddings="rows"))


def _counts(cores: int) -> list[int]:
    """Numbers of workers that are measured."""
    return sorted(count for count in {1, 2, 4, cores} if count <= max(cores, 1))


_ZEROS: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)


def sweep(cores: int, told: Callable[[str], None]) -> Links:
    """Everything; ``told`` hears what is being measured. The process must have no threads but this one."""
    before = psutil.Process().memory_info().rss
    _warm()
    imported = psutil.Process().memory_info().rss - before
    curves: dict[str, Curve] = {}
    overhead = {role: grown + imported for role, grown in _growths()}
    for name, plan in ways(cores):
        told(f"steps of {name} with {plan.workers}")
        _add(curves, f"exchange/{name}/{plan.workers}", [(n * FLOAT, partial(_exchange, plan, n)) for n in ELEMENTS])
    for name, plan in row_ways(cores):
        told(f"rows of {name} with {plan.workers}")
        _add(curves, f"rows/{name}/{plan.workers}", [(n * DIM * FLOAT, partial(_step, rows(n), plan)) for n in ROWS])
    for workers in sorted({2, min(4, cores)} - {1}):
        told(f"a pipeline of {workers}")
        plans = [(count, Plan(strategy="mp", workers=workers, microbatches=count)) for count in MICROBATCHES]
        _add(curves, f"exchange/mp/{workers}", [(n, partial(_step, chain(workers), plan)) for n, plan in plans])
    for ranks in sorted({2, min(4, 2 * cores)}):
        for way in ("shared", "tcp"):
            told(f"collectives of {ranks}, {way}")
            for operation, curve in collectives(ranks, apart=way == "tcp").items():
                curves[f"{way}/{operation}/{ranks}"] = curve
    told("copies and updates")
    with crew([_alone]) as (line,):
        for name, points in line.hear().items():
            curves[name] = Curve(tuple(Point(*point) for point in points))
    return Links(cores=cores, curves=curves, overhead=overhead)


def _growths() -> Iterator[tuple[str, int]]:
    """Bytes by which roles that hold next to nothing grow."""
    for way, plan in (
        ("dp", Plan(strategy="dp", workers=2)),
        ("ps", Plan(strategy="ps", workers=1, servers=1)),
        ("mp", Plan(strategy="mp", workers=2, microbatches=1)),
    ):
        with suppress(UserCodeError):
            for role, grown in rehearse(chain(ELEMENTS[0]), plan, 2).grown.items():
                yield f"{way}/{role}", grown


def _add(curves: dict[str, Curve], name: str, cases: Sequence[tuple[float, Callable[[], Figure]]]) -> None:
    """Measure a curve. What cannot run on this machine has none, and plans like it will be out of the question."""
    with suppress(UserCodeError):
        curves[name] = Curve(tuple(Point(x, *measured()) for x, measured in cases))


def _exchange(plan: Plan, elements: int) -> Figure:
    return rehearse(chain(elements), plan, LONG if elements == ELEMENTS[-1] else STEPS).exchange


def _step(job: Job, plan: Plan) -> Figure:
    return rehearse(job, plan, STEPS).step


def _warm() -> None:
    """Import and compile before forking what every fork would have to."""
    from tricorn.comm import within
    from tricorn.dp import replicate, shard  # noqa: F401  what forks import
    from tricorn.mp import trainer as pipelines  # noqa: F401  the same
    from tricorn.ps import ring, server, shared, sparse, trainer  # noqa: F401  the same

    within.warm({torch.float32, torch.float64})
    ring.warm()
    sparse.warm()


def collectives(ranks: int, *, apart: bool) -> dict[str, Curve]:
    """Seconds of each operation by bytes of the whole tensor (of ``send``: of the message), by processes here.

    ``apart``: as if each were on a host of its own.
    """
    secret = new_secret()
    with crew([partial(_rank, rank, apart, secret) for rank in range(ranks)]) as lines:
        tell(lines, gather(lines))
        found = gather(lines)[0]
        tell(lines, "end")
        gather(lines)
    return {operation: Curve(tuple(Point(*point) for point in points)) for operation, points in found.items()}


def _rank(rank: int, apart: bool, secret: bytes, line: Line) -> None:
    torch.set_num_threads(1)
    listener = PeerListener(secret)
    line.say(listener.address)
    addresses = [(host, port) for host, port in line.hear()]
    group = Group(
        rank=rank, addresses=addresses, listener=listener, secret=secret, epoch=1, channel="sweep",
        host=str(rank) if apart else "here",
    )  # fmt: skip
    found: dict[str, list[Point]] = {}
    for size in BYTES:
        flat = torch.zeros(size // FLOAT)
        for operation, work in _operations(group, flat).items():
            found.setdefault(operation, []).append(
                Point(size, *_timed(group, work, 8 if size == BYTES[-1] else ROUNDS))
            )
    line.say(found)
    line.hear()
    group.close()
    listener.close()
    line.say("ended")


def _operations(group: Group, flat: Tensor) -> dict[str, Callable[[], None]]:
    bounds = [len(flat) * rank // group.size for rank in range(group.size + 1)]
    parts = [flat[low:high] for low, high in pairwise(bounds)]
    filled = [part.clone() for part in parts]

    def send() -> None:  # there and back between the first two
        if group.rank == 0:
            handle = group.send(flat, 1)
            group.receive(filled[0], 1)
            handle.wait()
        elif group.rank == 1:
            group.receive(flat, 0)
            group.send(filled[0], 0).wait()

    return {
        "all_reduce": lambda: group.all_reduce_now(flat),
        "reduce_scatter": lambda: group.reduce_scatter(flat, bounds).wait(),
        "all_gather": lambda: group.all_gather(flat, bounds).wait(),
        "all_to_all": lambda: group.all_to_all(parts, filled).wait(),
        "send": send,
    }


def _timed(group: Group, work: Callable[[], None], rounds: int) -> Figure:
    taken = []
    for _ in range(2 + rounds):
        group.barrier()
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return Figure.of(taken[2:])


def _alone(line: Line) -> None:
    """One process: copies, and the update by plain SGD that is part of every measured step."""
    torch.set_num_threads(1)
    found: dict[str, list[Point]] = {}
    for size in BYTES:
        source, target = torch.zeros(size // FLOAT), torch.zeros(size // FLOAT)
        sgd = partial(optim.SGD(lr=0.0).update, target, source, {}, step=1, lr=0.0)
        works: dict[str, Callable[[], object]] = {"copy/1": partial(target.copy_, source), "update/1": sgd}
        for name, work in works.items():
            found.setdefault(name, []).append(Point(size, *_repeated(work)))
    line.say(found)


def _repeated(work: Callable[[], object], rounds: int = ROUNDS) -> Figure:
    taken: list[float] = []
    for _ in range(2 + rounds):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return Figure.of(taken[2:])
