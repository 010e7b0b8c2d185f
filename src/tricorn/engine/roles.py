"""The bodies of the roles: what a process does once it is a coordinator, a server or a worker."""

from __future__ import annotations

import contextlib
import socket
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from tricorn.control import messages as m
from tricorn.control.resume import rank_of
from tricorn.engine.base import RoleSpec
from tricorn.errors import TricornError, UserCodeError, in_words, users_line
from tricorn.worker.link import Link

if TYPE_CHECKING:
    from collections.abc import Callable

    from tricorn.job import Job
    from tricorn.state.shards import Piece
    from tricorn.worker.saver import Saver


def run_role(spec: RoleSpec, job: Job, listener: socket.socket) -> int:
    """Be the role until it is over; returns the exit code of its process."""
    if spec.role == "coordinator":
        return coordinate(spec, listener)
    listener.close()
    if spec.role.startswith("server-"):
        return serve(spec)
    return work(spec, job)


def coordinate(spec: RoleSpec, listener: socket.socket) -> int:
    from tricorn.control import server
    from tricorn.control.record import Record

    replaces = spec.incarnation > 1
    record = Record(Path(spec.folder), spec.job.order, spec.plan, spec.launch, replaces=replaces)
    server.serve(spec.facts, record, spec.secret, listener)
    return 0


def work(spec: RoleSpec, job: Job) -> int:
    import torch

    from tricorn import strategy
    from tricorn.comm.listener import PeerListener
    from tricorn.worker.batches import Batches
    from tricorn.worker.leased import LeasedLoop
    from tricorn.worker.loop import Orders
    from tricorn.worker.synchronous import SynchronousLoop

    torch.set_num_threads(spec.threads or 1)
    rank = rank_of(spec.role)
    listener = PeerListener(spec.secret, spec.host)
    orders = Orders(listener.announce)

    def measured(step: int, what: str, values: dict[str, float]) -> None:
        link.send(m.Measured(epoch=orders.epoch, step=step, what=what, values=values))

    link = _link(spec, orders.handle, orders.bytes_sent)
    link.open()
    try:
        context = strategy.Context(
            job=job, plan=spec.plan, rank=rank, incarnation=spec.incarnation, secret=spec.secret, listener=listener,
            measured=measured,
        )  # fmt: skip
        trainer = strategy.find(spec.plan).trainer(context)
        orders.trainer = trainer
        kind = SynchronousLoop if spec.plan.synchronous else LeasedLoop
        loop = kind(
            job=job, rank=rank, trainer=trainer, batches=Batches(job), link=link, orders=orders,
            saver=_saver(spec, link), total_steps=spec.facts.total_steps, steps_per_epoch=spec.facts.steps_per_epoch,
            checkpoint_steps=spec.timing.checkpoint_steps, address=listener.address,
        )  # fmt: skip
        loop.run()
        trainer.close()
    except (Exception, SystemExit) as error:
        return _failed(link, error)
    finally:
        listener.close()
    link.close()
    return 0


def serve(spec: RoleSpec) -> int:
    import torch

    from tricorn.ps import access
    from tricorn.ps.consistency import histogram
    from tricorn.ps.server import Server
    from tricorn.state import memory

    torch.set_num_threads(1)
    index = rank_of(spec.role)
    epoch = 0

    def snapshot(step: int, pieces: list[Piece]) -> None:
        if ages := server.staleness():
            link.send(m.Measured(epoch=epoch, step=step, what="staleness", values=histogram(ages)))
        saver.save(epoch, step, pieces)

    def applied(steps: list[int]) -> None:
        link.send(m.Applied(epoch=epoch, steps=steps))

    def handle(order: m.Order) -> None:
        nonlocal epoch
        match order:
            case m.Regroup():
                held = server.regroup()
                epoch = order.epoch
                applied = server.applied()
                part = f"server{index}"
                link.send(m.Ready(epoch=epoch, part=part, held=held, address=server.address, applied=applied))
            case m.Begin():
                source = "keep" if order.source == "peer" else order.source  # nobody has a server's part but itself
                server.begin(
                    epoch=order.epoch, step=order.step, source=source, workers=len(order.workers),
                    checkpoint=Path(order.checkpoint) if order.checkpoint else None,
                    generation=order.generation, applied=order.applied,
                )  # fmt: skip
            case m.Save():
                server.snapshot(order.step)
            case m.Shutdown():
                server.stop()

    # Rows are of the servers only, so those of this machine share all that it has for them.
    roles = spec.plan.workers + spec.plan.servers
    limit = memory.limit_bytes(among=-(-spec.plan.servers * memory.sharing() // roles))
    server = Server(spec.secret, spec.host, on_snapshot=snapshot, on_applied=applied, memory_limit=limit)
    link = _link(spec, handle, lambda: server.bytes_sent)
    saver = _saver(spec, link)
    link.open()
    reach = Path(spec.folder) / access.FOLDER / f"{spec.role}.json"
    try:
        with contextlib.suppress(OSError):  # it is for whoever looks
            access.write(reach, access.Access(servers={spec.role: server.address}, secret=spec.secret.hex()))
        server.serve_forever()
    except Exception as error:
        return _failed(link, error)
    finally:
        with contextlib.suppress(OSError):
            reach.unlink()
    saver.wait()
    link.close()
    return 0


def _link(spec: RoleSpec, handle: Callable[[m.Order], None], bytes_sent: Callable[[], int]) -> Link:
    return Link(
        spec.coordinator, spec.secret, role=spec.role, incarnation=spec.incarnation,
        beat_seconds=spec.timing.heartbeat_timeout / 5, handle=handle, bytes_sent=bytes_sent,
    )  # fmt: skip


def _saver(spec: RoleSpec, link: Link) -> Saver:
    from tricorn.worker.saver import Saver

    return Saver(spec.role, Path(spec.folder) / "checkpoints", link.send, lambda error: link.send(m.failed(error)))


def _failed(link: Link, error: BaseException) -> int:
    trace = traceback.format_exc()
    print(trace, flush=True)
    if not isinstance(error, TricornError):
        error = UserCodeError(in_words(error), where=users_line(error)).with_traceback(None)
    elif not error.where:
        error.where = users_line(error)  # the job's own line, where that is what failed
    link.send(m.failed(error, trace[-8000:]))
    link.close()
    return error.exit_code
