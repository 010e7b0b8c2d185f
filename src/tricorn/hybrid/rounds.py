"""Rows to whoever looks them up, and gradients back to whoever has the rows: all-to-all between workers.

Every exchange is a round of all workers, which begins with what each wants of each other. A worker that looks up ids
that were not foreseen asks in the midst of its forward; those that are done with theirs answer, and hand over their
gradients in the first round in which nobody asks any more.

Legend: U ids of one table, V of them are of rows that one worker has; T tables here; D columns of a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from tricorn.comm.group import Group
from tricorn.hybrid.division import Block
from tricorn.hybrid.own import Own
from tricorn.ps.rows import RowGradients, Wanted

_Asked = TypeVar("_Asked", Wanted, RowGradients)

_ASKS, _GIVES = 0, 1


class _Part(NamedTuple):
    """What of the ids of a table one worker has rows of: all of them where ``places_V`` is None."""

    ids_V: Tensor
    places_V: Tensor | None


class Rounds:
    """The exchanges of one group. ``owns``: this worker's blocks by table; ``blocks``: of each, those of all workers.

    Ids and rows are on the CPU, ids unique in each list. Everything raises PeerLost.
    """

    def __init__(self, group: Group, owns: Mapping[int, Own], blocks: Mapping[int, Sequence[Block]]) -> None:
        self._group = group
        self._owns = owns
        self._blocks = blocks

    def ask(self, wanted: Sequence[Wanted]) -> None:
        """Fill the rows that are wanted."""
        parts = [self._parts(each.table, each.ids_U) for each in wanted]
        kinds, counts = self._announce(_ASKS, wanted, parts)
        self._answer(kinds, counts, wanted, parts)

    def give(self, gradients: Sequence[RowGradients]) -> float:
        """Answer until nobody asks, then hand over; the squared norm of the summed gradient of this worker's rows."""
        parts = [self._parts(each.table, each.ids_U) for each in gradients]
        while True:
            kinds, counts = self._announce(_GIVES, gradients, parts)
            if _ASKS not in kinds:
                return self._take(counts, gradients, parts)
            self._answer(kinds, counts, (), ())

    def _parts(self, table: int, ids_U: Tensor) -> list[_Part]:
        found = []
        for block in self._blocks[table]:
            here_U = (ids_U >= block.first) & (ids_U < block.last)
            if here_U.all() and block.rows:
                found.append(_Part(ids_U, None))
            else:
                places_V = here_U.nonzero().view(-1)
                found.append(_Part(ids_U[places_V], places_V))
        return found

    def _announce(
        self, kind: int, asked: Sequence[_Asked], parts: Sequence[list[_Part]]
    ) -> tuple[list[int], list[dict[int, int]]]:
        """Tell each worker how many of its rows this is about; what kind each has begun, and how many by table."""
        order = {table: place for place, table in enumerate(self._owns, 1)}
        sends = torch.zeros(self._group.size, 1 + len(order), dtype=torch.int64)
        sends[:, 0] = kind
        for each, split in zip(asked, parts, strict=True):
            sends[:, order[each.table]] = torch.tensor([len(part.ids_V) for part in split])
        receives = torch.empty_like(sends)
        self._group.all_to_all(list(sends), list(receives)).wait()
        kinds, *columns = receives.T.tolist()
        return kinds, [dict(zip(order, row, strict=True)) for row in zip(*columns, strict=True)]

    def _answer(
        self, kinds: Sequence[int], counts: Sequence[dict[int, int]], wanted: Sequence[Wanted],
        parts: Sequence[list[_Part]],
    ) -> None:  # fmt: skip
        """Bring rows to those that ask, this worker's ``wanted`` among them."""
        asking = [kind == _ASKS for kind in kinds]
        counts = [of if asks else dict.fromkeys(of, 0) for of, asks in zip(counts, asking, strict=True)]
        ids = self._exchange_ids(counts, wanted, parts)
        dtype = next(iter(self._owns.values())).weights_rd.dtype
        sends = [
            _joined([own.gather(by_table[table]).view(-1) for table, own in self._owns.items()], dtype)
            for by_table in ids
        ]
        receives = [
            torch.empty(
                sum(
                    len(split[rank].ids_V) * self._blocks[each.table][rank].width
                    for each, split in zip(wanted, parts, strict=True)
                ),
                dtype=dtype,
            )
            for rank in range(self._group.size)
        ]
        self._group.all_to_all(sends, receives).wait()
        for rank, flat in enumerate(receives):
            at = 0
            for each, split in _ordered(self._owns, wanted, parts):
                block, part = self._blocks[each.table][rank], split[rank]
                size = len(part.ids_V) * block.width
                rows_Vd = flat[at : at + size].view(len(part.ids_V), block.width)
                at += size
                columns = each.out_UD[:, block.left : block.right]
                columns[slice(None) if part.places_V is None else part.places_V] = rows_Vd

    def _take(
        self, counts: Sequence[dict[int, int]], gradients: Sequence[RowGradients], parts: Sequence[list[_Part]]
    ) -> float:
        """Exchange gradients, and have those of this worker's rows added up in the order of the workers."""
        dtype = next(iter(self._owns.values())).weights_rd.dtype
        sends = []
        for rank in range(self._group.size):
            flats = []
            for each, split in _ordered(self._owns, gradients, parts):
                block, places_V = self._blocks[each.table][rank], split[rank].places_V
                grads_UD = each.grads_UD if places_V is None else each.grads_UD[places_V]
                flats.append(grads_UD[: len(split[rank].ids_V), block.left : block.right].reshape(-1))
            sends.append(_joined(flats, dtype))
        receives = [
            torch.empty(sum(of[table] * own.block.width for table, own in self._owns.items()), dtype=dtype)
            for of in counts
        ]
        handle = self._group.all_to_all(sends, receives)
        ids = self._exchange_ids(counts, gradients, parts)
        handle.wait()
        square, at = 0.0, [0] * len(receives)
        for table, own in self._owns.items():
            found = []
            for rank, (of, flat) in enumerate(zip(counts, receives, strict=True)):
                size = of[table] * own.block.width
                found.append(flat[at[rank] : at[rank] + size].view(of[table], own.block.width))
                at[rank] += size
            square += own.learn(torch.cat([by_table[table] for by_table in ids]), torch.cat(found))
        return square

    def _exchange_ids(
        self, counts: Sequence[dict[int, int]], asked: Sequence[_Asked], parts: Sequence[list[_Part]]
    ) -> list[dict[int, Tensor]]:
        """Send each worker the ids that are its; from each those that are this one's, by table."""
        ordered = _ordered(self._owns, asked, parts)
        sends = [_joined([split[rank].ids_V for _, split in ordered], torch.int64) for rank in range(self._group.size)]
        receives = [torch.empty(sum(of.values()), dtype=torch.int64) for of in counts]
        self._group.all_to_all(sends, receives).wait()
        split = [torch.split(flat, list(of.values())) for of, flat in zip(counts, receives, strict=True)]
        return [dict(zip(of, each, strict=True)) for of, each in zip(counts, split, strict=True)]


def _ordered(
    owns: Mapping[int, Own], asked: Sequence[_Asked], parts: Sequence[list[_Part]]
) -> list[tuple[_Asked, list[_Part]]]:
    """As both ends of a transfer have the tables in it."""
    order = {table: place for place, table in enumerate(owns)}
    return sorted(zip(asked, parts, strict=True), key=lambda each: order[each[0].table])


def _joined(flats: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([*flats]) if flats else torch.empty(0, dtype=dtype)
