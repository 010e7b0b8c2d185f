"""Hosts that fail in the course of a run, drawn by a seed, and what it costs."""

from __future__ import annotations

import random

from tricorn.plan import Plan
from tricorn.planner.ground import Ground
from tricorn.planner.parts import BETWEEN_CHECKPOINTS, NOTICING, STARTING, rolls_back

DAY = 86_400.0
ENDLESS = 100.0  # times the run's own seconds, after which nobody would wait


def over(seconds: float, plan: Plan, ground: Ground, seed: int) -> tuple[int, float]:
    """How many failures there are until so many seconds of work are done, and the seconds that they cost."""
    workers, servers = ground.places(plan)
    back = {host: rolls_back(plan, "worker") for host in workers}
    for host in servers:
        back[host] = back.get(host, False) or rolls_back(plan, "server")
    hosts = list(back)
    rates = [ground.host(host).failures_per_day / DAY for host in hosts]
    rate, draw = sum(rates), random.Random(seed)
    done = passed = 0.0
    count = 0
    while rate and passed < ENDLESS * seconds:
        until = draw.expovariate(rate)
        if done + until >= seconds:
            break
        done += until
        count += 1
        if back[draw.choices(hosts, rates)[0]]:
            done -= done % BETWEEN_CHECKPOINTS
        passed += until + NOTICING + STARTING
    return count, passed + (seconds - done) - seconds
