"""Where a server's parameters lie in memory that workers of its host can read."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tricorn.comm import segment
from tricorn.errors import ProtocolError
from tricorn.ps.sparse import reader


class Places(msgspec.Struct, frozen=True, kw_only=True):
    """What a server tells a worker before it answers the first PULL or ROWS with flag IN_PLACE."""

    weights: segment.Ticket
    tables: tuple[reader.Ticket, ...]


class Memory:
    """Fulfils ``transport.InPlace`` once attached."""

    def __init__(self) -> None:
        self._dense: segment.Segment | None = None
        self._tables: list[reader.RowReader] = []

    def attach(self, document: bytes | bytearray) -> None:
        """Raises PeerLost when the server is gone, ProtocolError."""
        try:
            places = msgspec.json.decode(document, type=Places)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"places that cannot be read: {error}") from None
        self.close()
        self._dense = segment.Segment.attach(places.weights)
        self._tables = [reader.RowReader(ticket) for ticket in places.tables]

    @property
    def weights(self) -> memoryview:
        if self._dense is None:
            raise ProtocolError("the server has not said where its parameters lie")
        return self._dense.memory

    def gather(self, table: int, ids_U: NDArray[np.int64], out_UD: Tensor) -> None:
        self._tables[table].gather(ids_U, out_UD.numpy())

    def close(self) -> None:
        if self._dense:
            self._dense.close()
        for table in self._tables:
            table.close()
