"""What several hosts are like: measured on them, by a process on each.

Every host computes with the job's own samples, all at the same time; every pair of them exchanges messages, in rounds
in which each host has one partner; and all together exchange in every way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from statistics import median_high, median_low
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from tricorn.comm.auth import new_secret
from tricorn.control import messages as m
from tricorn.engine.hosts import Place
from tricorn.errors import JobFailed
from tricorn.planner import orders
from tricorn.planner.cluster import FRAMED, Cluster, Host
from tricorn.planner.figures import Curve
from tricorn.planner.links import Links
from tricorn.planner.profile import Profile
from tricorn.planner.survey import M, Survey
from tricorn.state import cores

if TYPE_CHECKING:
    from tricorn.job import Job

SMALL, LARGE = 1 << 10, 1 << 20  # bytes of messages
SOFTWARE = 1.5  # times what sending a byte takes processors alone: a link that takes no more has no limit of its own
MEASURED_SAMPLES = 4  # a batch's part that a host computes with


class Link(NamedTuple):
    """``mbit`` is infinite where only processors limit it."""

    mbit: float
    latency: float


def measured(
    job: Job | tuple[str, str], places: Sequence[Place], profile: Profile, links: Links, told: Callable[[str], None]
) -> tuple[Cluster, Links]:
    """The hosts, and the links with what the collectives of all of them take their processors.

    ``profile`` and ``links`` are of this machine. Raises UsageError and JobFailed as ``Survey``, JobFailed for a job
    that cannot be run here.
    """
    if not profile.compute:
        raise JobFailed(f"the job cannot be measured: {profile.unmeasured}", remedy="Name a plan by its strategy.")
    with ExitStack() as stack:
        there = [stack.enter_context(Survey(job, told=_silence, place=place)) for place in places]
        told("loading the job on " + ", ".join(place.address for place in places))
        _all(there, [each.load() for each in there], orders.Loaded)
        told("computing on each")
        samples = max(1, min(profile.batch_size, profile.samples) // MEASURED_SAMPLES)
        found = _all(there, [orders.MeasureHost(samples=samples)] * len(there), orders.HostMeasured)
        expected = profile.computing(1, 1, samples)[0]
        room = cores.usable() / len(places)  # hosts without a quota share this machine's
        hosts = [_host(place, each, room, expected) for place, each in zip(places, found, strict=True)]
        if len(there) == 1:
            return Cluster(hosts=tuple(hosts), described=True, present=True), links
        met: list[list[Link]] = [[] for _ in hosts]
        for pairs in tournament(len(there)):
            told("exchanging between " + ", ".join(f"{hosts[a].name} and {hosts[b].name}" for a, b in pairs))
            groups = [[(there[rank], places[rank]) for rank in pair] for pair in pairs]
            for pair, curves in zip(pairs, _exchange(groups, [SMALL, LARGE], "send"), strict=True):
                link = _link(curves["send"], links, max(slowness(hosts[rank]) for rank in pair))
                for rank in pair:
                    met[rank].append(link)
        hosts = [*map(_linked, hosts, met)]
        told("exchanging between all")
        (group,) = _exchange([[*zip(there, places, strict=True)]], [SMALL, LARGE], None)
    cluster = Cluster(hosts=tuple(hosts), described=True, present=True)
    curves = {name: curve for name, curve in links.curves.items() if not name.startswith("tcp/")}
    curves |= {f"tcp/{way}/2": _software(way, curve, cluster, links) for way, curve in group.items()}
    return cluster, msgspec.structs.replace(links, curves=curves)


def tournament(players: int) -> Iterator[list[tuple[int, int]]]:
    """Rounds in which everyone meets another one, until each has met each: one stays, the others go round."""
    ring = [*range(players + players % 2)]  # the last of an odd number's is nobody
    for _ in ring[1:]:
        half = len(ring) // 2
        pairs = [(min(pair), max(pair)) for pair in zip(ring[:half], ring[: -half - 1 : -1], strict=True)]
        yield [pair for pair in pairs if pair[1] < players]
        ring = [ring[0], ring[-1], *ring[1:-1]]


def slowness(host: Host) -> float:
    """How many times as long as here one process takes there."""
    return max(1.0, 1 / host.cores) / host.speed


def _host(place: Place, found: orders.HostMeasured, room: float, expected: float) -> Host:
    """``expected``: seconds that what it computed takes here; ``room``: cores that are there for each host."""
    available = min(found.cores, room)
    speed = max(1.0, 1 / available) * expected / found.seconds
    return Host(name=place.address, cores=available, memory=found.memory, speed=speed)


def _link(there_and_back: Curve, links: Links, slow: float) -> Link:
    """Of two hosts, by such messages between them; their processors take so many times as long as here."""
    small, here = there_and_back.points[0], links.curve("tcp/send", 2)
    each, software = _slope(there_and_back) / 2, slow * _slope(here) / 2
    wire = each - software if each > SOFTWARE * software else 0.0
    latency = max(0.0, (small.seconds - slow * here.at(small.x)) / 2 - small.x * wire)
    return Link(8e-6 * FRAMED / wire if wire else math.inf, latency)


def _linked(host: Host, met: Sequence[Link]) -> Host:
    """The host, with the link that it has with most partners: with a slower one it is theirs that is slow."""
    mbit, latency = median_high(link.mbit for link in met), median_low(link.latency for link in met)
    return msgspec.structs.replace(host, latency=latency, mbit=mbit if mbit < math.inf else None)


def _slope(curve: Curve) -> float:
    """Seconds of each byte, of the smallest and the largest message."""
    low, high = curve.points[0], curve.points[-1]
    return max(0.0, (high.seconds - low.seconds) / (high.x - low.x))


def _software(way: str, curve: Curve, cluster: Cluster, links: Links) -> Curve:
    """What processors like this machine's take for an operation: less what links take, but no less than here."""
    h, hosts = len(cluster.hosts), cluster.hosts
    slow, here = max(map(slowness, hosts)), links.curve(f"tcp/{way}", 2)
    share, messages = {"all_reduce": (2 * (h - 1) / h, 2 * (h - 1)), "send": (2, 2)}.get(way, ((h - 1) / h, h - 1))
    wires = [
        max(share * point.x / host.bytes_per_second + messages * host.latency for host in hosts)
        for point in curve.points
    ]
    return Curve(
        tuple(
            point._replace(seconds=max((point.seconds - wire) / slow, here.at(point.x)))
            for point, wire in zip(curve.points, wires, strict=True)
        )
    )


def _exchange(
    groups: Sequence[Sequence[tuple[Survey, Place]]], sizes: list[int], only: str | None
) -> list[dict[str, Curve]]:
    """What the first of each group finds; all groups exchange at the same time."""
    members = [member for group in groups for member in group]
    given = [
        orders.Exchange(rank=rank, ranks=len(group), secret=secret, host=place.address, sizes=sizes, only=only)
        for group, secret in ((group, new_secret()) for group in groups)
        for rank, (_, place) in enumerate(group)
    ]
    surveys = [survey for survey, _ in members]
    listening = iter(_all(surveys, given, orders.Listening))
    meetings = [orders.Meet(addresses=[next(listening).address for _ in group]) for group in groups]
    told = [meeting for meeting, group in zip(meetings, groups, strict=True) for _ in group]
    found = _all(surveys, told, orders.Exchanged)
    _all(surveys, [orders.Part()] * len(surveys), orders.Parted)
    return [each.curves for each, order in zip(found, given, strict=True) if order.rank == 0]


def _all(surveys: Sequence[Survey], given: Sequence[m.Message], kind: type[M]) -> list[M]:
    """What each says to its order; all are told before the first is asked."""
    for survey, order in zip(surveys, given, strict=True):
        survey.order(order)
    return [survey.answer(kind) for survey in surveys]


def _silence(text: str) -> None:
    """It is told of all at once."""
