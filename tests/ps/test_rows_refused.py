"""Rows that are refused: whoever sent them is told why, and the tables stay as they were."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from tricorn.errors import Diverged, ProtocolError, TableFull, UsageError
from tricorn.ps.client import Client
from tricorn.ps.rows import RowGradients, Wanted
from tricorn.ps.sparse.ids import bucket_of

from .hub import F64, Build, dense, gradients, initial, read, spec, wanted


@pytest.mark.parametrize("ids", [torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32), torch.zeros(1, 1).long()])
def test_ids_of_a_wrong_type_are_the_callers_mistake(hub: Build, ids: torch.Tensor) -> None:
    run = hub(spec(), consistency="asp")
    (client,) = run.begin()
    rows = torch.zeros(1, 4, dtype=F64)
    for request in (
        lambda: client.read_rows([Wanted(0, ids, rows)]),
        lambda: client.push(0, [0], dense(1.0), [RowGradients(0, ids, rows)], factor=1.0),
        lambda: client.push_pull(0, [0], dense(1.0), [], dense(), [Wanted(0, ids, rows)], factor=1.0),
    ):
        with pytest.raises(UsageError, match=r"ids of table .emb. are .* of shape") as error:
            request()
        assert "int64" in error.value.remedy
    assert client.pull(dense()) == [0]  # nothing was sent


def test_rows_of_a_wrong_shape_type_or_table_are_the_callers_mistake(hub: Build) -> None:
    run = hub(spec())
    (client,) = run.begin()
    ids = torch.tensor([1])
    for rows in (torch.zeros(1, 5, dtype=F64), torch.zeros(2, 4, dtype=F64), torch.zeros(1, 4)):
        with pytest.raises(UsageError, match="rows of table 'emb'"):
            client.read_rows([Wanted(0, ids, rows)])
    with pytest.raises(UsageError, match="no table 1, only 1"):
        client.read_rows([wanted([1], 1)])
    with pytest.raises(UsageError, match="one table twice"):
        client.read_rows([wanted([1]), wanted([2])])


@pytest.mark.parametrize(
    ("where", "value"), [("dense", float("nan")), ("emb", float("inf")), ("b", float("nan")), ("b", -float("inf"))]
)
def test_a_gradient_that_is_not_finite_has_no_effect(hub: Build, where: str, value: float) -> None:
    run = hub(spec(), spec("b"), consistency="asp")
    (client,) = run.begin()
    rows = [gradients([1, 2], 1.0), gradients([1, 2], 1.0, 1)]
    grad = dense(1.0)
    (grad if where == "dense" else rows[where == "b"].grads_UD[1])[1] = value
    name = "the dense parameters" if where == "dense" else where
    with pytest.raises(Diverged, match=f"the gradient of {name} is not finite in step 8"):
        client.push(8, [0], grad, rows, factor=1.0)
    (client,) = run.begin("keep")
    weights_N = dense(9.0)
    assert client.pull(weights_N) == [0]
    assert torch.equal(weights_N, dense())
    assert torch.equal(read(client, [1, 2]), initial([1, 2]))
    assert client.push(8, [0], dense(1.0), factor=1.0).versions == [1]


@pytest.mark.parametrize("tables", [1, 2])
def test_an_id_that_is_pushed_twice_is_refused_or_added_up(hub: Build, tables: int) -> None:
    run = hub(*(spec(name) for name in ("emb", "b")[:tables]), consistency="asp")
    (client,) = run.begin()
    client.push(0, [0], dense(1.0), [gradients([1, 2], 1.0)], factor=1.0)
    for step, ids in enumerate(([1, 2, 1], [3, 3]), 1):  # of rows that there are, and that there are not
        with pytest.raises(ProtocolError, match="ids of table 'emb' come twice"):
            client.push(step, [1], dense(1.0), [gradients(ids, 1.0)], factor=1.0)
        (client,) = run.begin("keep")
        assert client.pull(dense()) == [1]
        assert torch.equal(read(client, [1, 2, 3]), initial([1, 2, 3]) - torch.tensor([[0.5], [0.5], [0.0]]))
    run = hub(spec(), consistency="bsp")
    (client,) = run.begin()
    client.push_sum(0, (0.0, 1, 1, 0, 0), dense(1.0), [gradients([1, 2, 1], 1.0)])
    client.pull_version(1, dense(), scale=1.0, factor=1.0)
    assert torch.equal(read(client, [1, 2]), initial([1, 2]) - torch.tensor([[1.0], [0.5]]))


@pytest.mark.parametrize("dense_too", [True, False])
def test_all_workers_hear_of_a_synchronous_gradient_that_is_not_finite(hub: Build, dense_too: bool) -> None:
    run = hub(spec(), workers=2)
    clients = run.begin()
    grad = dense(float("nan") if dense_too else 1.0)
    bad = gradients([1], 1.0 if dense_too else float("nan"))

    def work(client: Client) -> None:
        with pytest.raises(Diverged, match="the gradient of step 0 is not finite"):
            client.push_sum(0, (0.0, 1.0, 1.0, 0.0, 0.0), grad, [bad] if client is clients[1] else [])
        with pytest.raises(Diverged, match="the gradient of step 0 is not finite"):
            client.pull_version(1, dense(), scale=1.0, factor=1.0)  # of one who would go on all the same

    with ThreadPoolExecutor() as pool:
        [*pool.map(work, clients)]
    (client, _) = run.begin("keep", 0)
    weights_N = dense(9.0)
    client.pull_version(0, weights_N, scale=1.0, factor=0.0)
    assert torch.equal(weights_N, dense())
    assert torch.equal(read(client, [1]), initial([1]))


@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("consistency", ["bsp", "asp"])
def test_a_memory_limit_is_told_and_nothing_changes(hub: Build, consistency: str, tables: int) -> None:
    run = hub(*(spec("emb" if table else "before") for table in range(2 - tables, 2)), consistency=consistency,
              memory_limit=100_000 * tables)  # fmt: skip
    (client,) = run.begin()
    pushed = [gradients([1, 2], 1.0), gradients(torch.arange(100_000), 1.0, tables - 1)][2 - tables :]
    if consistency == "bsp":
        change = partial(client.push_sum, 0, (0.0, 1.0, 1.0, 0.0, 0.0), dense(1.0), pushed)
    else:
        change = partial(client.push, 0, [0], dense(1.0), pushed, factor=1.0)
    with pytest.raises(TableFull, match="table 'emb'"):
        change()
    if consistency == "bsp":  # who asks again is told again
        (client,) = run.begin("keep", 1)
        with pytest.raises(TableFull, match="table 'emb'"):
            client.status(0)
        with pytest.raises(TableFull, match="table 'emb'"):
            client.pull_version(1, dense(), scale=1.0, factor=1.0)
    (client,) = run.begin("keep", 0)
    weights_N = dense(9.0)
    if consistency == "asp":
        client.pull(weights_N)
    else:
        client.pull_version(0, weights_N, scale=1.0, factor=0.0)
    assert torch.equal(weights_N, dense())
    for table in range(tables):
        name = run.specs[table].name
        assert torch.equal(read(client, [1, 2], table), initial([1, 2], name))


@pytest.mark.parametrize("tables", [1, 2])
@pytest.mark.parametrize("consistency", ["bsp", "asp"])
def test_ids_of_another_placement_are_refused(hub: Build, consistency: str, tables: int) -> None:
    """As if the client believed in one server where there are two."""
    run = hub(*(spec(name) for name in ("emb", "b")[:tables]), consistency=consistency, servers=2)
    (client,) = run.begin()
    client._wire.rows._stops_S = np.array([4096, 4096])
    own = [id for id in range(100) if bucket_of(np.array([id]))[0] < 2048]
    pushed = dense(1.0), [gradients(own, 1.0), gradients(range(100), 1.0, tables - 1)][2 - tables :]
    if consistency == "bsp":
        push = partial(client.push_sum, 0, (0.0, 1.0, 1.0, 0.0, 0.0), *pushed)
    else:
        push = partial(client.push, 0, [0, 0], *pushed, factor=1.0)
    with pytest.raises(ProtocolError, match="is in none of the buckets 0 to 2047"):
        push()
    (client,) = run.begin("keep")
    weights_N = dense()
    if consistency == "bsp":
        client.pull_version(0, weights_N, scale=1.0, factor=1.0)
    else:
        client.pull(weights_N)
    assert weights_N[0] == 0.0  # at the server that refused
    assert torch.equal(read(client, range(100)), initial(range(100)))


@pytest.mark.parametrize("consistency", ["bsp", "asp"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_rate_that_is_not_finite_is_refused(hub: Build, consistency: str, number: float) -> None:
    for scale, factor in ((1.0, number), (number, 1.0))[: 2 if consistency == "bsp" else 1]:
        run = hub(spec(), consistency=consistency)
        (client,) = run.begin()
        pushed = dense(1.0), [gradients([1], 1.0)]
        if consistency == "bsp":
            client.push_sum(0, (0.0, 1.0, 1.0, 0.0, 0.0), *pushed)
            change = partial(client.pull_version, 1, dense(), scale=scale, factor=factor)
        else:
            change = partial(client.push, 0, [0], *pushed, factor=factor)
        with pytest.raises(ProtocolError, match="not all finite"):
            change()
        assert not run.hosts[0].service._mode.table.weights_S.any()
    run = hub(spec(), consistency="bsp")
    (client,) = run.begin()
    with pytest.raises(ProtocolError, match="not all finite"):
        client.push_sum(0, (0.0, number, 1.0, 0.0, 0.0), dense(1.0))


def test_a_table_of_another_shape_is_refused(hub: Build) -> None:
    run = hub(spec())
    run.begin()
    run.descriptions = hub(spec(dim=5)).descriptions
    with pytest.raises(ProtocolError, match=r"sparse tables .* are not those that this server holds"):
        run.begin("keep")


def test_a_checkpoint_without_the_table_is_refused(hub: Build) -> None:
    run = hub(spec())
    run.begin()
    run.hosts[0].service.snapshot(1)
    other = hub(spec("new"))
    with pytest.raises(UsageError, match="has no table 'new'"):
        other.begin("checkpoint", 1)
    wider = hub(spec(dim=6))
    wider.begin()
    assert wider.hosts[0].service._mode
