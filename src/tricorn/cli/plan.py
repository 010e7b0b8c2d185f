"""``tricorn plan FILE[:NAME]``: what every plan would cost, which is best, and why."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from tricorn import folder as folders
from tricorn.cli.job_file import job_in
from tricorn.errors import UsageError
from tricorn.report.picture import picture
from tricorn.report.table import table

MOST_ROWS = 12


def plan(
    job: Annotated[str, typer.Argument(metavar="FILE[:NAME]", help="The job's file, and its name if not 'job'.")],
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Machines to plan for (TOML). \\[this one]")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Only plans with so many workers. \\[any]")] = None,
    strategy: Annotated[str | None, typer.Option(help="Only plans of that strategy. \\[auto]")] = None,
    memory: Annotated[int | None, typer.Option(help="Bytes that each worker may use. \\[the machine's]")] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Choose asynchronous, compressed and local plans, too.")
    ] = False,
    trials: Annotated[bool, typer.Option("--try", help="Try what seems best here for some steps each.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew what is known already.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write the chosen plan, for train --plan. \\[nowhere]"),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every plan, and every one that cannot run.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Predict every plan for a job, and say which is best and why."""
    from tricorn import planner
    from tricorn.planner.explain import named, seconds, size

    settled = {"workers": workers, "strategy": strategy, "memory": memory}
    given = {field: value for field, value in settled.items() if value is not None}
    if trials and cluster is not None:
        raise UsageError("machines that are only described cannot be tried", remedy="Leave out --try or --cluster.")
    if trials:
        from tricorn.engine.local import LocalEngine
        from tricorn.trials import tried

        found = tried(job_in(job), given, engine=LocalEngine, approximate=approximate, fresh=fresh, told=_tell)
    else:
        found = planner.plan(job_in(job), given, cluster=cluster, approximate=approximate, fresh=fresh, told=_tell)
    chosen = found.chosen
    if output is not None:
        try:
            folders.write_json(output, chosen.plan)
        except OSError as error:
            raise UsageError(f"{output} cannot be written: {error.strerror}", remedy="Choose another file.") from None
    if json:
        print(msgspec.json.encode(as_json(found)).decode(), flush=True)
        return
    steps = found.ground.profile.steps
    rows = [
        (
            "*" if prediction is chosen else "",
            named(prediction.plan),
            seconds(prediction.seconds),
            f"{seconds(prediction.low)} to {seconds(prediction.high)}",
            seconds(prediction.seconds * steps),
            size(prediction.fullest[1]),
            size(prediction.sent),
            prediction.limit,
        )
        for prediction in found.ranked[: None if every else MOST_ROWS]
    ]
    print(table(("", "plan", "a step", "between", "an epoch", "memory", "sent a step", "limited by"), rows))
    hidden = len(found.ranked) - len(rows)
    print("\n" + picture(chosen.plan))
    print("\n" + "\n".join([*found.reasons, *([f"{hidden} more plans: --all."] if hidden > 0 else [])]))
    if every and found.rejected:
        print("\n" + table(("cannot run", "because"), [(named(r.plan), r.reason) for r in found.rejected]))


def as_json(found: Any) -> dict[str, Any]:
    """Everything that was found, as plain values."""
    return {
        "chosen": found.chosen.plan,
        "plans": [prediction.as_dict() for prediction in found.ranked],
        "rejected": found.rejected,
        "reasons": found.reasons,
        "steps_per_epoch": found.ground.profile.steps,
        "hosts": [host.name for host in found.ground.cluster.hosts],
    }


def _tell(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)
