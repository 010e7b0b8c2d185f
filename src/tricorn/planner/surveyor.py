"""The process that measures: it loads the job, forks what is to be timed, and computes nothing itself.

``python -m tricorn.planner.surveyor FD`` serves the planner at the other end of the descriptor.
"""

from __future__ import annotations

import signal
import socket
import sys
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec
import psutil

from tricorn.control import messages as m
from tricorn.engine.forkserver import die_with_parent, receive
from tricorn.errors import JobFailed, PeerLost, TricornError, UsageError, UserCodeError, in_words, users_line
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.planner.links import Links
from tricorn.planner.orders import (
    Exchange,
    Exchanged,
    HostMeasured,
    JobMeasured,
    Judge,
    Judged,
    LinksMeasured,
    Listening,
    Load,
    Loaded,
    MeasureHost,
    MeasureJob,
    MeasureLinks,
    Meet,
    Part,
    Parted,
    Told,
    ToSurveyor,
)
from tricorn.state import cores, memory


class Surveyor:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decode = m.Decoder(ToSurveyor)
        self._job: Job
        self._name = ""

    def serve(self) -> None:
        """Until the planner hangs up."""
        with suppress(PeerLost, ConnectionError):
            while True:
                order = receive(self._sock, self._decode)
                try:
                    self._say(self._obey(order))
                except TricornError as error:
                    self._say(m.failed(error))
                except (Exception, SystemExit) as error:
                    self._say(m.failed(_mistake(error)))

    def _obey(self, order: object) -> m.Message:
        match order:
            case Load():
                return self._load(order)
            case MeasureJob():
                from tricorn.planner.profiler import profile

                return JobMeasured(profile=profile(self._job, self._name, order.cores, self._tell))
            case MeasureLinks():
                return LinksMeasured(links=_swept(order.cores, self._tell))
            case MeasureHost():
                return _host(self._job, order.samples)
            case Exchange():
                return self._exchange(order)
            case Judge():
                return Judged(why_not=_judged(self._job, order.plans))
        raise AssertionError(order)

    def _load(self, order: Load) -> Loaded:
        from tricorn.engine.loading import load

        try:
            self._job = load(order.file, order.name, order.pickle_fd)
        except TricornError:
            raise
        except (Exception, SystemExit) as error:
            raise UsageError(
                f"the job cannot be loaded: {type(error).__name__}: {error}",
                remedy="Mend that line; `python FILE` shows the whole trace.",
                where=users_line(error),
            ) from None
        self._name = Path(order.file).stem if order.file else getattr(self._job.model, "__name__", "job").strip("<>")
        return Loaded(sources=_own_files() if order.file else [])

    def _exchange(self, order: Exchange) -> Parted:
        from tricorn.planner.sweep import exchanging

        with exchanging(order) as (address, begin):
            self._say(Listening(address=address))
            meet = receive(self._sock, self._decode)
            assert isinstance(meet, Meet)
            self._say(Exchanged(curves=begin(meet.addresses)))
            assert isinstance(receive(self._sock, self._decode), Part)  # nobody is left while another still exchanges
        return Parted()

    def _tell(self, text: str) -> None:
        self._say(Told(text=text))

    def _say(self, message: m.Message) -> None:
        self._sock.sendall(m.encode(message))


def _swept(cores: int, told: Callable[[str], None]) -> Links:
    """In a fork, so that a job measured afterwards does not have what the sweep imports and compiles."""
    from tricorn.planner.crew import Line, crew
    from tricorn.planner.sweep import sweep

    def measure(line: Line) -> None:
        line.say({"links": msgspec.to_builtins(sweep(cores, lambda text: line.say({"told": text})))})

    with crew([measure]) as (line,):
        while "told" in (said := line.hear()):
            told(said["told"])
    return msgspec.convert(said["links"], Links)


def _host(job: Job, samples: int) -> HostMeasured:
    """What this machine is like, for such a job."""
    from tricorn.planner.computing import on_average
    from tricorn.planner.crew import crew

    with crew([partial(on_average, job, samples)]) as (line,):
        seconds = line.hear()
    room = memory.limit_bytes() or psutil.virtual_memory().total
    return HostMeasured(cores=cores.share(), memory=room, seconds=seconds)


def _judged(job: Job, plans: Sequence[Plan]) -> list[str | None]:
    """Asked in a fork, for building models may leave anything behind."""
    from tricorn.planner.crew import Line, crew

    def ask(line: Line) -> None:
        line.say([why_not(job, plan) for plan in plans])

    with crew([ask]) as (line,):
        found = line.hear()
    return [None if reason is None else str(reason) for reason in found]


def why_not(job: Job, plan: Plan) -> str | None:
    """What the plan's strategy says of it; a strategy that cannot even look at the job has a reason, too."""
    from tricorn import strategy

    try:
        return strategy.find(plan).why_not(job, plan)
    except TricornError as error:
        return f"{error}; {error.remedy}" if error.remedy else str(error)
    except Exception as error:
        return f"it cannot look at the model: {type(error).__name__}: {error}"


def _own_files() -> list[str]:
    """The files of all modules that are neither Tricorn's nor installed."""
    libraries = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    own = (str(Path(__file__).parents[1]), *libraries)
    files = {getattr(module, "__file__", None) or "" for module in [*sys.modules.values()]}
    return sorted(file for file in files if file.endswith(".py") and not file.startswith(own))


def _mistake(error: BaseException) -> TricornError:
    said = in_words(error)
    where = users_line(error)
    if where or hasattr(error, "__notes__"):
        return UserCodeError(said, remedy="Mend that line; `python FILE` shows the whole trace.", where=where)
    return JobFailed(f"the job cannot be measured: {said}", remedy="Name a plan by --strategy, which needs no figures.")


def main() -> None:
    """Serve the planner at the other end of the descriptor that the command names."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the planner, which hangs up
    sock = socket.socket(fileno=int(sys.argv[1]))
    import torch

    torch.set_num_threads(1)  # no pool of threads may exist before a fork
    memory.keep_freed()
    Surveyor(sock).serve()


if __name__ == "__main__":
    main()
