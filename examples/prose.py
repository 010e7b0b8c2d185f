"""A wide network that learns which byte comes next: CPython's own documentation topics, a tenth of them held out.

A neural probabilistic language model (Bengio and others 2003) of twelve million weights, of which a step of 32 samples
reads all: exchanging their gradients takes as long as computing them, so workers do better to have layers of their own.
"""

import pydoc_data.topics

import torch
from torch import Tensor, nn

import tricorn

CONTEXT, EMBEDDED, WIDTH, BYTES = 16, 32, 3072, 256
SAMPLES, HELD_OUT, BATCH_SIZE = 2048, 512, 32

text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items())).encode()
tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
held_out = len(tokens) // 10


def samples(part: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Contexts and the bytes that follow them, from all over the part: [count, CONTEXT] and [count]."""
    starts = torch.linspace(0, len(part) - CONTEXT - 1, count).long()
    return part[starts[:, None] + torch.arange(CONTEXT)], part[starts + CONTEXT]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(BYTES, EMBEDDED), nn.Flatten(),
        nn.Linear(CONTEXT * EMBEDDED, WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, BYTES),
    )  # fmt: skip


job = tricorn.Job(
    model=network,
    loss=nn.functional.cross_entropy,
    optimizer=tricorn.optim.AdamW(lr=1e-3),
    train=tricorn.data.arrays(*samples(tokens[:-held_out], SAMPLES)),
    evaluate=tricorn.data.arrays(*samples(tokens[-held_out:], HELD_OUT)),
    batch_size=BATCH_SIZE,
    epochs=1,
)
