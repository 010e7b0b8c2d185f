"""Which worker has which part of each embedding. Pure: every worker comes to the same answer by itself.

Legend: R rows of a table, D elements of each; W workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tricorn.plan import Embeddings
    from tricorn.state.runs import Runs


class Block(NamedTuple):
    """Rows [first, last) of a table, and of each of them the columns [left, right)."""

    first: int
    last: int
    left: int
    right: int

    @property
    def rows(self) -> int:
        return self.last - self.first

    @property
    def width(self) -> int:
        return self.right - self.left

    def runs(self, dim: int) -> Runs:
        """Its elements in the flattened table."""
        from tricorn.state.runs import Runs, tidy  # with PyTorch, which the planner does without

        return tidy(Runs(self.first * dim + self.left, self.width, dim, self.rows))


NOTHING = Block(0, 0, 0, 0)


def divide(shapes: Sequence[tuple[int, int]], how: Embeddings, workers: int) -> list[list[Block]]:
    """For each table, [R, D], the block of each worker.

    By rows or columns, blocks are equal to within one; whole tables go, the largest first, to whoever has least.
    """
    if how == "tables":
        return _whole(shapes, workers)
    found = []
    for rows, dim in shapes:
        edges = [(rows if how == "rows" else dim) * worker // workers for worker in range(workers + 1)]
        blocks = [Block(*span, 0, dim) if how == "rows" else Block(0, rows, *span) for span in pairwise(edges)]
        found.append([block if block.rows and block.width else NOTHING for block in blocks])
    return found


def _whole(shapes: Sequence[tuple[int, int]], workers: int) -> list[list[Block]]:
    found = [[NOTHING] * workers for _ in shapes]
    held = [0] * workers
    for table in sorted(range(len(shapes)), key=lambda table: -shapes[table][0] * shapes[table][1]):
        rows, dim = shapes[table]
        owner = held.index(min(held))
        held[owner] += rows * dim
        found[table][owner] = Block(0, rows, 0, dim)
    return found
