"""docs/protocol.md is enough to write a worker: the one it shows trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tricorn.ps import wire

from .cluster import SECRET, Cluster, make_job

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def test_the_worker_of_the_page_trains(cluster: Callable[..., Cluster]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    run = cluster(make_job(), workers=1, consistency="asp")
    run.begin("initial")
    names: dict[str, Any] = {"address": run.servers[0].address, "secret": SECRET}
    exec(compile(program, "docs/protocol.md", "exec"), names)
    assert names["weights"] == pytest.approx((1.0, 2.0, 3.0), abs=1e-4)
    run.regroup()
    assert run.applied == [list(range(20))]


def test_the_page_lists_every_kind_of_frame() -> None:
    listed = {name: int(kind) for name, kind in re.findall(r"^\| ([A-Z]+) \| (\d+) \|", PAGE, re.MULTILINE)}
    assert listed == {op.name: op.value for op in wire.Op}
