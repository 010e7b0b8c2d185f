"""The run's folder, as others will read it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tricorn.control import record as module
from tricorn.control.checkpoints import folder_of
from tricorn.control.intervals import Intervals
from tricorn.control.ledger import Order
from tricorn.control.messages import File
from tricorn.control.record import Record
from tricorn.folder import history
from tricorn.plan import Plan
from tricorn.testing.clock import VirtualClock

ORDER = Order(seed=3, fingerprint="data", samples=10, batch_size=4, epochs=2)  # steps of 4, 4 and 2 samples
PROMISED = {
    "run", "strategy", "plan", "workers", "servers", "steps", "samples", "seconds", "samples_per_second", "bytes_sent",
    "restarts", "exactly_once", "loss", "metrics",
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    clock = VirtualClock(100.0)
    monkeypatch.setattr(module.time, "monotonic", clock.now)
    monkeypatch.setattr(module.time, "time", lambda: 2e9 + clock.now())
    return clock


@contextlib.contextmanager
def opened(folder: Path, launch: str = "first") -> Iterator[Record]:
    with contextlib.closing(Record(folder, ORDER, Plan(strategy="dp", workers=2), launch)) as record:
        yield record


@pytest.fixture
def record(tmp_path: Path, clock: VirtualClock) -> Iterator[Record]:
    with opened(tmp_path) as record:
        yield record


def rows(folder: Path) -> list[dict]:
    return [msgspec.json.decode(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def run(record: Record, clock: VirtualClock, steps: range) -> None:
    for step in steps:
        clock.advance(0.5)
        record.ledger.commit([step], 1)
        record.progress([step])
        record.trace(step, 1.0 / (step + 1))


def test_the_summary_of_a_whole_run(record, clock, tmp_path):
    record.begin(1, Intervals(), "the run begins")
    run(record, clock, range(6))
    record.measured(3, {"loss": 0.5})
    record.measured(6, {"loss": 0.25})
    summary = record.finish("done", 123, {"worker-0": 5})
    assert msgspec.json.decode((tmp_path / "summary.json").read_bytes()) == summary
    assert summary.keys() >= PROMISED
    assert (summary["run"], summary["outcome"], summary["strategy"]) == (tmp_path.name, "done", "dp")
    assert (summary["steps"], summary["total_steps"], summary["samples"]) == (6, 6, 20)
    assert (summary["seconds"], summary["samples_per_second"]) == (3.0, pytest.approx(20 / 3, abs=0.05))
    assert (summary["bytes_sent"], summary["restarts"], summary["exactly_once"]) == (123, 0, True)
    assert (summary["loss"], summary["metrics"]) == (1 / 6, {"loss": 0.25})
    assert summary["peak_bytes"].pop("coordinator") > 0
    assert summary["peak_bytes"] == {"worker-0": 5}
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_is_not_done_is_exactly_once_as_far_as_it_went(record, clock):
    record.begin(1, Intervals(), "the run begins")
    run(record, clock, range(2))
    assert record.finish("stopped", 0, {})["exactly_once"] is True
    assert record.finish("done", 0, {})["exactly_once"] is False


def test_nothing_happened(record):
    summary = record.finish("stopped", 0, {})
    assert (summary["steps"], summary["seconds"], summary["samples_per_second"], summary["loss"]) == (0, 0.0, 0.0, None)


def test_a_run_that_goes_on_counts_its_own_speed_and_every_step(tmp_path, clock):
    with opened(tmp_path) as record:
        record.begin(1, Intervals(), "the run begins")
        run(record, clock, range(3))
    with opened(tmp_path, "second") as record:
        clock.advance(1000)
        record.begin(2, Intervals([(0, 3)]), "the coordinator begins")
        run(record, clock, range(3, 6))
        summary = record.finish("done", 0, {})
    assert (summary["steps"], summary["restarts"], summary["exactly_once"]) == (6, 1, True)
    assert (summary["seconds"], summary["samples_per_second"]) == (1.5, pytest.approx(10 / 1.5, abs=0.05))
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(6))


def test_a_coordinator_that_is_replaced_goes_on_with_the_account(tmp_path, clock):
    with opened(tmp_path) as record:
        record.begin(1, Intervals(), "the run begins")
        run(record, clock, range(3))
    with (tmp_path / "metrics.jsonl").open("ab") as torn:
        torn.write(b'{"step":3,"lo')
    with opened(tmp_path) as record:
        record.begin(2, Intervals([(0, 3)]), "the coordinator begins")
        summary = record.finish("stopped", 0, {})
    assert (summary["seconds"], summary["loss"]) == (1.5, 1 / 3)
    assert summary["samples_per_second"] == pytest.approx(10 / 1.5, abs=0.05)
    assert [row["step"] for row in history(tmp_path)] == [0, 1, 2]


def test_the_metrics_are_one_json_object_a_line(record, clock, tmp_path):
    record.begin(1, Intervals(), "the run begins")
    record.trace(0, 0.5)
    record.trace(1, float("nan"))
    record.measured(3, {"loss": 0.25, "accuracy": float("inf")})
    record.flush()
    begun, first, second, measured = rows(tmp_path)
    assert (begun["event"], begun["step"], begun["membership"]) == ("the run begins", 0, 1)
    assert (first["step"], first["loss"]) == (0, 0.5)
    assert (second["step"], second["loss"]) == (1, None)  # JSON knows no nan
    assert (measured["step"], measured["evaluation"]) == (3, {"loss": 0.25, "accuracy": None})
    assert all(row["time"] > 1e9 for row in rows(tmp_path))


def test_what_roles_measured_is_kept_up_to_a_bound(record, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_NOTES", 2)
    for step in range(3):
        record.note("worker-1", step, "shares", {"0": 0.25, "1": float("nan")})
    record.flush()
    assert [(row["step"], row["shares"], row["role"]) for row in rows(tmp_path)] == [
        (step, {"0": 0.25, "1": None}, "worker-1") for step in range(2)
    ]
    assert history(tmp_path) == []


def test_progress_is_shown_now_and_then_over_the_last_seconds(record, clock):
    record.begin(1, Intervals(), "the run begins")
    assert record.progress([0]) is None  # no loss yet
    record.trace(0, 0.5)
    clock.advance(1.0)
    shown = record.progress([1])
    assert (shown.step, shown.loss, shown.samples_per_second) == (2, 0.5, 8.0)
    clock.advance(module.PROGRESS_SECONDS / 2)
    assert record.progress([1]) is None
    clock.advance(module.RATE_WINDOW)
    assert record.progress([3, 4]).samples_per_second == pytest.approx(12 / module.RATE_WINDOW)


def test_each_end_of_an_epoch_is_shown_with_its_mean_loss(record, clock):
    record.begin(1, Intervals(), "the run begins")
    for step, loss in enumerate([1.0, 2.0, 6.0, 5.0]):
        record.trace(step, loss)
        shown = record.progress([step])
        assert (shown is None) == (step in (1, 3))
        if step == 2:
            assert (shown.step, shown.loss) == (3, 3.0)


def test_checkpoints(record, tmp_path):
    assert (record.saved(), record.newest_checkpoint()) == (-1, (None, []))
    for step in (2, 4):
        folder = folder_of(tmp_path / "checkpoints", step)
        folder.mkdir(parents=True)
        (folder / "worker-0.safetensors").write_bytes(b"content")
        digest = hashlib.sha256(b"content").hexdigest()
        record.publish(step, [File(name="worker-0.safetensors", bytes=7, sha256=digest)], [(0, step)])
    newest, damages = record.newest_checkpoint()
    assert (newest.step, newest.folder, newest.applied, damages) == (4, str(folder), [(0, 4)], [])
    (folder / "worker-0.safetensors").write_bytes(b"c0ntent")
    newest, (problem,) = record.newest_checkpoint()
    assert newest.step == 2
    assert str(folder / "worker-0.safetensors") in problem
    assert record.saved() == 4


def test_a_full_disk_is_an_error_and_leaves_no_summary(tmp_path, clock):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with opened(tmp_path) as record:
        record.begin(1, Intervals(), "the run begins")
        with pytest.raises(OSError, match="No space left"):
            record.flush()
        with pytest.raises(OSError, match="No space left"):
            record.finish("done", 0, {})
    assert not (tmp_path / "summary.json").exists()


DAMAGED = [b"[]", b"5", b"{}", b'{"', b'{"launch": "first", "changes": [5]}', b'{"launch": "\xff"}', b'{"terms": {}}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_run_ends_well_though_what_it_reads_of_itself_is_damaged(record, clock, tmp_path, content):
    record.begin(1, Intervals(), "the run begins")
    run(record, clock, range(6))
    for name in ("changes.json", "predicted.json"):
        (tmp_path / name).write_bytes(content)
    summary = record.finish("done", 7, {})
    assert (summary["outcome"], summary["changes"], summary["bytes_sent"]) == ("done", [], 7)
    assert "predicted" not in summary


@pytest.mark.parametrize("line", [b"5", b"[]", b'{"loss": "x"}', b'{"loss": "\xff"}', b"\xff"])
def test_a_coordinator_begins_though_lines_of_the_metrics_are_damaged(tmp_path, clock, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step":0,"loss":0.5}\n' + line + b"\n")
    with opened(tmp_path) as record:
        assert record.finish("stopped", 0, {})["loss"] == 0.5
