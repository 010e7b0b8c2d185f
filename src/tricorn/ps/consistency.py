"""Who may do what when, without a socket or a tensor: synchronous steps (BSP) and clocks (SSP, ASP).

docs/consistency.md says what this comes to for who reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import Enum

from tricorn.errors import ProtocolError
from tricorn.plan import Consistency


class Verdict(Enum):
    """What becomes of a contribution."""

    TAKE = "take"
    WAIT = "wait"  # a repetition; its answer is due when the step is complete
    REPEAT = "repeat"  # a repetition; its answer is known


class Bsp:
    """One server's part in synchronous steps: ``version`` updates are applied, and the next one is collected.

    A step is *complete* here when every slot has contributed, *decided* when it is complete on all servers, which
    only the workers can know. It is applied by the first pull of the version after it: nobody pulls that before
    the step is decided, so no server is ever ahead of what another can still reach.

    Where workers make several steps by themselves, the first contribution says which step ends their round: it is at
    most ``reach`` - 1 after the version, and those before it have no update of their own.
    """

    def __init__(self, workers: int, version: int, reach: int = 1) -> None:
        self.version = version
        self.step = version  # that is collected
        self.complete = False
        self._reach = reach
        self._workers = workers
        self._contributed: set[int] = set()

    def judge(self, step: int, slot: int) -> Verdict:
        """What to do with the contribution of a slot; raises ProtocolError if the step is not the one at hand."""
        if step == self.version - 1 or (step == self.step and self.complete):
            return Verdict.REPEAT
        last = self.version + self._reach - 1
        if not self.version <= step <= last or (self._contributed and step != self.step):
            due = f"step {self.step}" if self._contributed or self._reach == 1 else f"steps {self.version} to {last}"
            raise ProtocolError(f"a contribution to step {step}, but this server collects {due}")
        return Verdict.WAIT if slot in self._contributed else Verdict.TAKE

    def contribute(self, step: int, slot: int) -> bool:
        """Take the contribution of a slot to a step that was judged so; returns whether the step is complete now."""
        self.step = step
        self._contributed.add(slot)
        self.complete = len(self._contributed) == self._workers
        return self.complete

    @property
    def missing(self) -> set[int]:
        """The slots that the step at hand waits for; none while nobody has contributed."""
        return {*range(self._workers)} - self._contributed if self._contributed else set()

    def pull(self, version: int) -> bool:
        """Whether the pull of that version has to apply the complete step first; raises ProtocolError if neither."""
        if version == self.version:
            return False
        if version != self.step + 1 or not self.complete:
            raise ProtocolError(f"a pull of version {version}, but this server has version {self.version}")
        return True

    def advance(self) -> None:
        """The complete step is applied."""
        self.version = self.step = self.step + 1
        self.complete = False
        self._contributed.clear()

    def steps(self) -> list[int]:
        """The steps that this server could go on from."""
        return [self.version, self.step + 1] if self.complete else [self.version]

    def begin(self, step: int, workers: int) -> None:
        """Go on from one of ``steps`` with another set of workers; a sum that does not lead there is dropped."""
        if step not in self.steps():
            raise ProtocolError(f"this server holds the steps {self.steps()}, not {step}")
        self._workers = workers
        if step == self.version:
            self.complete = False
            self._contributed.clear()


def row_bound(consistency: Consistency, staleness: int) -> int | None:
    """How many clocks old a value may be that is read; None is without bound."""
    return {"bsp": 0, "ssp": staleness, "asp": None}[consistency]


def histogram(ages: Mapping[int, int]) -> dict[str, float]:
    """How many gradients had which age, as metrics have it: single ages up to 15, then ranges that double."""
    found: dict[str, float] = {}
    for age, count in sorted(ages.items()):
        first = 1 << (age.bit_length() - 1) if age > 15 else age
        name = f"{first}-{2 * first - 1}" if age > 15 else str(age)
        found[name] = found.get(name, 0.0) + count
    return found


class Clocks:
    """How far each worker is, and who has to wait (SSP: Ho et al., NIPS 2013).

    A worker's clock counts its pushes. With a bound of s it may read while no working peer is more than s clocks
    behind it. Who waits for work, or has not begun, holds nobody up; whoever begins again takes the clock of the
    slowest.
    """

    def __init__(self) -> None:
        self.clocks: dict[int, int] = {}
        self.working: set[int] = set()
        self._at: Counter[int] = Counter()  # how many of those who work are at which clock

    def wake(self, worker: int) -> None:
        """The worker begins to work: it wants to read or has pushed."""
        if worker in self.working:
            return
        slowest = min(self._at) if self._at else min(self.clocks.values(), default=0)
        self.clocks[worker] = max(self.clocks.get(worker, 0), slowest)
        self.working.add(worker)
        self._at[self.clocks[worker]] += 1

    def push(self, worker: int) -> None:
        self.wake(worker)
        self._gone_from(self.clocks[worker])
        self.clocks[worker] += 1
        self._at[self.clocks[worker]] += 1

    def may_read(self, worker: int, bound: int | None, *, ahead: int = 0) -> bool:
        """Whether a worker that is awake may now read for the clock that it will have ``ahead`` pushes later.

        Raises ProtocolError if the bound would have it wait for its own pushes: it cannot push while it waits.
        """
        if ahead < 0 or (bound is not None and ahead > bound):
            raise ProtocolError(f"a read {ahead} clocks ahead, where {bound} are the most")
        if bound is None:
            return True
        return self.clocks[worker] + ahead - min(self._at) <= bound

    def idle(self, worker: int) -> None:
        """The worker waits for work."""
        if worker in self.working:
            self.working.discard(worker)
            self._gone_from(self.clocks[worker])

    def leave(self, worker: int) -> None:
        self.idle(worker)
        self.clocks.pop(worker, None)

    def _gone_from(self, clock: int) -> None:
        self._at[clock] -= 1
        if not self._at[clock]:
            del self._at[clock]
