"""``tricorn demo``: the same job by three strategies, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
) -> None:
    """Train one job by parameter server, data parallel and model parallel in turn, and compare."""
    rows = []
    for plan in PLANS:
        summary, _ = execute(LocalEngine, (job, "job"), plan, timing_of("30s", 10.0), runs=runs, folder=None)
        rows.append(
            (
                plan.strategy,
                summary["metrics"].get("accuracy"),
                round(summary["samples_per_second"]),
                summary["bytes_sent"],
                summary["exactly_once"],
            )
        )
    print(table(("strategy", "test accuracy", "samples/s", "bytes sent", "exactly once"), rows), flush=True)
