"""The inner loops of the encodings (codecs.py), compiled. None uses ``fastmath``: every machine gets the same bits.

Legend: N elements, B blocks of ``BLOCK`` elements that share a scale, K elements that are kept. ``bits_N`` are the same
float32 numbers as ``values_N``, seen as unsigned integers: by their bits, magnitudes compare as the numbers do, with
what is not finite above all others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tricorn.comm.kernel import kernel

Floats = NDArray[np.float32]
Bits = NDArray[np.uint32]

BLOCK = 256  # 1.6 % more to send, and an outlier coarsens no more than its neighbours
BIN_SHIFT = 16  # exponent and 7 bits of mantissa: a bin spans less than 1 % of its magnitude
_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_INFINITE = np.uint32(0x7F80_0000)
_SMALLEST = np.float32(2.0**-126)  # below it, the inverse of a scale is not finite
_LIMIT = np.float32(127)


@kernel
def encode_int8(values_N: Floats, bits_N: Bits, seed: Any, scales_B: Floats, codes_N: NDArray[np.int8]) -> None:
    """Each element over its block's scale, rounded up as often as its fraction says: unbiased.

    The randomness is a hash of seed and index (the mixer "lowbias32" of C. Wellons' hash-prospector). A block with a
    value that is not finite becomes NaN as a whole.
    """
    for b in range(len(scales_B)):
        start, stop = b * BLOCK, min((b + 1) * BLOCK, len(values_N))
        top = np.uint32(0)
        for i in range(start, stop):
            top = max(top, np.uint32(bits_N[i] & _MAGNITUDE))
        scale = np.float32(np.uint32(top).view(np.float32)) / _LIMIT
        if top >= _INFINITE or scale < _SMALLEST:
            scales_B[b] = np.float32(np.nan) if top >= _INFINITE else np.float32(0)
            codes_N[start:stop] = 0
            continue
        scales_B[b] = scale
        inverse = np.float32(1) / scale
        for i in range(start, stop):
            x = np.uint32(np.uint32(i) * np.uint32(0x9E37_79B9) + seed)
            x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x21F0_AAAD))
            x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x735A_2D97))
            x = np.uint32(x ^ (x >> np.uint32(15)))
            fraction = np.float32(np.int32(x >> np.uint32(8))) * np.float32(2.0**-24)
            code = np.floor(values_N[i] * inverse + fraction)
            codes_N[i] = np.int8(np.int32(min(max(code, -_LIMIT), _LIMIT)))


@kernel
def decode_int8(scales_B: Floats, codes_N: NDArray[np.int8], out_N: Floats) -> None:
    for b in range(len(scales_B)):
        scale = scales_B[b]
        for i in range(b * BLOCK, min((b + 1) * BLOCK, len(out_N))):
            out_N[i] = np.float32(codes_N[i]) * scale


@kernel
def largest(bits_N: Bits, bins: NDArray[np.int64], indices_K: NDArray[np.int32]) -> None:
    """The ascending indices of the K largest magnitudes, up to the width of a bin; the first of equal ones.

    ``bins`` are ``1 << (31 - BIN_SHIFT)`` zeros. One pass counts, one collects: at a million elements 8 times as fast
    as ``torch.topk``.
    """
    for i in range(len(bits_N)):
        bins[(bits_N[i] & _MAGNITUDE) >> np.uint32(BIN_SHIFT)] += 1
    above, threshold = 0, len(bins) - 1
    while above + bins[threshold] < len(indices_K):
        above += bins[threshold]
        threshold -= 1
    at_threshold = len(indices_K) - above
    kept = 0
    for i in range(len(bits_N)):
        place = np.int64((bits_N[i] & _MAGNITUDE) >> np.uint32(BIN_SHIFT))
        if place < threshold:
            continue
        if place == threshold:
            if at_threshold == 0:
                continue
            at_threshold -= 1
        indices_K[kept] = i
        kept += 1


@kernel
def ascending_below(indices_K: NDArray[np.int32], size: int) -> bool:
    """Whether these are distinct indices into ``size`` elements, in ascending order."""
    before = -1
    for index in indices_K:
        if not before < index < size:
            return False
        before = index
    return True
