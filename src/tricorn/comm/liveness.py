"""Whether the processes of this host that share a group are alive."""

from __future__ import annotations

import os
import select
import threading


class Liveness:
    """The processes, by rank. ``dead`` costs one system call; a frozen process is alive. For any thread."""

    def __init__(self, processes: dict[int, int]) -> None:
        self._ranks: dict[int, int] = {}  # by the descriptor of the process
        self._poll = select.poll()
        self._mutex = threading.Lock()  # poll refuses to be called by two threads at once
        self._gone: set[int] = set()
        for rank, process in processes.items():
            try:
                descriptor = os.pidfd_open(process)
            except ProcessLookupError:
                self._gone.add(rank)
                continue
            self._ranks[descriptor] = rank
            self._poll.register(descriptor, select.POLLIN)

    def dead(self, patience: int = 0) -> set[int]:
        """The ranks whose processes have ended, however that came about; the first is waited for so many ms."""
        with self._mutex:
            return self._gone | {self._ranks[descriptor] for descriptor, _ in self._poll.poll(patience)}

    def close(self) -> None:
        """Forget the processes. May be called again."""
        with self._mutex:
            for descriptor in self._ranks:
                self._poll.unregister(descriptor)
                os.close(descriptor)
            self._ranks.clear()
