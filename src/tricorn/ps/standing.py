"""Servers that stand alone, for training loops of one's own: one membership epoch, ranks by claim."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from ssl import PROTOCOL_TLS_CLIENT, PROTOCOL_TLS_SERVER, SSLContext

import torch

from tricorn.comm.auth import new_secret
from tricorn.comm.sockets import Address
from tricorn.errors import ProtocolError, UsageError
from tricorn.ps.access import Access
from tricorn.ps.server import Server

EPOCH = 0


def new_server(
    secret: bytes, host: str, port: int, *, memory_limit: int | None = None, tls: SSLContext | None = None
) -> Server:
    """A server that listens. Raises UsageError if it cannot listen there."""
    try:
        return Server(
            secret, host, port=port, memory_limit=memory_limit, tls=tls, on_snapshot=_no_snapshot, on_applied=_nothing
        )
    except OSError as error:
        raise UsageError(
            f"a server cannot listen at {host}:{port}: {error}", remedy="Choose another --host or --port."
        ) from None


def serve(
    secret: bytes,
    host: str,
    port: int,
    workers: int,
    memory_limit: int | None,
    tls: tuple[Path, Path] | None,
    listens: Callable[[Address], None],
) -> None:
    """Be a server until the process ends; ``listens`` is called with its address. Raises UsageError."""
    torch.set_num_threads(1)
    context = server_tls(*tls) if tls else None
    server = new_server(secret, host, port, memory_limit=memory_limit, tls=context)

    def begin() -> None:
        welcome(server, workers)
        listens(server.address)

    threading.Thread(target=begin, daemon=True).start()
    server.serve_forever()


def welcome(server: Server, workers: int) -> None:
    """Have a server that serves admit clients of ranks 0 to ``workers`` - 1."""
    server.begin(epoch=EPOCH, step=0, source="initial", checkpoint=None, workers=workers, alone=True)


@contextmanager
def serving(
    count: int = 1, *, workers: int = 1, memory_limit: int | None = None, tls: SSLContext | None = None
) -> Iterator[Access]:
    """Servers as threads of this process, for as long as the context lasts; yields how to reach them.

    ``workers``: how many clients there will be, with ranks 0 to ``workers`` - 1. ``memory_limit``: the bytes that the
    rows of tables may take on each server.
    """
    secret = new_secret()
    with ExitStack() as stack:
        servers = [new_server(secret, "127.0.0.1", 0, memory_limit=memory_limit, tls=tls) for _ in range(count)]
        for index, server in enumerate(servers):
            thread = threading.Thread(target=server.serve_forever, name=f"tricorn-server-{index}")
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.stop)
            welcome(server, workers)
        yield Access(
            servers={f"server-{index}": server.address for index, server in enumerate(servers)}, secret=secret.hex()
        )


def server_tls(certificate: Path, key: Path) -> SSLContext:
    """What a server encrypts with. Raises UsageError."""
    context = SSLContext(PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # of ssl, too
        raise UsageError(f"{certificate} with {key} is no certificate to serve with: {error}") from None
    return context


def client_tls(authority: Path) -> SSLContext:
    """What a client trusts: the servers' own certificate, or that of who signed it. Raises UsageError."""
    context = SSLContext(PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(authority)
    except OSError as error:
        raise UsageError(f"{authority} is no certificate to trust: {error}") from None
    return context


def _no_snapshot(step: int, pieces: object) -> None:
    raise ProtocolError("a server that stands alone keeps no checkpoints")


def _nothing(steps: list[int]) -> None:
    """Nobody counts the steps of a server that stands alone."""
