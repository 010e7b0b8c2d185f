"""``tricorn demo``: three jobs, each by parameter server, data parallel and model parallel, predicted and measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from tricorn.engine.local import LocalEngine
from tricorn.errors import Interrupted
from tricorn.planner.explain import disturbed, named, seconds, size
from tricorn.planner.prediction import Prediction
from tricorn.report.table import table
from tricorn.run import execute, timing_of

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.planner import Planned

JOBS = ["examples/movies.py", "examples/digits.py", "examples/prose.py"]  # each is for another of the families
FAMILIES = ("ps", "dp", "mp")
WORKERS = 2
RUN_SECONDS = 4.0  # that the slowest family may train for
FEWEST, MOST = 25, 300  # steps, of which the first few are not measured


def demo(
    jobs: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Job files. \\[three examples]")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Train jobs by parameter server, data parallel and model parallel in turn, beside what was predicted of each."""
    shown = [row for file in jobs or map(Path, JOBS) for row in _trained(file, runs)]
    if json:
        print(msgspec.json.encode({"runs": shown}).decode(), flush=True)
        return
    rows = [
        (
            row["job"],
            row["plan"],
            seconds(row["predicted"]),
            seconds(row["summary"]["measured"]["step"]),
            size(row["summary"]["bytes_sent"] / row["summary"]["steps"]),
            row["held_out"],
            row["summary"]["exactly_once"],
        )
        for row in shown
    ]
    headers = ("job", "plan", "predicted", "measured", "sent a step", "held out", "exactly once")
    print(table(headers, rows), flush=True)
    print("\n" + "\n".join(verdicts(shown)), flush=True)


def verdicts(shown: list[dict[str, Any]]) -> list[str]:
    """A sentence for each job: which family was to be the fastest, and which was."""
    said = []
    for job in dict.fromkeys(row["job"] for row in shown):
        its = [row for row in shown if row["job"] == job]
        expected = min(its, key=lambda row: row["predicted"])["family"]
        found = min(its, key=lambda row: row["summary"]["measured"]["step"])["family"]
        but = f"{found} was" if found != expected else "and was"
        said.append(f"{job}: {expected} was predicted to be the fastest, {but}.")
    return said


def _trained(file: Path, runs: Path) -> list[dict[str, Any]]:
    """By the best plan of each family that can run the job, the same steps each."""
    from tricorn import planner
    from tricorn.engine.loading import load

    _tell(f"{file}: measuring what a plan depends on")
    found = planner.plan((str(file), "job"), {"workers": WORKERS}, told=lambda text: _tell(f"{text} ..."))
    for said in disturbed(found.ground.busy):
        _tell(said)
    chosen = _best(found)
    slowest = max(prediction.seconds for prediction in chosen.values())
    whole = load(str(file), "job", None)
    job = shortened(whole, min(max(FEWEST, int(RUN_SECONDS / slowest)), MOST))
    _by_value(job)
    shown = []
    for family, prediction in chosen.items():
        try:
            summary, _ = execute(LocalEngine, job, prediction.plan, timing_of("30s", 10.0), runs=runs, folder=None)
        except Interrupted:
            raise KeyboardInterrupt from None  # the demo is, and begins anew: its runs are too short to go on with
        metrics = summary["metrics"]
        shown.append(
            {
                "job": file.stem, "family": family, "plan": named(prediction.plan), "predicted": prediction.seconds,
                "held_out": next((metrics[name] for name in job.metrics if name in metrics), metrics.get("loss")),
                "summary": summary,
            }
        )  # fmt: skip
    return shown


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _best(found: Planned) -> dict[str, Prediction]:
    """Of each family, hybrids with servers being of the first."""
    from tricorn.planner.search import exact

    able = [prediction for prediction in found.ranked if exact(prediction.plan)]
    best = {family: [p for p in able if p.plan.strategy.startswith(family)][:1] for family in FAMILIES}
    return {family: first[0] for family, first in best.items() if first}


def shortened(job: Job, steps: int) -> Job:
    """The same job for about so many steps, if it has more: fewer epochs, and of one the first samples."""
    from dataclasses import replace

    import numpy as np

    from tricorn.data.order import steps_per_epoch
    from tricorn.data.sources import arrays, as_source

    source = as_source(job.train)
    each = steps_per_epoch(len(source), job.batch_size)
    if steps >= each * job.epochs:
        return job
    few = np.arange(min(len(source), steps * job.batch_size))
    return replace(job, train=arrays(*source.fetch(few)), epochs=max(1, steps // each))


def _by_value(job: Job) -> None:
    """Hand the job's own module over with it: roles need not import what only its data came from."""
    import cloudpickle

    module = sys.modules[getattr(job.model, "__module__", "__main__")]
    cloudpickle.register_pickle_by_value(module)
