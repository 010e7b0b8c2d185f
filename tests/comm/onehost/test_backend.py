"""The backend against Gloo: the same calls, the same results."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

SIZE = 4
ROUNDS = int(os.environ.get("TRICORN_ROUNDS", "30"))
NUMBERS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)
OPERATIONS = (
    "all_reduce", "mean", "scaled", "complex", "coalesced", "reduce", "broadcast", "all_gather", "all_gather_single",
    "reduce_scatter", "all_to_all", "uneven", "gather", "scatter", "message", "any_source", "barrier",
    "listed_scatter", "listed_to_all",
)  # fmt: skip
SUMMED = {"all_reduce", "mean", "scaled", "complex", "coalesced", "reduce", "reduce_scatter", "listed_scatter"}
GROUPS = [[*ranks] for size in (4, 3, 2) for ranks in combinations(range(SIZE), size)]


def both(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Groups of each backend: all ranks and some of them."""
    from tricorn.comm import segment
    from tricorn.comm.backend import group

    if "hosts" in folder.name:  # two ranks on each of two hosts, told apart by name only
        segment.here = group.here = lambda: f"host {rank // 2}"
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("cpu:tricorn,cuda:nccl", store=store, rank=rank, world_size=size)
    return {
        name: [dist.new_group(ranks, backend=name, timeout=timedelta(seconds=30)) for ranks in GROUPS]
        for name in ("gloo", "tricorn")
    }


@pytest.fixture(scope="module", params=["one host", "two hosts"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, start_ranks: Any) -> Iterator[Any]:
    yield from start_ranks(SIZE, both, tmp_path_factory.mktemp(request.param.replace(" ", "_")))


def some(generator: torch.Generator, count: int, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 5, (count,), generator=generator).to(dtype)


def sequence(groups: dict[str, Any], seed: int) -> None:
    """One to ten random operations, of which every rank draws the same."""
    chance = random.Random(seed)
    me = dist.get_rank()
    for turn in range(chance.randint(1, 10)):
        place = chance.randrange(len(GROUPS))
        members = GROUPS[place]
        n, root = len(members), chance.randrange(len(members))
        dtype = chance.choice((*NUMBERS, *INTEGERS, torch.bool))
        length = chance.choice((1, 7, 64, 1000, 8193, 50_000)) * n
        operation = chance.choice(OPERATIONS)
        kinds = ["SUM", "MIN", "MAX", "PRODUCT"] + ["BAND", "BOR", "BXOR"] * (not dtype.is_floating_point)
        reduction = getattr(dist.ReduceOp, chance.choice(kinds) if dtype is not torch.bool else "MAX")
        later, strided = chance.random() < 0.5, chance.random() < 0.2
        splits = [[chance.randrange(4) for _ in range(n)] for _ in range(n)]
        if me not in members:
            continue
        own = members.index(me)
        results = {}
        for name in ("gloo", "tricorn"):
            x = some(torch.Generator().manual_seed(seed * 1000 + turn * 10 + me), length, dtype)
            if strided and name == "tricorn" and operation in ("all_reduce", "broadcast"):
                x = torch.stack((x, x), 1)[:, 0]
            results[name] = run(operation, groups[name][place], x, own, n, root, reduction, splits, later)
        for wanted, got in zip(results["gloo"], results["tricorn"], strict=True):
            where = f"operation {turn} of seed {seed}: {operation} of {length} {dtype} by {reduction}"
            if dtype.is_floating_point and operation in SUMMED:
                low = dtype in (torch.float16, torch.bfloat16)
                close = {"rtol": 0.02 if low else 1e-5, "atol": 0.06 if low else 1e-5}
                torch.testing.assert_close(got, wanted, **close, msg=lambda text, where=where: f"{where}: {text}")
            else:
                assert torch.equal(got, wanted), where


def run(
    operation: str, group: Any, x: Tensor, own: int, n: int, root: int, reduction: Any, splits: Any, later: bool
) -> list[Tensor]:
    each, ours = len(x) // n, dist.get_backend(group) == "tricorn"
    if operation in ("mean", "scaled", "complex") and not x.is_floating_point():
        operation = "all_reduce"
    if operation == "all_reduce":
        work, results = dist.all_reduce(x, reduction, group, async_op=later), [x]
    elif operation in ("mean", "scaled"):  # which Gloo does not know
        factor = 0.5 if operation == "scaled" else 1 / n
        if ours:
            kind = dist._make_nccl_premul_sum(factor) if operation == "scaled" else dist.ReduceOp.AVG
        else:
            kind, x = dist.ReduceOp.SUM, x * factor
        work, results = dist.all_reduce(x, kind, group, async_op=later), [x]
    elif operation == "complex":
        both_parts = torch.complex(x.float(), x.float().flip(0))
        work = dist.all_reduce(both_parts, group=group, async_op=later)
        results = [torch.view_as_real(both_parts)]
    elif operation == "coalesced":
        work, results = None, [*x.chunk(3)]
        if ours:
            with dist._coalescing_manager(group, async_ops=True) as work:
                for part in results:
                    dist.all_reduce(part, reduction, group)
        else:
            for part in results:
                dist.all_reduce(part, reduction, group)
    elif operation == "reduce":
        work = dist.reduce(x, group=group, group_dst=root, op=reduction, async_op=later)
        results = [x] if own == root else []
    elif operation == "broadcast":
        work, results = dist.broadcast(x, group_src=root, group=group, async_op=later), [x]
    elif operation == "all_gather":
        results = [torch.empty_like(x) for _ in range(n)]
        work = dist.all_gather(results, x, group, async_op=later)
    elif operation == "all_gather_single":
        results = [x.new_empty(len(x) * n)]
        work = dist.all_gather_single(results[0], x, group, async_op=later)
    elif operation == "reduce_scatter":
        results = [x.new_empty(each)]
        work = dist.reduce_scatter_single(results[0], x, reduction, group, async_op=later)
    elif operation == "listed_scatter":
        results = [x.new_empty(each)]
        if ours:
            work = dist.reduce_scatter(results[0], [*x.chunk(n)], reduction, group, async_op=later)
        else:
            work = dist.reduce_scatter_single(results[0], x, reduction, group, async_op=later)
    elif operation == "listed_to_all":
        results = [torch.empty_like(x)]
        if ours:
            work = dist.all_to_all([*results[0].chunk(n)], [*x.chunk(n)], group, async_op=later)
        else:
            work = dist.all_to_all_single(results[0], x, group=group, async_op=later)
    elif operation == "any_source":
        arrived: dict[int, Tensor] = {}
        if own == root:
            for _ in range(n - 1):
                part = torch.empty_like(x)
                arrived[dist.recv(part, group=group, tag=7)] = part
        else:
            dist.send(x, group=group, group_dst=root, tag=7)
        dist.barrier(group)  # who sends next must not be taken for this
        work, results = None, [arrived[source] for source in sorted(arrived)]
    elif operation == "all_to_all":
        results = [torch.empty_like(x)]
        work = dist.all_to_all_single(results[0], x, group=group, async_op=later)
    elif operation == "uneven":
        taken, given = [splits[peer][own] for peer in range(n)], splits[own]
        results, source = [x.new_empty(sum(taken))], x.repeat(13)[: sum(given)]
        work = dist.all_to_all_single(results[0], source, taken, given, group, async_op=later)
    elif operation == "gather":
        results = [torch.empty_like(x) for _ in range(n)] if own == root else []
        work = dist.gather(x, results or None, group=group, group_dst=root, async_op=later)
    elif operation == "scatter":
        results = [x.new_empty(each)]
        parts = [*x.chunk(n)] if own == root else None
        work = dist.scatter(results[0], parts, group=group, group_src=root, async_op=later)
    elif operation == "message":
        results = [torch.empty_like(x), torch.empty_like(x)]
        to, source = (own + 1) % n, (own - 1) % n
        sending = [dist.isend(x, group=group, group_dst=to, tag=tag) for tag in (1, 2)]
        works = [dist.irecv(results[tag - 1], group=group, group_src=source, tag=tag) for tag in (2, 1)]
        for each_work in (*works, *sending):
            each_work.wait()
        work = None
    else:
        work, results = dist.barrier(group, async_op=later), []
    if work is not None:
        work.wait()
    return results


def sequences(groups: dict[str, Any], seeds: range) -> None:
    for seed in seeds:
        sequence(groups, seed)


def test_random_sequences_give_what_gloo_gives(ranks: Any) -> None:
    for first in range(0, ROUNDS, 50):
        ranks.each(sequences, range(first, min(first + 50, ROUNDS)))


def coalesced(groups: dict[str, Any]) -> None:
    group, rank = groups["tricorn"][0], dist.get_rank()
    tensors = [torch.full((count,), float(rank)) for count in (3, 100, 70_000)]
    with dist._coalescing_manager(group, async_ops=True) as manager:
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)
    manager.wait()
    assert all(torch.equal(tensor, torch.full_like(tensor, 6.0)) for tensor in tensors)
    work = dist.all_reduce(torch.ones(5), group=group, async_op=True)
    assert torch.equal(work.get_future().wait()[0], torch.full((5,), 4.0))
    assert work.is_completed()
    assert work.is_success()
    scaled = torch.ones(3)
    dist.all_reduce(scaled, dist._make_nccl_premul_sum(0.5), group=group)
    assert torch.equal(scaled, torch.full((3,), 2.0))
    mean = torch.full((3,), float(rank))
    dist.all_reduce(mean, dist.ReduceOp.AVG, group=group)
    assert torch.equal(mean, torch.full((3,), 1.5))
    complex_sum = torch.full((3,), 1 + 2j)
    dist.all_reduce(complex_sum, group=group)
    assert torch.equal(complex_sum, torch.full((3,), 4 + 8j))
    objects: list[Any] = [None] * SIZE
    dist.all_gather_object(objects, {"rank": rank}, group=group)
    assert objects == [{"rank": each} for each in range(SIZE)]


def test_coalesced_futures_and_objects(ranks: Any) -> None:
    ranks.each(coalesced)


def any_source(groups: dict[str, Any]) -> None:
    group, rank = groups["tricorn"][0], dist.get_rank()
    if rank == 0:
        seen = set()
        for _ in range(SIZE - 1):
            x = torch.zeros(1)
            source = dist.recv(x, group=group, tag=5)
            assert source == int(x)
            seen.add(source)
        assert seen == {1, 2, 3}
    else:
        dist.send(torch.full((1,), float(rank)), group=group, group_dst=0, tag=5)
    group.monitored_barrier(timedelta(seconds=20))


def test_receiving_from_any_rank(ranks: Any) -> None:
    ranks.each(any_source)


def late(groups: dict[str, Any]) -> str:
    group = groups["tricorn"][0]
    if dist.get_rank() == 2:
        return ""
    try:
        group.monitored_barrier(timedelta(seconds=0.3))
    except Exception as error:
        return str(error)
    return ""


def test_who_is_late_is_named(start_ranks: Any, tmp_path: Path) -> None:
    for ranks in start_ranks(SIZE, both, tmp_path):
        texts = ranks.each(late)
        assert any("rank 2 has not come to barrier" in text for text in texts)
