"""A table beside layers that can be cut and split, in batches that no number of workers divides."""

import torch
from torch import nn

import tricorn

SAMPLES, BATCH_SIZE, EPOCHS = 163, 25, 12
STEPS = 7 * EPOCHS  # the last of an epoch is of 13 samples

generator = torch.Generator().manual_seed(1)
ids = torch.randint(0, 90, (SAMPLES,), generator=generator)
x = torch.randn(SAMPLES, 12, generator=generator, dtype=torch.float64)
y = (x @ torch.randn(12, 3, generator=generator, dtype=torch.float64)).argmax(1)


class Tabled(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(90, 4)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 3))

    def forward(self, ids, x):
        return self.layers(torch.cat([self.rows(ids), x], 1))


job = tricorn.Job(
    model=Tabled,
    tables={"rows": tricorn.Table(std=0.3)},
    loss=nn.functional.cross_entropy,
    optimizer=tricorn.optim.Adagrad(lr=0.1),
    schedule=lambda step: 1 / (1 + step / 100),
    clip_norm=1.0,
    train=tricorn.data.arrays((ids, x), y),
    batch_size=BATCH_SIZE,
    epochs=EPOCHS,
    precision="float64",
)
