"""How a run that did not end well is shown, last of all: what happened, where in the user's code, what to do."""

from __future__ import annotations

import re
import shlex
from typing import Any, TextIO

from tricorn.errors import Interrupted, TricornError


def show(error: TricornError, stream: TextIO) -> None:
    """Write the error, the line of the user's own code if one is known, and the remedy if there is one."""
    labels = ("", "", "") if isinstance(error, Interrupted) else ("error: ", "where: ", "what to do: ")
    parts = zip(labels, (str(error), error.where, error.remedy), strict=True)
    stream.write("\n" + "".join(f"{label}{text}\n" for label, text in parts if text))
    stream.flush()


def located(remedy: str, run: str, *, python: bool) -> str:
    """The remedy with the run's folder where it says RUN; ``python``: for who started the run from Python."""
    resume = f"tricorn.train(job, resume={run!r})" if python else f"tricorn train --resume {shlex.quote(run)}"
    words = {"RUN": shlex.quote(run), "tricorn train --resume RUN": resume}
    # In one go, because the folder's own name may have RUN in it.
    return re.sub(r"(tricorn train --resume )?\bRUN\b", lambda found: words[found[0]], remedy)


def as_json(error: TricornError) -> dict[str, Any]:
    """The same for a program: what ``--json`` prints in place of a result."""
    said = {"error": str(error), "kind": type(error).__name__, "where": error.where, "what_to_do": error.remedy}
    return {**said, "exit_code": error.exit_code}
