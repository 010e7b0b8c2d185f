"""How an error is shown, last of all: what happened, where in the user's code, and what to do."""

from __future__ import annotations

from typing import TextIO

from tricorn.errors import TricornError


def show(error: TricornError, stream: TextIO) -> None:
    """Write the error, the line of the user's own code if one is known, and the remedy if there is one."""
    parts = [("error", str(error)), ("where", error.where), ("what to do", error.remedy)]
    stream.write("\n" + "".join(f"{label}: {text}\n" for label, text in parts if text))
    stream.flush()
