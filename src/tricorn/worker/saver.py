"""Saving beside the training: pieces are copies already, so a thread writes them while steps go on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from tricorn.control import messages as m
from tricorn.control.checkpoints import folder_of
from tricorn.errors import StorageError
from tricorn.state.shards import Piece, write_shard


class Saver:
    """Writes this role's shard of each checkpoint and reports it, in order, by a thread that lives while there is any.

    Any thread may call it. ``save`` never waits for the disk: a server's sockets and heartbeats depend on that.
    """

    def __init__(
        self, role: str, root: Path, send: Callable[[m.Report], None], fail: Callable[[Exception], None]
    ) -> None:
        self._role = role
        self._root = root
        self._send = send
        self._fail = fail
        self._lock = threading.Lock()
        self._queue: deque[tuple[int, int, Sequence[Piece]]] = deque()
        self._writing = False  # whether the thread will look into the queue again
        self._thread: threading.Thread | None = None

    def save(self, epoch: int, step: int, pieces: Sequence[Piece]) -> None:
        with self._lock:
            self._queue.append((epoch, step, pieces))
            if self._writing:
                return
            if self._thread is not None:
                self._thread.join()  # it has nothing left to do but end
            self._writing = True
            self._thread = threading.Thread(target=self._write_all, name="saver")
            self._thread.start()

    def wait(self) -> None:
        """Until all that was begun is durable, or is told of as failed, and the thread has ended."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _write_all(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._writing = False
                    return
                saving = self._queue.popleft()
            self._write(*saving)

    def _write(self, epoch: int, step: int, pieces: Sequence[Piece]) -> None:
        folder = folder_of(self._root, step)
        files = []
        try:
            if pieces:
                shard = write_shard(folder, f"{self._role}.safetensors", pieces)
                files.append(m.File(name=shard.name, bytes=shard.bytes, sha256=shard.sha256))
        except OSError as error:
            self._fail(StorageError(f"the checkpoint {folder} cannot be written: {error.strerror or error}"))
        except Exception as error:  # such as MemoryError: untold, the run would wait for this part for ever
            self._fail(error)
        else:
            self._send(m.Saved(epoch=epoch, step=step, files=files))
