"""What is done with a gradient that was computed from old weights, dense and rows alike."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tricorn.ps.client import Client
from tricorn.ps.rows import RowGradients, Wanted

from .hub import F64, Build, Hub, spec

IDS = torch.arange(6)


@pytest.fixture
def hub(hub: Build) -> Build:
    return partial(hub, spec(std=0.0), consistency="asp", workers=2)


def state(client: Client) -> tuple[torch.Tensor, torch.Tensor]:
    weights_N, rows_UD = torch.empty(Hub.N, dtype=F64), torch.empty(len(IDS), 4, dtype=F64)
    client.pull(weights_N, [Wanted(0, IDS, rows_UD)], peek=True)
    return weights_N, rows_UD


def grads(value: float) -> tuple[torch.Tensor, list[RowGradients]]:
    return torch.full((Hub.N,), value, dtype=F64), [RowGradients(0, IDS, torch.full((len(IDS), 4), value, dtype=F64))]


def test_old_gradients_are_kept_and_counted(hub: Build) -> None:
    run = hub()
    client, _ = run.begin()
    for step, base in enumerate([0, 1, 0, 0]):
        client.push(step, [base], *grads(1.0), factor=1.0)
    assert torch.equal(state(client)[0], torch.full((3,), -4.0, dtype=F64))
    assert run.hosts[0].service.staleness == {0: 2, 2: 1, 3: 1}


def test_the_rate_of_old_gradients_is_scaled(hub: Build) -> None:
    run = hub(stale="scale")
    client, _ = run.begin()
    client.push(0, [0], *grads(1.0), factor=1.0)
    client.push(1, [0], *grads(1.0), factor=1.0)  # age 1
    client.push(2, [0], *grads(3.0), factor=0.5)  # age 2
    weights_N, rows_UD = state(client)
    assert torch.allclose(weights_N, torch.full((3,), -(1 + 0.5 + 0.5), dtype=F64), rtol=1e-14)
    assert torch.allclose(rows_UD, torch.full((6, 4), -0.5 * (1 + 0.5 + 0.5), dtype=F64), rtol=1e-14)


@pytest.mark.parametrize("servers", [1, 2])
def test_what_is_too_old_is_refused_and_counts_once_when_it_comes_again(hub: Build, servers: int) -> None:
    run = hub(stale="drop", staleness=1, servers=servers)
    client, other = run.begin()
    for step in range(2):
        other.push(step, [step] * servers, *grads(1.0), factor=1.0)
    # Of two servers the second has been read later, and takes what the first refuses.
    bases = [0, 1][:servers]
    pushed = client.push(2, bases, *grads(1.0), factor=1.0)
    assert pushed.refused
    assert pushed.versions == [2, 3][:servers]
    weights_N, _ = state(client)
    assert torch.equal(weights_N, torch.tensor([-2.0, -3.0, -3.0] if servers == 2 else [-2.0] * 3, dtype=F64))
    again = client.push(2, bases, *grads(10.0), factor=1.0, any_age=True)
    assert again == ([3] * servers, False)
    weights_N, rows_UD = state(client)
    assert torch.equal(weights_N, torch.tensor([-12.0, -3.0, -3.0] if servers == 2 else [-12.0] * 3, dtype=F64))
    assert {float(value) for value in rows_UD.flatten()} == ({-6.0, -1.5} if servers == 2 else {-6.0})
    assert [host.service.applied for host in run.hosts] == [[(0, 3)]] * servers
    assert [host.service._mode._clocks.clocks for host in run.hosts] == [{0: 3, 1: 2}] * servers


@pytest.mark.parametrize("servers", [1, 2])
def test_delay_compensation_corrects_for_what_changed_since_the_read(hub: Build, servers: int) -> None:
    rate = 0.1
    run = hub(stale="compensate", compensation=rate, servers=servers)
    client, other = run.begin()
    weights_N, rows_UD = torch.empty(Hub.N, dtype=F64), torch.empty(len(IDS), 4, dtype=F64)
    client.pull(weights_N, [Wanted(0, IDS, rows_UD)])
    client.read_rows([Wanted(0, IDS, rows_UD.clone())], ahead=1)  # for the step after this one
    other.push(0, [0] * servers, *grads(2.0), factor=1.0)
    now_N, now_UD = state(other)
    assert torch.equal(now_N, torch.full((3,), -2.0, dtype=F64))
    client.push(1, [0] * servers, *grads(3.0), factor=1.0)
    expected_N = now_N - (3 + rate * 9 * (now_N - weights_N))
    expected_UD = now_UD - 0.5 * (3 + rate * 9 * (now_UD - rows_UD))
    weights, rows = state(other)
    assert torch.allclose(weights, expected_N, rtol=1e-14)
    assert torch.allclose(rows, expected_UD, rtol=1e-14)
    # The rows that were read ahead belong to the next push; of an id that was not read no change is known.
    odd = torch.tensor([1, 77])
    client.push(
        2, [1] * servers, torch.zeros(3, dtype=F64), [RowGradients(0, odd, torch.ones(2, 4, dtype=F64))], factor=1.0
    )
    _, after = state(other)
    assert torch.allclose(after[1], rows[1] - 0.5 * (1 + rate * rows[1]), rtol=1e-14)
    assert torch.equal(after[2:], rows[2:])
    fresh = torch.empty(2, 4, dtype=F64)
    other.read_rows([Wanted(0, odd, fresh)], peek=True)
    assert torch.equal(fresh[1], torch.full((4,), -0.5, dtype=F64))
