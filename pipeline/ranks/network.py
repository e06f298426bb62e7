"""The network interface over which gloo connects the ranks of different nodes.

gloo uses the interface that the host's own name resolves to. On many systems that is the loopback interface, over which
no other node can be reached.
"""

from __future__ import annotations

import os
import socket

import psutil

INTERFACE = "GLOO_SOCKET_IFNAME"


def choose_interface() -> None:
    """For a run on several nodes, set GLOO_SOCKET_IFNAME to the interface that leads to rank 0, unless it is set."""
    if INTERFACE in os.environ or int(os.environ.get("SLURM_NNODES", 1)) < 2:
        return
    if interface := interface_towards(os.environ["MASTER_ADDR"]):
        os.environ[INTERFACE] = interface


def interface_towards(host: str) -> str | None:
    """The interface from which packets to a host leave; None if there is no way to it, or it is the loopback."""
    try:
        address = socket.gethostbyname(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # chooses a route; a datagram socket sends nothing here
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127."):
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.family == socket.AF_INET and found.address == own for found in addresses):
            return name
    return None


def address_of(interface: str) -> str | None:
    """The IPv4 address of an interface; None if there is no such interface, or it has none."""
    for found in psutil.net_if_addrs().get(interface, []):
        if found.family == socket.AF_INET:
            return found.address
    return None
