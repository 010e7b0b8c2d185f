"""Network namespaces joined by a switch, each through a link of its own speed (ip-netns(8), veth(4), tc-tbf(8)).

The switch is a bridge in a namespace of its own, so that no firewall of the machine sees what crosses it. One more
link joins it to the machine's own network, for whoever starts and watches the hosts from there. Addresses are those
that RFC 2544 sets aside for such tests.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tricorn.errors import ClusterError

NAMESPACES = Path("/run/netns")  # where ip-netns(8) keeps them
QUEUE = "50ms"  # what a link holds before it drops
BURST_SECONDS = 0.001


class Traffic(NamedTuple):
    """Bytes that crossed a link since it was made, as Ethernet frames."""

    sent: int
    received: int


class Network:
    """The network of one ``slot``, with a host's link speed (Mbit/s, None for no limit) for each host."""

    def __init__(self, slot: int, speeds: Sequence[float | None]) -> None:
        self._speeds = speeds
        self._name = f"tricorn{slot}"
        self._subnet = f"198.18.{slot}"
        self._switch = f"{self._name}-switch"

    def namespace(self, host: int) -> Path:
        return NAMESPACES / f"{self._name}-{host}"

    def address(self, host: int) -> str:
        return f"{self._subnet}.{host + 1}"

    def open(self) -> None:
        """Raises ClusterError where that is not possible."""
        hosts = range(len(self._speeds))
        root = [f"netns add {self._switch}", f"link add {self._name} type veth peer name machine netns {self._switch}"]
        switch = ["link add switch type bridge mcast_snooping 0", "link set switch addrgenmode none up"]
        for host in hosts:
            space = self.namespace(host).name
            root += [
                f"netns add {space}",
                f"link add eth0 netns {space} type veth peer name host{host} netns {self._switch}",
            ]
        for port in ("machine", *(f"host{host}" for host in hosts)):
            # No address that IPv6 makes up: its announcements would be counted among the traffic.
            switch.append(f"link set {port} addrgenmode none master switch up")
        _ip(root)
        _ip(switch, self._switch)
        _ip([f"link set {self._name} addrgenmode none up", f"addr add {self._subnet}.254/24 dev {self._name}"])
        for host, speed in enumerate(self._speeds):
            space = self.namespace(host).name
            _ip(
                ["link set lo up", "link set eth0 addrgenmode none up", f"addr add {self.address(host)}/24 dev eth0"],
                space,
            )
            if speed is not None:
                _shape(space, "eth0", speed)
                _shape(self._switch, f"host{host}", speed)

    def cut(self, host: int) -> None:
        _ip([f"link set host{host} down"], self._switch)

    def join(self, host: int) -> None:
        _ip([f"link set host{host} up"], self._switch)

    def traffic(self, host: int) -> Traffic:
        shown = _run("ip", "-json", "-stats", "-netns", self.namespace(host).name, "link", "show", "dev", "eth0")
        counters = json.loads(shown)[0]["stats64"]
        return Traffic(counters["tx"]["bytes"], counters["rx"]["bytes"])

    def close(self) -> None:
        """Remove all of it. May be called again, and on what others left in this slot."""
        commands = [f"netns delete {space.name}" for space in NAMESPACES.glob(f"{self._name}-*")]
        if Path("/sys/class/net", self._name).exists():
            commands.insert(0, f"link delete {self._name}")
        if commands:
            _ip(commands)


def _shape(space: str, device: str, mbit: float) -> None:
    """Limit what leaves the device."""
    bits = round(mbit * 1e6)
    burst = max(16 * 1024, round(bits / 8 * BURST_SECONDS))
    _run("tc", "-netns", space, "qdisc", "add", "dev", device, "root", "tbf",
         "rate", f"{bits}bit", "burst", str(burst), "latency", QUEUE)  # fmt: skip


def _ip(commands: Sequence[str], space: str | None = None) -> None:
    _run("ip", *(("-netns", space) if space else ()), "-batch", "-", text="\n".join(commands))


def _run(*command: str, text: str = "") -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ClusterError(f"there is no {command[0]!r}", remedy="Install the package iproute2.") from None
    if done.returncode:
        raise ClusterError(
            f"{' '.join(command)} failed: {done.stderr.strip()}",
            remedy="Run as root, with the capabilities to make network namespaces and veth links.",
        )
    return done.stdout
