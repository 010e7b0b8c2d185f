"""``tricorn demo``: the same job by three strategies, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from tricorn.engine.local import LocalEngine
from tricorn.plan import Plan
from tricorn.report.table import table
from tricorn.run import execute, timing_of

PLANS = (
    Plan(strategy="ps", workers=2, servers=1),
    Plan(strategy="dp", workers=2),
    Plan(strategy="mp", workers=2),
)


def demo(
    job: Annotated[str, typer.Argument(metavar="FILE", help="The job's file.")] = "examples/digits.py",
    runs: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print the summaries as one JSON object instead.")] = False,
) -> None:
    """Train one job by parameter server, data parallel and model parallel in turn, and compare."""
    timing = timing_of("30s", 10.0)
    summaries = [execute(LocalEngine, (job, "job"), plan, timing, runs=runs, folder=None)[0] for plan in PLANS]
    if json:
        print(msgspec.json.encode({"runs": summaries}).decode(), flush=True)
        return
    rows = [
        (
            s["strategy"],
            s["metrics"].get("accuracy"),
            round(s["samples_per_second"]),
            s["bytes_sent"],
            s["exactly_once"],
        )
        for s in summaries
    ]
    print(table(("strategy", "test accuracy", "samples/s", "bytes sent", "exactly once"), rows), flush=True)
