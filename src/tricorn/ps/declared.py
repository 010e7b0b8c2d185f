"""What a worker tells the servers of its job: which parameters and tables there are, and who holds what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tricorn.ps.client import Client
from tricorn.ps.placement import bucket_ranges, place
from tricorn.ps.sparse.spec import TableSpec
from tricorn.ps.table import Description

if TYPE_CHECKING:
    from tricorn.comm.codecs import ErrorFeedback
    from tricorn.job import Job
    from tricorn.optim import Optimizer
    from tricorn.plan import Compression
    from tricorn.state.flat import Entry
    from tricorn.state.rows import RowTable
    from tricorn.strategy import Context, Seat


def given_rows(model: nn.Module, tables: Sequence[RowTable]) -> list[Tensor | None]:
    """The rows that the model itself gives each of its tables, which are brought to the servers; None if it does not.

    They have to be taken before the tables are replaced.
    """
    return [model.get_parameter(table.parameter).detach() if table.prefilled else None for table in tables]


def new_feedback(compress: Compression, flat_N: Tensor) -> ErrorFeedback | None:
    """What adds to pushes of such a tensor what encoding earlier ones lost; None where nothing is encoded."""
    if compress == "none":
        return None
    from tricorn.comm.codecs import ErrorFeedback, find

    return ErrorFeedback(find(compress), len(flat_N), flat_N.dtype)


class Declared:
    """The dense parameters, laid out as ``entries``, and the tables that servers hold.

    ``optimizer`` is that of the dense parameters where it is not the job's.
    """

    def __init__(
        self,
        context: Context,
        entries: Sequence[Entry],
        tables: Sequence[RowTable],
        optimizer: Optimizer | None = None,
    ) -> None:
        self._context = context
        self._entries = entries
        self._tables = tables
        self._optimizer = optimizer or context.job.optimizer

    def client(self, seat: Seat, *, compress: Compression, feedback: ErrorFeedback | None = None) -> Client:
        """A client of the servers of a seat, not connected."""
        context = self._context
        return Client(
            seat.servers, place(self._entries, len(seat.servers)), context.secret, rank=context.rank,
            incarnation=context.incarnation, epoch=seat.epoch, tables=_specs(context.job, self._tables, (0, 0)),
            compress=compress, compress_tables=context.plan.compress_tables, feedback=feedback,
        )  # fmt: skip

    def connect(
        self, client: Client, servers: int, *, initial: Callable[[], Tensor], given: Sequence[Tensor | None]
    ) -> None:
        """Connect it; rank 0 brings weights and ``given`` rows to servers that want them. Raises as the client does."""
        client.connect()
        if self._context.rank == 0:
            parts = zip(place(self._entries, servers), bucket_ranges(servers), strict=True)
            client.create([self._description(*part) for part in parts], initial, given)

    def _description(self, part: tuple[int, int], buckets: tuple[int, int]) -> Description:
        job, plan = self._context.job, self._context.plan
        return Description(
            tables=tuple((entry.name, entry.shape) for entry in self._entries),
            dtype="float64" if job.precision == "float64" else "float32",
            start=part[0],
            stop=part[1],
            optimizer=self._optimizer,
            consistency=plan.consistency,
            staleness=plan.staleness,
            sparse=_specs(job, self._tables, buckets),
            sparse_consistency=plan.sparse_consistency,
            stale=plan.stale,
            local_steps=plan.local_steps,
        )


def _specs(job: Job, tables: Sequence[RowTable], buckets: tuple[int, int]) -> tuple[TableSpec, ...]:
    return tuple(
        TableSpec(
            name=table.name,
            dim=table.dim,
            dtype="float64" if job.precision == "float64" else "float32",
            seed=job.seed,
            declared=table.declared,
            optimizer=table.optimizer,
            buckets=buckets,
            prefilled=table.rows if table.prefilled else 0,
        )
        for table in tables
    )
