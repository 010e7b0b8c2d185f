"""What one server holds: a slice of the dense weights and their optimizer slots, and its rows of the sparse tables.

Legend: S elements of this server's slice of the flat layout; U ids of one sparse table; D elements of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec
import psutil
import torch
from torch import Tensor

from tricorn.errors import Diverged, PlanError, ProtocolError
from tricorn.optim import Optimizer
from tricorn.plan import Consistency, Stale
from tricorn.ps import memory
from tricorn.ps.blocks import Ids
from tricorn.ps.sparse.spec import BUCKETS, TableSpec
from tricorn.state.flat import OUTER_PREFIX, Entry, flat_pieces, layout
from tricorn.state.row_shards import CHUNK, read_rows, row_pieces
from tricorn.state.shards import CheckpointReader, Piece

if TYPE_CHECKING:
    from tricorn.ps.sparse.store import SparseTable

MAX_TABLES = 1024
_RECORD = 40  # bytes of a row besides its numbers: id, count, last use, and of the index, also while it is built anew
_UNEVEN = 1.25  # how much more than its share of the rows a server may have
_LEAST = 1 << 20  # bytes
_Natural = Annotated[int, msgspec.Meta(ge=0, lt=2**40)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker asks a server to hold, and how to update it.

    Elements [start, stop) of all dense tables, and of each sparse table the buckets that its spec says. ``staleness``
    bounds SSP, and what ``drop`` lets through; ``compensation`` is the lambda of delay compensation. With
    ``local_steps`` above 1 workers make up to that many updates of the dense part by themselves, and ``optimizer``, at
    its own rate whatever the schedule, takes how far they went for a gradient.
    """

    tables: tuple[tuple[str, tuple[_Natural, ...]], ...]  # name and shape, in the order of the flat layout
    dtype: Literal["float32", "float64"]
    start: _Natural
    stop: _Natural
    optimizer: Optimizer
    consistency: Consistency
    staleness: _Natural
    sparse: Annotated[tuple[TableSpec, ...], msgspec.Meta(max_length=MAX_TABLES)] = ()
    sparse_consistency: Consistency | None = None  # None: as the dense part
    stale: Stale = "keep"
    compensation: _Share = 0.04  # as Zheng et al. 2017 found best for CIFAR-10
    local_steps: Annotated[int, msgspec.Meta(ge=1, lt=2**31)] = 1

    @property
    def row_consistency(self) -> Consistency:
        return self.sparse_consistency or self.consistency

    @property
    def bytes(self) -> int:
        """Of the weights of this slice."""
        return (self.stop - self.start) * (8 if self.dtype == "float64" else 4)


def read_description(document: bytes | bytearray) -> Description:
    """Decode and judge the payload of a CREATE; raises ProtocolError, or PlanError if this machine is too small."""
    try:
        description = msgspec.json.decode(document, type=Description)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a description that cannot be read: {error}") from None
    if wrong := description.optimizer.mistakes():
        raise ProtocolError(f"an optimizer that cannot run: {wrong[0][0]} is {wrong[0][1]}")
    entries = layout(description.tables)
    if not description.start <= description.stop <= (entries[-1].stop if entries else 0):
        raise ProtocolError(f"a slice [{description.start}, {description.stop}) that the tables do not have")
    for mistake in _mistakes(description):
        raise ProtocolError(mistake)
    needed = description.bytes * (2 + len(description.optimizer.slots))
    if needed > psutil.virtual_memory().total:
        raise PlanError(
            f"this server's slice needs {needed / 2**30:.1f} GiB, more than its machine has; give more servers"
        )
    return description


def difference(held: Description, given: Description) -> str | None:
    """The first thing that a worker declares differently than a server holds it, in words."""
    for name in Description.__struct_fields__:
        own, other = getattr(held, name), getattr(given, name)
        if own == other:
            continue
        if isinstance(own, tuple) and isinstance(other, tuple) and {*own} != {*other}:
            own, other = ([each for each in one if each not in rest] for one, rest in ((own, other), (other, own)))
        what = {"tables": "dense parameters", "sparse": "sparse tables"}.get(name, name)
        return f"{what} {_shown(other)} are not those that this server holds: {_shown(own)}"
    return None


def _shown(value: object) -> str:
    text = "(none)" if value == [] else str(value)
    return text if len(text) <= 150 else f"{text[:149]}…"


def _mistakes(description: Description) -> list[str]:
    found = []
    for spec in description.sparse:
        wrong = [*spec.declared.mistakes(), *spec.optimizer.mistakes()]
        if not 0 < spec.dim <= 1 << 20 or not 0 <= spec.prefilled < 2**40 or not 0 <= spec.seed < 2**63:
            numbers = (spec.dim, spec.prefilled, spec.seed)
            found.append(f"sparse table {spec.name!r} has an impossible dim, prefilled or seed: {numbers}")
        if not 0 <= spec.buckets[0] <= spec.buckets[1] <= BUCKETS:
            found.append(f"sparse table {spec.name!r} has no buckets {spec.buckets} of {BUCKETS}")
        found += [f"sparse table {spec.name!r} cannot run: {field} is {given}" for field, given, _ in wrong]
    if description.consistency != "bsp" and description.row_consistency == "bsp":
        found.append("rows cannot be synchronous (bsp) where dense parameters are not")
    if description.consistency != "bsp" and description.local_steps > 1:
        found.append(f"local_steps {description.local_steps} need synchronous dense parameters (bsp)")
    return found


def _divided(limit: int, specs: Sequence[TableSpec]) -> list[int]:
    """The bytes that each table may take: what is known to be enough for it, and of the rest all others as much."""
    needs = {}
    for index, spec in enumerate(specs):
        rows = spec.prefilled or (spec.declared.max_rows or 0) * (spec.declared.admit == 1)
        share = (spec.buckets[1] - spec.buckets[0]) / BUCKETS
        record = spec.dim * (1 + len(spec.optimizer.slots)) * 8 + _RECORD
        needs[index] = int(rows * share * record * _UNEVEN) + _LEAST if rows else limit
    parts = [0] * len(specs)
    for left, index in zip(range(len(specs), 0, -1), sorted(needs, key=lambda index: needs[index]), strict=True):
        parts[index] = min(needs[index], limit // left)
        limit -= parts[index]
    return parts


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is."""
    # A sum is not finite if an element is not, and takes half the time; it may also just be too large.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


class Gradients(NamedTuple):
    """Of what a server holds: the dense slice (S); for each sparse table ids (U) and their rows' gradients (U, D)."""

    dense_S: Tensor
    rows: list[tuple[Ids, Tensor]]

    def flats(self) -> list[Tensor]:
        """All elements, as flat views."""
        return [self.dense_S, *(grads_UD.flatten() for _, grads_UD in self.rows)]

    def check_finite(self, step: int, names: Sequence[str]) -> None:
        """Raise Diverged if a number is not finite; ``names`` are those of the sparse tables.

        A single sparse table is left to judge by itself, which it does before it changes anything.
        """
        judged = [("the dense parameters", self.dense_S)]
        if len(names) > 1:
            judged += zip(names, self.flats()[1:], strict=True)
        for name, grad in judged:
            if not is_finite(grad):
                raise Diverged(f"the gradient of {name} is not finite in step {step}")


class Table:
    """The server's part as it is trained: ``weights_S``, the optimizer's ``slots``, and the ``sparse`` tables.

    The weights lie in shared memory and are zero until loaded; rows begin when they are first updated.
    ``memory_limit``, in bytes, is for all sparse tables together; None means the machine's memory.
    """

    def __init__(self, description: Description, *, memory_limit: int | None = None) -> None:
        self.description = description
        self.entries: tuple[Entry, ...] = layout(description.tables)
        self.dtype: torch.dtype = getattr(torch, description.dtype)
        self.weights_S = memory.zeros(description.stop - description.start, self.dtype)
        self.slots = {slot: torch.zeros_like(self.weights_S) for slot in description.optimizer.slots}
        self.sparse: tuple[SparseTable, ...] = ()
        if description.sparse:
            from tricorn.ps.sparse.store import SparseTable

            limit = psutil.virtual_memory().total if memory_limit is None else memory_limit
            with ExitStack() as stack:
                made = []
                for spec, part in zip(description.sparse, _divided(limit, description.sparse), strict=True):
                    made.append(SparseTable(spec, memory_limit=part))
                    stack.callback(made[-1].close)
                stack.pop_all()
            self.sparse = tuple(made)

    def close(self) -> None:
        """Give the memory of the rows back."""
        for table in self.sparse:
            table.close()

    def tensors(self) -> dict[str, Tensor]:
        prefix = OUTER_PREFIX if self.description.local_steps > 1 else "optim"
        return {"param": self.weights_S} | {f"{prefix}/{slot}": tensor for slot, tensor in self.slots.items()}

    def load(self, folder: Path, step: int) -> None:
        """Take the server's part from a checkpoint, written by any number of servers or another strategy.

        Raises CheckpointDamaged if the checkpoint does not have it, UsageError if it has other tables.
        """
        reader = CheckpointReader(folder, step)
        start, stop = self.description.start, self.description.stop
        for prefix, flat_S in self.tensors().items():
            for entry in self.entries:
                low, high = max(entry.start, start), min(entry.stop, stop)
                if low < high:
                    key = f"{prefix}/{entry.name}"
                    if prefix.startswith(OUTER_PREFIX) and key not in reader:
                        continue  # the run had no local steps until now
                    stored = reader.read_slice(key, entry.shape, low - entry.start, high - entry.start)
                    flat_S[low - start : high - start] = stored
        for table in self.sparse:
            self._load_rows(reader, table)

    @staticmethod
    def _load_rows(reader: CheckpointReader, table: SparseTable) -> None:
        from tricorn.ps.sparse.rows import slot_widths
        from tricorn.ps.sparse.store import Rows

        spec = table.spec
        slots = slot_widths(spec.optimizer, spec.dim)
        for chunk in read_rows(reader, spec.name, spec.dim, slots, getattr(torch, spec.dtype)):
            table.load(Rows(*chunk))

    def check_buckets(self, gradients: Gradients) -> None:
        """Raise ProtocolError for rows that are another server's."""
        for table, (ids_U, _) in zip(self.sparse, gradients.rows, strict=True):
            table.check_buckets(ids_U)

    def check_room(self, gradients: Gradients) -> None:
        """Raise TableFull if there is no room for these rows, of which each table has an id once."""
        for table, (ids_U, _) in zip(self.sparse, gradients.rows, strict=True):
            table.check_room(ids_U)

    def update(self, gradients: Gradients, *, step: int, factor: float) -> None:
        """Apply gradients as update number ``step``, from 1; they are used up.

        Every optimizer's rate is multiplied by ``factor``. Raises Diverged, ProtocolError and TableFull; before
        anything is changed if there is one sparse table, or all were checked before.
        """
        for table, (ids_U, grads_UD) in zip(self.sparse, gradients.rows, strict=True):
            if len(ids_U):
                table.update(ids_U, grads_UD.numpy(), step=step, lr=table.spec.optimizer.lr * factor)
            table.tick(step)
        if len(gradients.dense_S) < len(self.weights_S):  # rows alone
            return
        optimizer = self.description.optimizer
        rate = optimizer.lr * (factor if self.description.local_steps == 1 else 1.0)
        optimizer.update(self.weights_S, gradients.dense_S, self.slots, step=step, lr=rate)

    def gather(self, table: int, ids_U: Ids) -> Tensor:
        """Copies of these rows (U, D)."""
        spec = self.description.sparse[table]
        rows_UD = torch.empty(len(ids_U), spec.dim, dtype=getattr(torch, spec.dtype))
        if len(ids_U):
            self.sparse[table].gather(ids_U, rows_UD.numpy())
        return rows_UD

    def pieces(self) -> list[Piece]:
        """Copies of the server's part, as a checkpoint stores them."""
        dense = flat_pieces(self.tensors(), self.entries, self.description.start, self.description.stop)
        return dense + [
            piece
            for table in self.sparse
            for piece in row_pieces(table.spec.name, table.spec.buckets[0], table.export(CHUNK))
        ]
