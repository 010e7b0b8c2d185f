"""Ask a server how it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from tricorn.comm.sockets import Address, connect, receive_exactly
from tricorn.documents import UNREADABLE
from tricorn.errors import PeerLost, ProtocolError
from tricorn.ps.standing import client_tls
from tricorn.ps.wire import HEADER, MAX_DOCUMENT, Header, Op


def ask(address: Address, secret: bytes, tls: Path | None = None) -> dict[str, Any]:
    """The server's statistics (docs/protocol.md). Raises PeerLost, AuthenticationError, ProtocolError."""
    with connect(address, secret, {"channel": "stats"}, tls=client_tls(tls) if tls else None) as sock:
        try:
            header = Header.unpack(receive_exactly(sock, HEADER.size))
            if header.op != Op.STATS or header.length > MAX_DOCUMENT:
                raise ProtocolError(f"a reply of kind {header.op} came where statistics were due")
            return msgspec.json.decode(receive_exactly(sock, header.length), type=dict[str, Any])
        except OSError as error:
            raise PeerLost(f"the server is lost: {error}") from None
        except UNREADABLE as error:
            raise ProtocolError(f"the server's statistics cannot be read: {error}") from None
