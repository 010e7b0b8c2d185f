"""What a plan is expected to cost."""

from __future__ import annotations

from typing import Any

import msgspec

from tricorn.plan import Plan

NINE_OF_TEN = 1.645 / 0.674  # how much wider than half the middle half, where errors are normally distributed
COMPUTE, UPDATE, DATA, EXCHANGE, WIRE, IDLE = "compute", "update", "data", "exchange", "wire", "waiting"


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """Of one plan. Seconds are of one update of the model, from one batch.

    ``terms`` add up to ``seconds``: ``compute`` (forward and backward), ``update`` (of the optimizer), ``data`` (making
    batches), ``exchange`` (what processors do to exchange), ``wire`` (links between hosts), ``waiting`` (for others).
    ``low`` and ``high``, which nine of ten runs should be between, come from the scatter of what was measured.
    ``score`` is what plans are ranked by: seconds, times ``penalty`` for updates that are worth less than those of one
    process, over what of the time failures are expected to leave, of which ``lost`` is the share that they take.
    """

    plan: Plan
    terms: dict[str, float]
    scatter: float  # relative, of the whole
    penalty: float = 1.0
    lost: float = 0.0
    memory: dict[str, int] = {}  # role -> peak bytes
    sent: float = 0.0  # bytes between roles in a step
    links: dict[str, float] = {}  # the host whose link has most to carry -> bytes in a step, in its busier direction
    notes: tuple[str, ...] = ()  # where it goes beyond what was measured

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())

    @property
    def low(self) -> float:
        return self.seconds / (1 + NINE_OF_TEN * self.scatter)

    @property
    def high(self) -> float:
        return self.seconds * (1 + NINE_OF_TEN * self.scatter)

    @property
    def score(self) -> float:
        return self.seconds * self.penalty / (1 - self.lost) if self.lost < 1 else float("inf")

    @property
    def limit(self) -> str:
        """The term that is the largest part."""
        return max(self.terms, key=lambda term: self.terms[term])

    @property
    def fullest(self) -> tuple[str, int]:
        """The role that needs the most memory, and how much."""
        return max(self.memory.items(), key=lambda item: item[1], default=("", 0))

    def as_dict(self) -> dict[str, Any]:
        """All fields, and what follows from them, as plain values."""
        derived = ("seconds", "low", "high", "score", "limit")
        return {**msgspec.to_builtins(self), **{name: getattr(self, name) for name in derived}}


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A plan that is out of the question, and why."""

    plan: Plan
    reason: str
