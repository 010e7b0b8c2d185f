"""What tables on servers, or spread over the workers, cost beside a dense part that is data or model parallel."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec

from tricorn.planner.prediction import EXCHANGE, UPDATE, WIRE, Prediction

if TYPE_CHECKING:
    from types import ModuleType

    from tricorn.plan import Plan
    from tricorn.planner.ground import Ground
    from tricorn.planner.parts import Parts
    from tricorn.planner.profile import Profile

ROW_ID = 8  # bytes
INDEX = 16  # bytes of a row in a table's index


def predict(plan: Plan, ground: Ground) -> Prediction:
    """Of one step. Raises KeyError where nothing like it was measured, ValueError for what has no tables."""
    cost, on = _dense(plan, ground)
    dense: Prediction = cost.predict(plan, on)
    rows = _Rows(plan, ground)
    terms = {term: dense.terms.get(term, 0.0) + rows.terms.get(term, 0.0) for term in dense.terms | rows.terms}
    width = ground.profile.tables[0].dim * ground.profile.element_bytes
    return msgspec.structs.replace(
        dense, plan=plan, terms=terms, memory=_memory(plan, ground, dense),
        sent=dense.sent + 2 * rows.bytes * (1 + ROW_ID / width),
    )  # fmt: skip


def parts(plan: Plan, ground: Ground) -> Parts:
    """What a step consists of: the dense part's, and then the rows'. Raises as ``predict``."""
    cost, on = _dense(plan, ground)
    dense: Parts = cost.parts(plan, on)
    rows = _Rows(plan, ground).terms
    after = {term: dense.after.get(term, 0.0) + rows.get(term, 0.0) for term in dense.after | rows}
    return msgspec.structs.replace(dense, after=after)


def _dense(plan: Plan, ground: Ground) -> tuple[ModuleType, Ground]:
    """The equations of the dense part, and what they stand on without the tables."""
    if not ground.profile.tables:
        raise ValueError("the job has no tables; declare embeddings (tables={...})")
    return import_module(f"tricorn.{plan.dense}.cost"), replace(ground, profile=without_tables(ground.profile))


class _Rows:
    """What rows add to a step: ``bytes`` of all that are read, and ``terms``."""

    def __init__(self, plan: Plan, ground: Ground) -> None:
        profile, links, p = ground.profile, ground.links, plan.workers
        self._plan, self._ground = plan, ground
        readers = plan.replicas if plan.dense == "mp" else p
        each = sum(table.ids(profile.batch_size / readers) * table.dim for table in profile.tables)
        self.bytes = readers * each * profile.element_bytes
        seconds = links.seconds(f"rows/{'served' if plan.served else 'spread'}", p, self.bytes)
        seconds -= links.curve("exchange/dp", p).points[0].seconds
        update = profile.updating(1, 1, self.bytes / (plan.servers or p))
        if plan.sparse_consistency in ("ssp", "asp"):  # read while the step before is computed
            seconds /= 2
        self.terms = {EXCHANGE: max(seconds, 0.0), UPDATE: update, WIRE: 2 * self._one_way()}

    def _one_way(self) -> float:
        """Seconds in which rows, or their gradients, pass the fullest link."""
        plan, ground = self._plan, self._ground
        workers, servers = ground.places(plan)
        working, holding = Counter(workers), Counter(servers or workers)
        holders = len(servers or workers)
        found = 0.0
        for host in working | holding:
            read = working[host] / plan.workers * (1 - holding[host] / holders)
            given = holding[host] / holders * (1 - working[host] / plan.workers)
            found = max(found, max(read, given) * self.bytes / ground.host(host).bytes_per_second)
        return found


def without_tables(profile: Profile) -> Profile:
    """The profile of the dense part, whose rows come from elsewhere."""
    mark = "rows "
    elements = [layer.elements for layer in profile.layers]
    for size in (table.rows * table.dim for table in profile.tables):
        holder = max(range(len(elements)), key=elements.__getitem__, default=None)
        if holder is not None:
            elements[holder] = max(0, elements[holder] - size)
    return msgspec.structs.replace(
        profile,
        elements=profile.elements - profile.table_bytes // profile.element_bytes,
        tables=(),
        layers=tuple(
            msgspec.structs.replace(layer, elements=count)
            for layer, count in zip(profile.layers, elements, strict=True)
        ),
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
