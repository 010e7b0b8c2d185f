"""Where in a batch a table's ids come from: learned from one step, so that the next can read its rows in advance.

A model looks ids up as they stand in the batch, or some columns of them, or with a constant added to each column
(fields that share one table). Whatever else it may compute is not foreseen, and read when it is asked for.

Legend: B samples, W numbers of a sample, w of them in a row that are ids of one look-up; n = B w.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids: TypeAlias = NDArray[np.int64]

_DISTINCT = 4  # samples that it takes to believe in a constant


class Source(NamedTuple):
    """Columns [start, stop) of one of the batch's whole-number tensors, plus ``shift_w``."""

    tensor: int
    start: int
    stop: int
    shift_w: Ids | None

    def ids(self, tensors: Sequence[Ids]) -> Ids | None:
        """What a look-up will ask for in this batch, flat; None if it has no such columns."""
        if self.tensor >= len(tensors) or self.stop > tensors[self.tensor].shape[1]:
            return None
        ids_Bw = tensors[self.tensor][:, self.start : self.stop]
        return (ids_Bw if self.shift_w is None else ids_Bw + self.shift_w).reshape(-1)


def whole_numbers(inputs: Any) -> list[Ids]:
    """The tensors of a batch that may be ids, each as [B, W], in a fixed order."""
    return [
        tensor.reshape(len(tensor), -1).numpy(force=True).astype(np.int64, copy=False)
        for tensor in _tensors(inputs)
        if tensor.ndim and len(tensor) and tensor.dtype in (torch.int64, torch.int32)
    ]


def trace(ids_n: Ids, tensors: Sequence[Ids]) -> Source | None:
    """Where these ids stand in the batch, None if nowhere."""
    return next(_matches(ids_n, tensors, shifted=False), None) or next(_matches(ids_n, tensors, shifted=True), None)


def _matches(ids_n: Ids, tensors: Sequence[Ids], *, shifted: bool) -> Iterator[Source]:
    for index, numbers_BW in enumerate(tensors):
        B, W = numbers_BW.shape
        w, rest = divmod(len(ids_n), B)
        if rest or not w or (shifted and B < _DISTINCT):
            continue
        ids_Bw = ids_n.reshape(B, w)
        for start in range(W - w + 1):
            shift_Bw = ids_Bw - numbers_BW[:, start : start + w]
            if (shift_Bw == shift_Bw[0]).all() if shifted else not shift_Bw.any():
                yield Source(index, start, start + w, shift_Bw[0] if shifted else None)


def _tensors(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, dict):
        for name in sorted(inputs):
            yield from _tensors(inputs[name])
    elif isinstance(inputs, tuple | list):
        for item in inputs:
            yield from _tensors(item)
