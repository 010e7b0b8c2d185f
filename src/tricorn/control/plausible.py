"""What a role may say at all: whoever speaks of steps that the run does not have is cut off before it is believed."""

from __future__ import annotations

from collections.abc import Iterator

from tricorn.control import messages as m
from tricorn.errors import ProtocolError


def refuse_nonsense(role: str, message: m.Report, *, synchronous: bool, total_steps: int) -> None:
    """Raises ProtocolError for a report that no role of such a run makes, whatever the run's state is."""
    if any(step > total_steps for step in _bounds(message, synchronous)):
        raise ProtocolError(f"{role} speaks of steps beyond the {total_steps} of the run")
    kind = role.partition("-")[0]
    match message:
        case m.Committed():
            allowed = synchronous and role == "worker-0" and len(message.losses) <= message.upto
        case m.Want():
            allowed = not synchronous and kind == "worker"
        case m.Trained():
            allowed = not synchronous and kind == "worker" and len(message.losses) == len(message.steps)
        case m.Applied():
            allowed = kind == "server"
        case m.Saved():
            allowed = synchronous or kind == "server"
        case _:
            allowed = True
    if not allowed:
        raise ProtocolError(f"{role} may not say {type(message).__name__}")


def _bounds(message: m.Report, synchronous: bool) -> Iterator[int]:
    """How many steps the run must have for the message to make sense: each number is one such bound."""
    match message:
        case m.Committed():
            yield message.upto
        case m.Saved() | m.Evaluated() | m.Measured():
            yield message.step
        case m.Trained() | m.Applied():
            yield from (step + 1 for step in message.steps)
        case m.Ready():
            yield from (stop for _, stop in message.applied)
            yield from (share.step for share in message.evaluated)
            if synchronous:  # of an asynchronous run it is a number of a history, only ever compared
                yield from message.held
