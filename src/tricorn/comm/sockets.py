"""Blocking sockets: listening, dialling with the handshake, and whole reads."""

from __future__ import annotations

import socket
from ssl import SSLContext, SSLError
from typing import Any

from tricorn.comm import auth
from tricorn.errors import AuthenticationError, PeerLost

_TLS = "Give the certificate that the server was started with, made out for the address that is dialled."
HANDSHAKE_SECONDS = 5.0
Address = tuple[str, int]


def listen(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A listening socket on loopback unless told otherwise."""
    return socket.create_server((host, port), backlog=128)


def connect(
    address: Address,
    secret: bytes,
    claim: dict[str, Any],
    *,
    timeout: float = HANDSHAKE_SECONDS,
    tls: SSLContext | None = None,
) -> socket.socket:
    """Dial and prove the secret. Raises PeerLost if nobody is there, AuthenticationError, ProtocolError.

    With ``tls`` the connection is encrypted, and the listener's certificate judged by it: AuthenticationError.
    """
    try:
        sock = socket.create_connection(address, timeout=timeout)
        if tls:
            sock = tls.wrap_socket(sock, server_hostname=address[0])
    except SSLError as error:
        reason = f"who answers at {address[0]}:{address[1]} is not trusted: {error}"
        raise AuthenticationError(reason, remedy=_TLS) from None
    except OSError as error:
        raise PeerLost(f"nobody answers at {address[0]}:{address[1]}: {error}") from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    steps = auth.dial(secret, claim)
    try:
        wanted = next(steps)
        while True:
            if isinstance(wanted, int):
                wanted = steps.send(receive_exactly(sock, wanted))
            else:
                sock.sendall(wanted)
                wanted = next(steps)
    except StopIteration:
        sock.settimeout(None)
        return sock
    except OSError as error:
        sock.close()
        raise PeerLost(f"the handshake broke off: {error}") from None
    except BaseException:
        sock.close()
        raise


def receive_exactly(sock: socket.socket, count: int) -> bytes:
    """Read that many bytes; raises PeerLost at the end of the stream."""
    buffer = bytearray(count)
    receive_into(sock, memoryview(buffer))
    return bytes(buffer)


def receive_into(sock: socket.socket, view: memoryview) -> None:
    """Fill the view; raises PeerLost at the end of the stream."""
    while view:
        got = sock.recv_into(view)
        if not got:
            raise PeerLost("the peer closed the connection")
        view = view[got:]
