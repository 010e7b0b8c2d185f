"""The machines that a plan is for: this one, or those that a file describes.

[[host]]            # as often as there are kinds of hosts
name = "rack1"      # optional
count = 4           # how many of this kind
cores = 8           # may be a fraction
speed = 1.0         # of a core, beside one of the machine that plans
memory = "16 GB"    # or a number of bytes
mbit = 1000         # its link, each way
latency_ms = 0.2    # from host to host, one way
stalls = 0.01       # share of its workers' steps that take stall_times as long as the others
stall_times = 5
failures_per_day = 0.1
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import psutil

from tricorn.errors import UsageError
from tricorn.state import cores
from tricorn.state.memory import limit_bytes

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MOST_HOSTS = 10_000
# Bytes on the link for each that is sent: Ethernet, IP and TCP add 66 to 1448, and the other way a packet of 66
# acknowledges two of them.
FRAMED = (1448 + 66 + 33) / 1448
ALIKE = 1.7  # times: measured hosts that differ by less may be alike, as cores are now faster and now slower
_KEYS = (
    "name", "count", "cores", "speed", "memory", "mbit", "latency_ms", "stalls", "stall_times", "failures_per_day",
)  # fmt: skip


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """One machine. ``mbit`` is None where nothing limits its link, as between processes of this machine."""

    name: str
    cores: float
    memory: int
    speed: float = 1.0
    mbit: float | None = None
    latency: float = 0.0  # seconds, one way
    stalls: float = 0.0
    stall_times: float = 5.0
    failures_per_day: float = 0.0

    @property
    def bytes_per_second(self) -> float:
        """Of its link each way, without what packets and acknowledgements add."""
        return float("inf") if self.mbit is None else self.mbit * 1e6 / 8 / FRAMED


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """Hosts, at least one. ``described``: by a file, and not as the machine that plans is known.

    ``present``: at hand, so that what runs teach is of them.
    """

    hosts: tuple[Host, ...]
    described: bool = False
    present: bool = False

    def place(
        self, workers: int, servers: int, hosts: Sequence[int] | None = None
    ) -> tuple[list[int], list[int]]:  # fmt: skip
        """The host of each worker and of each server: workers one after another, then servers, as engines do it.

        ``hosts``: as those of a plan. Raises ValueError for one that there is not.
        """
        ring = hosts or range(len(self.hosts))
        if max(ring) >= len(self.hosts):
            raise ValueError(f"hosts are {tuple(ring)}, counted from 0, and there are {len(self.hosts)}")
        where = [ring[place % len(ring)] for place in range(workers + servers)]
        return where[:workers], where[workers:]

    def orders(self, workers: int, servers: int) -> list[tuple[int, ...] | None]:
        """On which hosts so many roles could well be placed: on the most powerful, on those with the fastest cores, the
        fastest links or the most memory, or with the fastest links for servers alone; or on as few of the most powerful
        as have a core for each.

        The first, None, is all hosts as they come. Of those that are alike the first are taken.
        """
        power, links = self._power, self._alike([host.bytes_per_second for host in self.hosts])
        speed = self._alike([host.speed for host in self.hosts])
        memory = self._alike([float(host.memory) for host in self.hosts])

        cores = [max(1, int(host.cores)) for host in self.hosts]
        if max(cores) == 1 and not any(map(max, (power, links, speed, memory))):
            return [None]

        def by(*traits: Sequence[int]) -> list[int]:
            return sorted(range(len(self.hosts)), key=lambda host: [trait[host] for trait in traits])

        found = [by(power, links), by(speed, power, links), by(links, power), by(memory, power, links)]
        if servers and max(links):
            near = dict.fromkeys(by(links, power)[:servers])
            others = [host for host in found[0] if host not in near]
            found.append([*others[:workers], *near, *others[workers:]])
        roles = workers + servers
        used = [tuple(order[:roles]) for order in found]
        spread = [hosts for hosts in used if hosts != (*range(len(hosts)),)]
        room = accumulate(cores[host] for host in found[0])
        few = next((count for count, cores in enumerate(room, 1) if cores >= roles), len(self.hosts))
        packed = [tuple(found[0][:few])] if few < min(roles, len(self.hosts)) else []
        return [*dict.fromkeys([None, *spread, *packed])]

    @property
    def fastest(self) -> int:
        """How many hosts compute as fast as the fastest."""
        return self._power.count(0)

    @property
    def cores(self) -> float:
        return sum(host.cores for host in self.hosts)

    @property
    def _power(self) -> list[int]:
        return self._alike([host.speed * host.cores for host in self.hosts])

    def _alike(self, values: Sequence[float]) -> list[int]:
        """Of each host's value the number of those that are alike: 0 for the largest, and all that may be as large."""
        times = ALIKE if self.present else 1.0
        found, number, largest = [0] * len(values), 0, max(values)
        for index in sorted(range(len(values)), key=lambda index: -values[index]):
            if values[index] * times < largest:
                number, largest = number + 1, values[index]
            found[index] = number
        return found


def here() -> Cluster:
    """This machine, or the part of it that this process may use."""
    memory = limit_bytes() or psutil.virtual_memory().total
    return Cluster(hosts=(Host(name="here", cores=cores.usable(), memory=memory),))


def of(given: Cluster | str | Path | None) -> Cluster:
    """What is given, or what the file says, or this machine. Raises as ``read``."""
    return given if isinstance(given, Cluster) else read(Path(given)) if given else here()


def read(path: Path) -> Cluster:
    """The cluster that a file describes. Raises UsageError that lists every mistake in it."""
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", remedy="Name a cluster file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is not TOML: {error}", remedy="Mend it there; docs/planning.md has an example."
        ) from None
    mistakes: list[str] = []
    hosts = _hosts(found, mistakes)
    if not mistakes and not hosts:
        mistakes.append("there is no [[host]]")
    if len(hosts) > 1:
        mistakes += [f"host {number}: mbit is missing" for number, given in enumerate(found["host"], 1)
                     if isinstance(given, dict) and "mbit" not in given]  # fmt: skip
    if len(hosts) > MOST_HOSTS:
        mistakes.append(f"there are {len(hosts)} hosts; at most {MOST_HOSTS} can be planned for")
    if mistakes:
        raise UsageError(
            f"{path} has mistakes:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes),
            remedy="Mend them; docs/planning.md has an example.",
        )
    return Cluster(hosts=tuple(hosts), described=True)


def _hosts(found: dict[str, Any], mistakes: list[str]) -> list[Host]:
    mistakes += [f"{key!r} is not known; there is only [[host]]" for key in found if key != "host"]
    tables = found.get("host", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        mistakes.append("host is one table; write [[host]], with two brackets")
        return []
    hosts: list[Host] = []
    for number, table in enumerate(tables, 1):
        where = f"host {number}"
        for key in [key for key in table if key not in _KEYS]:
            known = f"{', '.join(_KEYS[:-1])} and {_KEYS[-1]}"
            hint = "; GPUs cannot be planned for yet, leave them out" if "gpu" in key else ""
            mistakes.append(f"{where}: {key!r} is not known; there are {known}{hint}")
        name = table.get("name", f"host{number}")
        if not isinstance(name, str):
            mistakes.append(f"{where}: name is {name!r}; give a text")
            name = where
        count = _number(table, "count", 1, where, mistakes)
        if count != int(count) or count > MOST_HOSTS:
            mistakes.append(f"{where}: count is {count:g}; give a whole number up to {MOST_HOSTS}")
            count = 1
        for needed in ("cores", "memory"):
            if needed not in table:
                mistakes.append(f"{where}: {needed} is missing")
        cores = _number(table, "cores", 1, where, mistakes)
        speed = _number(table, "speed", 1.0, where, mistakes)
        mbit = _number(table, "mbit", 1000.0, where, mistakes)
        latency = _number(table, "latency_ms", 0.1, where, mistakes, least=True)
        stalls = _number(table, "stalls", 0.0, where, mistakes, least=True)
        if stalls >= 1:
            mistakes.append(f"{where}: stalls is {stalls:g}; give a share of the steps, below 1")
        times = _number(table, "stall_times", 5.0, where, mistakes)
        if times < 1:
            mistakes.append(f"{where}: stall_times is {times:g}; give at least 1")
        failures = _number(table, "failures_per_day", 0.0, where, mistakes, least=True)
        memory = _bytes(table.get("memory", 1), where, mistakes)
        hosts += [
            Host(name=f"{name}-{index}" if count > 1 else name, cores=cores, memory=memory, speed=speed, mbit=mbit,
                 latency=latency / 1e3, stalls=stalls, stall_times=times, failures_per_day=failures)
            for index in range(int(count))
        ]  # fmt: skip
    return hosts


def _number(
    table: dict[str, Any], key: str, default: float, where: str, mistakes: list[str], *, least: bool = False
) -> float:
    value = table.get(key, default)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and value < float("inf")
    if not fits or not (value >= 0 if least else value > 0):
        mistakes.append(f"{where}: {key} is {value!r}; give a number {'of at least' if least else 'above'} 0")
        return default
    return float(value)


def _bytes(value: object, where: str, mistakes: list[str]) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)):
        unit = _UNITS.get(match[2].upper())
        if unit and float(match[1]) > 0:
            return int(float(match[1]) * unit)
    mistakes.append(f'{where}: memory is {value!r}; give bytes, or a text such as "16 GB"')
    return 1
