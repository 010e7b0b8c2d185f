"""Embeddings that are trained by rows: only the rows of a batch's ids travel, and ids may be any whole number."""

from __future__ import annotations

from typing import Literal

import msgspec

from tricorn.fields import NamedStruct
from tricorn.optim import RowOptimizer

# An embedding that the job does not speak of is a table from here on, if rows and whole weights come to the same.
LARGE = 1 << 20  # elements


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=NamedStruct):
    """How the job trains the ``nn.Embedding`` or ``nn.EmbeddingBag`` of one name.

    A row begins as a function of the job's seed, the table's name and the id alone: ``std`` times a standard normal
    number in each place. So it does not matter which server makes it, or when, or in which strategy.

    ``optimizer``: None means the job's. A row is updated in the steps that have its id and left alone in the others,
    as ``torch.optim`` does for sparse gradients.

    ``admit``: a row comes into being at the ``admit``-th step that has its id; until then it keeps its first value.
    ``max_rows``: the most rows that the table keeps, over all servers; beyond, those go that were used least
    (``evict="rarest"``) or longest ago (``evict="oldest"``). ``ttl``: rows unused for that many steps go.
    """

    std: float = 1.0
    optimizer: RowOptimizer | None = None
    admit: int = 1
    max_rows: int | None = None
    ttl: int | None = None
    evict: Literal["oldest", "rarest"] = "oldest"

    @property
    def forgetful(self) -> bool:
        """Whether rows come and go by rules that only a server keeps."""
        return self.admit > 1 or self.max_rows is not None or self.ttl is not None

    def mistakes(self) -> list[tuple[str, str, str]]:
        """(field, given, what would do) for each impossible value."""
        found = []
        if not (isinstance(self.std, int | float) and 0 <= self.std < float("inf")):
            found.append(("std", repr(self.std), "give a number of at least 0"))
        if self.optimizer is not None:
            found += [(f"optimizer.{name}", given, do) for name, given, do in self.optimizer.mistakes()]
        for field in ("admit", "max_rows", "ttl"):
            value = getattr(self, field)
            if not (isinstance(value, int) and value >= 1) and (value is not None or field == "admit"):
                found.append((field, repr(value), "give a whole number of at least 1"))
        if self.evict not in ("oldest", "rarest"):
            found.append(("evict", repr(self.evict), "give oldest or rarest"))
        return found
