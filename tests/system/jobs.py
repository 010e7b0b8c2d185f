"""Jobs of the system tests: a small network, batches that no number of workers divides, a ragged last one."""

import torch
from torch import nn

import tricorn

SAMPLES, BATCH_SIZE, EPOCHS = 163, 25, 8  # 7 steps an epoch, the last of 13 samples; 56 steps

generator = torch.Generator().manual_seed(1)
x = torch.randn(SAMPLES, 12, generator=generator, dtype=torch.float64)
y = (x @ torch.randn(12, 3, generator=generator, dtype=torch.float64)).argmax(1)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 3))


def accuracy(output, target):
    return (output.argmax(1) == target).double().mean()


def make(optimizer, precision, **changes):
    fields = {
        "model": network, "loss": nn.functional.cross_entropy, "optimizer": optimizer, "precision": precision,
        "train": tricorn.data.arrays(x, y), "evaluate": tricorn.data.arrays(x[:40], y[:40]),
        "metrics": {"accuracy": accuracy}, "batch_size": BATCH_SIZE, "epochs": EPOCHS, "seed": 3,
        "schedule": lambda step: 1 / (1 + step / 100), "clip_norm": 1.0,
    }  # fmt: skip
    return tricorn.Job(**(fields | changes))


SGD = tricorn.optim.SGD(lr=0.1, momentum=0.9)
ADAM = tricorn.optim.Adam(lr=0.01)
sgd32, sgd64 = make(SGD, "float32"), make(SGD, "float64")
adam32, adam64 = make(ADAM, "float32"), make(ADAM, "float64")
long = make(SGD, "float64", epochs=60)  # 420 steps: long enough to be disturbed
local = make(tricorn.optim.SGD(lr=0.1), "float64", epochs=60)
dropout = make(
    SGD, "float64", epochs=20,
    model=lambda: nn.Sequential(nn.Linear(12, 32), nn.Dropout(0.3), nn.Tanh(), nn.Linear(32, 24), nn.Linear(24, 3)),
)  # fmt: skip
normed = make(
    SGD, "float64", epochs=60,
    model=lambda: nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 3)),
)  # fmt: skip


class Tabled(nn.Module):
    """A table, and layers that can be cut and split."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(90, 4)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 3))

    def forward(self, ids, x):
        return self.layers(torch.cat([self.rows(ids), x], 1))


tabled = make(
    tricorn.optim.Adagrad(lr=0.1), "float64", model=Tabled, batch_size=8, epochs=10**6,  # 21 steps an epoch
    train=tricorn.data.arrays((torch.arange(SAMPLES) ** 2 % 90, x), y), evaluate=None, metrics={},
    tables={"rows": tricorn.Table(std=0.3)},
)  # fmt: skip
layered = make(
    tricorn.optim.Adagrad(lr=0.1), "float64", model=Tabled, epochs=12, evaluate=None, metrics={},
    train=tricorn.data.arrays((torch.arange(SAMPLES) ** 2 % 90, x), y), tables={"rows": tricorn.Table(std=0.3)},
)  # fmt: skip
smaller_batches = make(SGD, "float64", batch_size=20)
