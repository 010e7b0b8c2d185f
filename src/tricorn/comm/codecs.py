"""Encodings of flat float tensors that take less to send, and what makes up for what they lose.

Legend: N elements of a flat tensor of float32 or float64. Encodings hold float32 at most: what float64 has beyond that
is lost with the rest. A tensor on a GPU is encoded by way of CPU memory; encoded bytes are on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tricorn.errors import ProtocolError, UsageError


class Codec(Protocol):
    """A pure encoding: the same input and seed give the same bytes on every machine."""

    def size(self, elements: int) -> int:
        """How many bytes the encoding of that many elements takes."""

    def encode(self, flat_N: Tensor, seed: int = 0) -> Tensor:
        """The encoding (uint8); ``seed`` decides which way stochastic rounding goes."""

    def decode(self, data: Tensor, out_N: Tensor) -> None:
        """Fill ``out_N`` from an encoding. Raises ProtocolError, and writes nothing, if it is none of N elements."""


@dataclass(frozen=True)
class Half:
    """Every element in 16 bits, rounded to the nearest: an error of at most 2^-8 (bf16) or 2^-11 (fp16) of it.

    float16 goes no further than 65504: larger finite ones become that, and below 6e-5 it has fewer digits.
    """

    dtype: torch.dtype

    def size(self, elements: int) -> int:
        return 2 * elements

    def encode(self, flat_N: Tensor, seed: int = 0) -> Tensor:
        local_N = flat_N.detach()
        if self.dtype == torch.float16:
            limit = torch.finfo(torch.float16).max
            local_N = torch.where(local_N.isfinite(), local_N.clamp(-limit, limit), local_N)
        return torch.empty(local_N.numel(), dtype=self.dtype).copy_(local_N).view(torch.uint8)

    def decode(self, data: Tensor, out_N: Tensor) -> None:
        _check_size(self, data, out_N)
        out_N.copy_(data.clone().view(self.dtype))  # cloned: what arrives need not be aligned


@dataclass(frozen=True)
class Int8:
    """A scale for each block of 256 elements, and a byte for each element: its multiple of the scale.

    Rounded up or down at random, so that the mean of the error is zero (QSGD, Alistarh et al. 2017); it is below one
    scale, which is the block's largest magnitude / 127.
    """

    def size(self, elements: int) -> int:
        from tricorn.comm.codec_kernels import BLOCK

        return 4 * -(-elements // BLOCK) + elements

    def encode(self, flat_N: Tensor, seed: int = 0) -> Tensor:
        from tricorn.comm import codec_kernels as kernels

        local_N = flat_N.detach().cpu().to(torch.float32).contiguous().numpy()
        data = np.empty(self.size(len(local_N)), dtype=np.uint8)
        codes = len(data) - len(local_N)
        kernels.encode_int8(
            local_N, local_N.view(np.uint32), np.uint32(_mixed(seed)), data[:codes].view(np.float32),
            data[codes:].view(np.int8),
        )  # fmt: skip
        return torch.from_numpy(data)

    def decode(self, data: Tensor, out_N: Tensor) -> None:
        from tricorn.comm import codec_kernels as kernels

        _check_size(self, data, out_N)
        received = data.contiguous().numpy()
        codes = len(received) - out_N.numel()
        scales_B = received[:codes].copy().view(np.float32)  # copied for the same reason
        direct = out_N.dtype == torch.float32 and out_N.is_cpu and out_N.is_contiguous()
        local_N = out_N if direct else torch.empty(out_N.numel(), dtype=torch.float32)
        kernels.decode_int8(scales_B, received[codes:].view(np.int8), local_N.detach().numpy())
        if local_N is not out_N:
            out_N.copy_(local_N)


@dataclass(frozen=True)
class TopK:
    """The elements of largest magnitude, a fraction of all but at least one, with their indices; the rest is zero.

    Which ones is exact to within 1 % of magnitude (Lin et al. 2018, *Deep Gradient Compression*, sample instead).
    At most 2^31 - 1 elements.
    """

    fraction: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"top-k keeps a fraction of {self.fraction}", remedy="Give a number above 0, at most 1.")

    def kept(self, elements: int) -> int:
        return min(elements, max(1, math.ceil(elements * self.fraction)))

    def size(self, elements: int) -> int:
        return 8 * self.kept(elements)

    def encode(self, flat_N: Tensor, seed: int = 0) -> Tensor:
        from tricorn.comm import codec_kernels as kernels

        local_N = flat_N.detach().cpu().to(torch.float32).contiguous().numpy()
        kept = self.kept(len(local_N))
        data = np.empty(8 * kept, dtype=np.uint8)
        indices_K = data[: 4 * kept].view(np.int32)
        if kept:
            bins = np.zeros(1 << (31 - kernels.BIN_SHIFT), dtype=np.int64)
            kernels.largest(local_N.view(np.uint32), bins, indices_K)
            data[4 * kept :].view(np.float32)[:] = local_N[indices_K]
        return torch.from_numpy(data)

    def decode(self, data: Tensor, out_N: Tensor) -> None:
        from tricorn.comm import codec_kernels as kernels

        _check_size(self, data, out_N)
        received = data.contiguous().numpy().copy()
        half = len(received) // 2
        indices_K = received[:half].view(np.int32)
        if not kernels.ascending_below(indices_K, out_N.numel()):
            raise ProtocolError(f"an encoding has indices that are not ascending ones of {out_N.numel()} elements")
        values_K = torch.from_numpy(received[half:].view(np.float32))
        out_N.zero_()
        out_N[torch.from_numpy(indices_K).to(out_N.device, torch.int64)] = values_K.to(out_N)


CODECS: dict[str, Codec] = {
    "bf16": Half(torch.bfloat16), "fp16": Half(torch.float16), "int8": Int8(), "topk": TopK(),
}  # fmt: skip


def find(name: str) -> Codec:
    """The encoding of that name: ``bf16``, ``fp16``, ``int8`` or ``topk``. Raises UsageError for another."""
    if name not in CODECS:
        raise UsageError(f"there is no encoding {name!r}", remedy="Give one of " + ", ".join(CODECS) + ".")
    return CODECS[name]


class ErrorFeedback:
    """What encodings of one flat tensor have lost, added to what is encoded next (Seide et al. 2014; Karimireddy et al.
    2019): all decodings and ``lost_N`` together are the sum of all inputs, up to rounding.
    """

    def __init__(self, codec: Codec, elements: int, dtype: torch.dtype = torch.float32) -> None:
        self._codec = codec
        self.lost_N = torch.zeros(elements, dtype=dtype)

    def encode(self, flat: Tensor, seed: int = 0, start: int = 0) -> Tensor:
        """The encoding of elements [start, start + len(flat)) and of what earlier ones lost of them."""
        lost = self.lost_N[start : start + len(flat)]
        wanted = lost + flat.cpu()
        data = self._codec.encode(wanted, seed)
        self._codec.decode(data, lost)
        torch.sub(wanted, lost, out=lost)
        return data

    def forget(self) -> None:
        """Begin again with nothing lost."""
        self.lost_N.zero_()


def _mixed(seed: int) -> int:
    """32 bits that differ for neighbouring seeds (the finalizer of SplitMix64)."""
    word = (seed * 0x9E37_79B9_7F4A_7C15 + 0x9E37_79B9_7F4A_7C15) & 0xFFFF_FFFF_FFFF_FFFF
    word = ((word ^ (word >> 30)) * 0xBF58_476D_1CE4_E5B9) & 0xFFFF_FFFF_FFFF_FFFF
    word = ((word ^ (word >> 27)) * 0x94D0_49BB_1331_11EB) & 0xFFFF_FFFF_FFFF_FFFF
    return (word ^ (word >> 31)) & 0xFFFF_FFFF


def _check_size(codec: Codec, data: Tensor, out_N: Tensor) -> None:
    expected = codec.size(out_N.numel())
    if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != expected:
        raise ProtocolError(
            f"an encoding of {out_N.numel()} elements has {data.numel()} bytes of {data.dtype}, not {expected} of uint8"
        )
