"""What exchanging costs on a machine, as a picture in plain text. Pure."""

from __future__ import annotations

from math import log10
from typing import TYPE_CHECKING

from tricorn.planner.explain import seconds, size
from tricorn.planner.load import BUSY
from tricorn.report.table import table

if TYPE_CHECKING:
    from tricorn.planner.links import Links

SIZES = (1e3, 1e5, 1e6, 1e7)  # bytes that are shown
FASTEST, SLOWEST, WIDTH = -6.0, -1.0, 10  # powers of ten of seconds, over so many characters
MARKS = " ▏▎▍▌▋▊▉█"
_WORDS = {
    "exchange": "a step of {} without its computing",
    "shared": "{} in shared memory",
    "tcp": "{} over connections",
    "coding": "a sum among two encoded as {}, without sending",
    "copy": "copying",
    "update": "updating by plain SGD",
}


def picture(links: Links) -> str:
    """One line an operation and number of ranks: its seconds at some sizes, each with a bar on a logarithmic scale."""
    rows = []
    for name in sorted(links.curves, key=_place):
        if name.startswith("exchange/mp"):  # is by microbatches
            continue
        kind, *what, ranks = name.split("/")
        curve = links.curves[name]
        rows.append((_WORDS[kind].format(*what), int(ranks), *(_cell(curve.at(x)) for x in SIZES)))
    lines = [table(("operation", "ranks", *(size(x) for x in SIZES)), rows)]
    if links.beside:
        slower = " and ".join(f"{what} {times:.2f} times" for what, times in links.beside.items())
        lines.append(f"\nAt once in one process, beside each other, {slower} as long as alone.")
    if links.busy > BUSY:
        lines.append(
            f"\nOther programs took {links.busy:.0%} of this machine meanwhile; it is measured again when quiet."
        )
    return "\n".join(lines)


def _place(name: str) -> tuple[int, str, int]:
    kind, *what, ranks = name.split("/")
    return list(_WORDS).index(kind), "/".join(what), int(ranks)


def _cell(value: float) -> str:
    return f"{_bar(value)} {seconds(value)}"


def _bar(value: float) -> str:
    share = (log10(max(value, 1e-12)) - FASTEST) / (SLOWEST - FASTEST)
    eighths = round(min(max(share, 0.0), 1.0) * WIDTH * 8)
    whole, rest = divmod(eighths, 8)
    return (MARKS[-1] * whole + (MARKS[rest] if rest else "")).ljust(WIDTH)
