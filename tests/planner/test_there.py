"""Hosts that are at hand: who exchanges with whom, and what messages say of links."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.planner.cluster import FRAMED, Cluster, Host
from tricorn.planner.figures import Curve, Point
from tricorn.planner.there import LARGE, SMALL, _link, _linked, _software, slowness, tournament

from .world import links


@given(st.integers(2, 40))
def test_everyone_meets_everyone_once_and_one_at_a_time(players: int) -> None:
    rounds = list(tournament(players))
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == [(a, b) for a in range(players) for b in range(a + 1, players)]
    for pairs in rounds:
        busy = [player for pair in pairs for player in pair]
        assert len(busy) == len(set(busy))


def host(**changes: float) -> Host:
    return Host(**{"name": "a", "cores": 1.0, "memory": 10**9, **changes})


def there_and_back(mbit: float | None, latency: float, slow: float) -> Curve:
    """Of such a link, between processors so many times as slow as this machine's."""
    each = 0.0 if mbit is None else 8e-6 * FRAMED / mbit
    here = links().curve("tcp/send", 2)
    return Curve(tuple(Point(n, slow * here.at(n) + 2 * (latency + n * each), 0.0) for n in (SMALL, LARGE)))


@pytest.mark.parametrize("slow", [1.0, 4.0])
@pytest.mark.parametrize("mbit", [100.0, 1000.0])
def test_a_link_is_told_from_the_processors_at_its_ends(mbit: float, slow: float) -> None:
    found = _link(there_and_back(mbit, 2e-4, slow), links(), slow)
    assert found.mbit == pytest.approx(mbit, rel=0.02)
    assert found.latency == pytest.approx(2e-4, rel=0.05)


def test_what_only_processors_limit_has_no_limit_of_its_own() -> None:
    met = [_link(there_and_back(mbit, 1e-4, 2.0), links(), 2.0) for mbit in (None, 100.0)]
    assert _linked(host(), met).mbit is None


def test_a_slow_link_of_one_partner_is_not_its_partners() -> None:
    met = [_link(there_and_back(mbit, latency, 1.0), links(), 1.0) for mbit, latency in ((100.0, 2e-3), (1e3, 1e-4))]
    found = _linked(host(), met)
    assert found.mbit == pytest.approx(1000.0, rel=0.02)
    assert found.latency == pytest.approx(1e-4, rel=0.05)


def test_of_a_collective_what_links_take_is_taken_off() -> None:
    hosts = tuple(host(mbit=100.0, latency=1e-4, speed=0.5) for _ in range(4))
    sizes, here = (SMALL, LARGE), links().curve("tcp/all_reduce", 2)
    taken = [2 * 3 * here.at(n) + 1.5 * n / hosts[0].bytes_per_second + 6 * 1e-4 for n in sizes]
    curve = Curve(tuple(Point(n, seconds, 0.0) for n, seconds in zip(sizes, taken, strict=True)))
    found = _software("all_reduce", curve, Cluster(hosts=hosts), links())
    assert [point.seconds for point in found.points] == pytest.approx([3 * here.at(n) for n in sizes])


@pytest.mark.parametrize(("cores", "speed", "times"), [(2.0, 1.0, 1.0), (1.0, 0.5, 2.0), (0.25, 1.0, 4.0)])
def test_a_host_with_a_part_of_a_core_or_a_slow_one_takes_longer(cores: float, speed: float, times: float) -> None:
    assert slowness(host(cores=cores, speed=speed)) == times
