"""A worker's client from one membership epoch to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tricorn.ps.client import Client


class Line:
    """``interrupt`` and ``bytes_sent`` are for any thread, the rest for the one that trains."""

    def __init__(self) -> None:
        self._client: Client | None = None
        self._sent_before = 0  # by the clients of earlier epochs

    @property
    def client(self) -> Client:
        assert self._client is not None, "join before anything else"
        return self._client

    @property
    def bytes_sent(self) -> int:
        client = self._client  # read once: another thread may ask while this one closes
        return self._sent_before + (client.bytes_sent if client else 0)

    def take(self, client: Client) -> Client:
        """From now on this client, not connected yet, so that ``interrupt`` ends its connecting too."""
        self.close()
        self._client = client
        return client

    def interrupt(self) -> None:
        if client := self._client:
            client.interrupt()

    def close(self) -> None:
        if client := self._client:
            self._sent_before += client.bytes_sent
            self._client = None
            client.close()
