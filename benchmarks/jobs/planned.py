"""Four jobs that the planner's equations were not made for: an MLP, a convolutional net, a transformer, a recommender.

All on made data, in epochs of 5 steps. ``mlp@80`` is the first with 80 steps; without a number there are 20.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

import tricorn

EPOCH = 5  # steps
KINDS: dict[str, Callable[[int, torch.Generator], tricorn.Job]] = {}


def kind(make: Callable[[int, torch.Generator], tricorn.Job]) -> Callable[[int, torch.Generator], tricorn.Job]:
    """Under its name, less the underscore."""
    KINDS[make.__name__[1:]] = make
    return make


def __getattr__(name: str) -> tricorn.Job:
    which, _, steps = name.partition("@")
    if which not in KINDS:
        raise AttributeError(name)
    return KINDS[which](max(1, int(steps or 20) // EPOCH), torch.Generator().manual_seed(0))


def perceptron() -> nn.Module:
    widths = (400, 1200, 900, 600)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(600, 20))


@kind
def _mlp(epochs: int, generator: torch.Generator) -> tricorn.Job:
    batch_size = 96
    n = EPOCH * batch_size
    x, y = torch.randn(n, 400, generator=generator), torch.randint(0, 20, (n,), generator=generator)
    return tricorn.Job(
        model=perceptron, loss=nn.functional.cross_entropy, optimizer=tricorn.optim.AdamW(lr=1e-4),
        train=tricorn.data.arrays(x, y), batch_size=batch_size, epochs=epochs,
    )  # fmt: skip


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48 * 16, 10),
    )  # fmt: skip


@kind
def _cnn(epochs: int, generator: torch.Generator) -> tricorn.Job:
    batch_size = 32
    n = EPOCH * batch_size
    x, y = torch.randn(n, 3, 24, 24, generator=generator), torch.randint(0, 10, (n,), generator=generator)
    return tricorn.Job(
        model=convolutions, loss=nn.functional.cross_entropy, optimizer=tricorn.optim.SGD(lr=0.01, momentum=0.9),
        train=tricorn.data.arrays(x, y), batch_size=batch_size, epochs=epochs,
    )  # fmt: skip


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(500, 128), nn.Parameter(torch.zeros(48, 128))
        layers = [nn.TransformerEncoderLayer(128, 4, 384, dropout=0.0, batch_first=True) for _ in range(3)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(128, 500)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(x) + self.places))


def by_token(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


@kind
def _transformer(epochs: int, generator: torch.Generator) -> tricorn.Job:
    batch_size = 16
    x, y = (torch.randint(0, 500, (EPOCH * batch_size, 48), generator=generator) for _ in range(2))
    return tricorn.Job(
        model=Transformer, loss=by_token, optimizer=tricorn.optim.Adam(lr=1e-4), train=tricorn.data.arrays(x, y),
        batch_size=batch_size, epochs=epochs,
    )  # fmt: skip


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(300_000, 24)
        self.tower = nn.Sequential(nn.Linear(12 * 24, 96), nn.ReLU(), nn.Linear(96, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.tower(self.rows(ids).flatten(1)).squeeze(1)


@kind
def _recommender(epochs: int, generator: torch.Generator) -> tricorn.Job:
    batch_size = 512
    n = EPOCH * batch_size
    skewed = (torch.rand(n, 12, generator=generator).pow(4) * 300_000).long()
    return tricorn.Job(
        model=Recommender, loss=nn.functional.binary_cross_entropy_with_logits,
        optimizer=tricorn.optim.Adagrad(lr=0.05), tables={"rows": tricorn.Table(std=0.01)},
        train=tricorn.data.arrays(skewed, torch.randint(0, 2, (n,), generator=generator).float()),
        batch_size=batch_size, epochs=epochs,
    )  # fmt: skip
