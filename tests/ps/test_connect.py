"""The parameter server in loops of one's own: several clients, every consistency, tables, TLS, and mistakes."""

from __future__ import annotations

import runpy
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import tricorn
from tricorn import optim
from tricorn.errors import AuthenticationError, Diverged, PeerLost, ProtocolError, TableFull, UsageError
from tricorn.ps import Session, connect, serving
from tricorn.ps.access import Access
from tricorn.ps.ask import ask
from tricorn.ps.standing import client_tls, server_tls
from tricorn.ps.wire import Header, Op
from tricorn.table import Table

SGD = optim.SGD(lr=0.5)
GOAL = torch.tensor([1.0, -2.0, 3.0])


def declared(**changes: Any) -> dict[str, Any]:
    return {"dense": {"w": torch.zeros(3), "b": torch.zeros(())}, "optimizer": SGD} | changes


def together(servers: Access, workers: int, work: Callable[[Session, int], Any], **changes: Any) -> list[Any]:
    def one(rank: int) -> Any:
        with connect(servers, rank=rank, **declared(**changes)) as client:
            return work(client, rank)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, range(workers)))


@pytest.mark.parametrize("share", [True, False], ids=["shared", "tcp"])
@pytest.mark.parametrize("consistency", ["bsp", "ssp", "asp"])
def test_clients_train_together(consistency: str, share: bool) -> None:
    def work(client: Session, rank: int) -> torch.Tensor:
        client.pull().wait()
        for _ in range(30):
            client.gradients["w"].copy_((client.weights["w"] - GOAL) / 2)
            client.push_pull().wait()
        client.barrier()
        client.pull().wait()
        assert client.clock() == 30
        return client.weights["w"].clone()

    with serving(2, workers=2) as servers:
        found = together(servers, 2, work, consistency=consistency, share=share)
    for weights in found:
        torch.testing.assert_close(weights, GOAL, rtol=0, atol=1e-3)


def test_synchronous_clients_take_the_mean_over_all_samples() -> None:
    def work(client: Session, rank: int) -> float:
        client.pull().wait()
        client.gradients["b"].fill_((1.0, 5.0)[rank])
        client.push(count=(3, 1)[rank])
        client.pull().wait()
        return client.weights["b"].item()

    with serving(workers=2) as servers:
        assert together(servers, 2, work, consistency="bsp") == [-0.5 * (3 * 1.0 + 5.0) / 4] * 2


def test_rows_are_read_and_trained() -> None:
    ids = torch.tensor([7, -1, 2**60])

    def work(client: Session, rank: int) -> torch.Tensor:
        rows = client.pull({"emb": ids}).wait()["emb"]
        first = rows.clone()
        client.push({"emb": (ids, torch.ones(3, 4))}).wait()
        after = client.push_pull({"emb": (ids[:1], torch.ones(1, 4))}, {"emb": ids}).wait()["emb"]
        expected = first - 0.5
        expected[0] -= 0.5
        torch.testing.assert_close(after, expected)
        return first

    with serving(2) as servers:
        (first,) = together(servers, 1, work, tables={"emb": (4, Table(std=0.1))})
        found = [ask(address, bytes.fromhex(servers.secret)) for address in servers.servers.values()]
    assert first.abs().min() > 0
    assert sum(table["rows"] for one in found for table in one["tables"]) == 3
    assert sorted(hot for one in found for table in one["tables"] for hot in table["hot"]) == [
        [-1, 1], [7, 2], [2**60, 1]
    ]  # fmt: skip
    assert all(one["requests"] >= 3 and one["p50"] <= one["p99"] and one["bytes_sent"] > 0 for one in found)
    assert {age: count for one in found for age, count in one["staleness"].items()} == {"0": 1, "1": 1}


def test_requests_are_carried_out_in_order_and_may_be_awaited_late() -> None:
    with serving() as servers, connect(servers, **declared()) as client:
        client.gradients["b"].fill_(1.0)
        tickets = [client.push() for _ in range(10)]
        last = client.pull()
        last.wait()
        assert client.weights["b"].item() == -5.0
        for ticket in tickets:
            ticket.wait()


def test_a_client_that_comes_back_goes_on() -> None:
    with serving() as servers:
        for life in range(3):
            with connect(servers, **declared()) as client:
                client.pull().wait()
                assert client.weights["b"].item() == -0.5 * life
                client.gradients["b"].fill_(1.0)
                client.push().wait()


def test_what_top_k_leaves_out_is_sent_later() -> None:
    with serving() as servers, connect(servers, **declared(dense={"w": torch.zeros(400)}, compress="topk")) as client:
        client.pull().wait()
        for _ in range(300):
            client.gradients["w"].fill_(1.0)
            client.push().wait()
            client.pull().wait()
        assert (client.weights["w"] != 0).all()


def test_all_clients_declare_the_same() -> None:
    other = pytest.raises(ProtocolError, match="staleness 9 are not those that this server holds: 3")
    with serving(workers=2) as servers, connect(servers, **declared(consistency="asp")), other:
        connect(servers, rank=1, **declared(consistency="asp", staleness=9))


def test_who_waits_for_a_client_hears_that_it_has_left() -> None:
    bsp = declared(consistency="bsp")
    with serving(2, workers=2) as servers:
        with pytest.raises(ProtocolError, match="rows cannot be synchronous"):
            connect(servers, **declared(sparse_consistency="bsp"))
        with connect(servers, **bsp) as first, connect(servers, rank=1, **bsp) as second:
            waiting = first.push()
            second.close()
            with pytest.raises(PeerLost, match="the client of rank 1 has left") as error:
                waiting.wait()
            assert "under its rank" in (error.value.remedy or "")
        with connect(servers, rank=1, **bsp) as second, connect(servers, **bsp) as first:
            for client in (first, second):
                client.gradients["b"].fill_(1.0)
            for ticket in [first.push(), second.push(), first.pull()]:
                ticket.wait()
            assert first.weights["b"].item() in (-0.25, -0.5)  # the first may have been heard before it was told


@pytest.mark.parametrize("consistency", ["bsp", "asp"])
def test_a_gradient_that_is_not_finite_is_not_sent_and_training_goes_on(consistency: str) -> None:
    tables = {"t": (2, Table(std=0.0))}
    ids = torch.tensor([5])

    def work(client: Session, rank: int) -> list[float]:
        client.pull().wait()
        client.gradients["b"].fill_(1.0)
        if rank == 1:
            client.gradients["w"].fill_(torch.nan)
            with pytest.raises(Diverged, match="of the dense parameters is not finite; it was not sent"):
                client.push()
            client.gradients["w"].zero_()
            with pytest.raises(Diverged, match="of table 't' is not finite"):
                client.push_pull({"t": (ids, torch.tensor([[1.0, torch.inf]]))})
            client.pull().wait()
        for _ in range(2):
            client.push({"t": (ids, torch.ones(1, 2))})
            client.pull().wait()
        client.barrier()
        rows = client.pull({"t": ids}).wait()["t"]
        assert client.clock() == 2
        return [client.weights["b"].item(), *client.weights["w"].tolist(), *rows[0].tolist()]

    with serving(2, workers=2) as servers:
        found = together(servers, 2, work, consistency=consistency, tables=tables)
    moved = -1.0 if consistency == "bsp" else -2.0
    assert found == [[moved, 0.0, 0.0, 0.0, moved, moved]] * 2


@pytest.mark.parametrize("share", [True, False], ids=["shared", "tcp"])
def test_a_sum_that_overflows_is_dropped_on_all_servers_and_training_goes_on(share: bool) -> None:
    def work(client: Session, rank: int) -> list[float]:
        client.pull().wait()
        client.gradients["w"].fill_(1.0)
        client.gradients["b"].fill_(3e38)  # of two clients that is no float32; the other server's part is sound
        with pytest.raises(Diverged, match="the gradient of step 0 is not finite"):
            client.push().wait()
        client.gradients["b"].fill_(1.0)
        client.push_pull().wait()
        return [*client.weights["w"].tolist(), client.weights["b"].item()]

    with serving(2, workers=2) as servers:
        assert together(servers, 2, work, consistency="bsp", share=share) == [[-0.5] * 4] * 2


@pytest.mark.parametrize("servers", [1, 2])
def test_a_full_table_is_told_to_all_clients_of_a_synchronous_step(servers: int) -> None:
    few, many = torch.arange(40), torch.arange(20_000)

    def work(client: Session, rank: int) -> list[float]:
        client.pull().wait()
        client.gradients["b"].fill_(1.0)
        client.push_pull({"t": (few, torch.ones(40, 2))}).wait()
        before = client.pull({"t": few}).wait()["t"]
        pushed = {"t": (many, torch.ones(len(many), 2))} if rank == 1 else {}
        with pytest.raises(TableFull, match="memory limit leaves no room"):
            client.push(pushed).wait()
        assert torch.equal(client.pull({"t": few}).wait()["t"], before)
        client.push({"t": (few, torch.ones(40, 2))}).wait()
        after = client.pull({"t": few}).wait()["t"]
        return [client.weights["b"].item(), *(after - before).unique().tolist()]

    with serving(servers, workers=2, memory_limit=100_000) as access:
        found = together(access, 2, work, consistency="bsp", tables={"t": (2, Table(std=0.0))})
        told = [ask(address, bytes.fromhex(access.secret)) for address in access.servers.values()]
    assert found == [[-1.0, -0.5]] * 2
    assert sum(table["rows"] for one in told for table in one["tables"]) == 40


def test_a_full_table_of_asynchronous_servers_is_left_as_it_was() -> None:
    tables, many = {"t": (2, Table(std=0.1))}, torch.arange(20_000)
    with serving(memory_limit=100_000) as servers:
        with connect(servers, **declared(tables=tables)) as client:
            before = client.pull({"t": many}).wait()["t"]
            client.gradients["b"].fill_(1.0)
            with pytest.raises(TableFull, match="memory limit leaves no room"):
                client.push({"t": (many, torch.ones(len(many), 2))}).wait()
        with connect(servers, **declared(tables=tables)) as client:
            assert torch.equal(client.pull({"t": many}).wait()["t"], before)
            assert client.weights["b"].item() == 0.0


@pytest.mark.parametrize(
    ("ours", "theirs", "kernel"),
    [
        (optim.SGD(lr=0.1, momentum=0.9), torch.optim.SGD, {"fused": True, "momentum": 0.9}),
        (optim.Adam(lr=0.01), torch.optim.Adam, {"fused": True}),
        (optim.AdamW(lr=0.01), torch.optim.AdamW, {"fused": True}),
        (optim.Adagrad(lr=0.1), torch.optim.Adagrad, {"foreach": False}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_client_of_agreed_steps_has_the_numbers_of_torch_bit_for_bit(ours: Any, theirs: Any, kernel: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    expected = torch.randn(1003, generator=generator).requires_grad_()
    reference = theirs([expected], lr=ours.lr, **kernel)
    bsp = declared(dense={"w": expected.clone()}, optimizer=ours, consistency="bsp")
    with serving() as servers, connect(servers, **bsp) as client:
        client.pull().wait()
        for step in range(1, 11):
            expected.grad = torch.randn(1003, generator=generator)
            reference.param_groups[0]["lr"] = ours.lr * (1 / step)
            reference.step()
            client.gradients["w"].copy_(expected.grad)
            client.push_pull(factor=1 / step).wait()
            assert torch.equal(client.weights["w"], expected.detach()), step


def test_mistakes_are_told_by_name() -> None:
    with serving() as servers:
        tables = {"t": (2, Table(std=0.1))}
        with connect(servers, **declared(tables=tables)) as client:
            with pytest.raises(UsageError, match="no table 'other'"):
                client.pull({"other": torch.tensor([1])})
            with pytest.raises(UsageError, match="ids of table 't' come twice"):
                client.pull({"t": torch.tensor([5, 5])})
            with pytest.raises(UsageError, match="ids of table 't' are a list"):
                client.pull({"t": [1, 2]})
            for ids in (torch.tensor(5), torch.tensor([5.0]), torch.zeros(1, 1).long()):
                with pytest.raises(UsageError, match=r"ids of table 't' are torch.* of shape"):
                    client.pull({"t": ids})
            with pytest.raises(UsageError, match="rows come as int64"):
                client.pull(torch.tensor([5, 6]))
            row = torch.tensor([5])
            for given in ((row, [[1.0, 1.0]]), row, (row,)):
                with pytest.raises(UsageError, match="the gradients of table 't' are"):
                    client.push({"t": given})
            for number in (torch.nan, torch.inf, "1"):
                with pytest.raises(UsageError, match="factor is"):
                    client.push(factor=number)
                with pytest.raises(UsageError, match="count is"):
                    client.push_pull(count=number)
            with pytest.raises(UsageError, match="count is -1"):
                client.push(count=-1)
            assert client.clock() == 0
        with pytest.raises(ProtocolError, match=r"dense parameters .* are not those that this server holds"):
            connect(servers, **declared(dense={"w": torch.zeros(4)}))
        with pytest.raises((AuthenticationError, PeerLost)):
            connect([*servers.servers.values()], secret=b"x" * 32, **declared())
        with pytest.raises(ProtocolError, match="none of rank 1"):
            connect(servers, rank=1, **declared())
    with pytest.raises(PeerLost, match="nobody answers"):
        connect(servers, **declared())
    for wrong, words in (
        ({"optimizer": optim.SGD(lr=-1.0)}, "optimizer's lr is -1.0"),
        ({"consistency": "eventual"}, "consistency is 'eventual'"),
        ({"staleness": -1}, "staleness is -1"),
        ({"compress": "zip"}, "no encoding 'zip'"),
        ({"compress": "topk", "tables": tables}, "topk leaves"),
        ({"compress_tables": {"t": "topk"}, "tables": tables}, "no encoding 'topk'"),
        ({"compress_tables": {"u": "int8"}, "tables": tables}, "the table 'u'"),
    ):
        with pytest.raises(UsageError, match=words):
            connect(servers, **declared(**wrong))
    with pytest.raises(UsageError, match="no secret"):
        connect([("127.0.0.1", 1)], **declared())
    with pytest.raises(UsageError, match="cannot be read"):
        connect("nowhere.json", **declared())
    with pytest.raises(UsageError, match="float16"):
        connect(servers, **declared(dense={"w": torch.zeros(3, dtype=torch.float16)}))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    make_certificate(certificate, key)
    return certificate, key


def make_certificate(certificate: Path, key: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=tricorn", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip


def test_tls(certificate: tuple[Path, Path]) -> None:
    big = {"dense": {"w": torch.zeros(500_000)}}
    with serving(tls=server_tls(*certificate)) as servers:
        with connect(servers, **declared(**big), tls=certificate[0]) as client:
            client.pull().wait()
            client.gradients["w"].fill_(1.0)
            for _ in range(3):
                client.push_pull().wait()
            assert torch.equal(client.weights["w"], torch.full((500_000,), -1.5))
        (address,) = servers.servers.values()
        assert ask(address, bytes.fromhex(servers.secret), certificate[0])["requests"] > 3
        with pytest.raises(PeerLost):  # a plain client
            connect(servers, **declared(**big))
    with serving() as servers, pytest.raises((AuthenticationError, PeerLost)):  # a plain server
        connect(servers, **declared(**big), tls=certificate[0])


def test_small_requests_are_encrypted_however_many_come(certificate: tuple[Path, Path]) -> None:
    with serving(tls=server_tls(*certificate)) as servers, connect(servers, **declared(), tls=certificate[0]) as client:
        client.pull().wait()
        client.gradients["b"].fill_(1.0)
        for _ in range(50):
            client.push_pull().wait()
        assert client.weights["b"].item() == -25.0


def test_statistics_count_what_is_read_where_it_lies() -> None:
    count = 100_000
    with serving() as servers:
        with connect(servers, **declared(dense={"w": torch.zeros(count)})) as client:
            client.pull().wait()
            for _ in range(3):
                client.push().wait()
        (address,) = servers.servers.values()
        assert ask(address, bytes.fromhex(servers.secret))["bytes_received"] >= 4 * count * 4  # with the first weights


def test_a_certificate_that_is_not_trusted(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    make_certificate(other, tmp_path / "key.pem")
    with serving(tls=server_tls(*certificate)) as servers, pytest.raises(AuthenticationError, match="not trusted"):
        connect(servers, **declared(), tls=other)
    with pytest.raises(UsageError, match="no certificate to trust"):
        client_tls(tmp_path / "nothing.pem")
    with pytest.raises(UsageError, match="no certificate to serve with"):
        server_tls(other, certificate[1])


def test_the_example_trains() -> None:
    example = runpy.run_path(str(Path(tricorn.__file__).parents[2] / "examples" / "own_loop.py"))
    assert max(example["main"](steps=100)) < 0.1


@pytest.mark.parametrize("said", [b"{", b"5", b'{"a": "\xff"}'])
def test_statistics_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    ours, theirs = socket.socketpair()
    monkeypatch.setattr("tricorn.ps.ask.connect", lambda *_, **__: ours)
    with theirs:
        theirs.sendall(Header(op=Op.STATS).pack(len(said)) + said)
        with pytest.raises(ProtocolError, match="statistics cannot be read"):
            ask(("127.0.0.1", 1), b"secret")
