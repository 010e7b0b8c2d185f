"""What roles, launcher and coordinator say to each other: small typed values, never tensors, never pickles.

Every message is a msgpack map with a ``type``; unknown fields, wrong types and impossible numbers are refused, and a
frame longer than ``MAX_FRAME`` is not read.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any

import msgspec

from tricorn import errors
from tricorn.errors import ProtocolError, TricornError

MAX_FRAME = 1 << 20
HEADER = struct.Struct("!I")
MAX_TEXT = 8000  # characters of one text of an error
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
Text = Annotated[str, msgspec.Meta(max_length=2 * MAX_TEXT)]
Address = tuple[Annotated[str, msgspec.Meta(max_length=255)], Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]]
# A key of a line of metrics.jsonl beside those that the coordinator writes itself.
MetricName = Annotated[
    str, msgspec.Meta(pattern=r"^(?!(step|loss|evaluation|event|membership|role|time)\Z)[a-z][a-z0-9_]{0,31}\Z")
]
ValueName = Annotated[str, msgspec.Meta(max_length=64)]
ShardName = Annotated[str, msgspec.Meta(pattern=r"^[a-z]+-[0-9]+\.safetensors\Z")]  # never a path


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    pass


class File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A written shard, as a manifest records it."""

    name: ShardName
    bytes: Count
    sha256: str


# From a worker or server.


class Evaluated(Message, frozen=True, kw_only=True):
    """A share of one evaluation: name -> (sum, weight)."""

    epoch: Count
    step: Count
    samples: Count
    sums: dict[str, tuple[float, float]]


class Ready(Message, frozen=True, kw_only=True):
    """I have stopped and wait for ``epoch`` to begin.

    ``held``: the steps I could go on from with my part. ``applied``: of a server of an asynchronous run, all steps
    that its part holds. ``evaluated``: my shares of the last evaluations, should they have been lost on the way.
    """

    epoch: Count
    part: str | None
    held: list[Count]
    address: Address
    applied: list[tuple[Count, Count]] = []
    evaluated: list[Evaluated] = []


class Heartbeat(Message, frozen=True, kw_only=True):
    """``peak_bytes``: the most memory that the role has had in this life."""

    bytes_sent: Count
    peak_bytes: Count = 0


class Committed(Message, frozen=True, kw_only=True):
    """The lead worker of a synchronous run: all steps below ``upto`` are in the model. ``losses``: of the last ones."""

    epoch: Count
    upto: Count
    losses: list[float]


class Want(Message, frozen=True, kw_only=True):
    """A leased worker can take that many steps more."""

    epoch: Count
    steps: Count


class Applied(Message, frozen=True, kw_only=True):
    """A server of an asynchronous run has applied these steps."""

    epoch: Count
    steps: list[Count]


class Trained(Message, frozen=True, kw_only=True):
    """What a leased worker has trained since it last said so: steps, and the mean loss of each."""

    epoch: Count
    steps: list[Count]
    losses: list[float]


class Saved(Message, frozen=True, kw_only=True):
    """My part of the checkpoint of ``step`` is durable."""

    epoch: Count
    step: Count
    files: list[File]


class Measured(Message, frozen=True, kw_only=True):
    """What a role measured at a step, worth a line ``{"step": step, what: values}`` of the run's metrics."""

    epoch: Count
    step: Count
    what: MetricName
    values: Annotated[dict[ValueName, float], msgspec.Meta(max_length=256)]


class Broken(Message, frozen=True, kw_only=True):
    """I lost a peer in this membership epoch."""

    epoch: Count
    reason: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]


class Failed(Message, frozen=True, kw_only=True):
    """The run cannot go on: an error of the user's code or data, or of the machine."""

    kind: Text
    message: Text
    remedy: Text
    where: Text
    trace: Text


class Finished(Message, frozen=True, kw_only=True):
    """I have nothing left to do; ``stopped`` if because somebody wished to stop."""

    epoch: Count
    stopped: bool
    bytes_sent: Count


# To a worker or server.


class Regroup(Message, frozen=True, kw_only=True):
    """Stop what you do and report Ready for this membership epoch."""

    epoch: int


class Begin(Message, frozen=True, kw_only=True):
    """All are ready: go on from ``step``.

    ``source`` is initial, keep, peer or checkpoint (in the folder ``checkpoint``). With peer, ``peers`` says of each
    part that somebody lacks the rank of a worker that has it; all other parts are kept.
    ``generation`` numbers the lines of history of an asynchronous run; ``applied`` are the steps its state holds.
    ``evaluate``: the model of this step has still to be evaluated; ``saved``: the step of the newest checkpoint.
    """

    epoch: int
    workers: list[Address]
    servers: list[Address]
    step: int
    source: str
    peers: dict[str, int]
    checkpoint: str | None
    generation: int
    applied: list[tuple[int, int]]
    evaluate: bool
    saved: int


class Wish(Message, frozen=True, kw_only=True):
    """To the lead worker: have all do this after the next step."""

    checkpoint: bool
    stop: bool


class Lease(Message, frozen=True, kw_only=True):
    """To a leased worker: train on these steps, each once."""

    epoch: int
    steps: list[int]


class Evaluate(Message, frozen=True, kw_only=True):
    """To a leased worker: judge the evaluation samples [start, stop) with the newest weights."""

    epoch: int
    step: int
    start: int
    stop: int


class Save(Message, frozen=True, kw_only=True):
    """To a role of an asynchronous run that stands still: save your part."""

    epoch: int
    step: int


class Shutdown(Message, frozen=True, kw_only=True):
    pass


# Between launcher and coordinator.


class Alive(Message, frozen=True, kw_only=True):
    """The launcher's first word: which incarnation of which role it runs, and the last of those that are dead."""

    roles: dict[str, int]
    dead: dict[str, int]


class Exited(Message, frozen=True, kw_only=True):
    role: str
    incarnation: int
    reason: str


class Stop(Message, frozen=True, kw_only=True):
    """Somebody interrupts the run: save and end."""


class Start(Message, frozen=True, kw_only=True):
    role: str
    incarnation: int


class Kill(Message, frozen=True, kw_only=True):
    role: str
    incarnation: int


class Progress(Message, frozen=True, kw_only=True):
    """``measured``: what a step took so far, by term (report/compare.py), in ``measured_steps`` of each worker."""

    step: int
    loss: float
    samples_per_second: float
    measured: dict[str, float] = {}
    measured_steps: float = 0.0


class Evaluation(Message, frozen=True, kw_only=True):
    step: int
    values: dict[str, float]


class Pulse(Message, frozen=True, kw_only=True):
    """The coordinator's heart beats."""


class Notice(Message, frozen=True, kw_only=True):
    text: str


class Ended(Message, frozen=True, kw_only=True):
    """The run is over: ``outcome`` is done, stopped or failed, with the error that failed it."""

    outcome: str
    error: Failed | None
    summary: dict[str, Any]


Report = (
    Ready | Heartbeat | Committed | Want | Applied | Trained | Evaluated | Saved | Measured | Broken | Failed | Finished
)
Order = Regroup | Begin | Wish | Lease | Evaluate | Save | Shutdown
FromLauncher = Alive | Exited | Stop
ToLauncher = Start | Kill | Pulse | Progress | Evaluation | Notice | Ended


def failed(error: Exception, trace: str = "") -> Failed:
    """An error as a message; of texts that are too long, their beginning, and of the trace its end."""
    return Failed(
        kind=type(error).__name__,
        message=_sendable(str(error)[:MAX_TEXT]),
        remedy=_sendable(getattr(error, "remedy", "")[:MAX_TEXT]),
        where=_sendable(getattr(error, "where", "")[:MAX_TEXT]),
        trace=_sendable(trace[-MAX_TEXT:]),
    )


def raised(failed: Failed, otherwise: type[TricornError]) -> TricornError:
    """The error that the message tells of; ``otherwise`` if its kind is unknown, or made of more than a message."""
    kind: Any = getattr(errors, failed.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, TricornError) and kind.__init__ is TricornError.__init__):
        kind = otherwise
    error: TricornError = kind(failed.message, remedy=failed.remedy or None, where=failed.where)
    return error


def _sendable(text: str) -> str:
    """Without what UTF-8 cannot say: a name of a file may hold lone surrogates."""
    return text.encode(errors="replace").decode()


_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """The whole frame: length, then msgpack."""
    payload = _encoder.encode(message)
    if len(payload) > MAX_FRAME:
        raise ProtocolError(f"a {type(message).__name__} of {len(payload)} bytes is over the limit of {MAX_FRAME}")
    return HEADER.pack(len(payload)) + payload


def length(header: bytes | bytearray) -> int:
    """The length of the payload that follows; raises ProtocolError before anything of it is read."""
    (count,) = HEADER.unpack(header)
    if count > MAX_FRAME:
        raise ProtocolError(f"a frame of {count} bytes is over the limit of {MAX_FRAME}")
    return int(count)


class Decoder:
    """Reads payloads of the expected union of messages and of nothing else."""

    def __init__(self, expected: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(expected)

    def __call__(self, payload: bytes) -> Any:
        try:
            return self._decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"a message that cannot be read: {error}") from None
