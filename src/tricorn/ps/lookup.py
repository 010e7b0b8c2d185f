"""The user's ``nn.Embedding`` and ``nn.EmbeddingBag`` as tables: look-ups read rows, backward leaves their gradients.

A look-up takes the rows of its ids as a small matrix, a leaf of the graph, on which torch's own arithmetic runs
(lookup_modules.py). Most rows are known before forward (lookup_sources.py), and come with the weights.

Legend: n ids of a look-up, U unique ones among them, D the width of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tricorn.errors import UsageError
from tricorn.ps.lookup_modules import replace
from tricorn.ps.lookup_sources import Ids, Source, trace, whole_numbers
from tricorn.ps.rows import RowGradients, Wanted
from tricorn.state.rows import RowTable

_MISSES = 3  # times that a look-up may ask for other ids than foreseen, before it is foreseen no more


class _Reading:
    """The rows of some ids: ``ids_U`` are asked of the servers, ``rows`` has the padding's row before theirs."""

    def __init__(self, ids_n: Ids, port: _Port) -> None:
        from tricorn.ps.sparse.ids import unique

        self.padded = int(port.padding_1D is not None)
        if self.padded:  # first, so that its place is known; it never changes, so it is not asked for
            ids_n = np.concatenate((np.array([port.table.padding], np.int64), ids_n))
        ids_U, inverse_n = unique(ids_n)
        self.ids_U = torch.from_numpy(ids_U[self.padded :])
        self.inverse_n = torch.from_numpy(inverse_n[self.padded :])
        self.rows = torch.empty(len(ids_U), port.table.dim, dtype=port.dtype)
        if port.padding_1D is not None:
            self.rows[:1] = port.padding_1D
        self._leaf: Tensor | None = None
        self.pending = 0  # foreseen look-ups that have not come

    @property
    def wanted_UD(self) -> Tensor:
        return self.rows[self.padded :]

    def leaf(self, device: torch.device, learning: bool) -> Tensor:
        """The rows on a device, as a leaf of the graph when the model learns."""
        if self._leaf is None:
            self._leaf = self.rows.to(device).requires_grad_(learning)
        return self._leaf

    def gradient_UD(self) -> Tensor | None:
        if self._leaf is None or self._leaf.grad is None:
            return None
        return self._leaf.grad[self.padded :].cpu()


@dataclass(frozen=True, eq=False)
class _Served:
    """A look-up that is answered, or can be: its ids and where their rows are."""

    ids_n: Ids
    reading: _Reading
    inverse_n: Tensor


class Ahead(NamedTuple):
    """What is foreseen of a batch: by table the look-ups in their order, and the rows to have read before forward.

    ``tensors`` are the whole numbers of each of its parts.
    """

    tensors: list[list[Ids]]
    served: list[list[_Served]]
    wanted: list[Wanted]


class _Port:
    """One table in this worker's model."""

    def __init__(
        self, index: int, table: RowTable, weight: Tensor, read: Callable[[list[Wanted]], object], *, bounded: bool
    ) -> None:
        self.index = index
        self.table = table
        self.here = True  # whether this worker has the module that looks up
        self._bounded = bounded or table.prefilled
        self.dtype = weight.dtype
        self.padding_1D: Tensor | None = None
        if table.padding is not None:
            padding = weight.detach()[table.padding].clone() if table.prefilled else torch.zeros(table.dim)
            self.padding_1D = padding.to(self.dtype).unsqueeze(0)
        self._read = read
        self._sources: list[Source | None] = []
        self._misses = 0
        self.begin([], learning=False)

    def begin(self, foreseen: list[_Served], *, learning: bool) -> None:
        self._learning = learning
        self._foreseen = foreseen
        self._awaited = [*foreseen]
        self._served: list[_Served] = []

    def foresee(self, tensors: Sequence[Sequence[Ids]]) -> list[_Served]:
        """The look-ups that a batch will lead to, on one common reading; empty if that is not known."""
        parts = [source.ids(part) if source else None for part in tensors for source in self._sources]
        known = [part for part in parts if part is not None]
        if not self.here or not known or len(known) < len(parts):
            return []
        ids_n = known[0] if len(known) == 1 else np.concatenate(known)
        reading = _Reading(ids_n, self)
        if self._beyond(reading.ids_U) is not None:
            return []  # the look-up itself will say so, in the user's line
        reading.pending = len(known)
        inverses = torch.split(reading.inverse_n, [len(part) for part in known])
        return [_Served(part, reading, inverse) for part, inverse in zip(known, inverses, strict=True)]

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [U, D] that some ids need, and for each id which of them it is, in the ids' shape."""
        if ids.dtype not in (torch.int64, torch.int32):
            raise UsageError(
                f"ids of embedding {self.table.name!r} are {ids.dtype}", remedy="Give int64 or int32 (ids.long())."
            )
        ids_n = ids.detach().reshape(-1).numpy(force=True).astype(np.int64, copy=False)
        served = self._known(ids_n) or self._ask(ids_n)
        return served.reading.leaf(ids.device, self._learning), served.inverse_n.to(ids.device).view(ids.shape)

    def learn(self, tensors: Sequence[Sequence[Ids]]) -> None:
        """After the forwards of a batch's parts: find where their ids came from, if they were not foreseen."""
        if not self._learning or self._served == self._foreseen:
            return
        self._misses += bool(self._sources)
        calls, rest = divmod(len(self._served), max(1, len(tensors)))
        hopeless = self._misses > _MISSES or rest or not tensors
        self._sources = [] if hopeless else [trace(served.ids_n, tensors[0]) for served in self._served[:calls]]

    def gradients(self) -> RowGradients | None:
        """The sums of the gradients of all look-ups since ``begin``, by id; None if there were none."""
        found: list[tuple[Tensor, Tensor]] = []
        for reading in dict.fromkeys(served.reading for served in self._served):
            if (gradient_UD := reading.gradient_UD()) is not None:
                ids_U = reading.ids_U
                if reading.pending:  # rows that were foreseen and then not looked up have no update
                    seen = torch.unique(torch.cat([s.inverse_n for s in self._served if s.reading is reading]))
                    seen = seen[seen >= reading.padded] - reading.padded
                    ids_U, gradient_UD = ids_U[seen], gradient_UD[seen]
                found.append((ids_U, gradient_UD))
        if len(found) > 1:
            found = [_merged(found)]
        if not found:
            return None
        ids_U, gradient_UD = found[0]
        return RowGradients(self.index, ids_U, gradient_UD)

    def _known(self, ids_n: Ids) -> _Served | None:
        """The next look-up of these ids that was foreseen, or one of the same ids that was answered before.

        The latter also when activation checkpointing repeats a forward within the backward.
        """
        for place, served in enumerate(self._awaited):
            if np.array_equal(served.ids_n, ids_n):
                del self._awaited[place]
                served.reading.pending -= 1
                self._served.append(served)
                return served
        return next((served for served in self._served if np.array_equal(served.ids_n, ids_n)), None)

    def _ask(self, ids_n: Ids) -> _Served:
        reading = _Reading(ids_n, self)
        if (beyond := self._beyond(reading.ids_U)) is not None:
            raise IndexError(
                f"id {beyond} is outside embedding {self.table.name!r}, which has {self.table.rows} rows; on servers "
                "(--strategy ps), a table that the job declares (tables=...) takes any id"
            )
        if len(reading.ids_U):
            self._read([self.wanted(reading)])
        self._served.append(_Served(ids_n, reading, reading.inverse_n))
        return self._served[-1]

    def wanted(self, reading: _Reading) -> Wanted:
        return Wanted(self.index, reading.ids_U, reading.wanted_UD)

    def _beyond(self, ids_U: Tensor) -> int | None:
        """An id that the table can have no row of, if there is one."""
        if not self._bounded or not len(ids_U):
            return None
        low, high = int(ids_U.min()), int(ids_U.max())
        return low if low < 0 else high if high >= self.table.rows else None


class Lookups:
    """All tables of one model. ``read(wanted)`` fills rows that were not foreseen, while forward waits.

    With ``bounded``, tables that the job declares have no other ids than the embedding has rows.
    """

    def __init__(
        self,
        module: nn.Module,
        tables: Sequence[RowTable],
        read: Callable[[list[Wanted]], object],
        *,
        bounded: bool = False,
    ) -> None:
        self._ports = []
        self._modules = []
        for index, table in enumerate(tables):
            port = _Port(index, table, module.get_parameter(table.parameter), read, bounded=bounded)
            self._ports.append(port)
            self._modules.append(module.get_submodule(table.name))
            replace(self._modules[-1], port)
        self._tensors: list[list[Ids]] = []

    def within(self, part: nn.Module) -> list[int]:
        """Foresee only what that part of the model looks up; the numbers of its tables."""
        there = {*part.modules()}
        for port, module in zip(self._ports, self._modules, strict=True):
            port.here = module in there
        return [port.index for port in self._ports if port.here]

    def ahead(self, *parts: Any) -> Ahead:
        """What a batch will look up, as far as that is known. ``parts``: the inputs of each forward, in order."""
        tensors = [whole_numbers(inputs) for inputs in parts] if self._ports else []
        served = [port.foresee(tensors) for port in self._ports]
        wanted = [port.wanted(found[0].reading) for port, found in zip(self._ports, served, strict=True) if found]
        return Ahead(tensors, served, wanted)

    def begin(self, ahead: Ahead, *, learning: bool = True) -> None:
        """Serve the forward of that batch, whose ``ahead.wanted`` are read by now."""
        self._tensors = ahead.tensors
        for port, served in zip(self._ports, ahead.served, strict=True):
            port.begin(served, learning=learning)

    def end(self) -> list[RowGradients]:
        """The gradients that backward has left, by table, and let go of the rows."""
        found = [gradients for port in self._ports if (gradients := port.gradients()) is not None]
        for port in self._ports:
            port.learn(self._tensors)
        self.abandon()
        return found

    def abandon(self) -> None:
        """Let go of the rows. How far a forward came that broke off says nothing of where ids come from."""
        for port in self._ports:
            port.begin([], learning=False)


def _merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    from tricorn.ps.sparse.ids import sum_rows, unique

    ids_U, inverse_n = unique(torch.cat([ids_U for ids_U, _ in parts]).numpy())
    gradient_nD = torch.cat([gradient for _, gradient in parts])
    sum_UD = gradient_nD.new_zeros(len(ids_U), gradient_nD.shape[1])
    sum_rows(inverse_n, gradient_nD.numpy(), sum_UD.numpy())
    return torch.from_numpy(ids_U), sum_UD
