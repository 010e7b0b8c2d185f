"""Four jobs that the planner's equations were not made for: an MLP, a convolutional net, a transformer, a recommender.

All on made data, with as many steps as PLANNED_STEPS says.
"""

import os
from itertools import pairwise

import torch
from torch import Tensor, nn

import tricorn

STEPS = int(os.environ.get("PLANNED_STEPS", "120"))
generator = torch.Generator().manual_seed(0)


def job(model, inputs: Tensor, target: Tensor, batch_size: int, optimizer, **more) -> tricorn.Job:
    return tricorn.Job(
        model=model, loss=more.pop("loss", nn.functional.cross_entropy), optimizer=optimizer,
        train=tricorn.data.arrays(inputs, target), batch_size=batch_size,
        epochs=max(1, STEPS * batch_size // len(target)), **more,
    )  # fmt: skip


def perceptron() -> nn.Module:
    widths = (400, 1200, 900, 600)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(600, 20))


mlp = job(
    perceptron, torch.randn(1920, 400, generator=generator), torch.randint(0, 20, (1920,), generator=generator), 96,
    tricorn.optim.AdamW(lr=1e-4),
)  # fmt: skip


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48 * 16, 10),
    )  # fmt: skip


cnn = job(
    convolutions, torch.randn(640, 3, 24, 24, generator=generator), torch.randint(0, 10, (640,), generator=generator),
    32, tricorn.optim.SGD(lr=0.01, momentum=0.9),
)  # fmt: skip


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(500, 128), nn.Parameter(torch.zeros(48, 128))
        layer = [nn.TransformerEncoderLayer(128, 4, 384, dropout=0.0, batch_first=True) for _ in range(3)]
        self.layers = nn.Sequential(*layer)
        self.head = nn.Linear(128, 500)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(x) + self.places))


def by_token(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


transformer = job(
    Transformer, torch.randint(0, 500, (320, 48), generator=generator),
    torch.randint(0, 500, (320, 48), generator=generator), 16, tricorn.optim.Adam(lr=1e-4), loss=by_token,
)  # fmt: skip


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(300_000, 24)
        self.tower = nn.Sequential(nn.Linear(12 * 24, 96), nn.ReLU(), nn.Linear(96, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.tower(self.rows(ids).flatten(1)).squeeze(1)


skewed = (torch.rand(10240, 12, generator=generator).pow(4) * 300_000).long()
recommender = job(
    Recommender, skewed, torch.randint(0, 2, (10240,), generator=generator).float(), 512,
    tricorn.optim.Adagrad(lr=0.05), loss=nn.functional.binary_cross_entropy_with_logits,
    tables={"rows": tricorn.Table(std=0.01)},
)  # fmt: skip
