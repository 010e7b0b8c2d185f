"""``tricorn simulate FILE[:NAME]``: a whole run on a described cluster, on a virtual clock."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from tricorn import folder as folders
from tricorn.cli.job_file import job_in

if TYPE_CHECKING:
    from tricorn.planner.simulation import Simulation


def simulate(
    job: Annotated[str, typer.Argument(metavar="FILE[:NAME]", help="The job's file, and its name if not 'job'.")],
    cluster: Annotated[Path | None, typer.Option(metavar="FILE", help="Machines (TOML). \\[this one]")] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The plan, as plan -o writes it. \\[the best for the cluster]")
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="The best plan of that strategy. \\[auto]")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are simulated one by one.")] = 200,
    seed: Annotated[int, typer.Option(help="Of what is drawn: scatter, stalls, failures.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Simulate a run on machines that are described, with their stragglers and failures."""
    from tricorn.planner.explain import disturbed, named
    from tricorn.planner.simulating import simulate as simulated

    chosen = folders.read_plan(plan) if plan else None
    given = {"strategy": strategy} if strategy else {}
    found = simulated(job_in(job), chosen, given, cluster=cluster, steps=steps, seed=seed, told=_tell)
    if json:
        whole = {**msgspec.to_builtins(found), "difference": found.difference}
        print(msgspec.json.encode(whole).decode(), flush=True)
        return
    rows = as_rows(found)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    print("\n".join([named(found.plan), "", *lines, *disturbed(found.busy)]))


def as_rows(found: Simulation) -> list[tuple[str, str]]:
    """What a person wants to know, name and value."""
    from tricorn.planner.explain import seconds

    rows = [
        ("a step, median", seconds(found.median)),
        ("a step, nine of ten are faster than", seconds(found.p90)),
        ("a step, mean", f"{seconds(found.mean)}; the equation says {seconds(found.predicted)} "
                         f"({100 * found.difference:+.1f} %)"),
    ]  # fmt: skip
    rows += [(f"{role}s wait", f"{100 * max(0.0, share):.1f} % of their time") for role, share in found.waiting.items()]
    if found.staleness:
        gradients = sum(found.staleness.values())
        shares = (f"{age}: {100 * count / gradients:.3g} %" for age, count in found.staleness.items())
        rows.append(("gradients are so many updates old", ", ".join(shares)))
    failed = f", of them {seconds(found.lost_seconds)} by {found.failures} failures" if found.failures else ""
    return [*rows, ("the whole run", seconds(found.run_seconds) + failed)]


def _tell(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)
