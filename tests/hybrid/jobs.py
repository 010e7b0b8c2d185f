"""Jobs with embeddings: a recommender of two towers, and ratings by factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import tricorn
from tricorn import Table, optim

SAMPLES, USERS, ITEMS = 50, 23, 31


class Towers(nn.Module):
    """What a user looked at before, in a bag, and numbers that are known of an item, each through a tower."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(USERS, 5)
        self.seen = nn.EmbeddingBag(ITEMS, 5, mode="mean", padding_idx=0)
        self.items = nn.Embedding(ITEMS, 5, padding_idx=0)
        self.left = nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 4))
        self.right = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():  # workers that are threads of the test share the global generator
            for parameter in self.parameters():
                parameter.uniform_(-0.5, 0.5, generator=generator)
            self.seen.weight[0] = self.items.weight[0] = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        left = self.left(torch.cat([self.users(ids[:, 0]), self.seen(ids[:, 2:])], 1))
        return (left * self.right(self.items(ids[:, 1]))).sum(1)


class Sums(nn.Module):
    """Linear in all its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, 3), nn.Embedding(ITEMS, 3)
        self.seen = nn.EmbeddingBag(ITEMS, 3, mode="sum")
        self.bias = nn.Parameter(torch.ones(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.users(ids[:, 0]) + self.items(ids[:, 1]) + self.seen(ids[:, 2:])
        return rows.sum(1) + self.bias.sum()


class Hashed(Sums):
    """Looks up what stands in no column of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 0.7))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.users(ids[:, 0] * 7 % 5) + self.items(ids.sum(1) % ITEMS) + self.seen(ids[:, 2:])
        return (torch.tanh(rows) * self.scale).sum(1) + self.bias.sum()


class Tied(nn.Module):
    """Its output layer has the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight


class Padded(nn.Module):
    """The row of its padding is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.ones(4, 2), freeze=False, padding_idx=1)


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = (torch.rand(SAMPLES, 5, generator=generator) ** 2 * torch.tensor([USERS, *[ITEMS] * 4])).long()
    return ids, torch.randn(SAMPLES, generator=generator, dtype=torch.float64)


DECLARED = {"users": Table(std=0.3), "items": Table(std=0.2), "seen": Table(std=0.1)}


def towers(**changes: Any) -> tricorn.Job:
    fields: dict[str, Any] = {
        "model": Towers, "loss": nn.functional.mse_loss, "optimizer": optim.Adagrad(lr=0.1), "tables": DECLARED,
        "train": tricorn.data.arrays(*samples()), "batch_size": 7, "epochs": 3, "precision": "float64",
    }  # fmt: skip
    return tricorn.Job(**fields | changes)
