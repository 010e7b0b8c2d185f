"""PUSH_PULL is the PUSH and the PULL after it: in every mode that has it, for duplicates, and where it has to wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tricorn.errors import ProtocolError
from tricorn.ps.client import Client
from tricorn.ps.rows import RowGradients, Wanted
from tricorn.ps.wire import DUPLICATE, Header, Op

from .hub import F64, Build, Hub, spec

IDS = torch.arange(5)


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    with ExitStack() as stack:

        def build(**options: Any) -> Hub:
            folder: Path = tmp_path_factory.mktemp("hub")
            built = Hub(folder, spec(std=0.1), **{"workers": 2, "consistency": "asp"} | options)
            stack.callback(built.close)
            return built

        yield build


class Reader:
    """One worker's weights and rows, and the versions that they are of."""

    def __init__(self, client: Client, servers: int) -> None:
        self.client = client
        self.weights_N, self.rows_UD = torch.zeros(Hub.N, dtype=F64), torch.zeros(len(IDS), 4, dtype=F64)
        self.wanted = [Wanted(0, IDS, self.rows_UD)]
        self.bases = [0] * servers
        self.refused = False

    def pull(self) -> None:
        self.bases = self.client.pull(self.weights_N, self.wanted)

    def gradients(self, value: float) -> tuple[torch.Tensor, list[RowGradients]]:
        rows_UD = torch.linspace(-1, 1, len(IDS) * 4, dtype=F64).view(len(IDS), 4) * value
        return torch.linspace(0.5, 1.5, Hub.N, dtype=F64) * value, [RowGradients(0, IDS, rows_UD)]

    def both(self, step: int, value: float, *, at_once: bool) -> None:
        dense_N, rows = self.gradients(value)
        if at_once:
            pushed, self.bases = self.client.push_pull(
                step, self.bases, dense_N, rows, self.weights_N, self.wanted, factor=0.5
            )
        else:
            pushed = self.client.push(step, self.bases, dense_N, rows, factor=0.5)
            self.pull()
        self.refused = pushed.refused

    @property
    def state(self) -> tuple[Any, ...]:
        return self.weights_N.tolist(), self.rows_UD.tolist(), self.bases, self.refused


turns = st.tuples(st.integers(0, 1), st.booleans(), st.sampled_from([0.5, -1.0, 2.0]))


@pytest.mark.parametrize("stale", ["keep", "scale", "compensate", "drop"])
@pytest.mark.parametrize("servers", [1, 2])
def test_it_comes_to_the_same_as_the_two(hub: Build, stale: str, servers: int) -> None:
    @settings(max_examples=12)
    @given(st.lists(turns, min_size=1, max_size=12))
    def run(todo: list[tuple[int, bool, float]]) -> None:
        ends = []
        for at_once in (True, False):
            run = hub(stale=stale, staleness=1, servers=servers)
            readers = [Reader(client, servers) for client in run.begin()]
            for reader in readers:
                reader.pull()
            step, seen = 0, []
            for rank, again, value in todo:
                readers[rank].both(max(0, step - again), value, at_once=at_once)
                step += not (again and step)
                seen.append(readers[rank].state)
            services = [host.service for host in run.hosts]
            ends.append((seen, [(service.staleness, service.applied) for service in services]))
            run.close()
        assert ends[0] == ends[1]

    run()


@pytest.mark.parametrize("stale", ["keep", "compensate"])
def test_a_step_that_is_in_the_weights_is_told_and_its_rows_are_read(hub: Build, stale: str) -> None:
    run = hub(stale=stale)
    first, second = (Reader(client, 1) for client in run.begin())
    first.pull()
    first.both(0, 1.0, at_once=True)
    before = first.state
    second.both(0, 9.0, at_once=True)  # the same step by another worker
    assert second.state == before
    dense_N, rows = second.gradients(9.0)
    wire = second.client._wire
    header = Header(Op.PUSH_PULL, step=0, version=1, numbers=(1.0,))
    wire.send_push_pull([header], dense_N, rows, second.wanted)
    (reply,) = wire.receive_push_pull([header], dense_N, rows, second.weights_N, second.wanted)
    assert reply.flags & DUPLICATE
    assert second.state == before


def test_under_ssp_the_answer_waits_for_the_slowest_and_the_push_does_not(hub: Build) -> None:
    run = hub(consistency="ssp", staleness=1)
    fast, slow = (Reader(client, 1) for client in run.begin())
    fast.pull()
    slow.pull()
    fast.both(0, 1.0, at_once=True)  # one clock ahead: within the bound
    dense_N, rows = fast.gradients(1.0)
    reading = fast.client.ask_push_pull(1, fast.bases, dense_N, rows, fast.weights_N, fast.wanted, factor=0.5)
    host = run.hosts[0]
    assert host.waiting(0)
    assert host.service.applied == [(0, 2)]
    slow.client.push(2, slow.bases, *slow.gradients(1.0), factor=0.5)
    assert not host.waiting(0)
    assert reading.wait() == [3]
    slow.client.pull(slow.weights_N, slow.wanted, peek=True)
    assert torch.equal(fast.weights_N, slow.weights_N)
    assert torch.equal(fast.rows_UD, slow.rows_UD)


def test_under_ssp_who_leaves_holds_no_answer_up(hub: Build) -> None:
    run = hub(consistency="ssp", staleness=0)
    fast, slow = (Reader(client, 1) for client in run.begin())
    fast.pull()
    slow.pull()
    dense_N, rows = fast.gradients(1.0)
    reading = fast.client.ask_push_pull(0, fast.bases, dense_N, rows, fast.weights_N, fast.wanted, factor=1.0)
    assert run.hosts[0].waiting(0)
    slow.client.close()
    assert reading.wait() == [1]


def test_what_was_pushed_by_it_goes_on_under_bsp(hub: Build) -> None:
    run = hub()
    readers = [Reader(client, 1) for client in run.begin()]
    for step in range(6):
        readers[step % 2].both(step, 1.0, at_once=True)
    readers[1].pull()
    for host in run.hosts:
        host.service.snapshot(6)
    later = hub(consistency="bsp")
    later.folder = run.folder
    client, _ = later.begin("checkpoint", 6)
    reader = Reader(client, 1)
    client.pull_version(6, reader.weights_N, reader.wanted, scale=1.0, factor=1.0)
    assert torch.equal(reader.weights_N, readers[1].weights_N)
    assert torch.equal(reader.rows_UD, readers[1].rows_UD)
    with pytest.raises(ProtocolError):
        reader.both(6, 1.0, at_once=True)  # agreed steps know no such request
