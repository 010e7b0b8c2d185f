"""Shards that are threads of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comm.ranks import Ranks

from tricorn.comm.group import Group


class Shards(Ranks):
    """So many ranks of one host, of which none waits for one that has failed."""

    def __init__(self, size: int) -> None:
        super().__init__([0] * size, "tensor")

    def each(self, function: Callable[[Group], Any]) -> list[Any]:
        """What the function returns for each rank, all called at once; raises the first of their errors."""

        def run(group: Group) -> Any:
            try:
                return function(group)
            except BaseException:
                group.interrupt()
                raise

        futures = self.start(run)
        errors = [error for future in futures if (error := future.exception(60)) is not None]
        for error in sorted(errors, key=lambda each: type(each).__name__ == "PeerLost"):
            raise error
        return [future.result() for future in futures]


@pytest.fixture(scope="package")
def shards() -> Iterator[Callable[[int], Shards]]:
    """The ranks of a group of 2, 3 or 4, the same in all tests, with every thread of theirs running."""
    made = {size: Shards(size) for size in (2, 3, 4)}
    for size, each in made.items():
        each.each(lambda group, size=size: group.all_gather(torch.zeros(size), range(size + 1)).wait())
    yield made.__getitem__
    for each in made.values():
        each.close()
