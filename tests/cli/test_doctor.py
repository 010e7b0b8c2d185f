from __future__ import annotations

import json
import shutil
from importlib import metadata

import pytest
import torch
import typer
from typer.testing import CliRunner

from tricorn.cli.doctor import doctor

app = typer.Typer()
app.command()(doctor)


def test_json_is_one_object_on_the_last_line() -> None:
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["available_memory"] <= found["machine"]["memory"]
    assert len(found["torch"]["cuda_devices"]) == torch.cuda.device_count()
    assert found["torch"]["gloo"] is torch.distributed.is_gloo_available()


def test_the_tables_name_what_is_missing_and_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    assert f"versions  torch             {metadata.version('torch')}" in result.stdout
    assert "tc       slow links between them       apt-get install iproute2" in result.stdout


def test_nothing_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tricorn.cli.doctor.missing", list)
    assert CliRunner().invoke(app, []).stdout.endswith("\nNothing is missing.\n")
