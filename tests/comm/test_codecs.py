"""Encodings: how far a round trip may be off, what becomes of what is lost, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tricorn.comm import codecs
from tricorn.comm.codec_kernels import BLOCK
from tricorn.errors import ProtocolError, UsageError

SIZES = (0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17)
DTYPES = (torch.float32, torch.float64)


def floats(limit: float) -> st.SearchStrategy[torch.Tensor]:
    """Flat tensors of numbers up to the limit, zeros and subnormal ones among them."""
    return arrays.arrays(
        np.float32,
        st.integers(0, 600),
        elements=st.floats(-limit, limit, width=32),
        fill=st.sampled_from([0.0, 1.0, -0.5]),
    ).map(torch.from_numpy)


def round_trip(codec: codecs.Codec, flat: torch.Tensor, seed: int = 0) -> torch.Tensor:
    data = codec.encode(flat, seed)
    assert data.dtype == torch.uint8
    assert data.numel() == codec.size(flat.numel())
    out = torch.full_like(flat, math.nan)
    codec.decode(data, out)
    return out


@pytest.mark.parametrize(("name", "digits", "tiny"), [("bf16", 2**-8, 1e-40), ("fp16", 2**-11, 2**-25)])
@given(flat=floats(6e4))
def test_halves_are_rounded_to_the_nearest(name, digits, tiny, flat):
    error = (round_trip(codecs.find(name), flat) - flat).abs()
    assert (error <= digits * flat.abs() + tiny).all()


def test_fp16_saturates():
    flat = torch.tensor([1e6, -1e6, 65504.0])
    assert round_trip(codecs.find("fp16"), flat).tolist() == [65504.0, -65504.0, 65504.0]


@given(flat=floats(2.0**126), seed=st.integers(0, 2**70))
def test_int8_is_within_a_scale(flat, seed):
    found = round_trip(codecs.find("int8"), flat, seed)
    for values, theirs in zip(flat.split(BLOCK), found.split(BLOCK), strict=True):
        scale = values.abs().max().item() / 127 if len(values) else 0.0
        assert ((theirs.double() - values.double()).abs() <= scale * (1 + 1e-5) + 2e-36).all()


def test_int8_rounds_without_bias():
    """The mean of many roundings nears the number as it must if each has mean zero: within 5 standard errors."""
    flat = torch.linspace(-1, 1, BLOCK)
    rounds = 4000
    found = torch.stack([round_trip(codecs.find("int8"), flat, seed) for seed in range(rounds)]).double()
    standard_error = found.std(0) / math.sqrt(rounds)
    assert ((found.mean(0) - flat).abs() <= 5 * standard_error + 1e-6).all()
    assert found.std(0).max() > 0.4 / 127  # it was random indeed


def test_rounding_follows_the_seed_alone():
    flat, codec = torch.randn(1000, generator=torch.Generator().manual_seed(0)), codecs.find("int8")
    assert torch.equal(codec.encode(flat, 7), codec.encode(flat, 7))
    assert not torch.equal(codec.encode(flat, 7), codec.encode(flat, 8))
    assert not torch.equal(codec.encode(flat, 7), codec.encode(flat, 7 + (1 << 32)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", codecs.CODECS)
def test_what_is_not_finite_is_not_hidden(name, value):
    flat = torch.zeros(2 * BLOCK)
    flat[3] = value
    found = round_trip(codecs.find(name), flat)
    assert not found[3].isfinite()
    assert (found[BLOCK:] == 0).all()


@given(flat=floats(2.0**126), fraction=st.floats(0.001, 1))
def test_topk_keeps_the_largest(flat, fraction):
    # Some libraries have the processor take subnormal numbers for zero.
    flat = torch.where(flat.abs() < torch.finfo(flat.dtype).tiny, 0.0, flat)
    codec = codecs.TopK(fraction)
    found = round_trip(codec, flat)
    kept = found != 0
    assert torch.equal(found[kept], flat[kept])
    assert kept.sum() <= codec.kept(len(flat))
    if codec.kept(len(flat)) >= (flat != 0).sum():
        assert torch.equal(found, flat)
    else:
        dropped = flat[~kept].abs().max()
        assert flat[kept].abs().min() >= dropped * (1 - 1 / 128)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", codecs.CODECS)
def test_error_feedback_loses_nothing(name, dtype, size):
    generator = torch.Generator().manual_seed(size)
    feedback = codecs.ErrorFeedback(codecs.find(name), size, dtype)
    given_sum, sent_sum = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
    for step in range(20):
        flat = torch.randn(size, generator=generator, dtype=dtype)
        given_sum += flat
        for part, start in ((slice(0, size // 3), 0), (slice(size // 3, size), size // 3)):
            out = torch.empty_like(flat[part])
            codecs.find(name).decode(feedback.encode(flat[part], step, start), out)
            sent_sum[part] += out
    exact = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(sent_sum + feedback.lost_N, given_sum, rtol=exact, atol=20 * exact)
    feedback.forget()
    assert not feedback.lost_N.any()


@pytest.mark.parametrize("name", codecs.CODECS)
@given(data=st.binary(max_size=700), size=st.integers(0, 600))
def test_bytes_of_another_length_are_refused(name, data, size):
    codec = codecs.find(name)
    out = torch.ones(size)
    received = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    if len(data) != codec.size(size):
        with pytest.raises(ProtocolError, match=f"an encoding of {size} elements"):
            codec.decode(received, out)
        assert (out == 1).all()
    elif name != "topk":
        codec.decode(received, out)


@pytest.mark.parametrize(
    "indices", [[0, 1, 2, 10], [-1, 1, 2, 3], [0, 0, 1, 2], [3, 2, 1, 0], [0, 1, 2, 2**31 - 1], [-(2**31), 0, 1, 2]]
)
def test_topk_writes_nowhere_else(indices):
    data = torch.cat([torch.tensor(indices, dtype=torch.int32).view(torch.uint8), torch.ones(4).view(torch.uint8)])
    out = torch.ones(10)
    with pytest.raises(ProtocolError, match="ascending"):
        codecs.TopK(0.4).decode(data, out)
    assert (out == 1).all()


def test_bytes_that_are_not_aligned_are_decoded():
    for name in codecs.CODECS:
        codec, flat = codecs.find(name), torch.linspace(-1, 1, 300)
        data = codec.encode(flat)
        out = torch.empty_like(flat)
        codec.decode(torch.cat([torch.zeros(1, dtype=torch.uint8), data])[1:], out)
        assert torch.equal(out, round_trip(codec, flat))


def test_a_name_or_fraction_that_is_none():
    with pytest.raises(UsageError, match="'int4'"):
        codecs.find("int4")
    with pytest.raises(UsageError, match="fraction of 0"):
        codecs.TopK(0)
