"""Messages survive the way there; what is unknown, mistyped or too long does not get through."""

from __future__ import annotations

import typing
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tricorn.control import messages as m
from tricorn.errors import ClusterError, JobError, Problem, ProtocolError, StorageError, UsageError

ALL = m.Report | m.Order | m.FromLauncher | m.ToLauncher

counts = st.integers(0, 2**53 - 1)
plain = {int: counts, str: st.text(max_size=20), float: st.floats(), bool: st.booleans(), type(None): st.none()}


def values(hint: Any) -> st.SearchStrategy:
    """Values of the type, such as messages are made of."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is m.ShardName:
        return st.just("worker-0.safetensors")
    if hint is m.MetricName:
        return st.just("shares")
    if origin is Annotated:
        return st.integers(0, 65535) if hint is typing.get_args(m.Address)[1] else values(parts[0])
    if origin is list:
        return st.lists(values(parts[0]), max_size=2)
    if origin is dict:
        return st.dictionaries(plain[str], plain[int] if parts[1] is Any else values(parts[1]), max_size=2)
    if origin is tuple:
        return st.tuples(*map(values, parts))
    if parts:
        return st.one_of(*map(values, parts))
    if hint in plain:
        return plain[hint]
    hints = typing.get_type_hints(hint, include_extras=True)
    return st.builds(hint, **{name: values(hints[name]) for name in hint.__struct_fields__})


def read(frame: bytes, kind: object = ALL) -> object:
    count = m.length(frame[: m.HEADER.size])
    assert count == len(frame) - m.HEADER.size
    return m.Decoder(kind)(frame[m.HEADER.size :])


@settings(max_examples=20)
@pytest.mark.parametrize("kind", typing.get_args(ALL))
@given(data=st.data())
def test_round_trip(kind, data):
    message = data.draw(values(kind))
    again = read(m.encode(message))
    assert type(again) is kind
    assert repr(again) == repr(message)  # in which even nan equals nan


def test_every_kind_has_its_own_name():
    names = [kind.__struct_config__.tag for kind in typing.get_args(ALL)]
    assert len(set(names)) == len(names)


@given(st.binary(max_size=300))
def test_anything_else_is_refused_or_is_a_message(payload):
    try:
        message = m.Decoder(ALL)(payload)
    except ProtocolError:
        return
    assert isinstance(message, m.Message)


BEAT = {"type": "Heartbeat", "bytes_sent": 1}


@pytest.mark.parametrize(
    "document",
    [
        BEAT | {"more": 1}, BEAT | {"type": "Nonsense"}, BEAT | {"type": 1}, {"bytes_sent": 1}, {"type": "Heartbeat"},
        *(BEAT | {field: it} for field in ("bytes_sent", "peak_bytes") for it in ("1", 1.5, True, None, -1, 2**53)),
        [], 1, None, "Heartbeat", BEAT | {"bytes_sent": [1]},
        {"type": "Saved", "epoch": 1, "step": 1, "files": [{"name": "../x", "bytes": 1, "sha256": ""}]},
        {"type": "Ready", "epoch": 1, "part": None, "held": [], "address": ["h", 65536]},
        {"type": "Broken", "epoch": 1, "reason": "x" * (m.MAX_TEXT + 1)},
        *(
            {"type": "Measured", "epoch": 1, "step": 1, "what": "shares", "values": {}} | wrong
            for wrong in (
                {"what": "loss"}, {"what": "time"}, {"what": "Shares"}, {"what": "a" * 33}, {"what": "a\n"},
                {"values": {str(i): 0.0 for i in range(257)}}, {"values": {"x" * 65: 0.0}}, {"values": {"x": "1"}},
            )
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(document):
    with pytest.raises(ProtocolError, match="cannot be read"):
        m.Decoder(m.Report)(msgspec.msgpack.encode(document))


@pytest.mark.parametrize(
    "nested", [b"\x91" * 10**5, b"\x82\xa1x" + b"\x91" * 10**5, b"\x82\xa1x" + b"\x81\xc0" * 10**5]
)
def test_depth_is_refused(nested):
    with pytest.raises(ProtocolError, match="cannot be read"):
        m.Decoder(m.Report)(nested + b"\xc0")


def test_a_role_cannot_give_orders():
    with pytest.raises(ProtocolError):
        read(m.encode(m.Shutdown()), m.Report)
    with pytest.raises(ProtocolError):
        read(m.encode(m.Stop()), m.Report)


def test_a_length_is_refused_before_anything_of_it_is_read():
    assert m.length(m.HEADER.pack(m.MAX_FRAME)) == m.MAX_FRAME
    for count in (m.MAX_FRAME + 1, 2**32 - 1):
        with pytest.raises(ProtocolError, match=f"a frame of {count} bytes"):
            m.length(m.HEADER.pack(count))


def test_a_message_over_the_limit_is_not_made():
    with pytest.raises(ProtocolError, match=r"a Notice of .* is over the limit"):
        m.encode(m.Notice(text="x" * m.MAX_FRAME))


def test_any_error_can_be_told():
    """However long its text is, and whatever is in it."""
    error = ValueError("a name that is not UTF-8: \udcff " + "x" * m.MAX_FRAME)
    told = read(m.encode(m.failed(error, "first line\n" * m.MAX_FRAME + "last line")))
    assert told.message.startswith("a name that is not UTF-8: ? xxx")
    assert told.trace.endswith("last line")
    assert read(m.encode(m.Ended(outcome="failed", error=told, summary={}))).error == told


def test_an_error_keeps_its_remedy_and_its_line():
    told = m.failed(StorageError("full", remedy="Free space.", where="job.py:3"))
    assert (told.kind, told.message, told.remedy, told.where) == ("StorageError", "full", "Free space.", "job.py:3")


@pytest.mark.parametrize("error", [StorageError("full"), StorageError("full", remedy="Buy more.", where="job.py:3")])
def test_an_error_that_is_told_is_raised_as_itself(error):
    again = m.raised(m.failed(error), UsageError)
    assert type(again) is StorageError
    assert (str(again), again.remedy, again.where) == (str(error), error.remedy, error.where)


@pytest.mark.parametrize("error", [KeyError("x"), JobError([Problem("epochs", "0", "give 1")])])
def test_an_error_that_is_made_of_more_than_a_message_is_told_as_another_kind(error):
    again = m.raised(m.failed(error), ClusterError)
    assert type(again) is ClusterError
    assert str(again) == str(error)
    assert type(m.raised(m.Failed(kind="failed", message="", remedy="", where="", trace=""), UsageError)) is UsageError
