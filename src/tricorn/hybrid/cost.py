"""What tables on servers, or spread over the workers, cost beside a dense part that is data or model parallel."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec

from tricorn.planner.prediction import EXCHANGE, UPDATE, WIRE, Prediction

if TYPE_CHECKING:
    from tricorn.plan import Plan
    from tricorn.planner.ground import Ground
    from tricorn.planner.profile import Profile

ROW_ID = 8  # bytes
INDEX = 16  # bytes of a row in a table's index


def predict(plan: Plan, ground: Ground) -> Prediction:
    """Of one step: the dense part's, and what its rows take. Raises KeyError where nothing like it was measured."""
    profile, p = ground.profile, plan.workers
    if not profile.tables:
        raise ValueError("the job has no tables")
    cost = import_module(f"tricorn.{plan.dense}.cost")
    dense: Prediction = cost.predict(plan, replace(ground, profile=without_tables(profile)))
    share = profile.batch_size / plan.replicas if plan.dense == "mp" else profile.batch_size / p
    readers = plan.replicas if plan.dense == "mp" else p
    row_bytes = readers * sum(table.ids(share) * table.dim for table in profile.tables) * profile.element_bytes
    way = "served" if plan.served else "spread"
    rows = ground.links.seconds(f"rows/{way}", p, row_bytes)
    rows -= ground.links.curve("exchange/dp", p).points[0].seconds
    wire = 2 * row_bytes / readers / min(host.bytes_per_second for host in ground.cluster.hosts)
    away = len(ground.cluster.hosts) > 1
    terms = dense.terms | {
        UPDATE: dense.terms[UPDATE] + profile.updating(1, 1, row_bytes / (plan.servers or p)),
        EXCHANGE: dense.terms[EXCHANGE] + max(rows, 0.0),
        WIRE: dense.terms[WIRE] + (wire * (readers if plan.served else 1) if away else 0.0),
    }
    width = profile.tables[0].dim * profile.element_bytes
    return msgspec.structs.replace(
        dense, plan=plan, terms=terms, memory=_memory(plan, ground, dense),
        sent=dense.sent + 2 * row_bytes * (1 + ROW_ID / width),
    )  # fmt: skip


def without_tables(profile: Profile) -> Profile:
    """The profile of the dense part, whose rows come from elsewhere."""
    mark = "rows "
    return msgspec.structs.replace(
        profile,
        elements=profile.elements - profile.table_bytes // profile.element_bytes,
        tables=(),
        compute={key.removeprefix(mark): curve for key, curve in profile.compute.items() if key.startswith(mark)},
        update={key.removeprefix(mark): curve for key, curve in profile.update.items() if key.startswith(mark)},
    )


def _memory(plan: Plan, ground: Ground, dense: Prediction) -> dict[str, int]:
    """Peak bytes by role: rows, their slots and their index are on servers, or on workers."""
    profile = ground.profile
    rows = sum(
        table.rows * (table.dim * (1 + profile.slots) * profile.element_bytes + INDEX) for table in profile.tables
    )
    if plan.served:
        return dense.memory | {"server": int(ground.base("ps", "server") + rows / plan.servers)}
    return {role: int(size + rows / plan.workers) for role, size in dense.memory.items()}
