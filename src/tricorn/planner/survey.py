"""What the planner knows of a job and of this machine: from disk, or measured by a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import msgspec

from tricorn.control import messages as m
from tricorn.engine.forkserver import receive
from tricorn.engine.hosts import Place
from tricorn.engine.local import end, environment, pickled
from tricorn.errors import JobFailed, PeerLost, UsageError
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.planner import load, orders, store
from tricorn.planner.correct import Seen
from tricorn.planner.links import Links
from tricorn.planner.profile import Profile
from tricorn.planner.search import question
from tricorn.state import cores

M = TypeVar("M", bound=m.Message)
PATIENCE = 120.0  # seconds for one measurement on a host
END_SECONDS = 2.0


class Survey:
    """Of one job, given as itself or as (file, name), or of the machine alone. Use as a context manager.

    ``told`` hears what is being measured; with ``fresh`` nothing is taken from disk, and what was measured on a busy
    machine is measured again when it no longer is. A process is started only when something has to be measured, on the
    host at that ``place``, if one is given. Raises UsageError for a job that cannot be loaded, JobFailed for what
    cannot be measured.
    """

    def __init__(
        self,
        job: Job | tuple[str, str] | None,
        *,
        told: Callable[[str], None],
        fresh: bool = False,
        place: Place | None = None,
    ) -> None:
        self._job = job
        self._prefix = place.prefix if place else ()
        self._name = place.address if place else "the process that measures"
        self._told = told
        self._fresh = fresh
        self._pickle = pickled(job) if isinstance(job, Job) else None
        self._sock: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._sources: dict[str, str] | None = None  # once the job is loaded
        self.key = self._name_job()  # under which its profile is kept
        self._kept = None if fresh else store.load_profile(self.key)
        self.cores = cores.usable()

    def __enter__(self) -> Survey:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sock is not None:
            self._sock.close()  # at the end of the stream the surveyor ends
        if self._process is not None:
            end(self._process, END_SECONDS)
        if self._pickle is not None:
            self._pickle.close()

    def links(self) -> Links:
        """Of this machine."""
        kept = None if self._fresh else store.load_links()
        if kept is not None and self._good(kept.busy):
            return kept
        if self._job is not None and self._kept is None:
            self._load()  # first: its mistakes are told at once
        self._told("measuring this machine, which is done once")
        found = self._ask(orders.MeasureLinks(cores=self.cores), orders.LinksMeasured).links
        if kept is not None and kept.busy <= found.busy:
            return kept
        store.save_links(found)
        return found

    def profile(self) -> Profile:
        """Of the job on this machine."""
        kept = self._kept
        if kept is not None and (self._sources is not None or self._good(kept.profile.busy)):
            return kept.profile
        self._told("measuring the job")
        self._load()
        found = self._ask(orders.MeasureJob(cores=self.cores), orders.JobMeasured).profile
        if kept is None or found.busy < kept.profile.busy:
            kept = store.KeptProfile(found, self._sources or {}, kept.verdicts if kept else {})
            self._keep(kept)
        return kept.profile

    @property
    def seen(self) -> Seen:
        """What runs of the job have taught since it was measured."""
        return self._kept.seen if self._kept is not None else {}

    @property
    def verdicts(self) -> dict[str, str | None]:
        """What ``why_not`` has found of plans (by their ``question``), now and before."""
        return self._kept.verdicts if self._kept is not None else {}

    def known(self) -> Profile | None:
        """Of the job, if it was measured before and is still the same."""
        return self._kept.profile if self._kept is not None else None

    def why_not(self, plans: Sequence[Plan]) -> list[str | None]:
        """For each plan one sentence that says why it cannot run the job, None if it can."""
        self.profile()
        kept = self._kept
        assert kept is not None
        names = [question(plan) for plan in plans]
        missing = {name: plan for plan, name in zip(plans, names, strict=True) if name not in kept.verdicts}
        if missing:
            self._told(f"asking which of {len(missing)} plans can run the job")
            self._load()
            judged = self._ask(orders.Judge(plans=[*missing.values()]), orders.Judged).why_not
            found = dict(zip(missing, judged, strict=True))
            kept = msgspec.structs.replace(kept, verdicts=kept.verdicts | found)
            self._keep(kept)
        return [kept.verdicts[name] for name in names]

    def teach(self, seen: Seen) -> None:
        """Keep what was learned of the job beside its profile."""
        assert self._kept is not None
        self._keep(msgspec.structs.replace(self._kept, seen=seen))

    def _good(self, busy: float) -> bool:
        """Whether what was measured beside so much of others will do: it was little, or is no less now."""
        return busy <= load.BUSY or self._busy_now

    @cached_property
    def _busy_now(self) -> bool:
        return load.glance(self.cores) > load.BUSY

    def _keep(self, kept: store.KeptProfile) -> None:
        self._kept = kept
        store.save_profile(self.key, kept)

    def _name_job(self) -> str:
        if isinstance(self._job, tuple):
            return f"{Path(self._job[0]).resolve()}:{self._job[1]}"
        if self._pickle is None:
            return ""
        digest = blake2b(self._pickle.read(), digest_size=16).hexdigest()
        self._pickle.seek(0)
        return f"pickle {digest}"

    def _ask(self, order: m.Message, kind: type[M]) -> M:
        self.order(order)
        return self.answer(kind)

    def order(self, order: m.Message) -> None:
        """Tell the process that measures what to do; ``answer`` waits for what it says."""
        if self._sock is None:
            self._start()
        assert self._sock is not None
        with suppress(BrokenPipeError, ConnectionResetError):  # told by the next read
            self._sock.sendall(m.encode(order))

    def _start(self) -> None:
        self._sock, theirs = socket.socketpair()
        handed = [theirs.fileno(), *([self._pickle.fileno()] if self._pickle else [])]
        self._process = subprocess.Popen(
            [*self._prefix, sys.executable, "-m", "tricorn.planner.surveyor", str(theirs.fileno())],
            pass_fds=handed, env=environment(), stdin=subprocess.DEVNULL, stdout=2,
        )  # fmt: skip
        theirs.close()
        if self._prefix:  # the host may hang
            self._sock.settimeout(PATIENCE)

    def load(self) -> orders.Load:
        """What has the process load the job."""
        file, name = self._job if isinstance(self._job, tuple) else (None, "")
        return orders.Load(file=file, name=name, pickle_fd=self._pickle.fileno() if self._pickle else None)

    def _load(self) -> None:
        """Have the job loaded, once."""
        if self._sources is None:
            self._sources = store.digests(self._ask(self.load(), orders.Loaded).sources)

    def answer(self, kind: type[M]) -> M:
        """Of that kind. Raises what was raised, and JobFailed if nothing more will be said."""
        assert self._sock is not None
        decode = m.Decoder(orders.FromSurveyor)
        try:
            while isinstance(answer := receive(self._sock, decode), orders.Told):
                self._told(answer.text)
        except TimeoutError:
            raise JobFailed(
                f"{self._name} does not answer for {PATIENCE:.0f} s while it is measured",
                remedy="Leave that host out, or name a plan by its strategy, which needs no figures.",
            ) from None
        except (PeerLost, ConnectionError):
            raise JobFailed(
                "the process that measures the job is gone, perhaps for want of memory",
                remedy="Look above for what it printed, or name a plan by --strategy, which needs no figures.",
            ) from None
        if isinstance(answer, m.Failed):
            raise m.raised(answer, UsageError)
        assert isinstance(answer, kind)
        return answer
