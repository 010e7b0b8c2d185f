"""The network 256-1024-1024-10 on made data, 128 samples a step; and a deep one, for what memory it takes."""

import os

import torch
from torch import nn

import tricorn

STEPS = int(os.environ.get("MLP_STEPS", "300"))
BATCH_SIZE = int(os.environ.get("MLP_BATCH_SIZE", "128"))

generator = torch.Generator().manual_seed(0)
inputs = torch.randn(8 * BATCH_SIZE, 256, generator=generator)
target = torch.randint(0, 10, (8 * BATCH_SIZE,), generator=generator)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def deep() -> nn.Module:
    layers = [layer for _ in range(32) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(nn.Linear(256, 1024), *layers, nn.Linear(1024, 10))


def make(model, steps: int, precision: str = "float32") -> tricorn.Job:
    return tricorn.Job(
        model=model, loss=nn.functional.cross_entropy, optimizer=tricorn.optim.AdamW(lr=1e-4), precision=precision,
        train=tricorn.data.arrays(inputs, target), batch_size=BATCH_SIZE, epochs=max(1, steps // 8),
    )  # fmt: skip


job = make(network, STEPS)
large = make(deep, 16)
# Where gradients vanish, Adam makes steps of full size out of what another order of additions rounds otherwise: in
# float32 the weights drift apart by 2e-3, whoever is right.
double = make(network, STEPS, "float64")
