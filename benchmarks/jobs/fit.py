"""Models of 80 MB of weights, whose memory is measured: many layers alike, wide layers, and two tables."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

import tricorn

SAMPLES, BATCH_SIZE = 32, 8
TOKENS, WIDTH, HIDDEN = 500, 256, 9216
IDS, DIM = 156_000, 64
generator = torch.Generator().manual_seed(0)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens):
        return self.head(self.layers(self.tokens(tokens))).transpose(1, 2)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(IDS, DIM), nn.Embedding(IDS, DIM)
        self.user, self.item = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, user, item):
        return (torch.relu(self.user(self.users(user))) * self.item(self.items(item))).sum(-1)


def perceptron():
    sizes = [64, *[2236] * 5, 10]
    layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def job(model, loss, inputs, target):
    return tricorn.Job(
        model=model, loss=loss, optimizer=tricorn.optim.Adam(lr=1e-3), train=tricorn.data.arrays(inputs, target),
        batch_size=BATCH_SIZE, epochs=1, device="cpu",
    )  # fmt: skip


words = torch.randint(0, TOKENS, (SAMPLES, 16), generator=generator)
pairs = tuple(torch.randint(0, IDS, (SAMPLES,), generator=generator) for _ in range(2))
transformer = job(Transformer, F.cross_entropy, words, words)
towers = job(Towers, F.mse_loss, pairs, torch.randn(SAMPLES, generator=generator))
mlp = job(perceptron, F.cross_entropy, torch.randn(SAMPLES, 64), torch.randint(0, 10, (SAMPLES,)))
