"""Embeddings spread over the workers that have the same part of a model: each has its block of every one.

Rows travel to whoever looks them up, before the forward as far as they are foreseen, and the sums of their gradients
travel back before the workers agree on the step; then each updates its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tricorn.comm.peers import Peers
from tricorn.data.sources import as_source
from tricorn.errors import PlanError
from tricorn.hybrid.division import divide
from tricorn.hybrid.own import Own
from tricorn.hybrid.rounds import Rounds
from tricorn.hybrid.tables import spread_tables
from tricorn.ps.lookup import Lookups
from tricorn.ps.rows import RowGradients, Wanted
from tricorn.state.flat import WEIGHT_DTYPES, call_model
from tricorn.state.gradient import placed
from tricorn.state.inspect import batch_statistics
from tricorn.state.whole_rows import open_checkpoint

if TYPE_CHECKING:
    from tricorn.state.shards import Piece
    from tricorn.strategy import Context, Seat

_PROBED = 16  # samples by which it is found out where ids come from


class SpreadTables:
    """Fulfils ``tricorn.strategy.Beside``."""

    alone = True
    foresees = reads = False

    def __init__(self, context: Context) -> None:
        self._context = context
        self._job = context.job
        self._peers = Peers(context, "embeddings")
        self._first_shard = context.rank % context.plan.tensor == 0  # all shards of a layer have the same
        self._nothing = torch.empty(0, dtype=torch.float64)
        self._rounds: Rounds | None = None
        self._owns: dict[int, Own] = {}
        self._step = 0
        self._probing = False

    @property
    def bytes_sent(self) -> int:
        return self._peers.bytes_sent

    def attach(self, model: nn.Module) -> None:
        self._tables = spread_tables(self._job, model)
        self._given: dict[int, Tensor | None] | None = {
            index: model.get_parameter(table.parameter).detach() if table.prefilled else None
            for index, table in enumerate(self._tables)
        }
        plan = self._context.plan
        # Where workers wait for each other in the midst of a forward, they cannot wait for rows there as well.
        self._strict = plan.dense == "mp" or plan.zero > 1 or bool(batch_statistics(model))
        self._rounds = None
        self._lookups = Lookups(model, self._tables, self._read, bounded=True)
        self._probe(model)

    def join(self, seat: Seat, ranks: Sequence[int], module: nn.Module) -> None:
        self._rounds = None
        group = self._peers.join(seat, ranks)
        here = self._lookups.within(module)
        self.reads = bool(here)
        tables = [self._tables[index] for index in here]
        divided = divide([(t.rows, t.dim) for t in tables], self._context.plan.embeddings, group.size)
        blocks = dict(zip(here, divided, strict=True))
        if self._given is not None:
            dtype, seed = WEIGHT_DTYPES[self._job.precision], self._job.seed
            self._owns = {
                index: Own(self._tables[index], blocks[index][group.rank], seed, dtype, self._given[index])
                for index in here
            }
            self._given = None
        if seat.checkpoint is not None:
            reader = open_checkpoint(self._job, seat.checkpoint, seat.step)
            for own in self._owns.values():
                own.load(reader)
        self._step = seat.step
        self._rounds = Rounds(group, self._owns, blocks)

    def carried(self) -> Tensor:
        return self._nothing

    def foresee(self, step: int, parts: Sequence[Any]) -> None:
        """Rows of this step's successor are not there before it is decided."""

    def fetch(self, step: int, parts: Sequence[Any]) -> None:
        ahead = self._lookups.ahead(*parts)
        self._ask(ahead.wanted)
        self._lookups.begin(ahead)

    def hand_over(self, count: int) -> float:
        rows = self._lookups.end()
        square = self._give(rows)
        return square if self._job.clip_norm is not None else 0.0

    def commit(self, count: int, scale: float, factor: float) -> None:
        self._step += 1
        for own in self._owns.values():
            own.update(self._step, scale=scale / max(count, 1), factor=factor)

    def abandon(self) -> None:
        self._peers.give_up()
        self._lookups.abandon()
        for own in self._owns.values():
            own.forget()

    @contextmanager
    def judging(self, parts: Sequence[Any]) -> Iterator[None]:
        ahead = self._lookups.ahead(*parts)
        self._ask(ahead.wanted)
        self._lookups.begin(ahead, learning=False)
        try:
            yield
            self._give([])
        finally:
            self._lookups.end()
            for own in self._owns.values():
                own.forget()

    def pieces(self) -> Sequence[Piece]:
        return [piece for own in self._owns.values() for piece in own.pieces()] if self._first_shard else []

    def interrupt(self) -> None:
        self._peers.interrupt()

    def close(self) -> None:
        self._peers.leave()

    def _ask(self, wanted: Sequence[Wanted]) -> None:
        if self._owns and self._rounds is not None:
            self._rounds.ask(wanted)

    def _give(self, rows: Sequence[RowGradients]) -> float:
        return self._rounds.give(rows) if self._owns and self._rounds is not None else 0.0

    def _read(self, wanted: Sequence[Wanted]) -> None:
        """Rows that were not foreseen, in the midst of a forward."""
        if self._probing:
            for each in wanted:
                each.out_UD.zero_()
            return
        if self._strict:
            names = ", ".join(repr(self._tables[each.table].name) for each in wanted)
            raise PlanError(
                f"the ids of embedding {names} are computed by the model, and its workers wait for each other before "
                "they are known",
                remedy="Let ids be columns of the inputs, or use --embeddings whole.",
            )
        self._ask(wanted)

    def _probe(self, model: nn.Module) -> None:
        """Find out from a few samples where in a batch the ids come from: rows of zeros do for that."""
        source = as_source(self._job.train)
        inputs, _ = source.fetch(np.arange(min(_PROBED, len(source))))
        model.eval()
        self._probing = True
        self._lookups.begin(self._lookups.ahead(inputs))
        try:
            # What fails with rows of zeros need not fail with others: then ids are known once they are asked for.
            with torch.random.fork_rng(devices=[]), torch.no_grad(), suppress(Exception):
                call_model(model, placed(self._job, inputs, torch.device("cpu")))
        finally:
            self._lookups.end()
            self._probing = False
            model.train()
