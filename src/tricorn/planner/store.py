"""What was measured, kept on disk: ``$TRICORN_CACHE``, else ``~/.cache/tricorn``.

A profile is of a job as its files are, links are of a machine; both of the versions that measured them. What does not
match is measured anew, and what cannot be read or written is as if it were not there.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import msgspec

from tricorn.documents import UNREADABLE
from tricorn.planner.correct import Seen
from tricorn.planner.links import Links
from tricorn.planner.profile import Profile
from tricorn.state import cores

FORMAT = 9  # of what is kept; what another one wrote is not read

T = TypeVar("T")


class KeptProfile(msgspec.Struct, frozen=True):
    """A profile, the digests of the files it depends on, and what strategies said of plans (question -> why not).

    ``seen``: what runs have taught since (planner/correct.py).
    """

    profile: Profile
    sources: dict[str, str]
    verdicts: dict[str, str | None]
    seen: Seen = {}


def folder() -> Path:
    """Where it is kept."""
    given = os.environ.get("TRICORN_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tricorn"


def load_links() -> Links | None:
    """What was measured of this machine."""
    return _load(_place("links", ""), Links)


def save_links(links: Links) -> None:
    _save(_place("links", ""), links)


def load_profile(job: str) -> KeptProfile | None:
    """What was measured of a job, if its files are still as they were."""
    kept = _load(_place("profile", job), KeptProfile)
    if kept is None or any(digest_of(path) != digest for path, digest in kept.sources.items()):
        return None
    return kept


def save_profile(job: str, kept: KeptProfile) -> None:
    _save(_place("profile", job), kept)


def digests(paths: Iterable[str]) -> dict[str, str]:
    """Of files that can be read."""
    return {path: digest for path in paths if (digest := digest_of(path))}


def digest_of(path: str) -> str:
    """Of a file's content; empty if it cannot be read."""
    with contextlib.suppress(OSError):
        return blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    return ""


def _place(kind: str, what: str) -> Path:
    key = blake2b("\0".join((*_machine(), what)).encode(), digest_size=16).hexdigest()
    return folder() / f"{kind}-{key}.json"


@cache
def _machine() -> tuple[str, ...]:
    model = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return (
        str(FORMAT), version("tricorn"), version("torch"), platform.python_version(), platform.node(), model,
        str(cores.usable()),
    )  # fmt: skip


def _load(path: Path, kind: type[T]) -> T | None:
    with contextlib.suppress(*UNREADABLE):
        return msgspec.json.decode(path.read_bytes(), type=kind)
    return None


def _save(path: Path, value: object) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(msgspec.json.encode(value))
        partial.replace(path)
