"""``tricorn server`` and ``tricorn ps stats`` as a person uses them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tricorn import optim
from tricorn.cli.main import app
from tricorn.errors import TableFull, UsageError
from tricorn.ps import connect
from tricorn.table import Table

TRICORN = Path(sys.executable).with_name("tricorn")
SECRET = "ab" * 32


def test_servers_serve_until_told_to_end(tmp_path: Path) -> None:
    file = tmp_path / "servers.json"
    command = [TRICORN, "server", "--servers", "2", "--memory-limit", "100KB", "--file", file]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TRICORN_SECRET": SECRET}
    ) as process:
        assert process.stdout
        assert "Serving at 127.0.0.1:" in process.stdout.readline()
        assert file.stat().st_mode & 0o777 == 0o600
        assert json.loads(file.read_text())["secret"] == SECRET
        tables = {"emb": (2, Table())}
        with connect(file, dense={"w": torch.ones(2)}, tables=tables, optimizer=optim.SGD(lr=1.0)) as client:
            client.gradients["w"].fill_(0.25)
            client.push({"emb": (torch.arange(5), torch.ones(5, 2))}).wait()
            client.pull().wait()
            assert client.weights["w"].tolist() == [0.75, 0.75]
            with pytest.raises(TableFull, match=r"table 'emb' has \d rows, and its memory limit leaves no room"):
                client.push({"emb": (torch.arange(20_000), torch.ones(20_000, 2))}).wait()
        told = CliRunner().invoke(app, ["ps", "stats", str(file), "--interval", "0.05", "--json"])
        shown = CliRunner().invoke(app, ["ps", "stats", str(file), "--interval", "0.05"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    servers = json.loads(told.stdout)["servers"]
    assert {*servers} == {"server-0", "server-1"}
    assert sum(table["rows"] for server in servers.values() for table in server["tables"]) == 5
    assert sum(server["dense"]["elements"] for server in servers.values()) == 2
    assert sum(server["bytes_in_place"] for server in servers.values()) == 2 * 4  # this host reads weights there
    assert all(server["staleness"] == {"0": 1} and server["p99"] > 0 for server in servers.values())
    assert "emb" in shown.stdout
    assert "versions old" in shown.stdout
    assert not file.exists()
    late = CliRunner().invoke(app, ["ps", "stats", str(file)])
    assert isinstance(late.exception, UsageError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory-limit", "much"], "--memory-limit is 'much'"),
        (["--certificate", "c.pem"], "go together"),
    ],
)
def test_options_that_cannot_be_are_told(tmp_path: Path, options: list[str], words: str) -> None:
    refused = CliRunner().invoke(app, ["server", "--file", str(tmp_path / "servers.json"), *options])
    assert isinstance(refused.exception, UsageError)
    assert words in str(refused.exception)


def test_a_server_that_cannot_start_ends_them_all(tmp_path: Path) -> None:
    command = [TRICORN, "server", "--file", tmp_path / "servers.json", "--host", "192.0.2.1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "cannot listen at 192.0.2.1" in ended.stderr


def test_a_secret_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRICORN_SECRET", "short")
    refused = CliRunner().invoke(app, ["server", "--file", str(tmp_path / "servers.json")])
    assert isinstance(refused.exception, UsageError)
    assert "64 hexadecimal" in str(refused.exception)
