"""The header in front of what one stage hands to the next."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tricorn.errors import ProtocolError
from tricorn.mp import wire

NUMBERS = [0, 1, 2, 5, 11, 12, 255, wire.MAX_BYTES, wire.MAX_BYTES + 1, 2**62, -1, -(2**62)]


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 3, requires_grad=True),
        torch.zeros((), dtype=torch.bfloat16),
        torch.zeros(0, 4, dtype=torch.int64),
        (torch.zeros(1, dtype=torch.complex64, requires_grad=True), torch.zeros(3, dtype=torch.bool)),
        (torch.zeros(1),),
        (),
        tuple(torch.zeros([1] * wire.MAX_DIMS) for _ in range(wire.MAX_TENSORS)),
    ],
)
def test_a_header_says_what_comes(value):
    assert wire.obstacle(value) is None
    kind = wire.decoded(wire.encoded(wire.kind_of(value)))
    assert kind.is_tuple == isinstance(value, tuple)
    assert kind.parts == tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in wire.tensors(value))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"x": torch.zeros(1)}, "a dict"),
        (3, "a int"),
        ((torch.zeros(1), 3), "a tuple of more than tensors"),
        ((torch.zeros(1),) * (wire.MAX_TENSORS + 1), "more than 8 tensors"),
        (torch.zeros([1] * (wire.MAX_DIMS + 1)), "more than 8 tensors or 8 dims"),
        (torch.zeros(1).to_sparse(), "a tensor of torch.float32 and torch.sparse_coo"),
    ],
)
def test_what_cannot_travel(value, why):
    assert why in wire.obstacle(value)


@given(st.lists(st.one_of(st.sampled_from(NUMBERS), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=90))
def test_a_malformed_header_is_refused_before_anything_is_allocated(numbers):
    header = wire.encoded(wire.kind_of(torch.zeros(2)))
    header[: len(numbers)] = torch.tensor(numbers[: len(header)], dtype=torch.int64)
    try:
        kind = wire.decoded(header)
    except ProtocolError:
        return
    assert len(kind.parts) <= wire.MAX_TENSORS
    for shape, dtype, _ in kind.parts:
        assert torch.empty(shape, dtype=dtype, device="meta").nbytes <= wire.MAX_BYTES


@given(st.data())
def test_one_wrong_number_in_a_header_is_refused_or_still_a_value(data):
    header = wire.encoded(wire.kind_of((torch.zeros(3, 4), torch.zeros(5, dtype=torch.int64))))
    header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.sampled_from(NUMBERS))
    try:
        parts = wire.decoded(header).parts
    except ProtocolError:
        return
    assert all(torch.empty(shape, dtype=dtype, device="meta").nbytes <= wire.MAX_BYTES for shape, dtype, _ in parts)
