"""A plan as a picture: which worker and server holds what, and who talks to whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tricorn.mp.mesh import Mesh, Place

if TYPE_CHECKING:
    from tricorn.plan import Plan

MOST = 8  # places along an axis that are drawn; of more, the first ones and the last


def picture(plan: Plan, layers: tuple[str, ...] = ()) -> str:
    """Several lines of plain text. ``layers``: what each stage of a pipeline holds, in words, where it is known."""
    drawn = _mesh(plan, layers) if plan.dense == "mp" else _workers(plan)
    return "\n".join([*drawn, *_spread(plan), *_servers(plan)])


def _mesh(plan: Plan, layers: tuple[str, ...]) -> list[str]:
    mesh = Mesh.of(plan)
    stages, replicas = _shown(mesh.stages), _shown(mesh.replicas)
    heads = ["", *("..." if stage is None else f"stage {stage}" for stage in stages)]
    rows = [heads]
    if layers:
        rows.append(["", *("" if stage is None else layers[stage] for stage in stages)])
    for replica in replicas:
        cells = ["..." if stage is None or replica is None else _workers_at(mesh, replica, stage) for stage in stages]
        rows.append(["..." if replica is None else f"replica {replica}" if mesh.replicas > 1 else "", *cells])
    lines = _columns(rows, "  " if mesh.stages == 1 else " -> ", plain=len(rows) - len(replicas))
    if mesh.stages > 1:
        lines.append("->  activations of microbatches go forward, their gradients come back")
    if mesh.tensor > 1:
        lines.append(f"+   {mesh.tensor} workers share each layer, and sum within it")
    if mesh.replicas > 1:
        what = "gradients, and each updates its part of the weights" if mesh.spread else "gradients"
        lines.append(f"|   replicas share each batch, and at each step those below each other sum {what}")
    return lines


def _workers_at(mesh: Mesh, replica: int, stage: int) -> str:
    shards = mesh.shards(mesh.rank(Place(replica, stage, 0)))
    return " + ".join("..." if shard is None else f"worker-{shards[shard]}" for shard in _shown(mesh.tensor))


def _workers(plan: Plan) -> list[str]:
    names = ["..." if rank is None else f"worker-{rank}" for rank in _shown(plan.workers)]
    dense = plan.strategy != "ps"
    whole = "the whole model" if not plan.served and plan.embeddings == "whole" else "the model but for its tables"
    between = " | " if dense and plan.workers > 1 else "   "
    holds = {
        0: whole,
        1: f"{whole} and a part of the optimizer's state",
        2: f"{whole} and a part of gradients and optimizer's state",
        3: f"a part of {whole.removeprefix('the whole ')}",
    }[plan.zero if dense else 0]
    lines = [between.join(names)]
    if dense and plan.workers > 1:
        lines.append(f"|   each has {holds} and a share of each batch; at each step they sum gradients")
    elif dense:
        lines.append("    it has the whole model and every batch")
    return lines


def _spread(plan: Plan) -> list[str]:
    if plan.embeddings == "whole":
        return []
    what = {"rows": "rows of each embedding", "columns": "columns of each embedding", "tables": "of the embeddings"}
    among = "replica of a stage" if plan.dense == "mp" else "worker"
    return [f"    embeddings are spread: each {among} has some {what[plan.embeddings]}"]


def _servers(plan: Plan) -> list[str]:
    if not plan.served:
        return []
    names = ["..." if index is None else f"server-{index}" for index in _shown(plan.servers)]
    held = "the model" if plan.strategy == "ps" else "the tables"
    holding = held if plan.servers == 1 else f"a part of {held} each"
    return ["   ".join(names), f"^   {holding}: every worker reads it there and sends its gradients"]


def _shown(count: int) -> list[int | None]:
    """The numbers to draw, with None where some are left out."""
    return [*range(count)] if count <= MOST else [*range(MOST - 2), None, count - 1]


def _columns(rows: list[list[str]], between: str, *, plain: int) -> list[str]:
    """The cells in columns; the first ``plain`` rows have spaces between them, the others ``between``."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        head, *cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        gap = " " * len(between) if number < plain else between
        lines.append(((head + "  " if widths[0] else "") + gap.join(cells)).rstrip())
    return lines
