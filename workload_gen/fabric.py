# SPDX-License-Identifier: MIT
"""A small network on one machine: a host per rank, a switch between them, mirrored ports, a monitor port.

Hosts and switch are network namespaces, cables are veth pairs, the switch is a bridge, and the mirroring is the
switch's own: `tc ... action mirred egress mirror`, both directions of the chosen ports. Frames carry addresses that no
kernel owns, so nothing but the adapters of `workload_gen._nic` answers. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from flowcheck import interfaces
from flowcheck.errors import ConfigError, DeviceError
from flowcheck.files import write_private
from workload_gen.wire import mac

__all__ = ["Fabric", "Network", "adapter_socket", "connect_local", "give_room", "listen_local", "of_this_user"]

_NAMESPACES = "/run/netns"
_OURS = re.compile(r"fc(\d+)-(?:r\d+|switch)")
_CLONE_NEWNET = 0x40000000
_SOL_PACKET, _PACKET_IGNORE_OUTGOING, _ETH_P_ALL = 263, 23, 3
_MTU = 9000
#: An adapter does not lose what it is sent while its host computes.
_BUFFER_BYTES = 32 << 20


def _ip(*commands: str) -> None:
    """Run commands of ip(8) in one batch; DeviceError if one fails."""
    try:
        subprocess.run(
            ["ip", "-batch", "-"], input="\n".join(commands) + "\n", check=True, capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise DeviceError("ip(8) is not installed: apt-get install iproute2") from error
    except subprocess.CalledProcessError as error:
        raise DeviceError(f"cannot build the network: {' '.join(error.stderr.split())}; it needs root") from error


@contextlib.contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """Be in a network namespace with this thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, open(f"{_NAMESPACES}/{namespace}") as there:
        for file, what in ((there, "enter"), (home, "leave")):
            if file is home:
                yield
            if libc.setns(file.fileno(), _CLONE_NEWNET):
                code = ctypes.get_errno()
                raise DeviceError(f"cannot {what} network namespace {namespace}: {os.strerror(code)}", code)


def give_room(end: socket.socket) -> None:
    """Let a socket hold what comes while its reader does not run, as far as the system allows."""
    for forced, option in ((33, socket.SO_RCVBUF), (32, socket.SO_SNDBUF)):  # SO_RCVBUFFORCE, SO_SNDBUFFORCE
        try:
            end.setsockopt(socket.SOL_SOCKET, forced, _BUFFER_BYTES)
        except PermissionError:  # as much as the system gives anybody
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)


def listen_local(name: str) -> socket.socket:
    """Return a socket that listens for frames from this machine under a name that begins with "@"."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"\0{name[1:]}")
    listener.listen()
    return listener


def of_this_user(end: socket.socket) -> bool:
    """Return whether the process at the other end of a local socket is this user's: anybody may use any name."""
    _, user, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user == os.getuid()


def connect_local(name: str) -> socket.socket:
    """Return a socket connected to the one that listens under a name; ConnectionError if none of this user does."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        end.connect(f"\0{name[1:]}")
        if not of_this_user(end):
            raise ConnectionError(f"{name}: another user listens there")
    except OSError:
        end.close()
        raise
    return end


def adapter_socket(host: str, interface: str) -> socket.socket:
    """Return a socket for `workload_gen._nic.Nic`.

    Args:
        host: a namespace, or the local socket of a port of `workload_gen.switch`, whose name begins with "@".
        interface: in the namespace.

    Raises:
        DeviceError: nothing of this user listens at the local socket, or the namespace cannot be entered.
    """
    if host.startswith("@"):
        try:
            end = connect_local(host)
        except ConnectionError as error:
            raise DeviceError(f"no switch at {host}: {error}; is the process that made it there still?") from error
        give_room(end)
        return end
    with _inside(host):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    raw.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    give_room(raw)
    raw.bind((interface, _ETH_P_ALL))
    return raw


@dataclass(frozen=True)
class Network:
    """What a job needs of a network.

    Attributes:
        hosts: of each rank, what `adapter_socket` takes.
        interface: in each of them.
        monitors: what shows a rank's mirrored port: an interface, or in-process the device arguments of a DPDK port.
    """

    hosts: tuple[str, ...]
    interface: str
    monitors: dict[int, str]

    @property
    def transport(self) -> str:
        """What carries the frames: "fabric" or "in-process"."""
        return "in-process" if self.hosts[0].startswith("@") else "fabric"

    def source(self, rank: int) -> dict[str, str]:
        """Return what the stream of a mirrored rank says in a plan: its `interface` or its `port`."""
        return {"port" if self.transport == "in-process" else "interface": self.monitors[rank]}

    @classmethod
    def load(cls, path: Path) -> Network:
        """Return the network that a JSON file describes; ConfigError if it does not."""
        try:
            found = json.loads(path.read_text())
            monitors = {int(rank): str(name) for rank, name in found["monitors"].items()}
            return cls(tuple(map(str, found["hosts"])), str(found["interface"]), monitors)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: no description of a network: {error}") from error

    def store(self, path: Path) -> None:
        """Write the description into a JSON file; mode 0600."""
        write_private(path, json.dumps(asdict(self)).encode())


class Fabric:
    """The network of a job, from `open` to `close`; use it in a `with`.

    Attributes:
        hosts: namespace of each rank's host; its interface is INTERFACE.
        monitors: interfaces of this process's namespace that show the mirrored ports, by rank.
    """

    INTERFACE = "roce0"

    def __init__(self, ranks: int, mirrored: tuple[int, ...]) -> None:
        self._name = f"fc{os.getpid()}"
        self.switch = f"{self._name}-switch"
        self.hosts = [f"{self._name}-r{rank}" for rank in range(ranks)]
        self.monitors = {rank: f"{self._name}m{rank}" for rank in mirrored}

    @property
    def network(self) -> Network:
        """What ranks need of it."""
        return Network(tuple(self.hosts), self.INTERFACE, self.monitors)

    def __enter__(self) -> Fabric:
        _remove_abandoned()
        quiet = f"addrgenmode none mtu {_MTU} up"
        try:
            _ip(*(f"netns add {name}" for name in (self.switch, *self.hosts)))
            self._build(quiet)
        except BaseException:
            self.close()
            raise
        return self

    def _build(self, quiet: str) -> None:
        # A switch says nothing of its own into the cables.
        self._in_switch("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6")
        inside = ["link add bridge type bridge stp_state 0 mcast_snooping 0", f"link set bridge {quiet}"]
        for rank, host in enumerate(self.hosts):
            inside += [
                f"link add port{rank} type veth peer name {self.INTERFACE} netns {host}",
                f"link set port{rank} master bridge",
                f"link set port{rank} {quiet}",
            ]
        for rank, monitor in self.monitors.items():
            inside += [
                f"link add mirror{rank} type veth peer name {monitor} netns {os.getpid()}",
                f"link set mirror{rank} {quiet}",
            ]
        self._in_switch("ip", "-batch", "-", text="\n".join(inside) + "\n")
        # As a switch that has seen every host: a mirrored port shows what is for it, and nothing flooded.
        known = [f"fdb add {mac(rank).hex(':')} dev port{rank} master static" for rank in range(len(self.hosts))]
        quiet_ports = [f"link set dev port{rank} flood off" for rank in range(len(self.hosts))]
        self._in_switch("bridge", "-batch", "-", text="\n".join(known + quiet_ports) + "\n")
        for host in self.hosts:
            self._inside(host, "ip", "link", "set", self.INTERFACE, *quiet.split())
        for rank, monitor in self.monitors.items():
            _ip(f"link set {monitor} {quiet}")
            self._in_switch("tc", "qdisc", "add", "dev", f"port{rank}", "clsact")
            self.mirror(rank)

    def mirrored(self, rank: int) -> tuple[int, int]:
        """Return how many frames and bytes of a port came to its monitor."""
        monitor = self.monitors[rank]
        return interfaces.received(monitor), interfaces.received_bytes(monitor)

    def mirror(self, rank: int, on: bool = True) -> None:
        """Begin, or end, the mirroring of a port."""
        for direction in ("ingress", "egress"):
            where = ("dev", f"port{rank}", direction, "protocol", "all", "prio", "1")
            if on:
                action = (
                    "u32",
                    "match",
                    "u32",
                    "0",
                    "0",
                    "action",
                    "mirred",
                    "egress",
                    "mirror",
                    "dev",
                    f"mirror{rank}",
                )
                self._in_switch("tc", "filter", "add", *where, *action)
            else:
                self._in_switch("tc", "filter", "del", *where)

    def _in_switch(self, *command: str, text: str | None = None) -> None:
        self._inside(self.switch, *command, text=text)

    def _inside(self, namespace: str, *command: str, text: str | None = None) -> None:
        try:
            subprocess.run(
                ["ip", "netns", "exec", namespace, *command], input=text, check=True, capture_output=True, text=True
            )
        except subprocess.CalledProcessError as error:
            what = " ".join(command)
            raise DeviceError(f"cannot build the network: {what}: {' '.join(error.stderr.split())}") from error

    def close(self) -> None:
        """Take the network away."""
        for monitor in self.monitors.values():  # the kernel takes a namespace's cables away later
            if os.path.exists(f"/sys/class/net/{monitor}"):
                _ip(f"link del {monitor}")
        for name in (*self.hosts, self.switch):
            if os.path.exists(f"{_NAMESPACES}/{name}"):
                _ip(f"netns del {name}")

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove_abandoned() -> None:
    """Take away the networks of processes that were killed."""
    for name in os.listdir(_NAMESPACES) if os.path.isdir(_NAMESPACES) else ():
        ours = _OURS.fullmatch(name)
        if ours and not os.path.exists(f"/proc/{ours[1]}"):
            with contextlib.suppress(DeviceError):  # another process may have been first
                _ip(f"netns del {name}")
