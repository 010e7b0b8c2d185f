"""Clicks of Criteo's shape (13 numbers, 26 ids) with a planted signal: made when they are asked for, never stored.

Every number of a sample is a function of the sample and its place. Ids follow a power law (the chance of the
k-th most frequent is about 1/k). The chance of a click is the logistic function of a weight of each id, products of
weights for some pairs of slots, and a line through the numbers.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import nn

import tricorn

NUMBERS, SLOTS, IDS, DIM = 13, 26, 20_000, 8  # IDS of each slot
SAMPLES = int(os.environ.get("CLICKS_SAMPLES", "400000"))
HELD_OUT = 40_000
BATCH_SIZE = 512


def mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: 64 scattered bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(stream: int, keys: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), each a function of its stream and key."""
    return (mixed(keys.astype(np.uint64) * np.uint64(64) + np.uint64(stream)) >> np.uint64(11)) * 2.0**-53


class Clicks:
    """Fulfils ``tricorn.data.sources.Source``: samples ``start`` to ``start + size`` of an endless stream."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size = start, size

    def __len__(self) -> int:
        return self.size

    @property
    def fingerprint(self) -> str:
        return f"{self.start:x}{self.size:x}"

    def fetch(self, ids: np.ndarray) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        sample_B1 = (self.start + ids)[:, None]
        slots, places = np.arange(SLOTS), np.arange(NUMBERS)
        ids_BS = np.exp(uniform(1, sample_B1 * SLOTS + slots) * np.log(IDS)).astype(np.int64) - 1
        numbers_BN = uniform(2, sample_B1 * NUMBERS + places) * 2 - 1
        weights_BS = uniform(3, ids_BS * SLOTS + slots) * 2 - 1
        pairs_B = (weights_BS[:, 0:12:2] * weights_BS[:, 1:12:2]).sum(1)
        logit_B = 0.6 * weights_BS.sum(1) + 1.2 * pairs_B + numbers_BN @ np.linspace(-0.6, 0.6, NUMBERS) - 0.5
        clicked_B = uniform(4, sample_B1[:, 0]) < 1 / (1 + np.exp(-logit_B))
        inputs = torch.from_numpy(ids_BS), torch.from_numpy(numbers_BN.astype(np.float32))
        return inputs, torch.from_numpy(clicked_B.astype(np.float32))


class Net(nn.Module):
    """All slots share one table, each with ids of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(SLOTS * IDS, DIM)
        self.layers = nn.Sequential(
            nn.Linear(SLOTS * DIM + NUMBERS, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)
        )
        self.register_buffer("first", torch.arange(SLOTS) * IDS)

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        rows = self.rows(ids + self.first).flatten(1)
        return self.layers(torch.cat([rows, numbers], 1)).squeeze(1)


job = tricorn.Job(
    model=Net,
    tables={"rows": tricorn.Table(std=0.1, optimizer=tricorn.optim.Adagrad(lr=0.05))},
    loss=nn.functional.binary_cross_entropy_with_logits,
    optimizer=tricorn.optim.SGD(lr=0.1),
    train=Clicks(0, SAMPLES),
    batch_size=BATCH_SIZE,
    epochs=1,
)
held_out = Clicks(1 << 40, HELD_OUT)
