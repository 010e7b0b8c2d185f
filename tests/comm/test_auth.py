"""The handshake, without a socket: only who knows the secret gets through, and nothing unbounded is asked for."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tricorn.comm import auth
from tricorn.errors import AuthenticationError, ProtocolError

SECRET = b"s" * 32
CLAIM = {"epoch": 1, "channel": "test", "rank": 0}
OPENING = struct.calcsize("!4sB32sH")


def bytes_of(steps: auth.Steps, heard: bytes) -> tuple[bytes, object]:
    """All that a side says when it hears these bytes, and what it returns; None while it waits for more."""
    said, result = b"", None
    try:
        wanted = next(steps)
        while True:
            if isinstance(wanted, bytes):
                said += wanted
                wanted = steps.send(b"")
            else:
                assert 0 <= wanted <= auth.MAX_CLAIM
                if len(heard) < wanted:
                    break
                part, heard = heard[:wanted], heard[wanted:]
                wanted = steps.send(part)
    except StopIteration as done:
        result = done.value
    steps.close()
    return said, result


def talk(dialer: auth.Steps, listener: auth.Steps) -> tuple[bytes, object]:
    """Run both sides against each other: all that the dialer says, and what the listener returns."""
    said, result = b"", None
    to_dialer, to_listener = b"", b""
    sides = {"dialer": [dialer, next(dialer)], "listener": [listener, next(listener)]}
    while sides:
        for name in [*sides]:
            steps, wanted = sides[name]
            try:
                if isinstance(wanted, bytes):
                    if name == "dialer":
                        said, to_listener = said + wanted, to_listener + wanted
                    else:
                        to_dialer += wanted
                    sides[name][1] = steps.send(b"")
                elif name == "dialer" and len(to_dialer) >= wanted:
                    part, to_dialer = to_dialer[:wanted], to_dialer[wanted:]
                    sides[name][1] = steps.send(part)
                elif name == "listener" and len(to_listener) >= wanted:
                    part, to_listener = to_listener[:wanted], to_listener[wanted:]
                    sides[name][1] = steps.send(part)
            except StopIteration as done:
                del sides[name]
                result = done.value if name == "listener" else result
    return said, result


def test_both_sides_prove_the_secret_and_the_claim_arrives():
    assert talk(auth.dial(SECRET, CLAIM), auth.answer(SECRET))[1] == CLAIM


@settings(max_examples=2000)
@given(noise=st.binary(max_size=1200))
def test_noise_is_refused(noise):
    try:
        said, result = bytes_of(auth.answer(SECRET), noise)
    except (ProtocolError, AuthenticationError):
        return
    assert result is None
    assert len(said) <= auth.NONCE


@settings(max_examples=2000)
@given(
    nonce=st.binary(min_size=32, max_size=32), claim=st.binary(max_size=1100), proof=st.binary(min_size=32, max_size=32)
)
def test_a_well_formed_caller_without_the_secret_is_refused(nonce, claim, proof):
    opening = struct.pack("!4sB32sH", auth.MAGIC, auth.VERSION, nonce, len(claim))
    with pytest.raises(ProtocolError if len(claim) > auth.MAX_CLAIM else AuthenticationError):
        bytes_of(auth.answer(SECRET), opening + claim + proof)


@settings(max_examples=2000)
@given(data=st.data())
def test_one_changed_bit_is_refused(data):
    """A man in the middle changes one bit of what the dialer says."""
    dialer, listener = auth.dial(SECRET, CLAIM), auth.answer(SECRET)
    opening = next(dialer)
    encoded = msgspec.json.encode(CLAIM)
    bit = data.draw(st.integers(0, 8 * (len(opening) + auth.PROOF) - 1))

    def changed(said: bytes, offset: int) -> bytes:
        place = bit // 8 - offset
        if not 0 <= place < len(said):
            return said
        return said[:place] + bytes([said[place] ^ (1 << bit % 8)]) + said[place + 1 :]

    def handshake() -> None:
        first = changed(opening, 0)
        next(listener)
        if listener.send(first[:OPENING]) != len(encoded):
            raise ProtocolError("the listener waits for another length")
        nonce = listener.send(first[OPENING:])
        next(dialer)
        next(listener)
        listener.send(changed(dialer.send(nonce), len(opening)))

    with pytest.raises((ProtocolError, AuthenticationError)):
        handshake()


@settings(max_examples=500)
@given(secret=st.binary(max_size=64).filter(lambda secret: secret != SECRET))
def test_neither_side_accepts_another_secret(secret):
    with pytest.raises(AuthenticationError):
        talk(auth.dial(secret, CLAIM), auth.answer(SECRET))
    # A listener that only pretends: whatever proof it sends, the dialer hangs up.
    dialer = auth.dial(SECRET, CLAIM)
    next(dialer)
    next(dialer)
    dialer.send(b"n" * auth.NONCE)
    next(dialer)
    with pytest.raises(AuthenticationError):
        dialer.send((secret + b"\0" * auth.PROOF)[: auth.PROOF])


def test_a_recorded_handshake_is_worth_nothing():
    recorded, _ = talk(auth.dial(SECRET, CLAIM), auth.answer(SECRET))
    with pytest.raises(AuthenticationError):
        bytes_of(auth.answer(SECRET), recorded)


def test_a_proof_sent_back_to_its_sender_is_refused():
    dialer = auth.dial(SECRET, CLAIM)
    next(dialer)
    next(dialer)
    proof = dialer.send(b"n" * auth.NONCE)
    next(dialer)
    with pytest.raises(AuthenticationError):
        dialer.send(proof)


def test_a_claim_that_is_too_long_is_never_sent():
    with pytest.raises(ProtocolError, match="over the limit"):
        next(auth.dial(SECRET, {"channel": "x" * auth.MAX_CLAIM}))


@pytest.mark.parametrize("encoded", [b"", b"null", b"[1]", b"{", b"\xff", b"[" * 1000])
def test_a_proved_claim_that_is_not_an_object_is_refused(encoded):
    listener = auth.answer(SECRET)
    next(listener)
    listener.send(struct.pack("!4sB32sH", auth.MAGIC, auth.VERSION, b"d" * 32, len(encoded)))
    nonce = listener.send(encoded)
    next(listener)
    listener.send(auth._proof(SECRET, b"dialer", b"d" * 32, nonce, encoded))
    with pytest.raises(ProtocolError, match="cannot be read"):
        next(listener)
