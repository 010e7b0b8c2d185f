"""What a worker has of the servers' agreed steps: the weights of one version, and rows of it or of older ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tricorn.plan import Plan
    from tricorn.ps.client import Client, Reading
    from tricorn.ps.lookup import Ahead
    from tricorn.ps.rows import Wanted


class Versions:
    """``weights_N``, if any, are filled by ``pull``. ``version`` is the step that is next: all before it are decided.

    Where the plan lets rows be older than their step, those of the next are read while this one computes.
    """

    def __init__(self, plan: Plan, client: Client, weights_N: Tensor | None, version: int) -> None:
        self.version = version
        self.rates = (1.0, 1.0)  # clipping's and the schedule's, of the step decided last
        self._client = client
        self._weights_N = weights_N
        self._loose = plan.sparse_consistency in ("ssp", "asp")
        self._pulled = -1  # the version of the weights here
        self._reading: tuple[Ahead, Reading] | None = None  # rows that were asked for in the step before

    def decided(self, version: int, rates: tuple[float, float]) -> None:
        """The step before ``version`` is decided; the next pull has it applied where it is not yet."""
        self.version, self.rates = version, rates

    def pull(self, wanted: Sequence[Wanted] = ()) -> bool:
        """Have the weights of this version here, and the rows that are wanted; whether there was anything to do."""
        if self._pulled == self.version and not wanted:
            return False
        scale, factor = self.rates
        self._client.pull_version(self.version, self._weights_N, wanted, scale=scale, factor=factor)
        self._pulled = self.version
        return True

    def fetch(self, ahead: Ahead, following: Iterable[Ahead]) -> list[int] | None:
        """Have the weights and the rows of a step here, and ask for rows of the ``following`` if they may be older.

        Returns, by server, the versions that rows were read from, None if all are of this one.
        """
        if not self._loose:
            self.pull(ahead.wanted)
            return None
        asked, self._reading = self._reading, None
        self.pull()
        bases = []
        if asked and asked[0] is ahead:
            bases = asked[1].wait()
        elif ahead.wanted:
            bases = self._client.read_rows(ahead.wanted)
        for each in following:
            if each.wanted:
                self._reading = each, self._client.ask_rows(each.wanted, ahead=1)
        return bases or None


def foresees(plan: Plan) -> bool:
    """Whether rows of the next step may be read before this one is decided."""
    return plan.sparse_consistency == "asp" or (plan.sparse_consistency == "ssp" and plan.staleness > 0)
