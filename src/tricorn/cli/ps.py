"""``tricorn ps stats``: what the parameter servers of a live run, or those that stand alone, hold and do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from tricorn.cli.verb import Verb
from tricorn.errors import PeerLost, UsageError
from tricorn.report.table import table

ps = typer.Typer(no_args_is_help=True, help="Look at parameter servers.")


@ps.callback()
def verbs() -> None:
    """Look at parameter servers."""


@ps.command(cls=Verb)
def stats(
    where: Annotated[str, typer.Argument(metavar="RUN|FILE", help="A run, or the file of tricorn server.")] = "latest",
    runs: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds over which rates are measured.")] = 1.0,
    tls: Annotated[Path | None, typer.Option(help="The certificate to trust, if the servers encrypt. \\[none]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show tables, rows, bytes, rates, latencies, hot ids and staleness."""
    from tricorn.ps import access
    from tricorn.ps.ask import ask

    found = access.read(_place(where, runs))
    try:
        before = {name: ask(address, bytes.fromhex(found.secret), tls) for name, address in found.servers.items()}
        time.sleep(interval)
        after = {name: ask(address, bytes.fromhex(found.secret), tls) for name, address in found.servers.items()}
    except PeerLost as error:
        raise UsageError(
            f"no server of {where} answers: {error}",
            remedy="Try again if it has just begun; once a run is over, its summary.json says what it came to.",
        ) from None
    servers = {name: after[name] | _rates(before[name], after[name]) for name in after}
    if json:
        print(msgspec.json.encode({"servers": servers}).decode(), flush=True)
        return
    for title, rows in (("server", _load(servers)), ("table", _tables(servers)), ("staleness", _staleness(servers))):
        if len(rows) > 1:
            print(("" if title == "server" else "\n") + table(rows[0], rows[1:]), flush=True)


def _place(where: str, runs: Path) -> Path:
    from tricorn.ps.access import FOLDER

    places = [Path(where) / FOLDER, runs / where / FOLDER]
    return next((place for place in places if place.is_dir()), Path(where))


def _rates(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    seconds = after["seconds"] - before["seconds"]
    return {
        f"{what}_per_second": (after[what] - before[what]) / seconds
        for what in ("requests", "bytes_received", "bytes_sent", "bytes_in_place")
    }


def _load(servers: dict[str, Any]) -> list[tuple[Any, ...]]:
    bytes_of = {"MB/s in": "bytes_received", "MB/s out": "bytes_sent", "MB/s read in place": "bytes_in_place"}
    head = ("server", "workers", "requests", "requests/s", *bytes_of, "p50 us", "p99 us", "dense bytes")
    return [head] + [
        (
            name, s["workers"], s["requests"], round(s["requests_per_second"]),
            *(round(s[f"{what}_per_second"] / 1e6, 1) for what in bytes_of.values()),
            *(None if s[part] is None else round(s[part] * 1e6) for part in ("p50", "p99")),
            s["dense"] and s["dense"]["bytes"],
        )
        for name, s in servers.items()
    ]  # fmt: skip


def _tables(servers: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [("server", "table", "rows", "width", "bytes", "consistency", "hottest ids (steps)")] + [
        (
            name, t["name"], t["rows"], t["dim"], t["bytes"], t["consistency"],
            ", ".join(f"{id} ({count})" for id, count in t["hot"]),
        )
        for name, s in servers.items()
        for t in s["tables"]
    ]  # fmt: skip


def _staleness(servers: dict[str, Any]) -> list[tuple[Any, ...]]:
    ages = sorted({int(age) for s in servers.values() for age in s["staleness"]})
    return [("versions old", *servers)] + [
        (age, *(s["staleness"].get(str(age), s["staleness"].get(age, 0)) for s in servers.values())) for age in ages
    ]
