"""How much sooner compression and local steps reach the loss of plain data parallel, over a link of 100 Mbit/s.

Two hosts with a worker each, of one thread. Plain data parallel trains for a fixed number of epochs; its last loss on
held-out data is the target. The others may take three or four times as many epochs. What counts is the time of
training, from the first membership to the first evaluation at which the target is reached, and what crossed the
interface, a step. Batches are small, so that a plain step is nearly all sending, as it is where people ask for
compression: their accelerators compute a hundred times as fast as one thread.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, Report, options

from tricorn.engine.hosts import on_hosts
from tricorn.plan import Options, Plan
from tricorn.run import execute, timing_of
from tricorn.testing.hosts import Host, RunningHost, hosts, hosts_unavailable

JOBS = ROOT / "benchmarks" / "jobs" / "slow_link.py"
CASES = ("digits", "text")
MBIT = 100
PLANS: dict[str, Options] = {  # an epoch has 23 and 60 steps, and a round ends with it
    "top-k 1 %": {"compress": "topk"},
    "PowerSGD rank 4": {"compress": "powersgd"},
    "DiLoCo, rounds of an epoch": {"local_steps": 60},
    "DiLoCo so, and int8": {"local_steps": 60, "compress": "int8"},
}
FIFTH = 0.2


@dataclass(frozen=True)
class Found:
    """One run: (seconds, loss) of each evaluation, seconds and megabytes on the link for each step."""

    evaluations: list[tuple[float, float]]
    seconds: float
    megabytes: float

    def seconds_to(self, loss: float) -> float:
        """Until the loss was reached; infinite if it was not."""
        return next((seconds for seconds, found in self.evaluations if found <= loss), float("inf"))


def train(places: tuple[RunningHost, ...], name: str, **plan: object) -> Found:
    sent = places[0].traffic().sent
    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stderr(io.StringIO()):
        declared = Plan(strategy="dp", workers=2, threads=1, **plan)
        summary, folder = execute(
            on_hosts(*places), (str(JOBS), name), declared, timing_of("1000s", 30.0), runs=Path(runs), folder=None
        )
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    began = next(row["time"] for row in rows if "event" in row)
    found = [(row["time"] - began, row["evaluation"]["loss"]) for row in rows if "evaluation" in row]
    megabytes = (places[0].traffic().sent - sent) / 1e6
    return Found(found, found[-1][0] / summary["steps"], megabytes / summary["steps"])


def compare(report: Report, places: tuple[RunningHost, ...], name: str, rounds: int) -> None:
    runs: dict[str, list[Found]] = {}
    for _ in range(rounds):
        runs.setdefault("plain", []).append(train(places, name))
        for system, plan in PLANS.items():
            runs.setdefault(system, []).append(train(places, f"{name}_long", **plan))
    plain = runs["plain"]
    for system, found in runs.items():
        report.row(system, f"{name}: on the link, a step", [run.megabytes for run in found], "MB")
        report.row(system, f"{name}: a step", [1e3 * run.seconds for run in found], "ms")
        report.row(system, f"{name}: lowest held-out loss", [min(run.evaluations, key=_loss)[1] for run in found], "")
        times = [run.seconds_to(other.evaluations[-1][1]) for run, other in zip(found, plain, strict=True)]
        report.row(system, f"{name}: to the loss of plain", times, "s")
        if system in PLANS:
            shares = [time / other.evaluations[-1][0] for time, other in zip(times, plain, strict=True)]
            report.bar(f"{name}: {system}, of plain's time to its loss", statistics.median(shares), at_most=FIFTH)


def _loss(evaluation: tuple[float, float]) -> float:
    return evaluation[1]


def main() -> None:
    report, chosen = options("time to the loss of plain data parallel, two hosts at 100 Mbit/s", cases=CASES)
    if reason := hosts_unavailable():
        raise SystemExit(f"hosts are not available: {reason}")
    with hosts(Host(mbit=MBIT), Host(mbit=MBIT)) as places:
        for name in chosen.case or CASES:
            compare(report, places, name, rounds=1 if chosen.quick else 3)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
