"""The numbers that collectives and messages carry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener
from tricorn.comm.mesh import SMALL
from tricorn.errors import PeerLost

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
# Around the limit of the small algorithm, and where ranks have unequal chunks or none.
LENGTHS = st.one_of(
    st.integers(0, 9), st.sampled_from([SMALL // 8 - 1, SMALL // 8 + 1, SMALL // 4, SMALL // 4 + 1, 40_003])
)
SHAPES = st.one_of(st.just(()), LENGTHS.map(lambda n: (n,)), st.tuples(LENGTHS, st.integers(1, 3)))


def contribution(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 10 + rank)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 1000).to(dtype)


def total(given_: list[torch.Tensor], hosts: list[list[int]]) -> torch.Tensor:
    """The sum in rank order within each host, then over hosts."""
    return in_order([in_order([given_[rank] for rank in ranks]) for ranks in hosts if ranks])


def in_order(given_: list[torch.Tensor]) -> torch.Tensor:
    """The sum; of half precision in float32, rounded once."""
    dtype = given_[0].dtype
    expected = given_[0].float() if dtype is torch.bfloat16 else given_[0].clone()
    for tensor in given_[1:]:
        expected += tensor
    return expected.to(dtype)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 4),
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    asynchronous=st.booleans(),
)
def test_all_reduce_is_the_sum_in_rank_order_on_every_rank(mesh, size, shape, dtype, seed, asynchronous):
    given_ = [contribution(rank, shape, dtype, seed) for rank in range(size)]

    def sum_up(group: Group) -> torch.Tensor:
        tensor = given_[group.rank].clone()
        if asynchronous:
            group.all_reduce(tensor).wait()
        else:
            group.all_reduce_now(tensor)
        return tensor

    expected = total(given_, mesh(size).hosts)
    for result in mesh(size).each(sum_up):
        assert torch.equal(result, expected)
    exact = torch.stack([t.double() for t in given_]).sum(0)
    epsilon = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    assert (expected.double() - exact).abs().max().item() <= 8000 * size * epsilon if exact.numel() else True


def test_queued_sums_come_in_order_and_before_one_asked_for_now(mesh):
    def run(group: Group) -> list[float]:
        tensors = [torch.full((n,), float(group.rank + n)) for n in (1, 20_000, 3, 100_000, 5)]
        handles = [group.all_reduce(tensor) for tensor in tensors]
        last = torch.ones(2)
        group.all_reduce_now(last)
        assert all(handle.done for handle in handles)
        for handle in handles:
            handle.wait()
        return [tensor[-1].item() for tensor in [*tensors, last]]

    expected = [3.0 * n + 3 for n in (1, 20_000, 3, 100_000, 5)] + [3.0]
    assert mesh(3).each(run) == [expected] * 3


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 4), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000), data=st.data())
def test_each_rank_gets_the_sum_of_its_part_and_then_all_get_all_parts(mesh, size, dtype, seed, data):
    length = data.draw(LENGTHS)
    bounds = [0, *sorted(data.draw(st.integers(0, length)) for _ in range(size - 1)), length]
    given_ = [contribution(rank, (length,), dtype, seed) for rank in range(size)]

    def run(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        flat = given_[group.rank].clone()
        group.reduce_scatter(flat, bounds).wait()
        part = flat[bounds[group.rank] : bounds[group.rank + 1]].clone()
        group.all_gather(flat, bounds).wait()
        return part, flat

    expected = total(given_, mesh(size).hosts)
    for rank, (part, flat) in enumerate(mesh(size).each(run)):
        assert torch.equal(part, expected[bounds[rank] : bounds[rank + 1]])
        assert torch.equal(flat, expected)


@pytest.mark.parametrize("bounds", [[0, 5], [0, 6, 5, 10], [0, 5, 9], [1, 5, 10]])
def test_bounds_that_are_no_cuts_of_the_tensor(mesh, bounds):
    group = mesh(2).groups[0]
    for operation in (group.reduce_scatter, group.all_gather):
        with pytest.raises(ValueError, match="not 3 ascending cuts of 10 elements"):
            operation(torch.zeros(10), bounds)


@pytest.mark.parametrize("size", [1, 3])
def test_all_to_all_carries_a_size_of_its_own_from_each_to_each(mesh, size):
    def parcel(source: int, target: int) -> torch.Tensor:
        return torch.full((40_000 * source + 7 * target,), 16 * source + target, dtype=torch.uint8)

    def run(group: Group) -> bool:
        sends = [parcel(group.rank, peer) for peer in range(size)]
        receives = [torch.empty_like(parcel(peer, group.rank)) for peer in range(size)]
        group.all_to_all(sends, receives).wait()
        return all(torch.equal(got, parcel(peer, group.rank)) for peer, got in enumerate(receives))

    assert mesh(size).each(run) == [True] * size


def test_all_to_all_needs_one_of_each_for_every_rank(mesh):
    with pytest.raises(ValueError, match="1 to send and 2 to receive, in a group of 2"):
        mesh(2).groups[0].all_to_all([torch.zeros(1)], [torch.zeros(1)] * 2)


@pytest.mark.parametrize("source", [0, 1, 2])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_broadcast(mesh, source, dtype):
    def run(group: Group) -> torch.Tensor:
        tensor = contribution(group.rank, (50_001,), torch.float64, 7).to(dtype)
        group.broadcast(tensor, source)
        return tensor

    expected = contribution(source, (50_001,), torch.float64, 7).to(dtype)
    assert all(torch.equal(result, expected) for result in mesh(3).each(run))


def test_messages_arrive_in_order_while_everyone_sends_more_than_a_socket_holds(mesh):
    def run(group: Group) -> bool:
        peers = [peer for peer in range(group.size) if peer != group.rank]
        handles = [
            group.send(torch.full((1_000_000 + k,), float(10 * group.rank + k)), peer)
            for k in range(3)
            for peer in peers
        ]
        arrived = torch.zeros(1_000_002)
        for peer in reversed(peers):
            for k in range(3):
                view = arrived[: 1_000_000 + k]
                group.receive(view, peer)
                assert torch.equal(view, torch.full_like(view, 10 * peer + k))
        for handle in handles:
            handle.wait()
        return True

    assert mesh(3).each(run) == [True] * 3


def test_a_message_that_nobody_reads_yet_does_not_hold_up_a_collective(mesh):
    def run(group: Group) -> float:
        large = torch.ones(3_000_000)
        handle = group.send(large, 1 - group.rank)
        total = torch.ones(1)
        group.all_reduce_now(total)
        group.receive(torch.empty(3_000_000), 1 - group.rank)
        handle.wait()
        return total.item()

    assert mesh(2).each(run) == [2.0, 2.0]


def test_bytes_sent_is_the_exact_payload_by_whatever_way(mesh):
    def run(group: Group) -> tuple[int, int]:
        group.all_reduce_now(torch.zeros(100))  # 400 bytes to each of 2
        group.all_reduce_now(torch.zeros(30_000))  # 80,000 bytes of other ranks' chunks, then the own to each of 2
        group.broadcast(torch.zeros(10, dtype=torch.float64), 2)  # 80 bytes to each of 2, from rank 2
        if group.rank == 0:
            group.send(torch.zeros(7, dtype=torch.bfloat16), 1).wait()
        if group.rank == 1:
            group.receive(torch.zeros(7, dtype=torch.bfloat16), 0)
        return group.bytes_sent, group.bytes_between

    sums = 800 + 80_000 + 80_000
    expected = {
        "apart": [(sums + 14, sums + 14), (sums, sums), (sums + 160, sums + 160)],
        "together": [(sums + 14, 0), (sums, 0), (sums + 160, 0)],
        # Rank 2 is with rank 0, which sends to rank 1, then gives the sums to rank 2.
        "spread": [(3 * 120_400 + 80 + 14, 120_400 + 80 + 14), (120_400, 120_400), (120_400 + 80, 0)],
    }
    made = mesh(3)
    assert made.each(run) == expected[made.name]


def test_barrier_lets_nobody_pass_before_the_last_has_come(mesh):
    arrived: list[int] = []

    def run(group: Group) -> int:
        arrived.append(group.rank)
        group.barrier()
        return len(arrived)

    assert mesh(4).each(run) == [4] * 4


def test_a_tensor_that_needs_gradient_is_summed_in_place(mesh):
    def run(group: Group) -> list[float]:
        weight = torch.nn.Parameter(torch.ones(3))
        group.all_reduce_now(weight)
        return weight.tolist()

    assert mesh(2).each(run) == [[2.0] * 3] * 2


def test_only_contiguous_tensors(mesh):
    (group,) = mesh(1).groups
    with pytest.raises(ValueError, match="contiguous"):
        group.all_reduce(torch.zeros(4, 4).t())


def test_interrupt_wakes_every_blocked_call_of_every_rank_and_fails_the_later_ones(mesh):
    """Rank 0 waits in a sum, 1 for a message of 2, and 2 for a message of 3; only 3 is interrupted."""
    made = mesh(4)

    def run(group: Group) -> str:
        if group.rank == 3:
            group.interrupt()
        blocked = group.barrier if group.rank in (0, 3) else lambda: group.receive(torch.zeros(10), group.rank + 1)
        with pytest.raises(PeerLost):
            blocked()
        for later in (
            group.barrier,
            group.all_reduce(torch.zeros(1)).wait,
            group.send(torch.zeros(1), 3 - group.rank).wait,
        ):
            with pytest.raises(PeerLost):
                later()
        return "lost"

    assert made.each(run) == ["lost"] * 4


def test_interrupt_from_another_thread(mesh):
    made = mesh(2)
    blocked = made.pool.submit(made.groups[0].receive, torch.zeros(1), 1)
    made.groups[0].interrupt()
    with pytest.raises(PeerLost, match="interrupted"):
        blocked.result(5)


def test_a_group_of_one_can_be_interrupted_and_closed_twice(mesh):
    (group,) = mesh(1).groups
    group.all_reduce(torch.zeros(1)).wait()
    group.interrupt()
    with pytest.raises(PeerLost):
        group.barrier()
    group.close()
    group.close()
    with pytest.raises(PeerLost):
        group.all_reduce(torch.zeros(1)).wait()


def test_a_peer_that_never_comes():
    listener, gone = PeerListener(b"s" * 32), PeerListener(b"s" * 32)
    gone.close()
    common = {"listener": listener, "secret": b"s" * 32, "epoch": 1, "channel": "test", "timeout": 0.05}
    with pytest.raises(PeerLost, match="rank 1 did not connect"):
        Group(rank=0, addresses=[listener.address, gone.address], **common)
    with pytest.raises(PeerLost, match="nobody answers"):
        Group(rank=1, addresses=[gone.address, listener.address], **common)
    listener.close()
