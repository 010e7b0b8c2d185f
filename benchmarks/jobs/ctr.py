"""The click-through model as an ordinary job: nothing in it speaks of servers or tables."""

import os

import torch
from ctr_data import BATCH, DIM, FIELDS, HIDDEN, NUMBERS, RATE, ROWS, samples
from torch import nn

import tricorn


class ClickThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(ROWS, DIM)
        nn.init.normal_(self.rows.weight, std=0.01)
        first, second = HIDDEN
        self.tower = nn.Sequential(
            nn.Linear(FIELDS * DIM + NUMBERS, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, 1),
        )

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return self.tower(torch.cat([self.rows(ids).flatten(1), numbers], 1)).squeeze(1)


ids, numbers, clicks = samples(BATCH * int(os.environ.get("CTR_BATCHES", "1000")))

job = tricorn.Job(
    model=ClickThrough,
    loss=nn.functional.binary_cross_entropy_with_logits,
    optimizer=tricorn.optim.SGD(lr=RATE),
    train=tricorn.data.arrays((ids, numbers), clicks),
    batch_size=BATCH,
    epochs=1,
)
