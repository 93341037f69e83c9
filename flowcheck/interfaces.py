# SPDX-License-Identifier: MIT
"""Network interfaces of this machine: are they there and up, what have they counted, and raw sockets on them."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from flowcheck.errors import DeviceError

__all__ = ["check", "fanout_group", "mtu", "raw_socket", "received", "received_bytes"]

_NAME_BYTES = 15
_UP = 1  # IFF_UP, linux/if.h


def _attribute(name: str, attribute: str) -> str:
    return Path("/sys/class/net", name, attribute).read_text().strip()


def check(name: str) -> None:
    """Raise DeviceError unless there is an interface of that name, and it is up with a carrier."""
    if not 0 < len(name.encode()) <= _NAME_BYTES or "/" in name or not Path("/sys/class/net", name).exists():
        there = ", ".join(sorted(other for _, other in socket.if_nameindex()))
        raise DeviceError(f"no interface {name!r} on this machine, which has: {there}", errno.ENODEV)
    if not int(_attribute(name, "flags"), 16) & _UP:
        raise DeviceError(f"interface {name!r} is down; ip link set {name} up", errno.ENETDOWN)
    if _attribute(name, "carrier") != "1":
        raise DeviceError(
            f"interface {name!r} is up but has no carrier: look at its cable, or its peer", errno.ENETDOWN
        )


def mtu(name: str) -> int:
    """Return the MTU of an interface, in bytes without its Ethernet header."""
    return int(_attribute(name, "mtu"))


def received(name: str) -> int:
    """Return the frames that came to an interface since it was made, those that the kernel dropped included."""
    return int(_attribute(name, "statistics/rx_packets")) + int(_attribute(name, "statistics/rx_dropped"))


def received_bytes(name: str) -> int:
    """Return the bytes of the frames that came to an interface since it was made."""
    return int(_attribute(name, "statistics/rx_bytes"))


def fanout_group(name: str, pid: int) -> int:
    """Return which group DPDK's af_packet driver puts its sockets on an interface into, in a process of that pid.

    As its `rte_eth_af_packet.c` counts, and has no option for. The kernel has no group on two interfaces: the second one is
    refused (EINVAL). OSError if there is no such interface.
    """
    return (pid ^ socket.if_nametoindex(name)) & 0xFFFF


def raw_socket(name: str) -> socket.socket:
    """Return a socket that sends whole Ethernet frames through an interface; DeviceError without the permission."""
    try:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    except PermissionError as error:
        raise DeviceError(
            f"no permission for raw frames on {name!r}: run as root, or give CAP_NET_RAW", errno.EPERM
        ) from error
    try:
        raw.bind((name, 0))
    except OSError as error:
        raw.close()
        raise DeviceError(f"interface {name!r}: {error.strerror}", error.errno or 0) from error
    return raw
