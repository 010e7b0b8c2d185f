"""A small table in plain text, aligned, the same in a terminal, a log and a document."""

from __future__ import annotations

from collections.abc import Sequence


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lines of aligned columns; a column of which every value is a number stands to the right.

    Floats are shown with four significant digits, whole numbers with thousands separated, booleans as yes and no.
    Raises ValueError if a row has not one value for each header.
    """
    columns = list(zip(headers, *([shown(value) for value in row] for row in rows), strict=True))
    numeric = [bool(rows) and all(is_number(row[index]) for row in rows) for index in range(len(headers))]
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(aligned).rstrip()

    lines = list(zip(*columns, strict=True))
    return "\n".join([line(lines[0]), line(["─" * width for width in widths]), *map(line, lines[1:])])


def shown(value: object) -> str:
    """A value as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def is_number(value: object) -> bool:
    """Whether a value is one that stands to the right in its column."""
    return isinstance(value, int | float) and not isinstance(value, bool)
