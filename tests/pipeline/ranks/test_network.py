"""The network interface over which gloo connects nodes."""

import os
import socket

import psutil
import pytest

from megabase.pipeline.ranks import network
from megabase.pipeline.ranks.network import address_of, choose_interface, interface_towards


def test_the_loopback_leads_nowhere() -> None:
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("no-such-host.invalid") is None
    assert address_of("lo") == "127.0.0.1" and address_of("no-such-interface") is None


def test_the_interface_of_an_own_address() -> None:
    others = [
        (name, found.address)
        for name, addresses in psutil.net_if_addrs().items()
        for found in addresses
        if found.family == socket.AF_INET and not found.address.startswith("127.")
    ]
    if not others:
        pytest.skip("this machine has the loopback only")
    for name, address in others:
        assert interface_towards(address) == name and address_of(name) is not None


def test_it_is_chosen_for_several_nodes_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interface_towards", {"node1": "ib0", "127.0.0.1": None}.get)
    for nodes, set_to, host, expected in (
        ("1", None, "node1", None),
        ("2", None, "node1", "ib0"),
        ("2", "eth1", "node1", "eth1"),
        ("2", None, "127.0.0.1", None),
    ):
        monkeypatch.setenv("SLURM_NNODES", nodes)
        monkeypatch.setenv("MASTER_ADDR", host)
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", set_to or "")
        if set_to is None:
            monkeypatch.delenv("GLOO_SOCKET_IFNAME")
        choose_interface()
        assert os.environ.get("GLOO_SOCKET_IFNAME") == expected
