"""docs/protocol.md is enough to write a worker: the one it shows trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tricorn.ps import blocks, placement, service, wire
from tricorn.ps.sparse.ids import bucket_of
from tricorn.ps.sparse.spec import BUCKETS, TableSpec
from tricorn.ps.table import Description

from .cluster import SECRET, Cluster, make_job

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def test_the_worker_of_the_page_trains(cluster: Callable[..., Cluster]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    run = cluster(make_job(), workers=1, consistency="asp")
    run.begin("initial")
    names: dict[str, Any] = {"address": run.servers[0].address, "secret": SECRET}
    exec(compile(program, "docs/protocol.md", "exec"), names)
    assert names["weights"] == pytest.approx((1.0, 2.0, 3.0), abs=1e-4)
    assert names["rows"] == pytest.approx((1.0, 1.0, 1.0, 1.0), abs=1e-4)
    run.regroup()
    assert run.applied == [list(range(20))]


def test_the_page_says_what_the_code_has() -> None:
    """Every number of the page that a client has to have right."""
    for words in (
        f"This is version {wire.PROTOCOL} of the protocol",
        f"count of ids, at most {blocks.MAX_IDS:,}",
        f"at most {blocks.MAX_ROWS >> 20} MiB",
        f"newest\n{blocks.Kept.LISTS} lists of a connection, as long as these have {blocks.Kept.IDS:,} ids together",
        f"fall into {BUCKETS} buckets",
        f"at most {placement.BUCKET:,}",
        f"description (JSON, at most {wire.MAX_DOCUMENT >> 20} MiB)",
        f"payload (at most {wire.MAX_ERROR})",
        f"at most {service._MAX_LOAD >> 20} MiB of them",
    ):
        assert words.replace("\n", " ") in PAGE.replace("\n", " "), words
    for number, encoding in enumerate(blocks.ENCODINGS[1:], 1):
        assert f"{number} `{encoding}`" in PAGE


@pytest.mark.parametrize("kind", [Description, TableSpec])
def test_the_page_lists_every_field(kind: Any) -> None:
    heading = "description" if kind is Description else "sparse table"
    table = PAGE.split(f"| field of {'the' if kind is Description else 'a'} {heading} |")[1].split("\n\n")[0]
    listed = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    }
    assert listed == {info.name for info in msgspec.structs.fields(kind)}


def test_the_bucket_of_the_page_is_that_of_the_code() -> None:
    (line,) = re.findall(r"^x = id;.*$", PAGE, re.MULTILINE)
    for id in (0, 1, -1, 2**63 - 1, -(2**63), 123_456_789):
        names: dict[str, Any] = {"id": id % 2**64}
        for statement in line.split(";"):
            exec(statement.strip(), names)
            names["x"] %= 2**64
        assert names["bucket"] % 4096 == bucket_of(np.array([id]))[0]


def test_the_page_lists_every_kind_of_frame() -> None:
    listed = {name: int(kind) for name, kind in re.findall(r"^\| ([A-Z_]+) \| (\d+) \|", PAGE, re.MULTILINE)}
    assert listed == {op.name: op.value for op in wire.Op}
