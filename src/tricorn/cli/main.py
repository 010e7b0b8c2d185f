"""``tricorn``: the verbs, the exit codes, and how an error is shown."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from tricorn import __version__
from tricorn.cli.demo import demo
from tricorn.cli.doctor import doctor
from tricorn.cli.plan import plan
from tricorn.cli.ps import ps
from tricorn.cli.report import report
from tricorn.cli.server import server
from tricorn.cli.simulate import simulate
from tricorn.cli.train import train
from tricorn.cli.verb import Verb
from tricorn.errors import TricornError
from tricorn.report.failure import as_json, show

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.command(cls=Verb)(train)
app.command(cls=Verb)(plan)
app.command(cls=Verb)(simulate)
app.command(cls=Verb)(report)
app.command(cls=Verb)(demo)
app.command(cls=Verb)(doctor)
app.command(cls=Verb)(server)
app.add_typer(ps, name="ps")


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def tricorn(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Train one declared PyTorch job by parameter server, data parallel or model parallel."""


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 the job failed, 2 wrong usage, 3 the cluster failed, 130 interrupted and resumable.
    """
    try:
        app()
    except TricornError as error:
        show(error, sys.stderr)
        if "--json" in sys.argv:
            print(msgspec.json.encode(as_json(error)).decode(), flush=True)
        sys.exit(error.exit_code)
