"""Mutual proof that both ends of a connection know the run's secret (HMAC-SHA256 over fresh nonces).

The secret never travels. Both nonces are fresh, so a recorded handshake is worth nothing, and the two proofs
differ, so one side's proof cannot be sent back to it. Every length is fixed or bounded before anything is read.

    dialer   -> MAGIC  version  nonce_d (32)  length of claim (2)  claim (at most MAX_CLAIM, canonical JSON)
    listener -> nonce_l (32)
    dialer   -> HMAC(secret, "dialer"   | nonce_d | nonce_l | claim)
    listener -> HMAC(secret, "listener" | nonce_d | nonce_l | claim)

The claim says who is calling (role, incarnation, membership epoch, channel); it is part of the proof.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Generator
from typing import Any

import msgspec

from tricorn.errors import AuthenticationError, ProtocolError

MAGIC = b"TRCN"
VERSION = 1
NONCE = 32
PROOF = 32
MAX_CLAIM = 1024
_OPENING = struct.Struct(f"!4sB{NONCE}sH")

Steps = Generator[bytes | int, bytes, Any]  # yields bytes to send or a number of bytes to read


def new_secret() -> bytes:
    return secrets.token_bytes(32)


def dial(secret: bytes, claim: dict[str, Any]) -> Steps:
    """The calling side, without input or output: yields bytes to send, or how many bytes it needs next."""
    encoded = msgspec.json.encode(claim)
    if len(encoded) > MAX_CLAIM:
        raise ProtocolError(f"a claim of {len(encoded)} bytes is over the limit of {MAX_CLAIM}")
    nonce = secrets.token_bytes(NONCE)
    yield _OPENING.pack(MAGIC, VERSION, nonce, len(encoded)) + encoded
    their_nonce = yield NONCE
    yield _proof(secret, b"dialer", nonce, their_nonce, encoded)
    if not hmac.compare_digest((yield PROOF), _proof(secret, b"listener", nonce, their_nonce, encoded)):
        raise AuthenticationError("the listener does not know the run's secret")


def answer(secret: bytes) -> Steps:
    """The listening side; returns the dialer's claim once it is proved."""
    magic, version, nonce, length = _OPENING.unpack((yield _OPENING.size))
    if magic != MAGIC:
        raise ProtocolError("the caller does not speak this protocol")
    if version != VERSION:
        raise ProtocolError(f"the caller speaks version {version} of the protocol, this side version {VERSION}")
    if length > MAX_CLAIM:
        raise ProtocolError(f"a claim of {length} bytes is over the limit of {MAX_CLAIM}")
    encoded = yield length
    own_nonce = secrets.token_bytes(NONCE)
    yield own_nonce
    if not hmac.compare_digest((yield PROOF), _proof(secret, b"dialer", nonce, own_nonce, encoded)):
        raise AuthenticationError("the caller does not know the run's secret")
    yield _proof(secret, b"listener", nonce, own_nonce, encoded)
    try:
        claim = msgspec.json.decode(encoded, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"the caller's claim cannot be read: {error}") from None
    return claim


def _proof(secret: bytes, side: bytes, nonce_d: bytes, nonce_l: bytes, claim: bytes) -> bytes:
    return hmac.digest(secret, side + nonce_d + nonce_l + claim, "sha256")
