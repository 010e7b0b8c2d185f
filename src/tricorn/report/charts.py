"""Pictures of a report: inline SVG and plain HTML, drawn without a library. Pure; texts are escaped here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import chain, pairwise
from math import ceil, floor, log10
from typing import NamedTuple

from tricorn.report.table import is_number, shown

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 200, 62, 14, 14, 40
NEAR, SMALLEST, LARGEST = 1e-9, 1e-200, 1e200  # what floats can still tell apart, and add up
MOST = 240  # points along a line; of more, the mean of neighbours is drawn, and the range that they span

Point = tuple[float, float]


class Mark(NamedTuple):
    """Something that happened at ``x``; ``bad`` if nobody wished it."""

    x: float
    text: str
    bad: bool


class Bar(NamedTuple):
    """A bar of a group: ``kind`` is its class, which colours it."""

    kind: str
    value: float
    text: str


def line(points: Sequence[Point], *, x: str, y: str, marks: Sequence[Mark] = (), steps: bool = False) -> str:
    """One line over numbered axes named ``x`` and ``y``. Values too large to draw are left out.

    ``steps``: whether a value holds until the next, so that it is neither averaged nor joined to that by a slope.
    """
    points = [point for point in points if abs(point[1]) < LARGEST]
    if not points:
        return "<p>There is nothing to draw yet.</p>"
    thin = _thinned(points)
    xs = [point[0] for point in points] + [mark.x for mark in marks]
    across, up = _axis(min(xs), max(xs)), _axis(*_span([p[1] for p in points]))
    at = _scale(across, LEFT, WIDTH - RIGHT)
    above = _scale(up, HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y)} over {escape(x)}">']
    for value in up:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{above(value)}" y2="{above(value)}"/>')
        parts.append(f'<text class="up" x="{LEFT - 6}" y="{above(value)}">{shown(value)}</text>')
    for value in across:
        parts.append(f'<text class="across" x="{at(value)}" y="{HEIGHT - BOTTOM + 16}">{shown(value)}</text>')
    if len(thin) < len(points) and not steps:
        edge = [f"{at(t.x)},{above(t.high)}" for t in thin] + [f"{at(t.x)},{above(t.low)}" for t in reversed(thin)]
        parts.append(f'<polygon class="range" points="{" ".join(edge)}"/>')
    for mark in marks:
        parts.append(
            f'<line class="{"bad" if mark.bad else "mark"}" x1="{at(mark.x)}" x2="{at(mark.x)}" y1="{TOP}" '
            f'y2="{HEIGHT - BOTTOM}"><title>{escape(mark.text)}</title></line>'
        )
    drawn = _stairs([(t.x, t.last) for t in thin]) if steps else [(t.x, t.mean) for t in thin]
    parts.append(f'<polyline class="line" points="{" ".join(f"{at(a)},{above(b)}" for a, b in drawn)}"/>')
    if len(drawn) == 1:
        parts.append(f'<circle class="dot" cx="{at(drawn[0][0])}" cy="{above(drawn[0][1])}" r="3"/>')
    parts.append(f'<text class="across" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}">{escape(x)}</text></svg>')
    return f"<figure><figcaption>{escape(y)}</figcaption>{''.join(parts)}</figure>"


def bars(groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Groups of horizontal bars, all to one scale, each with what it says beside it."""
    most = max((bar.value for _, group in groups for bar in group), default=0.0) or 1.0
    parts = []
    for name, group in groups:
        drawn = "".join(
            f'<div class="bar {bar.kind}"><i style="width:{60 * max(0.0, bar.value) / most:.2f}%"></i>'
            f"<span>{escape(bar.text)}</span></div>"
            for bar in group
        )
        parts.append(f"<dt>{escape(name)}</dt><dd>{drawn}</dd>")
    return f'<dl class="bars">{"".join(parts)}</dl>'


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table without the columns that are empty. Numbers are shown as in the terminal; their columns stand right."""
    found = ((header, [row[place] for row in rows]) for place, header in enumerate(headers))
    columns = [_column(header, values) for header, values in found if any(map(shown, values))]
    head, *body = (f"<tr>{''.join(cells)}</tr>" for cells in zip(*columns, strict=True)) if columns else [""]
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'


def _column(header: str, values: Sequence[object]) -> list[str]:
    kind = " class=number" if any(map(is_number, values)) else ""
    return [f"<th{kind}>{escape(header)}</th>", *(f"<td{kind}>{escape(shown(value))}</td>" for value in values)]


class _Thin(NamedTuple):
    x: float
    low: float
    mean: float
    high: float
    last: float


def _thinned(points: Sequence[Point]) -> list[_Thin]:
    found = []
    size = -(-len(points) // MOST)
    for first in range(0, len(points), size):
        some = points[first : first + size]
        values = [value for _, value in some]
        mean = sum(values) / len(values)
        found.append(_Thin(some[-1][0], min(values), mean, max(values), values[-1]))
    return found


def _stairs(points: Sequence[Point]) -> list[Point]:
    """Each value as it is until the next."""
    corners = [(after[0], before[1]) for before, after in pairwise(points)]
    return [points[0], *chain.from_iterable(zip(corners, points[1:], strict=True))]


def _span(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    # From nothing where nothing is near: a fall from 2 to 0.01 is not one from 2 to the bottom.
    return (0.0 if 0 < low < high / 2 else low), high


def _axis(low: float, high: float) -> list[float]:
    """Round numbers, evenly spaced, the first at most ``low`` and the last at least ``high``."""
    width = max(high - low, NEAR * max(abs(low), abs(high))) if high > low else abs(high)
    width = width if width > SMALLEST else 1.0
    power = 10.0 ** floor(log10(width / 4))
    step = next(power * times for times in (1, 2, 2.5, 5, 10) if power * times * 5 >= width)
    first, last = floor(low / step), ceil(high / step)
    return [step * place for place in range(first, max(last, first + 1) + 1)]


def _scale(axis: Sequence[float], start: float, stop: float) -> Callable[[float], float]:
    low, high = axis[0], axis[-1]
    return lambda value: round(start + (stop - start) * (value - low) / (high - low), 1)
