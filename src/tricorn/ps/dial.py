"""A worker connects to a server: through shared memory where both are on one host, else by TCP."""

from __future__ import annotations

import socket
from ssl import SSLContext
from typing import Any

import msgspec

from tricorn.comm.sockets import Address, connect, receive_exactly
from tricorn.errors import PeerLost
from tricorn.ps.transport import TcpTransport, TlsTransport, Transport

SHARED, REFUSED = b"\1", b"\0"  # what a server says to a segment that a worker offers


def dial(
    address: Address, secret: bytes, claim: dict[str, Any], *, share: bool = True, tls: SSLContext | None = None
) -> Transport:
    """Connect to a server, through shared memory if it is on this host, unless ``share`` forbids or ``tls`` encrypts.

    Raises PeerLost, AuthenticationError or ProtocolError.
    """
    if tls:
        return TlsTransport(connect(address, secret, claim, tls=tls))
    if not share:
        return TcpTransport(connect(address, secret, claim))
    # Its kernels take half a second to load, which nobody waits for who connects by TCP.
    from tricorn.ps.shared import SharedTransport, new_segment

    segment = new_segment()
    try:
        sock = connect(address, secret, claim | {"segment": msgspec.to_builtins(segment.ticket)})
        if _answer(sock) == SHARED:
            return SharedTransport(sock, segment)
    except BaseException:
        segment.close()
        raise
    segment.close()
    return TcpTransport(sock)


def _answer(sock: socket.socket) -> bytes:
    try:
        return receive_exactly(sock, 1)
    except OSError as error:
        sock.close()
        raise PeerLost(f"the server is lost: {error}") from None
    except PeerLost:
        sock.close()
        raise
