"""What is said to be sent, held against what transports, servers' layouts and models really have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from comm.ranks import Ranks
from msgspec.structs import replace
from torch import nn

import tricorn
from tricorn.comm import mesh, shared
from tricorn.comm.group import Group
from tricorn.dp import buckets, cost, powersgd
from tricorn.dp.gathered import gathered
from tricorn.mp.measure import example
from tricorn.plan import Plan
from tricorn.planner import traffic
from tricorn.planner.prediction import Prediction
from tricorn.planner.profile import Profile, Splitting
from tricorn.planner.search import predicted
from tricorn.planner.traffic import Traffic
from tricorn.ps.blocks import Kept
from tricorn.ps.cost import KEPT

from .world import apart, ground, machine, profile, recommender

ELEMENTS = 12 * 4096  # of float32: more than what is summed in one round


def all_reduce(elements: int) -> Callable[[Group], None]:
    return lambda group: group.all_reduce_now(torch.ones(elements))


def bounds(group: Group) -> list[int]:
    return [ELEMENTS * rank // group.size for rank in range(group.size + 1)]


def exchange(group: Group) -> None:
    sends, receives = ([torch.ones(ELEMENTS // group.size) for _ in range(group.size)] for _ in range(2))
    group.all_to_all(sends, receives).wait()


OPERATIONS: list[tuple[str, int, Callable[[Group], None]]] = [
    ("all_reduce", ELEMENTS, all_reduce(ELEMENTS)),
    ("all_reduce", 1200, all_reduce(1200)),
    ("reduce_scatter", ELEMENTS, lambda group: group.reduce_scatter(torch.ones(ELEMENTS), bounds(group)).wait()),
    ("all_gather", ELEMENTS, lambda group: group.all_gather(torch.ones(ELEMENTS), bounds(group)).wait()),
    ("all_to_all", ELEMENTS, exchange),
]


@pytest.mark.parametrize("hosts", [[0, 0, 0], [0, 1, 2], [0, 1, 0, 0], [0, 1, 0, 1]])
def test_collectives_send_what_groups_count(hosts: Sequence[int]) -> None:
    ranks = Ranks(hosts)
    try:
        for name, elements, operation in OPERATIONS:
            before = [(group.bytes_sent, group.bytes_between) for group in ranks.groups]
            ranks.each(operation)
            sent = [group.bytes_sent - old for group, (old, _) in zip(ranks.groups, before, strict=True)]
            out: dict[int, int] = {}
            for host, group, (_, old) in zip(hosts, ranks.groups, before, strict=True):
                out[host] = out.get(host, 0) + group.bytes_between - old
            found = Traffic()
            getattr(found, name)(hosts, 4 * elements)
            assert found.sent == pytest.approx(sum(sent)), name
            assert {host: size for host, size in found._out.items() if size} == pytest.approx(
                {host: size for host, size in out.items() if size}
            ), name
            assert sum(found._in.values()) == pytest.approx(sum(out.values()))
    finally:
        ranks.close()


def test_figures_that_are_said_twice_agree() -> None:
    assert traffic.SMALL == mesh.SMALL == shared.SMALL
    assert (cost.BUCKET, cost.FIRST) == (buckets.BUCKET_BYTES, buckets.BUCKET_BYTES // buckets.FIRST_PART)
    assert (cost.RANK, KEPT) == (powersgd.RANK, Kept.LISTS)


def sent(plan: Plan, job: Profile | None = None, hosts: int = 0) -> tuple[float, dict[str, float]]:
    """In all, and over the fullest link."""
    found = predicted(plan, ground(job, apart(hosts) if hosts else machine()))
    assert isinstance(found, Prediction), found
    return found.sent, found.links


def test_the_fullest_link_counts_in_its_busier_direction() -> None:
    n = 8e6
    # A worker and a server on each of two hosts: half of the weights in and out, and as much of the gradients.
    assert sent(Plan(strategy="ps", workers=2, servers=2), hosts=2) == (3 * n, {"h0": n})
    # A server on a host of its own, that two read from.
    coded = n * (1 + 4 / 256) / 4
    assert sent(Plan(strategy="ps", workers=2, servers=1, compress="int8"), hosts=3) == (2 * (n + coded), {"h2": 2 * n})
    # On one host weights are read where they lie.
    assert sent(Plan(strategy="ps", workers=2, servers=1)) == (2 * n, {})


def test_servers_have_whole_buckets() -> None:
    """Of the cuts of 100,000 and 300,000 elements, that nearest to the middle is 100,000 + 2 * 65,536."""
    job = profile(elements=400_000, shapes=((100_000,), (100, 3000)))
    _, links = sent(Plan(strategy="ps", workers=1, servers=2), job, hosts=2)
    assert links == {"h0": pytest.approx(4 * 231_072)}  # of the server that is not where the worker is


def test_rows_go_to_whoever_has_them() -> None:
    """Nine in ten of 190 ids are of the first half of the rows, for which the other worker asks; ids go there twice."""
    job = recommender()
    table = replace(job.tables[0], where=(0.6, 0.3, 0.1, 0.0))
    everything, links = sent(Plan(strategy="dp", workers=2, embeddings="rows"), replace(job, tables=(table,)), hosts=2)
    dense, asked, rows = 4 * 50_000, 190 * (16 + 64), 190 * 64
    assert everything == pytest.approx(2 * dense + asked + rows)
    assert links == {"h0": pytest.approx(dense + 0.9 * asked + 0.1 * rows)}


@pytest.mark.parametrize("way", [{"tensor": 2}, {"replicas": 2}, {"replicas": 2, "zero": 1}, {}])
def test_meshes_send_over_links_what_they_exchange(way: dict[str, Any]) -> None:
    """Two workers on two hosts: half of a sum leaves each of them twice, or what one stage hands to the other."""
    job = profile(splitting=Splitting(shares=(0.5,) * 8, sums=(4096.0,), gathers=(1024.0,)))
    found = {"tensor": 64 * (4096 + 512), "replicas": 8e6}.get(next(iter(way), ""), 4 * 64_000)
    plan = Plan(strategy="mp", workers=2, microbatches=1, **way)
    assert sent(plan, job, hosts=2) == (pytest.approx(2 * found), {"h0": pytest.approx(found)})


def test_local_steps_meet_at_the_end_of_an_epoch_too() -> None:
    job = profile(samples=640)  # ten steps
    every, some = (sent(Plan(strategy="dp", workers=2, local_steps=steps), job)[0] for steps in (1, 4))
    assert some == pytest.approx(every * 3 / 10)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.scale = nn.Embedding(50, 6), nn.Parameter(torch.ones(6))
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.rows(x) * self.scale)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_blocks_that_keep_no_weight_are_gathered_once(precision: str) -> None:
    job = tricorn.Job(
        model=Two, loss=nn.functional.cross_entropy, optimizer=tricorn.optim.SGD(lr=0.1), batch_size=4, epochs=1,
        precision=precision, train=tricorn.data.arrays(torch.arange(8), torch.zeros(8, dtype=torch.int64)),
    )  # fmt: skip
    assert gathered(job, example(job, 2)) == 300 + 6 + 2 * (42 + 21)
