"""Jobs with one table, of two sizes and with two batch sizes; made when they are asked for, never stored.

A sample has ten ids, by a power law: the chance of the k-th most frequent is about 1/k.
"""

from __future__ import annotations

import numpy as np
import torch
from clicks import uniform
from torch import nn

import tricorn

DIM, IDS, STEPS = 16, 10, 60


class Bags:
    """Fulfils ``tricorn.data.sources.Source``."""

    def __init__(self, rows: int, size: int) -> None:
        self.rows, self.size = rows, size

    def __len__(self) -> int:
        return self.size

    @property
    def fingerprint(self) -> str:
        return f"{self.rows:x}{self.size:x}"

    def fetch(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        place_BI = ids[:, None] * IDS + np.arange(IDS)
        rows_BI = np.exp(uniform(1, place_BI) * np.log(self.rows)).astype(np.int64) - 1
        return torch.from_numpy(rows_BI), torch.from_numpy(rows_BI[:, 0] % 2).float()


class Net(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = nn.EmbeddingBag(rows, DIM, mode="mean", device="meta")
        self.head = nn.Linear(DIM, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.rows(ids)).squeeze(1)


def declared(rows: int, batch_size: int) -> tricorn.Job:
    return tricorn.Job(
        model=lambda: Net(rows),
        tables={"rows": tricorn.Table(std=0.1)},
        loss=nn.functional.binary_cross_entropy_with_logits,
        optimizer=tricorn.optim.Adagrad(lr=0.1),
        train=Bags(rows, STEPS * batch_size),
        batch_size=batch_size,
        epochs=1,
    )


rows_100k_batch_512, rows_1m_batch_512 = declared(100_000, 512), declared(1_000_000, 512)
rows_100k_batch_2048, rows_1m_batch_2048 = declared(100_000, 2048), declared(1_000_000, 2048)
