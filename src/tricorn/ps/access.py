"""How to reach the servers of a run or of ``tricorn server``: a file that only its owner can read."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from tricorn.comm.sockets import Address
from tricorn.errors import UsageError

FOLDER = "servers"  # of a run's folder: a file from each server
_REMEDY = "Name a run with strategy ps that is in progress, or the file that tricorn server wrote."


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses by role, and the secret in hexadecimal digits."""

    servers: dict[str, Address]
    secret: str


def write(path: Path, access: Access) -> None:
    """Replace the file, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(access) + b"\n")
    partial.replace(path)


def read(path: Path) -> Access:
    """What a file says, or all files of a folder together. Raises UsageError."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    try:
        found = [msgspec.json.decode(file.read_bytes(), type=Access) for file in files]
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the servers' addresses cannot be read: {error}", remedy=_REMEDY) from None
    if not found:
        raise UsageError(f"no server is there now: {path} is empty, as before a run and after it", remedy=_REMEDY)
    return Access(servers={name: at for one in found for name, at in one.servers.items()}, secret=found[-1].secret)
