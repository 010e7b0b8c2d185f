"""``tricorn report RUN``: what happened in a run, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tricorn import folder as folders
from tricorn.errors import UsageError


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's folder, or its name.")] = "latest",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where to write it. \\[report.html in the run]"),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
) -> None:
    """Write what happened in a run, predicted against measured, as one HTML file; print its path."""
    from tricorn.report.page import html
    from tricorn.report.reading import read

    folder = folders.find(run, runs)
    path = output or folder / "report.html"
    text = html(read(folder))
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", remedy="Choose another file with -o.") from None
    print(path, flush=True)
