"""A job whose gradients do not depend on the weights: in any order and at any age, the same updates add up to the same
weights, and an update that is lost or made twice shows."""

import torch
from torch import nn

import tricorn

SAMPLES, BATCH_SIZE, EPOCHS = 163, 25, 16
STEPS = 7 * EPOCHS

generator = torch.Generator().manual_seed(1)
ids = (torch.rand(SAMPLES, 3, generator=generator) ** 3 * 500).long()
x = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
y = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(500, 6)
        self.head = nn.Linear(4, 1)

    def forward(self, ids, x):
        return self.rows(ids).sum((1, 2)) + self.head(x).squeeze(1)


job = tricorn.Job(
    model=Linear,
    tables={"rows": tricorn.Table(std=0.1)},
    loss=lambda output, target: (output * target).mean(),
    optimizer=tricorn.optim.SGD(lr=0.01),
    schedule=lambda step: 1 / (1 + step / 100),
    train=tricorn.data.arrays((ids, x), y),
    batch_size=BATCH_SIZE,
    epochs=EPOCHS,
    precision="float64",
)
