"""What a server has sent to one worker, so that a gradient can be corrected for what has changed since.

Delay compensation (Zheng et al. 2017, *Asynchronous Stochastic Gradient Descent with Delay Compensation*): a gradient
g, computed from weights w_then and applied to w_now, becomes g + lambda * g * g * (w_now - w_then), where g * g stands
for the diagonal of the Hessian.

Legend: S elements of the dense slice; U ids of one sparse table; D elements of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tricorn.ps.blocks import Ids
from tricorn.ps.table import Gradients, Table

_READS = 8  # of rows, remembered for each worker


class Sent:
    """The weights that a worker has last pulled, and the rows of its reads that it has not pushed gradients for."""

    def __init__(self) -> None:
        self._weights_S: Tensor | None = None
        self._reads: list[tuple[int, Sequence[tuple[Ids, Tensor]]]] = []  # for which clock, and by table

    def keep(self, clock: int, rows: Sequence[tuple[Ids, Tensor]], table: Table | None) -> None:
        """Rows that were read for the push of that clock; ``table``: where its weights were read as well."""
        if table is not None:
            self._weights_S = table.weights_S.clone()
        self._reads = [*self._reads, (clock, rows)][-_READS:]

    def compensate(self, gradients: Gradients, table: Table, clock: int) -> None:
        """Correct the gradients that are pushed at that clock, in place; rows that were not read stay as they are."""
        rate = table.description.compensation
        if self._weights_S is not None:
            _correct(gradients.dense_S, table.weights_S - self._weights_S, rate)
        reads = [rows for kept, rows in self._reads if kept <= clock]
        self._reads = [(kept, rows) for kept, rows in self._reads if kept > clock]
        for index, (ids_U, grads_UD) in enumerate(gradients.rows):
            then = [rows[index] for rows in reads if rows and len(rows[index][0])]
            if then and len(ids_U):
                then_ids = np.concatenate([ids for ids, _ in then])
                then_UD = torch.cat([rows for _, rows in then])
                drift_UD = table.gather(index, ids_U)
                places = _places(then_ids, ids_U)
                drift_UD -= torch.where(places[:, None] >= 0, then_UD[places], drift_UD)
                _correct(grads_UD, drift_UD, rate)


def _correct(grad: Tensor, drift: Tensor, rate: float) -> None:
    grad.addcmul_(grad * grad, drift, value=rate)


def _places(among: Ids, ids_U: Ids) -> Tensor:
    """Where each id is first in ``among``, -1 where it is not."""
    order = np.argsort(among, kind="stable")
    at = np.minimum(np.searchsorted(among, ids_U, sorter=order), len(among) - 1)
    found = order[at]
    return torch.from_numpy(np.where(among[found] == ids_U, found, -1))
