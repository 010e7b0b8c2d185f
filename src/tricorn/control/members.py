"""Who is in the run: roles, their incarnations, whether they are heard from, and what they reported."""

from __future__ import annotations

from dataclasses import dataclass, field

from tricorn.control.messages import Ready


@dataclass
class Member:
    """One role and its present life."""

    role: str
    incarnation: int = 0
    alive: bool = False  # the launcher runs a process for it
    connected: bool = False
    killed: bool = False  # suspected, and the launcher was told to end it
    finished: bool = False
    heard: float = 0.0  # when it was last heard from
    ready: Ready | None = None
    stillborn: int = 0  # lives in a row that ended before they were ready
    bytes_sent: int = 0
    peak_bytes: int = 0


@dataclass
class Members:
    """All roles of the plan. Bytes of dead incarnations are kept, so that the sum is of the whole run."""

    roles: dict[str, Member] = field(default_factory=dict)
    bytes_of_the_dead: int = 0

    @classmethod
    def of(cls, workers: int, servers: int) -> Members:
        names = [f"server-{i}" for i in range(servers)] + [f"worker-{i}" for i in range(workers)]
        return cls({name: Member(name) for name in names})

    def current(self, role: str, incarnation: int) -> Member | None:
        """The member, if this is its present life; None for a stranger or a zombie."""
        member = self.roles.get(role)
        return member if member and member.alive and member.incarnation == incarnation else None

    def begin_life(self, role: str, incarnation: int, now: float) -> None:
        old = self.roles[role]
        self.bytes_of_the_dead += old.bytes_sent
        self.roles[role] = Member(
            role, incarnation, alive=True, heard=now, stillborn=old.stillborn, peak_bytes=old.peak_bytes
        )

    def workers(self) -> list[Member]:
        return [m for m in self.roles.values() if m.role.startswith("worker-")]

    def servers(self) -> list[Member]:
        return [m for m in self.roles.values() if m.role.startswith("server-")]

    def all_ready(self, epoch: int) -> dict[str, Ready] | None:
        """What each role reported for this membership epoch, once all have."""
        reports = {m.role: m.ready for m in self.roles.values() if m.alive and m.ready and m.ready.epoch == epoch}
        return reports if len(reports) == len(self.roles) else None

    def peak_bytes(self) -> dict[str, int]:
        """The most memory of each role, over all its lives."""
        return {member.role: member.peak_bytes for member in self.roles.values()}

    def bytes_sent(self) -> int:
        return self.bytes_of_the_dead + sum(m.bytes_sent for m in self.roles.values())
