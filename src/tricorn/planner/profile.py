"""What a job needs of any machine, as it was measured on this one. A plain value: kept on disk, read by the costs.

Legend: N elements of all dense parameters; w workers that compute at once; b samples of one worker's share.
"""

from __future__ import annotations

from itertools import pairwise

import msgspec

from tricorn.planner.figures import Curve


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """A block of the model, as model parallel cuts it; times are of ``Profile.layer_samples`` samples, alone."""

    name: str
    forward: float  # seconds
    backward: float  # that the layer before it waits for
    weights: float  # seconds of backward that only its own parameters need
    elements: int  # of its trainable parameters
    output_bytes: int  # that it hands on
    kept_bytes: int  # that it keeps from forward to backward
    cut_after: bool  # whether a stage may end with it
    together: int = 1  # for how many microbatches of so many samples its weight gradients are computed at a time

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.weights


class Splitting(msgspec.Struct, frozen=True, kw_only=True):
    """What of the model tensor parallel workers share, and what they exchange for it."""

    shares: tuple[float, ...]  # of the trained elements of each layer; of the whole model where there are no layers
    sums: tuple[float, ...]  # bytes of a sample of each value that is summed over the workers, forward or backward
    gathers: tuple[float, ...]  # of each that is gathered
    steps: Curve | None = None  # seconds of a step of two workers of this machine, by samples; None: not measured


class TableUse(msgspec.Struct, frozen=True, kw_only=True):
    """A table that is trained by rows."""

    name: str
    rows: int
    dim: int
    unique: tuple[tuple[int, float], ...]  # (samples, how many different ids they have), ascending
    where: tuple[float, ...] = ()  # the shares of a batch's different ids in equal ranges of rows; else evenly spread

    def ids(self, samples: float) -> float:
        """Different ids in so many samples: between measured ones on a straight line, beyond them like its last."""
        points = [(0, 0.0), *self.unique]
        for (low, fewer), (high, more) in pairwise(points):
            if samples <= high or (high, more) == points[-1]:
                return min(self.rows, fewer + (more - fewer) * (samples - low) / (high - low))
        return 0.0

    def within(self, first: int, last: int) -> float:
        """The share of a batch's different ids that are of rows [first, last)."""
        size, shares = self.rows / max(1, len(self.where)), self.where or (1.0,)
        parts = (max(0.0, min(last, (number + 1) * size) - max(first, number * size)) for number in range(len(shares)))
        return sum(share * part / size for share, part in zip(shares, parts, strict=True))


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Of one job. Seconds are of this machine; bytes of any."""

    name: str
    samples: int  # of an epoch
    batch_size: int
    epochs: int
    device: str  # cpu or cuda
    optimizer: str
    elements: int  # trainable, tables included
    element_bytes: int
    slots: int  # of the optimizer, for each element
    parameters: int  # trainable tensors
    shapes: tuple[tuple[int, ...], ...] = ()  # of these, in their order
    gathered: int = 0  # elements that zero=3 gathers for forward and backward of one microbatch (dp/gathered.py)
    buffer_bytes: int
    base_bytes: int  # a worker's own memory before it has a model
    input_bytes: float  # of a sample
    kept_bytes: float  # of a sample, from forward to backward
    compute: dict[str, Curve]  # "WxT": forward and backward by samples, W workers at once with T threads each;
    # "rows WxT": with rows of tables that come from servers
    direct: dict[str, Curve] = {}  # the same where gradients go where all workers of a host see them (dp/in_place.py)
    update: dict[str, Curve]  # by the same: the optimizer's update, by bytes of parameters
    load: Curve  # seconds to make a batch, by samples
    tables: tuple[TableUse, ...] = ()
    rows: dict[str, Curve] = {}  # what reading and updating rows of tables takes (planner/reading.py)
    layers: tuple[Layer, ...] = ()
    layer_samples: int = 0
    splitting: Splitting | None = None  # None: no layer can be split
    busy: float = 0.0  # the share of this machine's cores that others took while it was measured
    no_layers: str = ""  # why the model was not followed from layer to layer
    unmeasured: str = ""  # why nothing could be run: the user's own error

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self.samples // self.batch_size)

    @property
    def weight_bytes(self) -> int:
        """Of all trainable parameters, tables included."""
        return self.elements * self.element_bytes

    @property
    def dense_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of trained parameters that are no tables."""
        found = [*self.shapes]
        for table in self.tables:
            if (table.rows, table.dim) in found:
                found.remove((table.rows, table.dim))
        return tuple(found)

    @property
    def gathered_bytes(self) -> int:
        """What zero=3 gathers in a step; all weights twice where that is not known."""
        return (self.gathered or 2 * self.elements) * self.element_bytes

    def meetings(self, local_steps: int) -> float:
        """After a step, on average, if workers meet after so many and at the end of an epoch."""
        return -(-self.steps // local_steps) / self.steps

    @property
    def largest_bytes(self) -> int:
        """Of the block with most trainable parameters, of all where there are no blocks."""
        return max((layer.elements for layer in self.layers), default=self.elements) * self.element_bytes

    @property
    def table_bytes(self) -> int:
        """The part of it in tables."""
        return sum(table.rows * table.dim for table in self.tables) * self.element_bytes

    @property
    def new_rows(self) -> float:
        """Of the bytes of rows that all steps of the job read, the share that is read for the first time."""
        read = sum(table.ids(self.batch_size) * table.dim for table in self.tables) * self.steps * self.epochs
        return min(1.0, sum(table.ids(self.samples) * table.dim for table in self.tables) / read) if read else 0.0

    @property
    def backward(self) -> float:
        """The share of computing that is backward; two thirds where layers are not known."""
        whole = sum(layer.seconds for layer in self.layers)
        return sum(layer.backward + layer.weights for layer in self.layers) / whole if whole else 2 / 3

    def computing(
        self, workers: float, threads: int, samples: float, *, served: bool = False, direct: bool = False
    ) -> tuple[float, float]:
        """Seconds of forward and backward of ``samples``, and their scatter, of one of ``workers`` on this machine.

        ``served``: with rows of tables that come from servers. ``direct``: with gradients that go where all workers of
        a host see them. Raises KeyError if that could not be measured.
        """
        if direct and self.direct:
            return _among(self.direct, workers, threads, samples)
        mark = "rows " if served and self.tables else ""
        curves = {key.removeprefix(mark): c for key, c in self.compute.items() if key.startswith("rows ") == bool(mark)}
        if not curves:
            raise KeyError("computing with rows that come from servers" if mark else "computing")
        return _among(curves, workers, threads, samples)

    def updating(self, workers: float, threads: int, weight_bytes: float) -> float:
        """Seconds of the optimizer's update of so many bytes of parameters."""
        curves = {key: curve for key, curve in self.update.items() if not key.startswith("rows ")} or self.update
        if not curves:
            return 0.0
        return _among({key.removeprefix("rows "): c for key, c in curves.items()}, workers, threads, weight_bytes)[0]


def crowd(workers: int, threads: int) -> str:
    """The key of what was measured of so many workers at once, with so many threads each."""
    return f"{workers}x{threads}"


def _among(curves: dict[str, Curve], workers: float, threads: int, x: float) -> tuple[float, float]:
    """What the curve says that was measured of the most similar crowd; more workers than that share its time."""
    counts = {key: tuple(map(int, key.split("x"))) for key in curves}
    key = min(counts, key=lambda k: (abs(counts[k][1] - threads), counts[k][0] > workers, abs(counts[k][0] - workers)))
    curve = curves[key]
    lowest = curve.points[0]
    seconds = curve.at(x)
    if x < lowest.x and len(curve.points) > 1:  # below the smallest share, on the line that leads there
        second = curve.points[1]
        slope = max(0.0, (second.seconds - lowest.seconds) / (second.x - lowest.x))
        seconds = max(lowest.seconds - slope * (lowest.x - x), lowest.seconds * x / lowest.x)
    crowding = max(1.0, workers * threads / (counts[key][0] * counts[key][1])) if _full(counts, key) else 1.0
    return seconds * crowding, curve.scatter


def _full(counts: dict[str, tuple[int, ...]], key: str) -> bool:
    """Whether this crowd has all the cores that were measured."""
    return counts[key][0] * counts[key][1] == max(w * t for w, t in counts.values())
