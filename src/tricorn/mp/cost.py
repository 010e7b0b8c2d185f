"""What a mesh costs: stages from the profile of each layer, its schedule carried out on a virtual clock.

Legend: p stages, v chunks of each, t shards of a layer, R replicas, M microbatches.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, pairwise
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from tricorn.errors import PlanError
from tricorn.mp.cut import NUMBERED, Link, balanced
from tricorn.mp.mesh import Mesh, Place, chunks_of
from tricorn.mp.schedule import gathered, microbatches_of, order, split
from tricorn.mp.simulate import Work, most_in_flight, simulate
from tricorn.planner.ground import combined
from tricorn.planner.parts import Line, Parts, stalls_of, waiting
from tricorn.planner.prediction import COMPUTE, DATA, EXCHANGE, IDLE, UPDATE, WIRE, Prediction
from tricorn.planner.profile import Layer, Splitting
from tricorn.planner.traffic import Traffic
from tricorn.state.footprint import peak_bytes

if TYPE_CHECKING:
    from tricorn.plan import Plan
    from tricorn.planner.ground import Ground
    from tricorn.planner.profile import Profile

MEGABYTE = 1e6
RECOMPUTED = 1.0  # forwards more, where activations are computed again


class Stage(NamedTuple):
    """Layers of one stage, and the bytes of their trained parameters that one shard has."""

    layers: tuple[Layer, ...]
    bytes: float


def predict(plan: Plan, ground: Ground) -> Prediction:
    """Of one step. Raises KeyError where nothing like it was measured, ValueError for what cannot be laid out."""
    mesh = _Mesh(plan, ground)
    found, line = mesh.parts(), mesh.line
    simulated = simulate(line.orders, line.works, line.hop)
    M, v = mesh.count, len(line.works) // mesh.p
    workers = [sum(sum(work) for work in line.works[rank :: mesh.p]) for rank in range(mesh.p)]
    busiest = max(workers) * M
    inside = mesh.exchanged * M  # of the busiest stage: what actions are besides arithmetic
    hops = min(max(0.0, simulated.seconds - busiest), 2 * (mesh.p * v - 1) * line.hop)
    seconds = max(simulated.seconds, line.least([M * busy for busy in workers]))
    idle = max(0.0, seconds - busiest - hops)
    lines = [seconds * M for seconds in workers] * plan.replicas
    idle += waiting(lines, ground.jitter(found.scatter), _stalls(mesh)) - (busiest - sum(lines) / len(lines))
    terms = {
        COMPUTE: max(0.0, busiest - inside), IDLE: max(0.0, idle), DATA: found.loading, **found.after,
        EXCHANGE: found.after[EXCHANGE] + inside + (0.0 if mesh.away else hops),
        WIRE: found.after[WIRE] + (hops if mesh.away else 0.0),
    }  # fmt: skip
    sending = mesh.traffic()
    return Prediction(
        plan=mesh.cut(),
        terms=terms,
        scatter=combined((seconds, found.scatter), (found.after[EXCHANGE] + inside, mesh.moved)),
        memory=mesh.memory(),
        sent=sending.sent,
        links=sending.links(ground),
        notes=ground.notes("mp", max(2, mesh.p), 0.0),
    )


def traffic(plan: Plan, ground: Ground) -> Traffic:
    """What workers send each other in a step. Raises as ``predict``."""
    return _Mesh(plan, ground).traffic()


def parts(plan: Plan, ground: Ground) -> Parts:
    """What a step consists of. Raises as ``predict``."""
    return _Mesh(plan, ground).parts()


class _Mesh:
    """A plan's workers laid out over the hosts, and its layers over the workers."""

    def __init__(self, plan: Plan, ground: Ground) -> None:
        self.plan, self.ground, self.profile = plan, ground, ground.profile
        self.mesh = Mesh.of(plan)
        self.p, self.v, self.t, self.R = plan.stages, chunks_of(plan), plan.tensor, plan.replicas
        if self.p < 1 or plan.replicas > self.profile.batch_size:
            raise ValueError(f"{plan.replicas} replicas have no batch of {self.profile.batch_size} to share")
        self.samples = self.profile.batch_size / self.R
        self.count = len(split(int(self.samples), microbatches_of(plan, int(self.samples))))
        self.microbatch = self.samples / self.count
        self.times = self.microbatch / max(1, self.profile.layer_samples)  # what layers were measured of
        self.hosts = ground.places(plan)[0]
        lines = [self.mesh.line(self.mesh.rank(Place(r, 0, k))) for r in range(self.R) for k in range(self.t)]
        self.away = any(self._apart(line) for line in lines)
        self.there = Counter(self.hosts)
        slow = {host: ground.slowness(host, count) * self._granted(host) for host, count in self.there.items()}
        self.slow, self.slow_hop = [slow[host] for host in self.hosts], sum(slow.values()) / len(slow)
        self.splitting = self._splitting()
        self.stages = self._stages()
        self.moved = ground.links.curve("exchange/mp", max(2, self.p)).scatter
        self.per_action, per_step = _overheads(ground, max(2, self.p))
        self.per_step = per_step * max(self.slow)
        self.exchanged = 0.0
        self.summed, self.sent = self._copies()  # seconds of processors, and of links
        self.updates = [self._update(stage) for stage in range(self.p)]
        self.line = self._line()

    def cut(self) -> Plan:
        """The plan, with the cuts that all this is of."""
        if not self.profile.layers or not 1 < len(self.stages) <= NUMBERED:
            return self.plan
        lengths = accumulate(len(stage.layers) for stage in self.stages[:-1])
        return replace(self.plan, cuts=tuple(lengths))

    def parts(self) -> Parts:
        """What a step consists of."""
        after = {UPDATE: max(self.updates), EXCHANGE: self.per_step + self.summed, WIRE: self.sent}
        loading = self.ground.loading(self.samples, max(sum(work) for work in self.line.works) * self.count)
        _, scatter = self.ground.on(self.hosts[0], self.plan, self.microbatch)
        return Parts(computing=(), scatter=scatter, loading=loading, after=after, line=self.line)

    def _update(self, stage: int) -> float:
        """Seconds in which the slowest worker of a stage updates its part."""
        part = self._of_worker(stage) / (self.R if self.plan.zero else 1)
        hosts = {self.hosts[rank] for rank in self._ranks(stage)}
        return max(self.ground.updating(self.plan, part, host) * self._granted(host) for host in hosts)

    def traffic(self) -> Traffic:
        """What workers send each other in a step."""
        found = Traffic()
        for replica in range(self.R):
            self._hand(found, replica)
            if self.splitting:
                self._exchange(found, replica, self.splitting)
        for rank in range(self.p * self.t if self.R > 1 else 0):
            copies = [self.hosts[copy] for copy in self.mesh.copies(rank)]
            n = self._of_worker(self.mesh.place(rank).stage)
            if self.plan.zero:
                found.reduce_scatter(copies, n)
                found.all_gather(copies, n)
            else:
                found.all_reduce(copies, n)
        return found

    def _hand(self, found: Traffic, replica: int) -> None:
        """Values from stage to stage, and their gradients back: each shard hands on the whole."""
        for number, size in enumerate(self.handed):
            for shard in range(self.t):
                a, b = (
                    self.hosts[self.mesh.rank(Place(replica, stage % self.p, shard))] for stage in (number, number + 1)
                )
                found.send(a, b, size * self.count)
                found.send(b, a, size * self.count)

    def _exchange(self, found: Traffic, replica: int, splitting: Splitting) -> None:
        """What shards exchange of all microbatches, in each stage by what it has of the layers that are split."""
        shares = iter(splitting.shares)
        split = [sum(layer.seconds * next(shares, 0.0) for layer in stage.layers) for stage in self.stages]
        for number, part in enumerate(split):
            ranks = self.mesh.shards(self.mesh.rank(Place(replica, number % self.p, 0)))
            hosts, inside = [self.hosts[rank] for rank in ranks], Traffic()
            for size in splitting.sums:
                inside.all_reduce(hosts, size * self.microbatch)
            for size in splitting.gathers:
                inside.all_gather(hosts, size * self.microbatch)
            found.add(inside.part(self.count * part / (sum(split) or 1.0)))

    def memory(self) -> dict[str, int]:
        """Peak bytes of each stage: weights, gradients and slots of its layers, and activations of what is in flight.

        A copy of what is saved is made to be written.
        """
        profile, found = self.profile, {}
        for rank, actions in enumerate(self.orders):
            flying, mine = most_in_flight(actions), self.stages[rank :: self.p]
            weights = sum(stage.bytes for stage in mine)
            slots = profile.slots / (self.R if self.plan.zero else 1)
            layers = [layer for stage in mine for layer in stage.layers]
            whole, given = self._activations(layers)
            kept = flying * given + whole if self.plan.recompute else flying * whole / self.v
            saved = weights * (1 + profile.slots) / self.R  # replicas share the writing
            held = peak_bytes(weights * (2 + slots), kept, saved, profile.largest_bytes)
            found[f"stage {rank}"] = int(self.ground.base("mp") + held)
        return found

    def _activations(self, layers: list[Layer]) -> tuple[float, float]:
        """Bytes that layers keep of one microbatch, and that are handed to their first."""
        if not self.profile.layers:
            return self.profile.kept_bytes * self.microbatch, 0.0
        kept = sum(layer.kept_bytes / self.t + layer.output_bytes for layer in layers)
        return kept * self.times, layers[0].output_bytes * self.times

    def _splitting(self) -> Splitting | None:
        if self.t == 1:
            return None
        if self.profile.splitting is None:
            raise ValueError("no layer of the model can be split among workers")
        return self.profile.splitting

    def _stages(self) -> list[Stage]:
        """The chunks of all workers, cut so that the slowest is fastest."""
        profile, count = self.profile, self.p * self.v
        layers = profile.layers or (_whole(profile),)
        legal = [index + 1 for index, layer in enumerate(layers[:-1]) if layer.cut_after]
        if len(legal) < count - 1:
            raise ValueError(profile.no_layers or f"the model can be cut into {len(legal) + 1} stages at most")
        hop = self._hop
        price = Link(0.0, max(0.0, hop(MEGABYTE) - hop(0.0)) / MEGABYTE)
        update = profile.updating(1, 1, profile.weight_bytes) / max(1, profile.elements) / self.count
        seconds = [self.times * layer.seconds + update * layer.elements for layer in layers]
        handed = [int(self.times * layer.output_bytes) for layer in layers]
        taken = [self._seconds(stage) / self._quota(stage) for stage in range(self.p)]
        slowness = [each / min(taken) for each in taken]
        if self.plan.cuts and count > NUMBERED:
            raise ValueError(
                f"what is cut into more than {NUMBERED} stages is predicted by the planner's own cuts only"
            )
        if self.plan.cuts and (len(self.plan.cuts) != count - 1 or not set(self.plan.cuts) <= set(legal)):
            raise ValueError(f"the model cannot be cut into {count} stages before blocks {self.plan.cuts}")
        try:
            cuts = self.plan.cuts or balanced(seconds, slowness * self.v, legal, handed, price)[0]
        except PlanError as error:
            raise ValueError(str(error)) from None
        shares = self.splitting.shares if self.splitting else (0.0,) * len(layers)
        return [
            Stage(layers[start:stop], profile.element_bytes * sum(
                layer.elements * (1 - share + share / self.t)
                for layer, share in zip(layers[start:stop], shares[start:stop], strict=True)
            ))
            for start, stop in pairwise((0, *cuts, len(layers)))
        ]  # fmt: skip

    def _line(self) -> Line:
        """What a microbatch takes in each stage: of all replicas and shards, the slowest host's."""
        layers = [layer for stage in self.stages for layer in stage.layers]
        whole = sum(layer.seconds for layer in layers)
        shares = list(self.splitting.shares) if self.splitting else [0.0] * len(layers)
        split_seconds = sum(layer.seconds * share for layer, share in zip(layers, shares, strict=True))
        summed, beyond = self._sums(), self._beyond(split_seconds / whole if whole else 0.0)
        works, at = [], 0
        for number, stage in enumerate(self.stages):
            mine = shares[at : at + len(stage.layers)]
            at += len(stage.layers)
            ratio = self._seconds(number % self.p) / whole if whole else 0.0
            scale = [max(0.0, 1 - share + share / self.t + share * beyond) * ratio for share in mine]
            forward, backward, weights = (
                sum(getattr(layer, what) * each for layer, each in zip(stage.layers, scale, strict=True))
                for what in ("forward", "backward", "weights")
            )
            here = sum(layer.seconds * share for layer, share in zip(stage.layers, mine, strict=True))
            sums = summed * here / split_seconds if split_seconds else 0.0
            again = RECOMPUTED * forward if self.plan.recompute else 0.0
            fixed = self.per_action * self._slow_in(number % self.p) if self.p > 1 else 0.0
            self.exchanged = max(self.exchanged, 2 * fixed + sums)
            works.append(Work(fixed + forward + sums / 2, fixed + backward + again + sums / 2, weights))
        self.handed = [stage.layers[-1].output_bytes * self.times for stage in self.stages[:-1]]
        schedule = self.plan.schedule or ("interleaved" if self.v > 1 else "1f1b")
        self.orders = [order(schedule, rank, self.p, self.count, self.v) for rank in range(self.p)]
        together = [self._together(stage) for stage in self.stages]
        orders = tuple(tuple(gathered(actions, together[rank :: self.p])) for rank, actions in enumerate(self.orders))
        hop = self._hop(sum(self.handed) / len(self.handed)) if self.p > 1 else 0.0
        granted = tuple(self._quota(stage) for stage in range(self.p))
        working = tuple(update + self.per_step + self.summed for update in self.updates)
        return Line(orders=orders, works=tuple(works), hop=hop, replicas=self.R, granted=granted, working=working)

    def _together(self, stage: Stage) -> int:
        """For how many microbatches at a time a stage computes most of its weight gradients.

        What had rows enough when it was measured is taken to have enough.
        """
        together = max(stage.layers, key=lambda layer: layer.weights).together
        return ceil(together * self.profile.layer_samples * self.count / self.samples) if together > 1 else 1

    def _seconds(self, stage: int) -> float:
        """Of forward and backward of the whole model, for one microbatch, on the slowest host of this stage.

        Workers that outnumber their host's cores were measured as such (``Ground.on``).
        """
        hosts = {self.hosts[rank] for rank in self._ranks(stage)}
        return max(self.ground.on(host, self.plan, self.microbatch)[0] * self._granted(host) for host in hosts)

    def _quota(self, stage: int) -> float:
        """The share of a step for which workers of a stage may compute."""
        return min(self._granted(self.hosts[rank]) for rank in self._ranks(stage))

    def _granted(self, host: int) -> float:
        """The share of the time for which the one worker of a host that is granted less than a core may compute.

        While it waits for others it saves that up, so that a stage computes at full speed and then stands still.
        """
        return self.ground.granted(host) if self.p > 1 and self.there[host] == 1 else 1.0

    def _slow_in(self, stage: int) -> float:
        """How many times as long exchanging takes processors on the slowest host of this stage."""
        return max(self.slow[rank] for rank in self._ranks(stage))

    def _ranks(self, stage: int) -> list[int]:
        """Its workers in all replicas."""
        return [self.mesh.rank(Place(r, stage, k)) for r in range(self.R) for k in range(self.t)]

    def _sums(self) -> float:
        """Seconds that shards exchange for in one microbatch."""
        if self.splitting is None:
            return 0.0
        shards = [self.mesh.shards(self.mesh.rank(Place(r, s, 0))) for r in range(self.R) for s in range(self.p)]
        apart = any(self._apart(ranks) for ranks in shards)
        found = self._exchanging("tcp" if apart else "shared", self.t, self.microbatch) * max(self.slow)
        if apart:
            for size, times in [(size, 2) for size in self.splitting.sums] + [(s, 1) for s in self.splitting.gathers]:
                part = times * (self.t - 1) / self.t * size * self.microbatch
                found += self.ground.wire(part, self.hosts[: self.t], times * (self.t - 1))
        return found

    def _exchanging(self, way: str, shards: int, samples: float) -> float:
        """Seconds of processors in which shards of this machine exchange what so many samples ask for."""
        assert self.splitting is not None
        return sum(
            self.ground.links.seconds(f"{way}/{operation}", shards, size * samples)
            for operation, sizes in (("all_reduce", self.splitting.sums), ("all_gather", self.splitting.gathers))
            for size in sizes
        )

    def _beyond(self, share: float) -> float:
        """What layers take for being split, however many shards they have, as a share of what they take whole.

        ``share`` of the model's seconds is theirs. It is what steps of two workers here were measured to take beyond
        the arithmetic that each should have, exchanges, and what any step takes; of fewer samples than these, as much.
        """
        if self.splitting is None or self.splitting.steps is None or not share:
            return 0.0
        profile, samples = self.profile, self.microbatch
        tried = max(samples, self.splitting.steps.points[0].x)
        halves = profile.element_bytes * sum(
            layer.elements * (1 - each / 2)
            for layer, each in zip(profile.layers or (_whole(profile),), self.splitting.shares, strict=True)
        )
        known = (
            profile.computing(2, 1, tried)[0] * (1 - share / 2)
            + self._exchanging("shared", 2, tried)
            + _overheads(self.ground, 2)[1]
            + profile.updating(2, 1, halves)
        )
        return (self.splitting.steps.at(tried) - known) / (share * profile.computing(2, 1, samples)[0])

    def _of_worker(self, rank: int) -> float:
        """Bytes of the parameters that a worker of this stage has."""
        return sum(stage.bytes for stage in self.stages[rank :: self.p])

    def _copies(self) -> tuple[float, float]:
        """Seconds that replicas of the largest stage sum gradients for, and seconds of that on the links."""
        if self.R == 1:
            return 0.0, 0.0
        n = max(self._of_worker(rank) for rank in range(self.p))
        if not any(self._apart(self.mesh.copies(rank)) for rank in range(self.p * self.t)):
            return self.ground.exchanging("dp", self.R, n)[0] * max(self.slow), 0.0
        there = max(Counter(self.hosts).values())  # workers that share a link
        amount = 2 * (self.R - 1) / self.R * n * there
        return (
            self.ground.links.seconds("tcp/all_reduce", 2, n) * max(self.slow),
            self.ground.wire(amount, sorted(set(self.hosts)), 2 * (self.R - 1)),
        )

    def _apart(self, ranks: tuple[int, ...]) -> bool:
        return len({self.hosts[rank] for rank in ranks}) > 1

    def _hop(self, size: float) -> float:
        """Seconds from one stage to the next."""
        there_and_back = self.ground.links.seconds(f"{'tcp' if self.away else 'shared'}/send", 2, size)
        wire = self.ground.wire(size, sorted(set(self.hosts)), 1) if self.away else 0.0
        return there_and_back / 2 * self.slow_hop + wire


def _overheads(ground: Ground, p: int) -> tuple[float, float]:
    """Seconds of each forward or backward, and of each step, that are not arithmetic: of a chain without any.

    Its steps take 2 (M + p - 1) actions one after another.
    """
    few, *_, many = ground.links.curve("exchange/mp", p).points
    per_action = max(0.0, (many.seconds - few.seconds) / (many.x - few.x) / 2)
    return per_action, max(0.0, few.seconds - 2 * (few.x + p - 1) * per_action)


def _whole(profile: Profile) -> Layer:
    """A model that was not followed is one layer."""
    part = 1 / 3
    return Layer(
        name=profile.name, forward=part, backward=part, weights=part, elements=profile.elements, output_bytes=0,
        kept_bytes=0, cut_after=False,
    )  # fmt: skip


def _stalls(mesh: _Mesh) -> list[tuple[float, float]]:
    """Of each stage of each replica, those of its first shard."""
    found = stalls_of(mesh.plan, mesh.ground)
    return [found[rank] for rank in range(0, mesh.mesh.size, mesh.t)]
