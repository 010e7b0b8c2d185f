"""``tricorn``: the verbs, the exit codes, and how an error is shown."""

from __future__ import annotations

import sys

import typer

from tricorn.cli.demo import demo
from tricorn.cli.doctor import doctor
from tricorn.cli.train import train
from tricorn.errors import TricornError
from tricorn.report.failure import show

app = typer.Typer(
    help="Train one declared PyTorch job by parameter server, data parallel or model parallel.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(demo)
app.command()(doctor)


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 the job failed, 2 wrong usage, 3 the cluster failed, 130 interrupted and resumable.
    """
    try:
        app()
    except TricornError as error:
        show(error, sys.stderr)
        sys.exit(error.exit_code)
