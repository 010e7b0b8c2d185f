"""Rows of sparse tables through real clients and services: which numbers come back, in every mode."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tricorn import optim
from tricorn.errors import Diverged, ProtocolError, UsageError
from tricorn.ps.client import Client
from tricorn.ps.rows import RowGradients
from tricorn.ps.table import _divided
from tricorn.ps.wire import VOID, Header, Op
from tricorn.state.shards import Piece, write_shard
from tricorn.table import Table

from .hub import F64, Build, dense, gradients, initial, read, spec, wanted

IDS = [5, -3, 2**63 - 1, -(2**63), 0, 17, 4096]


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("consistency", ["bsp", "ssp", "asp"])
def test_reading_gives_first_values_and_inserts_nothing(hub: Build, servers: int, consistency: str) -> None:
    run = hub(spec(std=0.1), spec("other"), servers=servers, consistency=consistency)
    (client,) = run.begin()
    assert torch.equal(read(client, IDS), initial(IDS, std=0.1))
    assert torch.equal(read(client, IDS, table=1), initial(IDS, "other"))
    assert read(client, []).shape == (0, 4)
    both = [wanted(IDS, 1), wanted([9], 0)]
    client.read_rows(both)
    assert torch.equal(both[0].out_UD, initial(IDS, "other"))
    assert torch.equal(both[1].out_UD, initial([9], std=0.1))
    assert [table.rows for host in run.hosts for table in host.service._mode.table.sparse] == [0] * 2 * servers


@pytest.mark.parametrize("servers", [1, 2])
def test_synchronous_rows_are_summed_over_ranks_and_divided_by_the_count(hub: Build, servers: int) -> None:
    run = hub(spec(), servers=servers, workers=2)
    clients = run.begin()
    pushes = [gradients([1, 2, 3], 6.0), gradients([3, 4, 2], torch.arange(12, dtype=F64).view(3, 4))]

    def work(client: Client, rows: RowGradients) -> tuple[float, torch.Tensor]:
        ack = client.push_sum(0, (0.0, 1.5, 1.0, 0.0, 0.0), dense(1.5), [rows])
        again = wanted([1, 2, 3, 4])
        weights_N = dense()
        client.pull_version(1, weights_N, [again], scale=0.5, factor=0.1)
        assert torch.allclose(weights_N, torch.full((3,), -0.05, dtype=F64), rtol=1e-14)
        return ack.squared_norm, again.out_UD

    with ThreadPoolExecutor() as pool:
        (norm, one), (_, other) = pool.map(work, clients, pushes)
    sums = torch.tensor([[6, 6, 6, 6], [14, 15, 16, 17], [6, 7, 8, 9], [4, 5, 6, 7]], dtype=F64)
    assert norm == pytest.approx(float((sums / 3).square().sum()) + 3.0, rel=1e-12)
    assert torch.equal(one, other)
    assert torch.allclose(one, initial([1, 2, 3, 4]) - 0.5 * 0.1 * 0.5 * sums / 3, rtol=1e-14)


@pytest.mark.parametrize("servers", [1, 3])
def test_asynchronous_rows_are_applied_with_the_dense_part_once_a_step(hub: Build, servers: int) -> None:
    run = hub(spec(), spec("b", optimizer=optim.Adagrad(lr=1.0)), servers=servers, consistency="asp")
    (client,) = run.begin()
    for _ in range(2):  # the second time it is known
        pushed = client.push(4, [0] * servers, dense(1.0), [gradients(IDS, 2.0), gradients([1], -3.0, 1)], factor=0.5)
        assert pushed == ([1] * servers, False)
    asked, weights_N = [wanted(IDS), wanted([1], 1)], dense()
    assert client.pull(weights_N, asked) == [1] * servers
    assert torch.equal(weights_N, dense(-0.5))
    assert torch.equal(asked[0].out_UD, initial(IDS) - 0.5)
    assert torch.allclose(asked[1].out_UD, initial([1], "b") + 0.5, rtol=1e-9)
    pushed, versions = client.push_pull(5, [1] * servers, dense(1.0), [gradients(IDS, 2.0)], weights_N, asked, factor=1)
    assert (pushed.versions, versions) == ([2] * servers, [2] * servers)
    assert torch.equal(asked[0].out_UD, initial(IDS) - 0.5 - 1.0)


def test_rows_of_synchronous_steps_may_be_read_ahead_where_the_tables_allow(hub: Build) -> None:
    run = hub(spec(), sparse_consistency="ssp", staleness=1, servers=2)
    (client,) = run.begin()
    client.pull_version(0, dense(), scale=1.0, factor=0.0)
    for step in range(3):
        ahead = wanted(IDS)
        reading = client.ask_rows([ahead], ahead=1)  # for the step after this one, while this one computes
        client.push_sum(step, (0.0, 1.0, 1.0, 0.0, 0.0), dense(), [gradients(IDS, 2.0)], bases=[max(0, step - 1)] * 2)
        assert reading.wait() == [step] * 2
        assert torch.allclose(ahead.out_UD, initial(IDS) - step, rtol=1e-13)
        client.pull_version(step + 1, dense(), scale=1.0, factor=1.0)
    assert [host.service.staleness for host in run.hosts] == [{0: 1, 1: 2}] * 2
    with pytest.raises(ProtocolError, match="before version 4 is pulled"):
        client.read_rows([wanted(IDS)], ahead=2)


def test_a_list_that_was_read_travels_once(hub: Build) -> None:
    run = hub(spec(), consistency="asp")
    (client,) = run.begin()
    (line,) = client._wire.servers
    ids = torch.arange(1000)
    asked = wanted(ids)
    client.pull(dense(), [asked])
    assert line.frames[-1].length == 8 + 16 + 8000
    client.push(0, [0], dense(), [RowGradients(0, ids, torch.ones(1000, 4, dtype=F64))], factor=1.0)
    assert line.frames[-1].length == 24 + 8 + 16 + 32_000
    client.read_rows([wanted(torch.arange(1000))])  # the same list as another tensor
    assert line.frames[-1].length == 8 + 16
    client.read_rows([asked], peek=True)
    assert torch.equal(asked.out_UD, initial(np.arange(1000)) - 0.5)


@pytest.mark.parametrize("servers", [1, 2])
def test_ids_that_were_changed_in_place_are_other_ids(hub: Build, servers: int) -> None:
    run = hub(spec(), consistency="asp", servers=servers)
    (client,) = run.begin()
    ids = torch.arange(100)
    for first in (0, 1000):
        asked = wanted(ids.copy_(torch.arange(first, first + 100)))
        client.read_rows([asked])
        assert torch.equal(asked.out_UD, initial(np.arange(first, first + 100)))


def test_a_server_that_forgot_a_list_is_told_again(hub: Build) -> None:
    run = hub(spec(), consistency="asp")
    (client,) = run.begin()
    (line,), (host,) = client._wire.servers, run.hosts
    ids = torch.arange(100)
    asked, rows = wanted(ids), RowGradients(0, ids, torch.ones(100, 4, dtype=F64))
    client.pull(dense(), [asked])
    for step, forget in enumerate([True, False]):
        if forget:
            host.service._mode.greet(0)
        client.push(step, [0], dense(), [rows], factor=1.0)
    client.pull(dense(), [asked])
    host.service._mode.greet(0)
    client.push_pull(2, [2], dense(), [rows], dense(), [asked], factor=1.0)
    assert torch.allclose(asked.out_UD, initial(np.arange(100)) - 1.5, rtol=1e-14)
    host.service._mode.greet(0)
    client.read_rows([asked])
    assert [Op(frame.op).name for frame in line.frames[2:]] == [
        "PULL", "PUSH", "PUSH", "PUSH", "PULL", "PUSH_PULL", "PUSH_PULL", "ROWS", "ROWS"
    ]  # fmt: skip


@pytest.mark.parametrize("compress", ["bf16", "fp16", "int8", "topk"])
def test_gradients_may_travel_shortened(hub: Build, compress: str) -> None:
    run = hub(spec(), consistency="asp", servers=2)
    (client,) = run.begin(compress=compress)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(300, 4, generator=generator, dtype=F64)
    rows, asked = RowGradients(0, torch.arange(300), values), wanted(range(300))
    client.push(0, [0, 0], torch.tensor([1.0, -2.0, 0.5], dtype=F64), [rows], factor=1.0)
    weights_N = dense()
    client.pull(weights_N, [asked])
    lost = (initial(np.arange(300)) - asked.out_UD) / 0.5 - values
    assert 0 < lost.abs().max() < (5 if compress == "topk" else 0.04)
    if compress != "topk":
        assert torch.allclose(weights_N, torch.tensor([-1.0, 2.0, -0.5], dtype=F64), rtol=0.01)
    plain = 24 + 300 * 32 + 300 * 8
    assert sum(line.frames[1].length for line in client._wire.servers) < plain / 2 + 300 * 8


@pytest.mark.parametrize(
    ("whole", "by_table", "exact"),
    [("none", {"emb": "int8"}, (True, False, True)), ("int8", {"emb": "none", "other": "bf16"}, (False, True, False))],
)
def test_each_table_may_travel_in_its_own_way(
    hub: Build, whole: str, by_table: dict[str, str], exact: tuple[bool, ...]
) -> None:
    def sent(compress: str, compress_tables: dict[str, str]) -> tuple[int, list[torch.Tensor]]:
        run = hub(spec(), spec("other"), consistency="asp")
        (client,) = run.begin(compress=compress, compress_tables=compress_tables)
        values = torch.randn(303, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
        rows = [RowGradients(table, torch.arange(300), values[:300]) for table in (0, 1)]
        weights_N, asked = dense(), [wanted(range(300), table) for table in (0, 1)]
        client.push(0, [0], values[300:, 0].contiguous(), rows, factor=1.0)
        client.pull(weights_N, asked)
        return client._wire.servers[0].frames[2].length, [weights_N, *(each.out_UD for each in asked)]

    size, plain = sent("none", {})
    smaller, found = sent(whole, by_table)
    assert tuple(torch.equal(a, b) for a, b in zip(plain, found, strict=True)) == exact
    encoded = {"none": 9600, "int8": 1200 + 5 * 4, "bf16": 2400}  # of 300 rows of 4 float64
    saved = sum(9600 - encoded[by_table.get(name, whole)] for name in ("emb", "other"))
    assert abs(size - smaller - saved) < 32  # and of three dense elements


@pytest.mark.parametrize("consistency", ["bsp", "asp"])
def test_prefilled_rows_begin_as_the_model_gave_them(hub: Build, consistency: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("tricorn.ps.client._LOAD_BYTES", 1000)
    given = torch.randn(200, 4, generator=torch.Generator().manual_seed(2), dtype=F64)
    run = hub(spec("declared"), spec(prefilled=200), servers=3, consistency=consistency)
    (client,) = run.begin(prefilled=[None, given])
    assert torch.equal(read(client, range(199, -1, -1), table=1), given.flip(0))
    assert torch.equal(read(client, range(200)), initial(range(200), "declared"))


def test_a_table_whose_rows_are_known_leaves_the_memory_to_the_others() -> None:
    known = msgspec.structs.replace(spec("known"), prefilled=10_000)
    bounded = msgspec.structs.replace(spec("bounded"), declared=Table(max_rows=10_000))
    one, other, *rest = _divided(1 << 30, [known, bounded, spec("a"), spec("b")])
    assert 10_000 * 100 < one <= other < 4 << 20
    assert rest == [((1 << 30) - one - other) // 2] * 2
    assert _divided(3000, [spec("a"), known, spec("b")]) == [1000] * 3


@pytest.mark.parametrize("void", [False, True])
def test_who_comes_when_another_was_lost_between_servers_brings_them_together(hub: Build, void: bool) -> None:
    run = hub(spec(), servers=2)
    (client,) = run.begin()
    pushed = dense(1.0)
    pushed[0] = torch.nan if void else 1.0  # at the first server
    with suppress(Diverged):
        client.push_sum(0, (0.0, 1.0, 1.0, 0.0, 0.0), pushed, [gradients(range(9), 1.0)])
    client._wire.servers[void].send(Header(Op.PULL, version=1, flags=VOID * void, numbers=(1.0, 1.0)))
    assert [host.service._mode._bsp.version for host in run.hosts] == ([0, 1] if void else [1, 0])
    (client,) = run.come()
    weights_N = dense(9.0)
    assert client.newest(weights_N) == 1
    assert torch.equal(weights_N, dense(0.0 if void else -1.0))
    assert torch.equal(read(client, range(9)), initial(range(9)) - (0.0 if void else 0.5))
    client.push_sum(1, (0.0, 1.0, 1.0, 0.0, 0.0), dense(1.0))
    client.pull_version(2, weights_N, scale=1.0, factor=1.0)
    assert torch.equal(weights_N, dense(-1.0 if void else -2.0))


@pytest.mark.parametrize("servers", [(2, 3), (1, 2)])
@pytest.mark.parametrize("consistency", ["bsp", "asp"])
def test_a_checkpoint_of_tables_goes_on_with_other_servers(
    hub: Build, servers: tuple[int, int], consistency: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("tricorn.ps.table.CHUNK", 7)
    tables = (spec(optimizer=optim.Adam(lr=0.1)), spec("b", optimizer=optim.RowwiseAdagrad(lr=0.1)), spec("none"))

    def rows() -> list[RowGradients]:
        return [gradients(range(-20, 20), 1.5), gradients([3, 7], 0.5, 1)]

    def steps(client: Client, count: int, servers: int, first: int) -> None:
        for step in range(first, first + count):
            if consistency == "asp":
                client.push(step, [step] * servers, dense(1.0), rows(), factor=1.0)
            else:
                client.push_sum(step, (0.0, 1.0, 1.0, 0.0, 0.0), dense(1.0), rows())
                client.pull_version(step + 1, dense(), scale=1.0, factor=1.0)

    run = hub(*tables, servers=servers[0], consistency=consistency)
    (client,) = run.begin()
    steps(client, 3, servers[0], 0)
    for host in run.hosts:
        host.service.snapshot(3)
    steps(client, 2, servers[0], 3)
    other = hub(*tables, servers=servers[1], consistency=consistency)
    (later,) = other.begin("checkpoint", 3, applied=[(0, 3)])
    steps(later, 2, servers[1], 3)
    for table in range(3):
        assert torch.equal(read(later, range(-25, 25), table), read(client, range(-25, 25), table))
    assert sum(host.service._mode.table.sparse[0].rows for host in other.hosts) == 40


@pytest.mark.parametrize("servers", [1, 2])
def test_weights_that_were_trained_as_a_whole_become_rows(hub: Build, tmp_path: Path, servers: int) -> None:
    generator = torch.Generator().manual_seed(3)
    whole, state = (torch.rand(50, 4, generator=generator, dtype=F64) for _ in range(2))
    write_shard(tmp_path / "5", "worker-0.safetensors", [
        Piece("param/w", (3,), 0, 3, dense(2.0)), Piece("param/emb.weight", (50, 4), 0, 200, whole.flatten()),
        Piece("optim/sum/emb.weight", (50, 4), 0, 200, state.flatten()),
    ])  # fmt: skip
    run = hub(spec(optimizer=optim.Adagrad(lr=1.0)), servers=servers, consistency="asp")
    (client,) = run.begin("checkpoint", 5)
    assert torch.equal(read(client, range(50)), whole)
    assert torch.equal(read(client, [50, -1]), initial([50, -1]))
    client.push(5, [5] * servers, dense(), [gradients([7], 2.0)], factor=1.0)
    assert torch.allclose(read(client, [7])[0], whole[7] - 2.0 / (state[7] + 4).sqrt(), rtol=1e-9)
    momentum = hub(spec(optimizer=optim.SGD(lr=1.0, momentum=0.9)), consistency="asp")
    with pytest.raises(UsageError, match=r"has no optim/momentum_buffer/emb\.weight"):
        momentum.begin("checkpoint", 5)
