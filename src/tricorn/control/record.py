"""The run's folder, as the coordinator writes it: ledger, metrics, checkpoints, summary."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from tricorn.control import checkpoints
from tricorn.control.instructions import Checkpoint
from tricorn.control.intervals import Intervals
from tricorn.control.ledger import Ledger, Order
from tricorn.control.messages import Failed, File, Progress
from tricorn.data.order import step_range, steps_per_epoch
from tricorn.documents import UNREADABLE
from tricorn.plan import Plan
from tricorn.report import compare
from tricorn.state import memory

PROGRESS_SECONDS = 0.2
_TAIL = 1 << 16  # bytes of metrics.jsonl among which the last loss is looked for
_NOTES = 100_000  # lines of what roles measured: whoever tells more must not fill the disk
RATE_WINDOW = 5.0  # seconds over which the shown samples a second are averaged


class _Traced(msgspec.Struct):
    """A line of ``metrics.jsonl``, as far as it tells the loss of a step."""

    loss: float | None = None


class _Change(msgspec.Struct):
    """What a launch came to under a plan that it had before (run.py)."""

    steps: int
    plan: Plan
    measured: dict[str, float]
    bytes_sent: int


class _Changes(msgspec.Struct):
    """``changes.json``."""

    launch: str
    changes: list[_Change]


class _Predicted(msgspec.Struct):
    """``predicted.json``, as far as it is held against what was measured."""

    terms: dict[str, float]
    seconds: float
    low: float
    high: float
    memory: dict[str, int] = {}
    sent: float = 0.0


class Record:
    """Writes what happens into the folder of one run. Methods raise OSError when the disk will not take it."""

    def __init__(self, folder: Path, order: Order, plan: Plan, launch: str, *, replaces: bool = False) -> None:
        """``launch`` tells one launch of the run from another, however often the coordinator is replaced.

        ``replaces``: whether this coordinator takes the place of one that was lost.
        """
        self.folder = folder
        self.ledger = Ledger(folder / "ledger.sqlite", order)
        self._order = order
        self._plan = plan
        self._checkpoints = folder / "checkpoints"
        self._metrics = (folder / "metrics.jsonl").open("ab")
        self._launch = launch
        self._lost = "the coordinator was lost; " if replaces else ""  # to be told with the first event
        self._began: float | None = None
        self._before = len(self.ledger.committed())
        self._loss: float | None = self._last_loss()
        self._epoch, self._epoch_losses = -1, (0.0, 0)  # of the epoch traced last: their sum, and how many
        self._shown = 0.0
        self._notes = 0
        self._spent: dict[str, dict[str, float]] = {}  # by role
        self._recent: deque[tuple[float, int]] = deque()

    def begin(self, epoch: int, committed: Intervals, event: str) -> None:
        event, self._lost = self._lost + event, ""
        self.ledger.begin(epoch, committed, event, time.time())
        if self._began is None:
            # The wall clock, because a coordinator that replaces another has no other in common with it.
            self._began, self._before = self.ledger.launched(self._launch, time.time(), len(committed))
        self._recent.clear()
        self._write({"event": event, "step": len(committed), "membership": epoch})

    def progress(self, steps: list[int]) -> Progress | None:
        """Count committed steps; now and then, and at each end of an epoch, what to show of it."""
        now = time.monotonic()
        order = self._order
        samples = sum(
            stop - start for _, start, stop in (step_range(s, order.samples, order.batch_size) for s in steps)
        )
        self._recent.append((now, samples))
        while now - self._recent[0][0] > RATE_WINDOW:
            self._recent.popleft()
        per_epoch = steps_per_epoch(order.samples, order.batch_size)
        due = now - self._shown >= PROGRESS_SECONDS or any((step + 1) % per_epoch == 0 for step in steps)
        total, count = self._epoch_losses
        if not due or not count:
            return None
        self._shown = now
        elapsed = now - self._recent[0][0]
        rate = sum(count for _, count in self._recent) / elapsed if elapsed > 0 else 0.0
        spent = [*self._spent.values()]
        return Progress(
            step=max(steps) + 1, loss=total / count, samples_per_second=rate,
            measured=compare.measured(spent, self._plan), measured_steps=compare.counted(spent),
        )  # fmt: skip

    def trace(self, step: int, loss: float) -> None:
        self._loss = loss
        epoch = step // steps_per_epoch(self._order.samples, self._order.batch_size)
        total, count = self._epoch_losses if epoch == self._epoch else (0.0, 0)
        self._epoch, self._epoch_losses = epoch, (total + loss, count + 1)
        self._write({"step": step, "loss": loss})

    def measured(self, step: int, values: dict[str, float]) -> None:
        self.ledger.evaluated(step, values)
        self._write({"step": step, "evaluation": values})

    def note(self, role: str, step: int, what: str, values: dict[str, float]) -> None:
        """Write what a role measured; the first ``_NOTES`` of a coordinator's life are kept.

        What a worker's steps were spent on, each word of which replaces the one before, is for the summary.
        """
        if what == "seconds":
            self._spent[role] = values
            return
        self._notes += 1
        if self._notes <= _NOTES:
            self._write({"step": step, what: values, "role": role})

    def publish(self, step: int, files: list[File], applied: list[tuple[int, int]]) -> None:
        checkpoints.publish(self._checkpoints, checkpoints.Manifest(step=step, applied=applied, files=files))

    def saved(self) -> int:
        """The step of the newest published checkpoint, -1 if there is none."""
        return max((int(folder.name) for folder in checkpoints.published(self._checkpoints)), default=-1)

    def newest_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest whole checkpoint, and what is wrong with each newer one."""
        folder, damages = checkpoints.newest_whole(self._checkpoints)
        if folder is None:
            return None, damages
        manifest = checkpoints.load_manifest(folder)
        return Checkpoint(manifest.step, str(folder), manifest.applied), damages

    def finish(
        self, outcome: str, bytes_sent: int, peak_bytes: dict[str, int], error: Failed | None = None
    ) -> dict[str, Any]:
        """Write and return the summary. ``peak_bytes``: the most memory of each role; ``error``: what failed it."""
        changes = self._changes()
        order = self._order
        committed = self.ledger.committed()
        seconds = time.time() - self._began if self._began is not None else 0.0
        samples = sum(
            stop - start
            for low, high in committed.pairs
            for _, start, stop in (step_range(s, order.samples, order.batch_size) for s in range(low, high))
        )
        here = samples * (1 - self._before / len(committed)) if len(committed) else 0.0
        evaluations = self.ledger.evaluations()
        summary = {
            "run": self.folder.name,
            "outcome": outcome,
            "strategy": self._plan.strategy,
            "plan": msgspec.to_builtins(self._plan),
            "workers": self._plan.workers,
            "servers": self._plan.servers,
            "steps": len(committed),
            "launch_steps": len(committed) - self._before,
            "saved": max(self.saved(), 0),
            "total_steps": order.epochs * steps_per_epoch(order.samples, order.batch_size),
            "samples": samples,
            "seconds": round(seconds, 3),
            "samples_per_second": round(here / seconds, 1) if seconds else 0.0,
            "bytes_sent": bytes_sent + sum(change["bytes_sent"] for change in changes),
            "peak_bytes": {"coordinator": memory.peak_bytes(), **peak_bytes},
            "changes": changes,
            "restarts": self.ledger.restarts(),
            "exactly_once": self.ledger.exactly_once(complete=outcome == "done"),
            "loss": self._loss,
            "metrics": evaluations[max(evaluations)] if evaluations else {},
            **self._steps(),
            **({"error": {key: getattr(error, key) for key in ("message", "where", "remedy")}} if error else {}),
        }
        self.flush()
        path = self.folder / "summary.json"
        partial = path.with_suffix(".partial")
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=1))
        partial.replace(path)
        return summary

    def _changes(self) -> list[dict[str, Any]]:
        """What this launch of the run came to under plans that it had before (run.py)."""
        with contextlib.suppress(*UNREADABLE):
            said = msgspec.json.decode((self.folder / "changes.json").read_bytes(), type=_Changes)
            if said.launch == self._launch:
                return [msgspec.to_builtins(change) for change in said.changes]
        return []

    def _steps(self) -> dict[str, Any]:
        """What a step took, by terms, and what it was predicted to take if it was."""
        spent = [*self._spent.values()]
        found = compare.measured(spent, self._plan)
        told: dict[str, Any] = {"measured": found, "measured_steps": compare.counted(spent), "spent": self._spent}
        with contextlib.suppress(*UNREADABLE):
            said = msgspec.json.decode((self.folder / "predicted.json").read_bytes(), type=_Predicted)
            predicted = compare.grouped(said.terms, said.seconds, found)
            interval = {"low": said.low, "high": said.high}
            told |= {"predicted": predicted | interval, "worst_term": compare.worst(predicted, found)}
            told |= {"predicted_peak_bytes": said.memory, "predicted_bytes_a_step": said.sent}
        return told

    def _last_loss(self) -> float | None:
        """The loss that an earlier coordinator wrote last. Ends a line that it did not come to end."""
        path = self.folder / "metrics.jsonl"
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read(_TAIL).splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            self._metrics.write(b"\n")
        for line in reversed(lines):
            with contextlib.suppress(*UNREADABLE):
                if (loss := msgspec.json.decode(line, type=_Traced).loss) is not None:
                    return loss
        return None

    def _write(self, row: dict[str, Any]) -> None:
        self._metrics.write(msgspec.json.encode({**row, "time": round(time.time(), 3)}) + b"\n")

    def flush(self) -> None:
        self._metrics.flush()

    def close(self) -> None:
        """Let go of the files. A disk that will not take the rest has been told of, or the run has ended before."""
        with contextlib.suppress(OSError):
            self._metrics.close()
        self.ledger.close()
