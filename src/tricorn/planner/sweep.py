"""Measure this machine: what each strategy's steps cost beside computing, and what collectives and copies cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

import psutil
import torch
from torch import Tensor

from tricorn import optim
from tricorn.comm.auth import new_secret
from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener
from tricorn.control.messages import Address
from tricorn.errors import UserCodeError
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.planner.beside import beside
from tricorn.planner.coding import coding
from tricorn.planner.crew import Line, crew, gather, tell
from tricorn.planner.figures import Curve, Figure, Point
from tricorn.planner.links import Links
from tricorn.planner.load import Quiet
from tricorn.planner.orders import Exchange
from tricorn.planner.rehearse import Found, chain, rehearse, warm

ELEMENTS = (1 << 12, 1 << 18, 1 << 21)  # of made models
MICROBATCHES = (1, 8)
STEPS = 12
LONG = 6  # steps of the largest
BYTES = (1 << 10, 1 << 16, 1 << 20, 1 << 23)  # of collectives
FEWEST, ROUNDS = 2, 12
SWEPT = 0.2  # seconds for the rounds of one operation and size
FLOAT = 4  # bytes
_CHAINS = [chain(elements) for elements in ELEMENTS]
_LENGTHS = [STEPS, STEPS, LONG]

T = TypeVar("T")


class Way(NamedTuple):
    """A plan whose steps are measured, by the name that curves have for it."""

    name: str
    plan: Plan


def ways(cores: int) -> Iterator[Way]:
    """All that are measured on so many cores."""
    for workers in counts(cores):
        yield Way("dp", Plan(strategy="dp", workers=workers))
        yield Way("ps", Plan(strategy="ps", workers=workers, servers=1))
        yield Way("asp", Plan(strategy="ps", workers=workers, servers=1, consistency="asp"))
        if workers > 1:
            for zero in _ZEROS:
                yield Way(f"zero{zero}", Plan(strategy="dp", workers=workers, zero=zero))


def counts(cores: int) -> list[int]:
    """Numbers of workers that are measured."""
    return sorted(count for count in {1, 2, 4, cores} if count <= max(cores, 1))


_ZEROS: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)


def sweep(cores: int, told: Callable[[str], None]) -> Links:
    """Everything; ``told`` hears what is being measured. The process must have no threads but this one."""
    with crew([_warmed]) as (line,):  # what has to be compiled is by a process that ends, and takes its memory along
        line.hear()
    before = _of_a_fork()
    warm()
    imported = _of_a_fork() - before
    curves: dict[str, Curve] = {}
    overhead: dict[str, int] = {}
    quiet = Quiet(cores)

    def measured(said: str, work: Callable[[], T]) -> T:
        told(said)
        return quiet.measure(work)

    for name, plan in ways(cores):
        if found := measured(f"steps of {name} with {plan.workers}", partial(_rehearsed, _CHAINS, plan, _LENGTHS)):
            sizes = [n * FLOAT for n in ELEMENTS]
            curves[f"exchange/{name}/{plan.workers}"] = _curve(sizes, [each.exchange for each in found])
            overhead |= {f"{name}/{role}": imported + grown for role, grown in found[0].grown.items()}
    for workers in sorted({2, min(4, cores)} - {1}):
        if found := measured(f"a pipeline of {workers}", partial(_pipelines, workers)):
            curves[f"exchange/mp/{workers}"] = _curve(MICROBATCHES, [each.step for each in found])
            overhead |= {f"mp/{role}": imported + grown for role, grown in found[0].grown.items()}
    for ranks in sorted({2, min(4, 2 * cores)}):
        for way in ("shared", "tcp"):
            swept = measured(f"collectives of {ranks}, {way}", partial(collectives, ranks, apart=way == "tcp"))
            curves |= {f"{way}/{operation}/{ranks}": curve for operation, curve in swept.items()}
    curves |= measured("copies and updates", _copies)
    curves |= measured("encodings", _codings)
    both = measured("computing beside exchanging", beside)
    return Links(cores=cores, curves=curves, overhead=overhead, beside=both, busy=quiet.busy)


def _warmed(line: Line) -> None:
    warm()
    line.say("warm")


def _rehearsed(jobs: Sequence[Job], plan: Plan, steps: Sequence[int]) -> list[Found]:
    """Empty for what cannot run on this machine: plans like it will be out of the question."""
    with suppress(UserCodeError):
        return rehearse(jobs, plan, steps)
    return []


def _pipelines(workers: int) -> list[Found]:
    plans = [Plan(strategy="mp", workers=workers, microbatches=count) for count in MICROBATCHES]
    found = [_rehearsed([chain(workers)], plan, [STEPS]) for plan in plans]
    return [each for (each,) in found] if all(found) else []


def _curve(sizes: Sequence[float], figures: Sequence[Figure]) -> Curve:
    return Curve(tuple(Point(x, *figure) for x, figure in zip(sizes, figures, strict=True)))


def _of_a_fork() -> int:
    """Resident bytes of a new fork of this process, which has of a library's pages those that it comes to use."""
    with crew([lambda line: line.say(psutil.Process().memory_info().rss)]) as lines:
        return int(gather(lines)[0])


def collectives(ranks: int, *, apart: bool) -> dict[str, Curve]:
    """Seconds of each operation by bytes of the whole tensor (of ``send``: of the message), by processes here.

    ``apart``: as if each were on a host of its own.
    """
    secret = new_secret()
    orders = [
        Exchange(rank=rank, ranks=ranks, secret=secret, host="127.0.0.1", sizes=[*BYTES]) for rank in range(ranks)
    ]
    with crew([partial(_rank, order, apart) for order in orders]) as lines:
        tell(lines, gather(lines))
        found = gather(lines)[0]
        tell(lines, "end")
        gather(lines)
    return _curves(found)


@contextmanager
def exchanging(order: Exchange) -> Iterator[tuple[Address, Callable[[list[Address]], dict[str, Curve]]]]:
    """The same, as one rank of a group whose others are elsewhere: its address, and what to call with those of all.

    It stays until the end of the context, which all ranks may come to once all have their curves.
    """
    with crew([partial(_rank, order, True)]) as (line,):
        host, port = line.hear()

        def begin(addresses: list[Address]) -> dict[str, Curve]:
            line.say(addresses)
            return _curves(line.hear())

        yield (host, port), begin
        line.say("end")
        line.hear()


def _curves(found: dict[str, list[tuple[float, float, float]]]) -> dict[str, Curve]:
    return {operation: Curve(tuple(Point(*point) for point in points)) for operation, points in found.items()}


def _rank(order: Exchange, apart: bool, line: Line) -> None:
    torch.set_num_threads(1)
    listener = PeerListener(order.secret, order.host)
    line.say(listener.address)
    addresses = [(host, port) for host, port in line.hear()]
    group = Group(
        rank=order.rank, addresses=addresses, listener=listener, secret=order.secret, epoch=1, channel="sweep",
        host=str(order.rank) if apart else "here",
    )  # fmt: skip
    found: dict[str, list[Point]] = {}
    for size in order.sizes:
        flat = torch.zeros(size // FLOAT)
        for operation, work in _operations(group, flat).items():
            if order.only in (None, operation):
                found.setdefault(operation, []).append(Point(size, *_timed(group, work)))
    line.say(found)
    line.hear()
    group.close()
    listener.close()
    line.say("ended")


def _operations(group: Group, flat: Tensor) -> dict[str, Callable[[], None]]:
    bounds = [len(flat) * rank // group.size for rank in range(group.size + 1)]
    parts = [flat[low:high] for low, high in pairwise(bounds)]
    arrived, returned = [parts[group.rank].clone() for _ in parts], flat.clone()

    def send() -> None:  # there and back between the first two
        if group.rank == 0:
            handle = group.send(flat, 1)
            group.receive(returned, 1)
            handle.wait()
        elif group.rank == 1:
            group.receive(flat, 0)
            group.send(returned, 0).wait()

    return {
        "all_reduce": lambda: group.all_reduce_now(flat),
        "reduce_scatter": lambda: group.reduce_scatter(flat, bounds).wait(),
        "all_gather": lambda: group.all_gather(flat, bounds).wait(),
        "all_to_all": lambda: group.all_to_all(parts, arrived).wait(),
        "send": send,
    }


def _timed(group: Group, work: Callable[[], None]) -> Figure:
    """Of as many rounds as there is time for, after one that says how long they take."""
    taken: list[float] = []
    rounds = torch.zeros(1)
    while len(taken) <= rounds.item():
        group.barrier()
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
        if len(taken) == 1:
            rounds[0] = SWEPT / taken[0] if group.rank == 0 else 0.0
            group.all_reduce_now(rounds)  # for all to make as many
            rounds.clamp_(FEWEST, ROUNDS)
    return Figure.of(taken[1:])


def _copies() -> dict[str, Curve]:
    with crew([_alone]) as (line,):
        return {name: Curve(tuple(Point(*point) for point in points)) for name, points in line.hear().items()}


def _codings() -> dict[str, Curve]:
    with crew([_encoding]) as (line,):
        return {f"coding/{how}/1": Curve(tuple(Point(*point) for point in points)) for how, points in line.hear()}


def _encoding(line: Line) -> None:
    torch.set_num_threads(1)
    line.say([*coding()])


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
