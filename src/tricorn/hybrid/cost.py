"""What tables on servers, or spread over the workers, cost beside a dense part that is data or model parallel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec

from tricorn.hybrid.division import divide
from tricorn.mp.mesh import Mesh
from tricorn.planner.ground import ENCODED
from tricorn.planner.prediction import EXCHANGE, WIRE, Prediction
from tricorn.planner.traffic import Traffic
from tricorn.ps.cost import ROW_ID, SERVERS_SIDE, row_encoding, rows_traffic
from tricorn.state.footprint import peak_bytes

if TYPE_CHECKING:
    from types import ModuleType

    from tricorn.plan import Plan
    from tricorn.planner.ground import Ground
    from tricorn.planner.parts import Parts
    from tricorn.planner.profile import Profile

INDEX = 16  # bytes of a row in a table's index


def predict(plan: Plan, ground: Ground) -> Prediction:
    """Of one step. Raises KeyError where nothing like it was measured, ValueError for what has no tables."""
    cost, on = _dense(plan, ground)
    dense: Prediction = cost.predict(plan, on)
    rows = _Rows(plan, ground, dense.seconds)
    terms = {term: dense.terms.get(term, 0.0) + rows.terms.get(term, 0.0) for term in dense.terms | rows.terms}
    sending: Traffic = cost.traffic(plan, on)
    sending.add(_traffic(plan, ground))
    return msgspec.structs.replace(
        dense, terms=terms, memory=_memory(plan, ground, dense), sent=sending.sent,
        links=sending.links(ground),
    )  # fmt: skip


def parts(plan: Plan, ground: Ground) -> Parts:
    """What a step consists of: the dense part's, and then the rows'. Raises as ``predict``."""
    cost, on = _dense(plan, ground)
    dense: Parts = cost.parts(plan, on)
    rows = _Rows(plan, ground, cost.predict(plan, on).seconds).terms
    after = {term: dense.after.get(term, 0.0) + rows.get(term, 0.0) for term in dense.after | rows}
    return msgspec.structs.replace(dense, after=after)


def _dense(plan: Plan, ground: Ground) -> tuple[ModuleType, Ground]:
    """The equations of the dense part, and what they stand on without the tables."""
    if not ground.profile.tables:
        raise ValueError("the job has no tables; declare embeddings (tables={...})")
    return import_module(f"tricorn.{plan.dense}.cost"), replace(ground, profile=without_tables(ground.profile))


class _Rows:
    """What rows add to a step: ``bytes`` of all that are read, and ``terms``.

    ``passing``: bytes of rows and of their gradients as they travel, on average of both ways. ``beside``: seconds of
    the dense part's step.
    """

    def __init__(self, plan: Plan, ground: Ground, beside: float) -> None:
        profile = ground.profile
        self._plan, self._ground = plan, ground
        self._readers, servers = _readers(plan, ground), ground.places(plan)[1]
        self._holders = servers if plan.served else self._readers
        m = len(self._readers)
        read = [table.ids(profile.batch_size / m) * table.dim for table in profile.tables]
        self.bytes = m * sum(read) * profile.element_bytes
        hows = [row_encoding(plan, table.name) for table in profile.tables]
        sizes = [each * profile.element_bytes for each in read]  # of one reader
        pushed = m * sum(ENCODED[how] * size for how, size in zip(hows, sizes, strict=True))
        coding = sum(map(ground.coding, hows, sizes)) / 2  # rows come as they are
        self.passing = (self.bytes + pushed) / 2
        if plan.served:
            self._held = [1 / plan.servers] * plan.servers
        else:
            whole = sum(read) or 1.0
            self._held = [sum(part) / whole for part in zip(*_parts_of(read, plan, ground, m), strict=True)]
        self._beside = beside
        exchange = self._exchanging()
        if plan.sparse_consistency in ("ssp", "asp"):  # read while the step before is computed
            exchange /= 2
        self.terms = {EXCHANGE: exchange + coding, WIRE: 2 * self._one_way()}

    def _exchanging(self) -> float:
        """Seconds in which processors read and update rows."""
        ground, m, slow = self._ground, len(self._readers), self._ground.slowest(self._readers)
        if not self._plan.served:  # all ask, and the one that holds the most has the most to answer
            return self._seconds("spread", m, self.bytes * (1 + m * max(self._held)) / 2) * slow
        together = self._seconds("served", m, self.bytes)
        alone = min(together, self._seconds("served", 1, self.bytes / m))
        if not ground.apart(self._plan):
            return together * slow
        # What others add is that the servers have more to do.
        awake = ground.awake(self._holders, ground.places(self._plan)[0])
        answering = together * SERVERS_SIDE / self._plan.servers * ground.slowest(self._holders)
        return max(alone * slow + (together - alone) * awake, answering - self._beside)

    def _seconds(self, way: str, m: int, n: float) -> float:
        """Of this machine, for m workers; what they exchange besides rows is the dense part's."""
        least = self._ground.links.curve("exchange/dp", m).points[0].seconds
        return max(0.0, self._ground.reading(way, m, n)[0] - least)

    def _one_way(self) -> float:
        """Seconds in which rows, or their gradients, pass the fullest link."""
        m, reading = len(self._readers), Counter(self._readers)
        held: dict[int, float] = {}
        for host, share in zip(self._holders, self._held, strict=True):
            held[host] = held.get(host, 0.0) + share
        found = 0.0
        for host in reading | Counter(self._holders):
            its, share = reading[host] / m, held.get(host, 0.0)
            passing = max(its * (1 - share), share * (1 - its))
            found = max(found, passing * self.passing / self._ground.host(host).bytes_per_second)
        return found


def _readers(plan: Plan, ground: Ground) -> list[int]:
    """The hosts of the workers that look rows up, shards of a layer once."""
    return _shards(plan, ground)[0]


def _shards(plan: Plan, ground: Ground) -> list[list[int]]:
    """The hosts of the workers that look rows up: of a pipeline's first stage, the replicas of each shard."""
    workers, mesh = ground.places(plan)[0], Mesh.of(plan)
    if plan.dense == "dp":
        return [workers]
    return [[workers[rank] for rank in mesh.copies(shard)] for shard in range(plan.tensor)]


def _traffic(plan: Plan, ground: Ground) -> Traffic:
    """What is sent of rows: to those that look them up, and their gradients back."""
    profile, found, shards = ground.profile, Traffic(), _shards(plan, ground)
    samples = profile.batch_size / len(shards[0])
    if plan.served:
        return rows_traffic(plan, ground, [host for readers in shards for host in readers], shards[0], samples)
    blocks = divide([(table.rows, table.dim) for table in profile.tables], plan.embeddings, len(shards[0]))
    for table, each in zip(profile.tables, blocks, strict=True):
        ids = [table.within(block.first, block.last) for block in each]  # of columns, everyone has all
        rows = [share * block.width / table.dim for share, block in zip(ids, each, strict=True)]
        unique = table.ids(samples)
        size = unique * table.dim * profile.element_bytes
        for readers in shards:
            _spread(found, readers, ids, 2 * unique * ROW_ID, 0.0)  # before the rows, and with their gradients
            _spread(found, readers, rows, size, size)
    return found


def _spread(found: Traffic, hosts: Sequence[int], held: Sequence[float], up: float, down: float) -> None:
    """Each worker tells all others ``up`` bytes and gets ``down``, each by what it has ``held``."""
    there: dict[int, float] = {}
    for host, share in zip(hosts, held, strict=True):
        there[host] = there.get(host, 0.0) + share
    found.ask(hosts, there, up=up, down=down, here=up + down)
    found.sent -= sum(held) * (up + down)  # what is its own


def _parts_of(amounts: Sequence[float], plan: Plan, ground: Ground, m: int) -> list[list[float]]:
    """Of each table's amount the part of each of m workers that tables are spread over."""
    tables = ground.profile.tables
    blocks = divide([(table.rows, table.dim) for table in tables], plan.embeddings, m)
    return [
        [amount * block.rows * block.width / (table.rows * table.dim) for block in each]
        for amount, table, each in zip(amounts, tables, blocks, strict=True)
    ]


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
        shapes=profile.dense_shapes,
        gathered=max(0, profile.gathered - profile.table_bytes // profile.element_bytes),
        tables=(),
        layers=tuple(
            msgspec.structs.replace(layer, elements=count)
            for layer, count in zip(profile.layers, elements, strict=True)
        ),
        compute={key.removeprefix(mark): curve for key, curve in profile.compute.items() if key.startswith(mark)},
        update={key.removeprefix(mark): curve for key, curve in profile.update.items() if key.startswith(mark)},
    )


def _memory(plan: Plan, ground: Ground, dense: Prediction) -> dict[str, int]:
    """Peak bytes by role: rows, their slots and their index are on servers, or on workers, and are copied to be saved.

    In a pipeline tables are taken to be in its first stage.
    """
    profile = ground.profile
    numbers = [table.rows * table.dim * (1 + profile.slots) * profile.element_bytes for table in profile.tables]
    if plan.served:
        rows = (sum(numbers) + INDEX * sum(table.rows for table in profile.tables)) / plan.servers
        return dense.memory | {"server": int(ground.base("ps", "server") + peak_bytes(rows, 0, rows, 0))}
    parts = _parts_of(numbers, plan, ground, len(_readers(plan, ground)))
    fullest = max(sum(part) for part in zip(*parts, strict=True))
    holders = {role for role in dense.memory if role in ("worker", "stage 0")}
    return dense.memory | {role: int(dense.memory[role] + peak_bytes(fullest, 0, fullest, 0)) for role in holders}
