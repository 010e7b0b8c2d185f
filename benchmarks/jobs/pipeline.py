"""What pipelines are timed on: two uneven MLPs, and a small transformer by tokens. All stages end between blocks."""

from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

import tricorn

WIDTHS = {"small": (64, 256, 128, 512, 128, 256, 10), "mlp": (256, 1024, 512, 2048, 512, 1024, 10)}
CUTS = {
    "small": {2: (6,), 4: (2, 6, 8)},
    "mlp": {2: (6,), 4: (2, 6, 8)},
    "transformer": {2: (4,), 4: (2, 4, 6)},
}
BATCH = {"small": 128, "mlp": 128, "transformer": 32}
VOCABULARY, LENGTH, WIDTH, LAYERS = 512, 64, 256, 6


class Attention(nn.Module):
    """Multi-head attention over what came before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BLD.shape
        split = self.into(x_BLD).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    """Attention, then two linear layers, each added to what it was given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, 4)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class Tokens(nn.Module):
    """Embeds tokens and their places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.token(tokens) + self.place


class Head(nn.Module):
    """Scores of the next token, [batch, vocabulary, length]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.scores = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scores(self.norm(x)).transpose(1, 2)


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers = [each for a, b in pairwise(widths) for each in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def transformer() -> nn.Sequential:
    return nn.Sequential(Tokens(WIDTH), *(Layer(WIDTH) for _ in range(LAYERS)), Head(WIDTH))


def data(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of 8 batches, made up."""
    generator, samples = torch.Generator().manual_seed(0), 8 * BATCH[name]
    if name in WIDTHS:
        inputs = torch.randn(samples, WIDTHS[name][0], generator=generator)
        return inputs, torch.randint(0, WIDTHS[name][-1], (samples,), generator=generator)
    tokens = torch.randint(0, VOCABULARY, (samples, LENGTH + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def make(name: str) -> tricorn.Job:
    return tricorn.Job(
        model=partial(mlp, WIDTHS[name]) if name in WIDTHS else transformer, loss=F.cross_entropy,
        batch_size=BATCH[name], optimizer=tricorn.optim.AdamW(lr=1e-4), train=tricorn.data.arrays(*data(name)),
        epochs=8,
    )  # fmt: skip


job_small = make("small")
job_mlp = make("mlp")
job_transformer = make("transformer")
