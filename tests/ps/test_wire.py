"""What is said between workers and servers, as bytes."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from tricorn.errors import ProtocolError, StorageError, TricornError, UsageError
from tricorn.ps.wire import HEADER, MAX_ERROR, Header, Op, decode_error, encode_error, unsent

octets, wholes, lengths = st.integers(0, 255), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**64 - 1)


@given(st.builds(Header, octets, wholes, wholes, octets, st.tuples(*[st.floats(allow_nan=False)] * 6), lengths))
def test_headers_survive_the_wire(header: Header) -> None:
    packed = header.pack()
    assert len(packed) == HEADER.size == 80
    assert Header.unpack(packed) == header


@given(st.text(max_size=5000))
def test_errors_survive_the_wire_and_stay_short(text: str) -> None:
    text = text.encode(errors="ignore").decode()
    payload = encode_error(ProtocolError(text))
    assert len(payload) <= MAX_ERROR
    told = decode_error(payload)
    assert type(told) is ProtocolError
    assert str(told).startswith("a parameter server says: " + text[:100])


@given(st.text(max_size=300))
def test_a_remedy_travels_with_its_error(text: str) -> None:
    payload = encode_error(UsageError("wrong" * 100, remedy=text))
    assert len(payload) <= MAX_ERROR
    told = decode_error(payload)
    assert type(told) is UsageError
    assert told.remedy == text.encode(errors="replace")[:200].decode(errors="ignore")
    assert decode_error(encode_error(StorageError("full"))).remedy == StorageError.remedy


@given(st.binary(max_size=300))
def test_error_frames_of_junk_are_errors(junk: bytes) -> None:
    assert isinstance(decode_error(junk), TricornError)


@given(st.lists(st.binary(max_size=9), max_size=5), st.data())
def test_what_is_unsent_is_the_rest(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    sent = data.draw(st.integers(0, len(whole)))
    assert b"".join(unsent([memoryview(part) for part in parts], sent)) == whole[sent:]


def test_the_header_is_laid_out_as_documented() -> None:
    packed = Header(Op.PUSH, step=258, version=-1, flags=3, numbers=(1.5,), length=77).pack()
    assert packed[:2] == bytes([4, 3])
    assert struct.unpack("!qq", packed[8:24]) == (258, -1)
    assert struct.unpack("!d", packed[24:32]) == (1.5,)
    assert struct.unpack("!Q", packed[72:]) == (77,)
