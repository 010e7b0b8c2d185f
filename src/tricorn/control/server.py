"""The coordinator's process: an asyncio server around the state machine, the ledger and the run's folder."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import time
from collections.abc import Iterable
from typing import Literal

import msgspec

from tricorn.comm import auth
from tricorn.control import messages as m
from tricorn.control.facts import Facts
from tricorn.control.instructions import (
    BeginEpoch,
    Checkpoint,
    Commit,
    End,
    Instruction,
    Measured,
    Note,
    Publish,
    Send,
    Tell,
    Trace,
)  # fmt: skip
from tricorn.control.plausible import refuse_nonsense
from tricorn.control.record import Record
from tricorn.control.state import Coordinator
from tricorn.errors import AuthenticationError, CheckpointDamaged, ProtocolError, StorageError

TICK_SECONDS = 0.1
MAX_STRANGERS = 64  # connections that have not yet proved the secret
HANDSHAKE_SECONDS = 5.0
_CALLERS_FAULT = (AuthenticationError, ProtocolError, OSError, EOFError, TimeoutError)


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who a caller proves to be: a role in one of its lives, or the launcher, which has only one."""

    channel: Literal["control"]
    role: str
    incarnation: int = 0


class CoordinatorServer:
    """Serves one run until it has ended and the launcher has been told.

    A caller that cannot prove the secret, or sends what is malformed, too long or senseless, is cut off; nothing else
    happens.
    """

    def __init__(self, facts: Facts, record: Record, secret: bytes) -> None:
        self._synchronous = facts.synchronous
        self._steps = facts.total_steps
        self._record = record
        self._secret = secret
        self._state = Coordinator(
            facts,
            epoch=record.ledger.membership,
            committed=record.ledger.committed(),
            evaluated=set(record.ledger.evaluations()),
            saved=record.saved(),
            newest_checkpoint=self._newest_checkpoint,
        )
        self._roles: dict[str, asyncio.StreamWriter] = {}
        self._launcher: asyncio.StreamWriter | None = None
        self._strangers: dict[asyncio.StreamWriter, None] = {}  # in order of arrival
        self._over: asyncio.Future[None]
        self._from_role = m.Decoder(m.Report)
        self._from_launcher = m.Decoder(m.FromLauncher)

    async def serve(self, listener: socket.socket) -> None:
        """Run until the end; returns once the launcher has hung up.

        An error that is nobody else's fault is raised: a coordinator that ends is replaced, one that hangs is not.
        """
        self._over = asyncio.get_running_loop().create_future()
        listener.setblocking(False)
        server = await asyncio.start_server(self._caller, sock=listener, limit=m.MAX_FRAME + m.HEADER.size)
        ticker = asyncio.create_task(self._tick())
        try:
            await self._over
        finally:
            ticker.cancel()
            server.close()
            for writer in [*self._roles.values(), *([self._launcher] if self._launcher else [])]:
                writer.close()

    def _end(self, mistake: Exception | None = None) -> None:
        if not self._over.done():
            self._over.set_exception(mistake) if mistake else self._over.set_result(None)

    async def _tick(self) -> None:
        try:
            while True:
                await asyncio.sleep(TICK_SECONDS)
                self._do(self._state.tick(time.monotonic()))
                _write(self._launcher, m.Pulse())
                try:
                    self._record.flush()
                except OSError as error:
                    self._do(self._state.storage_failed(self._unwritable(error)))
        except Exception as mistake:
            self._end(mistake)

    async def _caller(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task cancelled at the end of the run has nobody left to tell.
        with contextlib.closing(writer), contextlib.suppress(asyncio.CancelledError, *_CALLERS_FAULT):
            try:
                claim = await self._introduced(reader, writer)
                if claim.role != "launcher":
                    await self._serve_role(claim.role, claim.incarnation, reader, writer)
                elif self._launcher is None:
                    await self._serve_launcher(reader, writer)
            except _CALLERS_FAULT:
                raise
            except Exception as mistake:
                self._end(mistake)

    async def _introduced(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Claim:
        if len(self._strangers) >= MAX_STRANGERS:
            # A real role is admitted within a millisecond, so the oldest of many strangers is not one.
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()
        self._strangers[writer] = None
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                return await _handshake(reader, writer, self._secret)
        finally:
            self._strangers.pop(writer, None)

    async def _serve_launcher(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._launcher = writer
        try:
            while True:
                message = self._from_launcher(await _payload(reader))
                now = time.monotonic()
                match message:
                    case m.Alive():
                        self._do(self._state.launcher(message, now))
                    case m.Exited():
                        self._do(self._state.exited(message, now))
                    case m.Stop():
                        self._do(self._state.stop(now))
        except _CALLERS_FAULT:  # it has all it wanted, or is dead: then nothing may stay behind
            self._end()

    async def _serve_role(
        self, role: str, incarnation: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if not self._state.admits(role, incarnation):
            return
        if (previous := self._roles.get(role)) is not None:
            previous.close()
        self._roles[role] = writer
        self._do(self._state.connected(role, incarnation, time.monotonic()))
        try:
            while self._roles.get(role) is writer:
                message = self._from_role(await _payload(reader))
                refuse_nonsense(role, message, synchronous=self._synchronous, total_steps=self._steps)
                self._do(self._state.report(role, incarnation, message, time.monotonic()))
        finally:
            if self._roles.get(role) is writer:
                del self._roles[role]
                self._state.disconnected(role, incarnation)

    def _do(self, instructions: Iterable[Instruction]) -> None:
        try:
            for instruction in instructions:
                self._carry_out(instruction)
        except (OSError, sqlite3.Error) as error:
            self._do(self._state.storage_failed(self._unwritable(error)))

    def _carry_out(self, instruction: Instruction) -> None:
        record = self._record
        match instruction:
            case Send(role, message):
                _write(self._roles.get(role), message)
            case Tell(message):
                _write(self._launcher, message)
            case BeginEpoch(epoch, committed, event):
                record.begin(epoch, committed, event)
            case Commit(steps, epoch):
                record.ledger.commit(steps, epoch)
                if progress := record.progress(steps):
                    _write(self._launcher, progress)
            case Trace(step, loss):
                record.trace(step, loss)
            case Measured(step, values):
                record.measured(step, values)
            case Note(role, step, what, values):
                record.note(role, step, what, values)
            case Publish(step, files, applied):
                record.publish(step, files, applied)
            case End(outcome, error):
                try:
                    members = self._state.members
                    summary = record.finish(outcome, members.bytes_sent(), members.peak_bytes(), error)
                except (OSError, sqlite3.Error) as problem:
                    outcome, error, summary = "failed", error or self._unwritable(problem), {}
                _write(self._launcher, m.Ended(outcome=outcome, error=error, summary=summary))

    def _unwritable(self, error: Exception) -> m.Failed:
        return m.failed(StorageError(f"the run's folder {self._record.folder} cannot be written: {error}"))

    def _newest_checkpoint(self) -> Checkpoint | None:
        checkpoint, damages = self._record.newest_checkpoint()
        if checkpoint is None and damages:
            raise CheckpointDamaged(f"no checkpoint of the run can be read: {'; '.join(damages)}")
        for damage in damages:
            _write(self._launcher, m.Notice(text=f"a damaged checkpoint is passed over: {damage}"))
        return checkpoint


async def _handshake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes) -> Claim:
    steps = auth.answer(secret)
    wanted = next(steps)
    try:
        while True:
            if isinstance(wanted, int):
                wanted = steps.send(await reader.readexactly(wanted))
            else:
                writer.write(wanted)
                await writer.drain()
                wanted = next(steps)
    except StopIteration as done:
        try:
            return msgspec.convert(done.value, Claim)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"the caller's claim cannot be read: {error}") from None


async def _payload(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(m.length(await reader.readexactly(m.HEADER.size)))


def _write(writer: asyncio.StreamWriter | None, message: m.Message) -> None:
    if writer is not None and not writer.is_closing():
        writer.write(m.encode(message))


def serve(facts: Facts, record: Record, secret: bytes, listener: socket.socket) -> None:
    """The body of the coordinator's process."""
    with contextlib.closing(record):
        asyncio.run(CoordinatorServer(facts, record, secret).serve(listener))
