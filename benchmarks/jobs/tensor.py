"""Models whose layers are split among workers, and what a step of them takes on one. Used by mp_tensor.py."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, LENGTH = 256, 8, 64
STEPS = 60


class Mlp(nn.Module):
    """Two pairs of linear layers. ``COLUMN`` and ``ROW`` are what DTensor has to be told."""

    COLUMN, ROW = ("layers.0", "layers.4"), ("layers.2", "layers.6")
    SHAPE = (64, 512)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512), nn.ReLU(),
            nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Block(nn.Module):
    """A block of a transformer; the number of heads is viewed as -1, so that DTensor's local parts fit as well."""

    COLUMN, ROW = ("q", "k", "v", "up"), ("out", "down")
    SHAPE = (4, LENGTH, WIDTH)

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


MODELS = {"mlp": Mlp, "transformer": Block}


def timed(model: nn.Module, local: Callable[[Tensor], Tensor], barrier: Callable[[], None]) -> float:
    """Milliseconds of a step, of which the first half is left out.

    ``local`` gives the part of a parameter or a gradient that this rank has: the same fused AdamW runs on the parts,
    whoever made them.
    """
    inputs = torch.randn(model.SHAPE, generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())
    parts = [local(parameter.data) for parameter in parameters]
    slots = [[torch.zeros_like(part) for part in parts] for _ in range(2)]
    counts = [torch.zeros(()) for _ in parts]
    for step in range(STEPS):
        if step == STEPS // 2:
            barrier()
            began = time.perf_counter()
        F.mse_loss(model(inputs), torch.zeros(model.SHAPE)).backward()
        torch._foreach_add_(counts, 1)
        torch._fused_adamw_(
            parts, [local(parameter.grad) for parameter in parameters], *slots, [], counts, lr=1e-4, beta1=0.9,
            beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip
        for parameter in parameters:
            parameter.grad = None
    barrier()
    return 1e3 * (time.perf_counter() - began) / (STEPS - STEPS // 2)
