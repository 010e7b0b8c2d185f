"""``tricorn server``: parameter servers that stand alone, for training loops of one's own."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from tricorn.comm.auth import new_secret
from tricorn.engine.forkserver import die_with_parent
from tricorn.errors import RoleFailed, TricornError, UsageError
from tricorn.report.failure import show

if TYPE_CHECKING:
    from tricorn.comm.sockets import Address

SECRET = "TRICORN_SECRET"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def server(
    servers: Annotated[int, typer.Option(min=1, max=64, help="How many, each a process of its own.")] = 1,
    workers: Annotated[int, typer.Option(min=1, max=4096, help="How many clients there will be.")] = 1,
    host: Annotated[str, typer.Option(help="Where to listen: an address of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the first; the others follow. \\[free ones]")] = 0,
    file: Annotated[Path, typer.Option(help="Written for clients: addresses and secret.")] = Path("servers.json"),
    memory_limit: Annotated[str | None, typer.Option(help="For the rows of each server, such as 4GB. \\[all]")] = None,
    certificate: Annotated[Path | None, typer.Option(help="Encrypt with TLS: the certificate (PEM). \\[none]")] = None,
    key: Annotated[Path | None, typer.Option(help="The certificate's private key (PEM). \\[none]")] = None,
) -> None:
    """Run parameter servers by themselves, for training loops of one's own, until interrupted.

    Clients call tricorn.ps.connect(FILE), and have the ranks 0 to WORKERS - 1. The secret is TRICORN_SECRET (64
    hexadecimal digits), or a new one.
    """
    from tricorn.ps import access
    from tricorn.ps.standing import serve  # PyTorch is loaded once, and shared by all that are forked

    limit, secret = _bytes(memory_limit), _secret()
    if (certificate is None) != (key is None):
        raise UsageError("a certificate and its key go together", remedy="Give --certificate and --key, or neither.")
    children: dict[int, str] = {}
    addresses: dict[str, Address] = {}
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts what is in the background without the first
        signal.signal(number, signal.default_int_handler)
    try:
        for index in range(servers):
            at = port + index if port else 0
            tls = (certificate, key) if certificate and key else None
            pid, address = _start(partial(serve, secret, host, at, workers, limit, tls))
            children[pid] = f"server-{index}"
            addresses[f"server-{index}"] = address
        access.write(file, access.Access(servers=addresses, secret=secret.hex()))
        where = ", ".join(f"{address[0]}:{address[1]}" for address in addresses.values())
        print(f"Serving at {where}; clients: tricorn.ps.connect({str(file)!r}, ...)", flush=True)
        pid, status = os.wait()
        name = children.pop(pid)
        raise RoleFailed(f"{name} has ended ({status})", remedy="Read what it said above, and start the servers again.")
    except KeyboardInterrupt:
        pass
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error}", remedy="Choose another --file.") from None
    finally:
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        with suppress(OSError):
            file.unlink()


def _start(serve: Callable[[Callable[[Address], None]], None]) -> tuple[int, Address]:
    """Fork a server; returns its process and address once it listens."""
    told, tells = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            os.close(told)
            die_with_parent()
            if os.getppid() == parent:
                serve(partial(_tell, tells))
            code = 0
        except TricornError as error:
            show(error, sys.stderr)
            code = error.exit_code
        except KeyboardInterrupt:
            pass
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(tells)
    with os.fdopen(told, "rb") as pipe:
        said = pipe.read()
    if not said:
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        kind = UsageError if code == UsageError.exit_code else RoleFailed
        raise kind("a server could not start", remedy="Read what it said above.")
    return pid, msgspec.json.decode(said, type=tuple[str, int])


def _tell(pipe: int, address: Address) -> None:
    os.write(pipe, msgspec.json.encode(address))
    os.close(pipe)


def _bytes(size: str | None) -> int | None:
    if size is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", size.strip().upper())
    if not match:
        raise UsageError(f"--memory-limit is {size!r}", remedy="Give a size such as 500MB or 4GB.")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _secret() -> bytes:
    given = os.environ.get(SECRET)
    if given is None:
        return new_secret()
    if not re.fullmatch(r"[0-9a-fA-F]{64}", given):
        raise UsageError(f"{SECRET} is not 64 hexadecimal digits", remedy="Leave it out, and a new one is made.")
    return bytes.fromhex(given)
