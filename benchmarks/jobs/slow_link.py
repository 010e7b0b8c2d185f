"""Two jobs for slow links: an MLP on handwritten digits, and the transformer of examples/text.py, twice as wide.

``*_long`` may take three or four times as many epochs, for what learns more slowly by the sample.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import tricorn
from tricorn.data.sources import Source

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import text as example

# Digits: 1,437 images to learn from. 64-512-512-10: 301,066 weights, 1.2 MB.
_digits = load_digits()
_order = torch.randperm(len(_digits.images), generator=torch.Generator().manual_seed(0))
_images = torch.tensor(_digits.images, dtype=torch.float32)[_order].flatten(1) / 16
_labels = torch.tensor(_digits.target)[_order]


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


digits = tricorn.Job(
    model=perceptron, loss=nn.functional.cross_entropy, optimizer=tricorn.optim.SGD(lr=0.02, momentum=0.9),
    train=tricorn.data.arrays(_images[360:], _labels[360:]), evaluate=tricorn.data.arrays(_images[:360], _labels[:360]),
    batch_size=64, epochs=5,
)  # fmt: skip

# Text: 240 windows of 64 bytes to learn from. Two blocks of width 192: 1.0 million weights, 4.0 MB.
example.WIDTH = 192


def _some(part: torch.Tensor, count: int) -> Source:
    inputs, target = example.windows(part)
    chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:count]
    return tricorn.data.arrays(inputs[chosen], target[chosen])


text = tricorn.Job(
    model=example.Writer, loss=example.cross_entropy, optimizer=tricorn.optim.AdamW(lr=1e-3), clip_norm=1.0,
    train=_some(example.tokens[: -example.held_out], 240), evaluate=_some(example.tokens[-example.held_out :], 32),
    batch_size=4, epochs=2,
)  # fmt: skip

digits_long = dataclasses.replace(digits, epochs=4 * digits.epochs)
text_long = dataclasses.replace(text, epochs=3 * text.epochs)
