"""What the launcher asks of an engine, and what a role is started with."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import msgspec

from tricorn.control.facts import Facts
from tricorn.control.ledger import Order
from tricorn.control.messages import Address
from tricorn.plan import Plan


class JobFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher and the coordinator know of a job; goes into ``job.json``."""

    name: str
    file: str | None  # the job file and the job's name in it, None for a job that came from Python
    entry: str
    fingerprint: str
    samples: int
    evaluation_samples: int
    batch_size: int
    epochs: int
    seed: int
    precision: str
    device: str
    optimizer: dict[str, Any]
    metrics: list[str]

    @property
    def order(self) -> Order:
        return Order(
            seed=self.seed, fingerprint=self.fingerprint, samples=self.samples, batch_size=self.batch_size,
            epochs=self.epochs,
        )  # fmt: skip


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How patient a run is (seconds), and how often it saves."""

    checkpoint_seconds: float = 30.0
    checkpoint_steps: int = 0
    heartbeat_timeout: float = 10.0


class RoleSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a role needs besides the job."""

    role: str  # coordinator, worker-0, server-0, ...
    incarnation: int
    host: str = "127.0.0.1"  # where the role listens; the engine that starts it knows
    coordinator: Address
    secret: bytes
    launch: str  # tells this launch of the run from earlier ones
    folder: str  # the run's folder, which roles that save must reach
    threads: int | None = None  # of a worker; where the plan leaves it open, the engine that starts it knows
    plan: Plan
    job: JobFacts
    facts: Facts
    timing: Timing


class Gone(NamedTuple):
    """A role's process has ended."""

    role: str
    incarnation: int
    reason: str


class Engine(Protocol):
    """Starts roles and sees them end. Used by one thread."""

    @property
    def pids(self) -> dict[str, int]:
        """Of the roles that live on this machine."""

    def load(self, plan: Plan) -> tuple[JobFacts, Address]:
        """Make the job ready where roles will run; also where the coordinator will listen.

        Raises UsageError for a job that cannot be loaded, PlanError for a plan that cannot run it.
        """

    def start(self, spec: RoleSpec) -> None:
        """Start a role, with its ``host`` and ``threads`` filled in; its end is told by ``gone``."""

    def kill(self, role: str, incarnation: int) -> None:
        """End a role at once, whatever state it is in."""

    def gone(self) -> list[Gone]:
        """Which roles ended since the last call. Raises ClusterError if the engine itself is lost.

        Asked several times a second, so that an engine may tell by its clock that a machine does not answer.
        """

    def fileno(self) -> int:
        """Readable when ``gone`` may have news."""

    def rest(self, patience: float = 0.0) -> None:
        """Between two runs: wait so many seconds for all roles to end, then end them.

        Raises ClusterError if the engine itself is lost.
        """

    def close(self) -> None:
        """End all roles and wait until nothing is left of them."""
