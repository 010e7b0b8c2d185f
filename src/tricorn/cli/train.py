"""``tricorn train FILE[:NAME]``: train a job on this machine's processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, get_args

import msgspec
import typer

from tricorn import folder as folders
from tricorn.cli.job_file import job_in
from tricorn.engine.local import LocalEngine
from tricorn.errors import UsageError
from tricorn.plan import Compression, Plan, RowCompression
from tricorn.planner.auto import choose, outlook
from tricorn.run import execute, timing_of

Strategy = StrEnum("Strategy", {"auto": "auto", "ps": "ps", "dp": "dp", "mp": "mp", "ps_dp": "ps+dp", "ps_mp": "ps+mp"})
Consistency = StrEnum("Consistency", ["bsp", "ssp", "asp"])
Stale = StrEnum("Stale", ["keep", "scale", "compensate", "drop"])
Outer = StrEnum("Outer", ["average", "nesterov"])
Schedule = StrEnum(
    "Schedule", {"gpipe": "gpipe", "one": "1f1b", "interleaved": "interleaved", "zero_bubble": "zero-bubble"}
)
Embeddings = StrEnum("Embeddings", ["whole", "rows", "columns", "tables"])
CUT_BY = ("workers", "replicas", "tensor", "schedule", "chunks", "memory")  # what a plan's cuts were found for


def train(
    job: Annotated[
        str | None, typer.Argument(metavar="FILE[:NAME]", help="The job's file, and its name if not 'job'.")
    ] = None,
    strategy: Annotated[
        Strategy | None,
        typer.Option(
            help="ps: parameter server, dp: data parallel, mp: model parallel; ps+dp, ps+mp: both; auto: what is "
            "predicted to be fastest. \\[auto]"
        ),
    ] = None,
    planned: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="A plan that tricorn plan has written. \\[none]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes; with mp, of the whole mesh. \\[chosen, or 2]")
    ] = None,
    servers: Annotated[int | None, typer.Option(help="Parameter servers, with ps. \\[1]")] = None,
    consistency: Annotated[
        Consistency | None, typer.Option(help="With ps: bsp synchronous, ssp bounded, asp without bound. \\[bsp]")
    ] = None,
    staleness: Annotated[int | None, typer.Option(help="With ssp: how many clocks old a value may be. \\[3]")] = None,
    sparse_consistency: Annotated[
        Consistency | None, typer.Option(help="With ps: that of the tables. \\[as --consistency]")
    ] = None,
    stale: Annotated[
        Stale | None, typer.Option(help="With ps: what becomes of a gradient from old weights. \\[keep]")
    ] = None,
    zero: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=3,
            help="With dp: spread optimizer state (1; also mp), gradients (2), weights (3). \\[chosen, or 0]",
        ),
    ] = None,
    balance: Annotated[
        bool | None,
        typer.Option("--balance/--no-balance", help="With dp: shares follow the workers' speed. \\[chosen, or no]"),
    ] = None,
    microbatches: Annotated[int | None, typer.Option(help="With dp and mp: parts of a batch. \\[chosen]")] = None,
    replicas: Annotated[int | None, typer.Option(help="With mp: how many copies of the model. \\[1]")] = None,
    tensor: Annotated[int | None, typer.Option(help="With mp: workers that share each layer. \\[1]")] = None,
    schedule: Annotated[
        Schedule | None, typer.Option(help="With mp: the order of a pipeline's work. \\[chosen]")
    ] = None,
    chunks: Annotated[int | None, typer.Option(help="With --schedule interleaved: stages a worker. \\[2]")] = None,
    recompute: Annotated[
        bool | None, typer.Option("--recompute/--no-recompute", help="With mp: compute activations again. \\[chosen]")
    ] = None,
    embeddings: Annotated[
        Embeddings | None, typer.Option(help="With dp and mp: how embedding tables are spread. \\[whole]")
    ] = None,
    memory: Annotated[int | None, typer.Option(help="Bytes that each worker may use. \\[the machine's]")] = None,
    compress: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[TABLE=]HOW",
            help="How gradients travel: none, bf16, fp16, int8, topk or powersgd. With ps again, for the rows of a "
            "table that differs. \\[none]",
        ),
    ] = None,
    local_steps: Annotated[int | None, typer.Option(help="Updates a worker makes before all meet. \\[1]")] = None,
    outer: Annotated[Outer | None, typer.Option(help="With --local-steps: how they meet. \\[nesterov]")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads of each worker. \\[cores / workers]")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with a run, under its plan or the one given. \\[a new run]")
    ] = None,
    replan: Annotated[
        bool,
        typer.Option("--replan", help="Change over to a plan that turns out to be clearly faster."),
    ] = False,
    checkpoint_every: Annotated[str, typer.Option(help="A time (30s) or a number of steps (100).")] = "30s",
    heartbeat_timeout: Annotated[float, typer.Option(help="Seconds of silence after which a role is replaced.")] = 10.0,
    runs: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    json: Annotated[
        bool, typer.Option("--json", help="Print the summary as one JSON object, the last line of output.")
    ] = False,
) -> None:
    """Train a job: the same declared job by any strategy, with the same numbers."""
    named = None if strategy is Strategy.auto else strategy
    given = {
        "strategy": named and named.value, "workers": workers, "servers": servers,
        "consistency": consistency and consistency.value, "staleness": staleness,
        "sparse_consistency": sparse_consistency and sparse_consistency.value, "stale": stale and stale.value,
        "zero": zero, "balance": balance, "microbatches": microbatches,
        "replicas": replicas, "tensor": tensor, "schedule": schedule and schedule.value, "chunks": chunks,
        "recompute": recompute, "embeddings": embeddings and embeddings.value, "memory": memory,
        **encodings(compress or ()), "local_steps": local_steps, "outer": outer and outer.value, "threads": threads,
    }  # fmt: skip
    changes = {field: value for field, value in given.items() if value is not None}
    expected = None
    folder = folders.find(resume, runs) if resume else None
    if folder is not None:
        facts, old = folders.load(folder)
        plan = replanned(old, changes)
        where = job or (f"{facts.file}:{facts.entry}" if facts.file else None)
        if where is None:
            raise UsageError(
                "this run was started from Python, and has no job file",
                remedy="Name the job's file, or use tricorn.train(job, resume=...).",
            )
    elif job is None:
        raise UsageError("no job is named", remedy="Give the file that declares it: tricorn train FILE.py")
    else:
        plan, where = replanned(folders.read_plan(planned) if planned else Plan(strategy="dp"), changes), job
    source = job_in(where)
    timing = timing_of(checkpoint_every, heartbeat_timeout)
    if folder is None and planned is None and "strategy" not in changes:
        plan, expected = choose(source, changes)
    else:
        expected = outlook(source, plan, thorough=replan)
    summary, folder = execute(
        LocalEngine, source, plan, timing, runs=runs, folder=folder, expected=expected, replan=replan
    )
    if json:
        print(msgspec.json.encode(summary).decode(), flush=True)


def encodings(given: Sequence[str]) -> dict[str, object]:
    """Fields of a plan, of encodings as ``HOW`` and ``TABLE=HOW``. Raises UsageError for one that there is not."""
    whole, by_table = None, {}
    for each in given:
        table, equals, how = each.rpartition("=")
        possible = get_args(RowCompression if equals else Compression)
        if how not in possible:
            raise UsageError(
                f"there is no encoding {how!r} of {f'the rows of table {table!r}' if equals else 'gradients'}",
                remedy=f"Give one of {', '.join(possible)}.",
            )
        if equals:
            by_table[table] = how
        else:
            whole = how
    return {"compress": whole, "compress_tables": by_table or None}


def replanned(plan: Plan, changes: Mapping[str, object]) -> Plan:
    """The plan with changes, on this machine, whatever hosts it was for. Options that only another strategy has fall
    away with that strategy, and so do cuts where that has changed which they were found for.
    """
    if plan.hosts:
        print(f"the plan's hosts {plan.hosts} are left out: this machine trains it", file=sys.stderr)
        plan = msgspec.structs.replace(plan, hosts=None)
    strategy = changes.get("strategy", plan.strategy)
    if strategy != plan.strategy:
        plan = Plan(strategy=plan.strategy, workers=plan.workers, threads=plan.threads, memory=plan.memory)
    if str(strategy).startswith("ps") and plan.servers == 0:
        changes = {"servers": 1, **changes}
    changed = msgspec.structs.replace(plan, **changes)
    if plan.cuts == changed.cuts and any(getattr(plan, field) != getattr(changed, field) for field in CUT_BY):
        return msgspec.structs.replace(changed, cuts=None)
    return changed
