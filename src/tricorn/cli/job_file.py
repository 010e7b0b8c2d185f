"""``FILE[:NAME]``: where a job is declared."""

from __future__ import annotations

from pathlib import Path

from tricorn.errors import UsageError


def job_in(where: str) -> tuple[str, str]:
    """The file and the name of the job in it, ``job`` unless said. Raises UsageError if there is no such file."""
    file, _, name = where.rpartition(":") if ":" in where else (where, "", "job")
    if not Path(file).is_file():
        raise UsageError(f"there is no file {file}", remedy="Name a Python file that declares a tricorn.Job.")
    return file, name
