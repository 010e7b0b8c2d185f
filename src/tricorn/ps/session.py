"""The parameter server in a training loop of one's own: ``tricorn.ps.connect``.

Legend: N elements of all dense parameters; U ids of one sparse table; D elements of a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Generic, Literal, TypeVar, get_args

import msgspec
import torch
from torch import Tensor

from tricorn.comm.lane import Handle, Lane
from tricorn.comm.sockets import Address
from tricorn.errors import Diverged, TableFull, UsageError, form
from tricorn.optim import Optimizer
from tricorn.plan import Consistency, RowCompression
from tricorn.ps import memory, unfit_encoding
from tricorn.ps.access import Access, read
from tricorn.ps.blocks import ENCODINGS
from tricorn.ps.client import Client
from tricorn.ps.placement import bucket_ranges, place
from tricorn.ps.rows import RowGradients, Wanted, check_ids
from tricorn.ps.sparse.spec import TableSpec
from tricorn.ps.standing import EPOCH, client_tls
from tricorn.ps.table import Description, is_finite
from tricorn.state.flat import layout
from tricorn.table import Table

T = TypeVar("T")
_RANK_BITS = 12
_PUSH_BITS = 51


class Ticket(Generic[T]):
    """A request under way, of which ``wait`` is the answer."""

    def __init__(self, lane: Lane, request: Callable[[], T]) -> None:
        self._request = request
        self._handle: Handle = lane.start(self._run)

    def wait(self) -> T:
        """Block until it is answered; raise what it raised. May be called again."""
        self._handle.wait()
        return self._answer

    def _run(self) -> None:
        self._answer = self._request()


class Session:
    """A client of servers that stand alone. Requests are carried out in order; its methods are for one thread.

    ``weights``: the dense parameters by name, CPU tensors that every ``pull`` fills. ``gradients``: tensors of the
    same shapes, from which ``push`` sends; where a server is on this host it reads them in place. So both belong to
    the servers until the ticket of the request was waited for, and so do the ids and gradients of rows.

    What is asked for is judged before anything is sent: UsageError for what cannot be, Diverged for a gradient that is
    not finite. A ticket raises PeerLost when a server is lost, or a client whose gradients a synchronous step waits
    for, ProtocolError for what does not fit the servers, and TableFull at a limit of memory. In a synchronous step all
    clients are told of it, it changes nothing, and the next one may follow. Otherwise the servers that did not say so
    have applied their part of the push, and the client has to connect again.
    """

    def __init__(
        self,
        client: Client,
        entries: Mapping[str, Tensor],
        specs: Sequence[TableSpec],
        *,
        rank: int,
        servers: int,
        synchronous: bool,
        version: int,
        dtype: torch.dtype,
    ) -> None:
        self._client = client
        self._specs = {spec.name: (index, spec) for index, spec in enumerate(specs)}
        count = sum(tensor.numel() for tensor in entries.values())
        self._weights_N, self._grads_N = torch.zeros(count, dtype=dtype), memory.zeros(count, dtype)
        self.weights, self.gradients = (_views(flat_N, entries) for flat_N in (self._weights_N, self._grads_N))
        self._lane = Lane("tricorn-ps")
        self._synchronous = synchronous
        self._version = version  # synchronous: the step at hand
        self._factor = 1.0  # of the step that the next synchronous pull applies
        self._bases = [0] * servers  # asynchronous: by server, the version pulled last
        self._clock = 0
        # A step is applied once, so none may have the number of another client's, or of this one's earlier life.
        self._first = rank << _PUSH_BITS | time.time_ns() // 10_000

    def pull(self, ids: Mapping[str, Tensor] | None = None) -> Ticket[dict[str, Tensor]]:
        """Fill ``weights``, and get the rows of these ids (int64, each once) by table: [U, D].

        It waits where the consistency says so: synchronous, for the gradients of all clients; ``ssp``, for clients
        that are more than ``staleness`` clocks behind.
        """
        wanted, rows = self._wanted(ids)
        return Ticket(self._lane, lambda: self._pull(wanted, rows))

    def push(
        self, rows: Mapping[str, tuple[Tensor, Tensor]] | None = None, *, factor: float = 1.0, count: int = 1
    ) -> Ticket[None]:
        """Send ``gradients``, and for each table (ids, gradients of their rows [U, D]); they are applied once.

        ``factor`` multiplies every optimizer's rate. Synchronous: gradients are means over ``count`` samples, and
        the mean over all clients' samples is applied by the next ``pull``.
        """
        gradients = self._judged(rows, factor, count)
        self._clock += 1
        clock = self._clock
        return Ticket(self._lane, lambda: self._push(gradients, clock, factor, count))

    def push_pull(
        self,
        rows: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        ids: Mapping[str, Tensor] | None = None,
        *,
        factor: float = 1.0,
        count: int = 1,
    ) -> Ticket[dict[str, Tensor]]:
        """``push`` and ``pull``, where possible in one round trip."""
        gradients, (wanted, read) = self._judged(rows, factor, count), self._wanted(ids)
        self._clock += 1
        clock = self._clock

        def request() -> dict[str, Tensor]:
            if self._synchronous:
                self._push(gradients, clock, factor, count)
                return self._pull(wanted, read)
            _, self._bases = self._client.push_pull(
                self._first + clock, self._bases, self._grads_N, gradients, self._weights_N, wanted, factor=factor
            )
            return read

        return Ticket(self._lane, request)

    def clock(self) -> int:
        """How often this client has pushed."""
        return self._clock

    def barrier(self) -> None:
        """Wait until all requests are answered and every client has come to its barrier, or has left."""
        Ticket(self._lane, self._client.barrier).wait()

    def close(self) -> None:
        """Wait for all requests, and leave."""
        self._lane.close()
        self._client.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._client.interrupt()
        self.close()

    def _pull(self, wanted: Sequence[Wanted], rows: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._synchronous:
            self._client.pull_version(self._version, self._weights_N, wanted, scale=1.0, factor=self._factor)
        else:
            self._bases = self._client.pull(self._weights_N, wanted)
        return rows

    def _push(self, rows: Sequence[RowGradients], clock: int, factor: float, count: int) -> None:
        if not self._synchronous:
            self._client.push(self._first + clock, self._bases, self._grads_N, rows, factor=factor)
            return
        if count != 1:
            self._grads_N.mul_(count)
            rows = [row._replace(grads_UD=row.grads_UD * count) for row in rows]
        try:
            self._client.push_sum(self._version, (0.0, count, count, 0, 0), self._grads_N, rows)
        except (Diverged, TableFull):  # all clients are told the same, and do the same
            self._version += 1
            self._client.pull_version(self._version, self._weights_N, scale=1.0, factor=1.0, void=True)
            raise
        self._version += 1
        self._factor = factor

    def _wanted(self, ids: Mapping[str, Tensor] | None) -> tuple[list[Wanted], dict[str, Tensor]]:
        wanted, rows = [], {}
        for name, ids_U in _by_table(ids).items():
            index, spec = self._known(name, ids_U)
            rows[name] = torch.empty(len(ids_U), spec.dim, dtype=getattr(torch, spec.dtype))
            wanted.append(Wanted(index, ids_U, rows[name]))
        self._client.check(wanted)
        return wanted, rows

    def _judged(
        self, rows: Mapping[str, tuple[Tensor, Tensor]] | None, factor: float, count: int
    ) -> list[RowGradients]:
        """The gradients of rows. Raises UsageError, and Diverged if these or the dense ones are not finite."""
        _check_number("factor", factor, -math.inf)
        _check_number("count", count, 0)
        gradients, judged = [], {"the dense parameters": self._grads_N}
        for name, pair in _by_table(rows).items():
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], Tensor):
                raise UsageError(
                    f"the gradients of table {name!r} are {form(pair)}",
                    remedy="Give two tensors: (ids, gradients of their rows).",
                )
            ids_U, grads_UD = pair
            gradients.append(RowGradients(self._known(name, ids_U)[0], ids_U, grads_UD))
            judged[f"table {name!r}"] = grads_UD
        self._client.check(gradients)
        for what, grads in judged.items():
            if not is_finite(grads):
                raise Diverged(f"the gradient of {what} is not finite; it was not sent")
        return gradients

    def _known(self, name: str, ids_U: Tensor) -> tuple[int, TableSpec]:
        """The table, of which these ids can be asked for. Raises UsageError."""
        known = self._table(name)
        if not isinstance(ids_U, Tensor):
            raise UsageError(
                f"ids of table {name!r} are a {type(ids_U).__name__}", remedy="Give a one-dimensional int64 tensor."
            )
        check_ids(name, ids_U)
        from tricorn.ps.sparse.ids import first_repeated

        if first_repeated(ids_U.contiguous().numpy(force=True)) >= 0:
            raise UsageError(
                f"ids of table {name!r} come twice",
                remedy="Give each once (torch.unique), with the sum of its gradients.",
            )
        return known

    def _table(self, name: str) -> tuple[int, TableSpec]:
        if name not in self._specs:
            raise UsageError(f"there is no table {name!r}", remedy=f"Declare it; there are {[*self._specs]}.")
        return self._specs[name]


def connect(
    servers: Access | Path | str | Sequence[Address],
    *,
    dense: Mapping[str, Tensor] | None = None,
    tables: Mapping[str, tuple[int, Table]] | None = None,
    optimizer: Optimizer,
    secret: bytes | None = None,
    rank: int = 0,
    consistency: Consistency = "asp",
    sparse_consistency: Consistency | None = None,
    staleness: int = 3,
    seed: int = 0,
    compress: str = "none",
    compress_tables: Mapping[str, str] | None = None,
    share: bool = True,
    tls: Path | str | None = None,
) -> Session:
    """Become the client of that ``rank``; all clients declare the same. Waits until rank 0 has.

    ``servers``: the file that ``tricorn server`` writes, what ``serving`` yields, or addresses, and then their
    ``secret``. ``dense``: names and initial values (those of rank 0 count), all of one type, float32 or float64.
    ``tables``: for each sparse table the width of its rows and how they are trained. ``compress``: how gradients travel
    (none, bf16, fp16, int8 or topk); ``compress_tables``: those of the rows of a table, where it differs. ``tls``: the
    file of the certificate to trust. Raises UsageError, PeerLost when nobody answers, AuthenticationError for a wrong
    secret or certificate, and ProtocolError when the servers hold something else.
    """
    access = read(Path(servers)) if isinstance(servers, str | Path) else servers
    if isinstance(access, Access):
        addresses, secret = [*access.servers.values()], bytes.fromhex(access.secret)
    else:
        addresses = [*access]
    if secret is None or not addresses:
        raise UsageError("no servers, or no secret", remedy="Give addresses with their secret, or the servers' file.")
    if not 0 <= rank < 1 << _RANK_BITS:
        raise UsageError(f"rank {rank} is not from 0 to {(1 << _RANK_BITS) - 1}", remedy="Count clients from 0.")
    by_table = dict(compress_tables or {})
    _check(optimizer, consistency, sparse_consistency, staleness)
    _check_encodings(compress, by_table, [*(tables or {})])
    entries = {name: tensor.detach().cpu() for name, tensor in (dense or {}).items()}
    kinds = {tensor.dtype for tensor in entries.values()} or {torch.float32}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
        raise UsageError(f"dense parameters are of {sorted(map(str, kinds))}", remedy="Give float32 or float64 alone.")
    (dtype,) = kinds
    specs = [_spec(name, dim, table, optimizer, dtype, seed) for name, (dim, table) in (tables or {}).items()]
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in entries.items())
    slices = place(layout(shapes), len(addresses)) if shapes else ((0, 0),) * len(addresses)
    feedback = None
    if compress != "none":
        from tricorn.comm import codecs

        feedback = codecs.ErrorFeedback(codecs.find(compress), layout(shapes)[-1].stop if shapes else 0, dtype)
    client = Client(
        addresses, slices, secret, rank=rank, incarnation=time.time_ns() // 1000, epoch=EPOCH, tables=specs,
        compress=compress, compress_tables=by_table, feedback=feedback, share=share,
        tls=client_tls(Path(tls)) if tls else None,
    )  # fmt: skip
    try:
        client.connect()
        descriptions = [
            Description(
                tables=shapes, dtype=_name(dtype), start=start, stop=stop, optimizer=optimizer,
                consistency=consistency, sparse_consistency=sparse_consistency, staleness=staleness,
                sparse=tuple(msgspec.structs.replace(spec, buckets=buckets) for spec in specs),
            )
            for (start, stop), buckets in zip(slices, bucket_ranges(len(slices)), strict=True)
        ]  # fmt: skip
        flat = [tensor.reshape(-1) for tensor in entries.values()]
        client.create(descriptions, lambda: torch.cat(flat) if flat else torch.zeros(0, dtype=dtype))
        synchronous = consistency == "bsp"
        count = sum(tensor.numel() for tensor in flat)
        version = client.newest(torch.empty(count, dtype=dtype)) if synchronous else 0
        if not synchronous:
            client.idle()
    except BaseException:
        client.close()
        raise
    return Session(
        client, entries, specs, rank=rank, servers=len(addresses), synchronous=synchronous, version=version, dtype=dtype
    )


def _check(
    optimizer: Optimizer, consistency: Consistency, sparse_consistency: Consistency | None, staleness: int
) -> None:
    """Raise UsageError for what no server could do."""
    for field, given, would_do in optimizer.mistakes():
        raise UsageError(f"the optimizer's {field} is {given}", remedy=would_do)
    for name, value in (("consistency", consistency), ("sparse_consistency", sparse_consistency or "asp")):
        if value not in get_args(Consistency):
            raise UsageError(f"{name} is {value!r}", remedy=f"Give one of {', '.join(get_args(Consistency))}.")
    if not isinstance(staleness, int) or staleness < 0:
        raise UsageError(f"staleness is {staleness!r}", remedy="Give a whole number of clocks, 0 or more.")


def _check_encodings(compress: str, by_table: Mapping[str, str], tables: Sequence[str]) -> None:
    """Raise UsageError for an encoding that there is not, or not for rows, and for a table that there is not."""
    for given, possible in ((compress, ENCODINGS), *((each, get_args(RowCompression)) for each in by_table.values())):
        if given not in possible:
            raise UsageError(f"there is no encoding {given!r}", remedy=f"Give one of {', '.join(possible)}.")
    if wrong := unfit_encoding(compress, by_table, tables):
        raise UsageError(wrong[0], remedy=f"{wrong[1][0].upper()}{wrong[1][1:]}.")


def _check_number(name: str, value: object, least: float) -> None:
    """Raise UsageError unless it is a finite number, not below ``least``."""
    if not isinstance(value, Real) or not math.isfinite(value) or value < least:
        raise UsageError(f"{name} is {value!r}", remedy=f"Give a finite number{', 0 or more' * (least == 0)}.")


def _by_table(given: Mapping[str, T] | None) -> Mapping[str, T]:
    """What is given, {} for nothing. Raises UsageError for what has no names of tables."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UsageError(f"rows come as {form(given)}, not by table", remedy="Give a dict with the names of tables.")
    return given


def _views(flat_N: Tensor, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.split(flat_N, [tensor.numel() for tensor in entries.values()])
    return {name: part.view(tensor.shape) for part, (name, tensor) in zip(parts, entries.items(), strict=True)}


def _spec(name: str, dim: int, table: Table, optimizer: Optimizer, dtype: torch.dtype, seed: int) -> TableSpec:
    if wrong := table.mistakes():
        field, given, would_do = wrong[0]
        raise UsageError(f"table {name!r}: {field} is {given}", remedy=would_do)
    return TableSpec(
        name=name, dim=dim, dtype=_name(dtype), seed=seed, declared=table, optimizer=table.optimizer or optimizer,
        buckets=(0, 0),
    )  # fmt: skip


def _name(dtype: torch.dtype) -> Literal["float32", "float64"]:
    return "float64" if dtype == torch.float64 else "float32"
