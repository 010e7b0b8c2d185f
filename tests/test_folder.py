"""A run's folder as the launcher reads it: whole, or damaged in any way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tricorn import folder as folders
from tricorn.engine.base import JobFacts
from tricorn.errors import UsageError
from tricorn.plan import Plan

JOB = JobFacts(
    name="digits", file=None, entry="job", fingerprint="data", samples=12, evaluation_samples=0, batch_size=4, epochs=2,
    seed=0, precision="float32", device="cpu", optimizer={}, metrics=[],
)  # fmt: skip
SUMMARY = {
    "run": "a", "outcome": "done", "steps": 6, "samples": 24, "seconds": 1.0, "samples_per_second": 24.0, "loss": None,
    "metrics": {},
}  # fmt: skip
DAMAGED = [b"", b"5", b"[]", b"{}", b'{"', b'{"name": "\xff"}', b'{"outcome": "done"}', b'{"a":' * 100_000]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folders.say(tmp_path, JOB, Plan(strategy="dp"))
    folders.write_json(tmp_path / "summary.json", SUMMARY)
    return tmp_path


def test_what_was_written_is_read(folder: Path) -> None:
    assert folders.load(folder) == (JOB, Plan(strategy="dp"))
    assert folders.read_plan(folder / "plan.json") == Plan(strategy="dp")
    assert folders.finished(folder, JOB) == SUMMARY
    assert folders.finished(folder, msgspec.structs.replace(JOB, epochs=3)) is None


@pytest.mark.parametrize("content", DAMAGED)
def test_what_is_damaged_is_one_error_or_as_if_it_were_not_there(folder: Path, content: bytes) -> None:
    reads: dict[str, list[Callable[[], Any]]] = {
        "job.json": [lambda: folders.load(folder)],
        "plan.json": [lambda: folders.load(folder), lambda: folders.read_plan(folder / "plan.json")],
    }
    for name, calls in reads.items():
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        for call in calls:
            with pytest.raises(UsageError):
                call()
        assert (folders.finished(folder, JOB) is None) == (name == "job.json")
        (folder / name).write_bytes(before)
    (folder / "summary.json").write_bytes(content)
    assert folders.finished(folder, JOB) is None


@pytest.mark.parametrize("damaged", [*DAMAGED, b'{"step": null, "loss": 1.0}', b'{"step": [], "evaluation": {}}'])
def test_damaged_lines_of_the_metrics_are_left_out(folder: Path, damaged: bytes) -> None:
    rows = [{"step": step, "loss": 1.0} for step in range(2)]
    first, second = map(msgspec.json.encode, rows)
    (folder / "metrics.jsonl").write_bytes(b"\n".join((first, damaged, second)))
    assert folders.history(folder) == rows
