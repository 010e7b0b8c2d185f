"""What a pipeline costs: stages from the profile of each layer, its schedule carried out on a virtual clock.

Legend: p stages, M microbatches.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from tricorn.mp.cut import Link, balance
from tricorn.mp.schedule import microbatches_of, order, split
from tricorn.mp.simulate import Simulated, Work, simulate
from tricorn.planner.ground import combined
from tricorn.planner.prediction import COMPUTE, DATA, EXCHANGE, IDLE, UPDATE, WIRE, Prediction

if TYPE_CHECKING:
    from tricorn.plan import Plan
    from tricorn.planner.ground import Ground
    from tricorn.planner.profile import Layer


def predict(plan: Plan, ground: Ground) -> Prediction:
    """Of one step. Raises KeyError where nothing like it was measured, ValueError where layers are not known."""
    if plan.tensor > 1 or plan.schedule == "interleaved":
        raise ValueError("what layers that workers share, and interleaved stages, cost is not predicted")
    profile, p = ground.profile, plan.stages
    layers = profile.layers
    legal = [index + 1 for index, layer in enumerate(layers[:-1]) if layer.cut_after]
    if p > 1 and len(legal) < p - 1:
        raise ValueError(profile.no_layers or f"the model can be cut into {len(legal) + 1} stages at most")
    samples = profile.batch_size / plan.replicas
    count = len(split(int(samples), microbatches_of(plan, int(samples))))
    per_action, per_step = _overheads(ground, p)
    hop = _Hop(plan, ground)
    cuts = balance(
        [layer.seconds for layer in layers], p, legal, [layer.output_bytes for layer in layers],
        Link(0.0, hop(1.0) - hop(0.0)),
    ) or ()  # fmt: skip
    stages = [layers[start:stop] for start, stop in pairwise((0, *cuts, len(layers)))]
    hosts = ground.places(plan)[0][:p]
    whole = sum(layer.seconds for layer in layers)
    works, scatter = [], 0.0
    for stage, host in zip(stages, hosts, strict=True):
        seconds, scatter = ground.on(host, plan, samples / count)
        ratio = seconds / whole if whole else 0.0
        forward = sum(layer.forward for layer in stage) * ratio
        backward = sum(layer.backward for layer in stage) * ratio
        works.append(Work(per_action + forward, per_action + backward, sum(layer.weights for layer in stage) * ratio))
    handed = [stage[-1].output_bytes * (samples / count) / profile.layer_samples for stage in stages[:-1]]
    orders = [order(plan.schedule or "1f1b", rank, p, count, 1) for rank in range(p)]
    simulated = simulate(orders, works, hop(max(handed, default=0.0)))
    busiest = max(sum(work) for work in works) * count
    exchange = per_step + 2 * per_action * count
    largest = max(sum(layer.elements for layer in stage) for stage in stages) * profile.element_bytes
    away = len(set(hosts)) > 1
    hops = min(max(0.0, simulated.seconds - busiest), sum(hop(size) for size in handed))
    terms = {
        COMPUTE: busiest - 2 * per_action * count,
        UPDATE: max(ground.updating(plan, largest, host) for host in set(hosts)),
        EXCHANGE: exchange + (0.0 if away else hops),
        WIRE: hops if away else 0.0,
        IDLE: max(0.0, simulated.seconds - busiest - hops),
        DATA: ground.loading(samples, busiest),
    }
    if plan.replicas > 1:
        summed, _ = ground.exchanging("dp", plan.replicas, largest)
        terms[EXCHANGE] += summed
    sent = 2 * sum(handed) * count * plan.replicas
    return Prediction(
        plan=plan,
        terms=terms,
        scatter=combined((simulated.seconds, scatter), (exchange, ground.links.curve("exchange/mp", p).scatter)),
        memory=_memory(plan, ground, stages, simulated, samples / count),
        sent=sent,
        links={ground.host(hosts[0]).name: sent / 2} if away else {},
        notes=ground.notes("mp", p, 0.0),
    )


def _overheads(ground: Ground, p: int) -> tuple[float, float]:
    """Seconds of each forward or backward, and of each step, that are not arithmetic: of a chain without any.

    Its steps take 2 (M + p - 1) actions one after another.
    """
    few, *_, many = ground.links.curve("exchange/mp", p).points
    per_action = max(0.0, (many.seconds - few.seconds) / (many.x - few.x) / 2)
    return per_action, max(0.0, few.seconds - 2 * (few.x + p - 1) * per_action)


class _Hop:
    """Seconds from one stage to the next, by bytes."""

    def __init__(self, plan: Plan, ground: Ground) -> None:
        hosts = ground.places(plan)[0][: plan.stages]
        self._ground, self._hosts = ground, sorted(set(hosts))
        self._way = "tcp" if len(self._hosts) > 1 else "shared"

    def __call__(self, size: float) -> float:
        there_and_back = self._ground.links.seconds(f"{self._way}/send", 2, size)
        wire = self._ground.wire(size, self._hosts, 1) if len(self._hosts) > 1 else 0.0
        return there_and_back / 2 + wire


def _memory(
    plan: Plan, ground: Ground, stages: list[tuple[Layer, ...]], simulated: Simulated, samples: float
) -> dict[str, int]:
    """Peak bytes of each stage: weights, gradients and slots of its layers, and activations of what is in flight."""
    profile = ground.profile
    found = {}
    for rank, (stage, flying) in enumerate(zip(stages, simulated.in_flight, strict=True)):
        weights = sum(layer.elements for layer in stage) * profile.element_bytes
        kept = sum(layer.kept_bytes + layer.output_bytes for layer in stage) / profile.layer_samples * samples * flying
        found[f"stage {rank}"] = int(ground.base("mp") + weights * (2 + profile.slots) + kept)
    return found
