# SPDX-License-Identifier: MIT
"""The wire of a job without root: local sockets instead of cables, and a switch that is a thread of this process.

For ranks it is what `workload_gen.fabric` is: the same adapters send the same frames. The switch hands what a mirrored
port sees to a live dump through shared memory, by the memif protocol (DPDK, drivers/net/memif): the dump's port is the
server, the switch its client. A full ring makes the switch wait, so that nothing is lost while a dump lives; what finds
none is counted.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import select
import socket
import struct
import threading
import time
from types import TracebackType

from flowcheck.errors import DeviceError
from workload_gen._switch import FRAMES_LOG2, RING_BYTES, Forwarder
from workload_gen.fabric import Network, connect_local, give_room, listen_local, of_this_user
from workload_gen.wire import mac

__all__ = ["Switch"]

_MESSAGE_BYTES = 128
_ACK, _HELLO, _INIT, _ADD_REGION, _ADD_RING, _CONNECT, _CONNECTED = range(1, 8)
_VERSION = 2 << 8
_TO_SERVER = 1
_PATIENCE_S = 5.0
#: Between two looks for a dump while no frame comes.
_LOOK_MS = 100


class _Dump:
    """The connection to a port's dump: made when there is one to connect to, again when that one is gone."""

    def __init__(self, forwarder: Forwarder, port: int, name: str, secret: str) -> None:
        self._forwarder, self._port, self._name, self._secret = forwarder, port, name, secret.encode()
        self.control: socket.socket | None = None

    def connect(self) -> None:
        """Connect to the dump if it listens, and give it a ring."""
        with contextlib.suppress(ConnectionError, FileNotFoundError):
            control = connect_local(self._name)
            try:
                control.settimeout(_PATIENCE_S)
                self._offer(control)
            except (OSError, DeviceError):
                control.close()
                return
            self.control = control

    def _offer(self, control: socket.socket) -> None:
        region = os.memfd_create("flowcheck-switch", os.MFD_CLOEXEC)
        wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            os.ftruncate(region, RING_BYTES)
            memory = memoryview(mmap.mmap(region, RING_BYTES))
            Forwarder.prepare(memory)
            _expect(control, _HELLO)
            for kind, body, descriptors, answer in (
                (_INIT, struct.pack("<HIB24s32s", _VERSION, 0, 0, self._secret, b"flowcheck"), [], _ACK),
                (_ADD_REGION, struct.pack("<HQ", 0, RING_BYTES), [region], _ACK),
                (_ADD_RING, struct.pack("<HHHIBH", _TO_SERVER, 0, 0, 0, FRAMES_LOG2, 0), [wake], _ACK),
                (_CONNECT, b"switch", [], _CONNECTED),
            ):
                message = (struct.pack("<H", kind) + body).ljust(_MESSAGE_BYTES, b"\0")
                if descriptors:
                    socket.send_fds(control, [message], descriptors)
                else:
                    control.send(message)
                _expect(control, answer)
            self._forwarder.dump(self._port, memory, control.fileno())
        finally:
            os.close(region)
            os.close(wake)

    def drain(self) -> None:
        """Wait until the dump has taken everything: it loses the ring with the connection."""
        end = time.monotonic() + _PATIENCE_S
        while self.control is not None and self._forwarder.waiting(self._port) and time.monotonic() < end:
            if select.select([self.control], [], [], 0.001)[0]:
                return  # it is gone

    def disconnect(self) -> None:
        """Give up the connection; what is still in the ring is counted as unmirrored."""
        if self.control is not None:
            self._forwarder.dump(self._port, None, -1)
            self.control.close()
            self.control = None


def _expect(control: socket.socket, kind: int) -> None:
    """Take a message of the memif protocol; ConnectionError if it is another."""
    message = control.recv(_MESSAGE_BYTES)
    if len(message) != _MESSAGE_BYTES or struct.unpack_from("<H", message)[0] != kind:
        raise ConnectionError(f"the dump answers {message[:100]!r}")


class Switch:
    """The network of a job in one user's processes, as `workload_gen.fabric.Fabric`; use it in a `with`.

    Attributes:
        hosts: the local sockets of its ports, by rank.
        monitors: DPDK device arguments of the ports that show mirrored frames, by rank.
    """

    def __init__(self, ranks: int, mirrored: tuple[int, ...]) -> None:
        token = secrets.token_hex(8)
        self.hosts = [f"@flowcheck-{token}-r{rank}" for rank in range(ranks)]
        self.monitors = {}
        self._forwarder = Forwarder([mac(rank) for rank in range(ranks)])
        self._dumps = {}
        for rank in mirrored:
            name, secret = f"flowcheck-{token}-m{rank}", secrets.token_hex(11)
            self.monitors[rank] = f"net_memif{rank},role=server,socket={name},socket-abstract=yes,secret={secret}"
            self._dumps[rank] = _Dump(self._forwarder, rank, f"@{name}", secret)
            self._forwarder.mirror(rank, True)
        self._stop, self._stopped = os.eventfd(0, os.EFD_CLOEXEC), False
        self._thread = threading.Thread(target=self._run, name="switch", daemon=True)

    @property
    def network(self) -> Network:
        """What ranks need of it."""
        return Network(tuple(self.hosts), "", self.monitors)

    @property
    def unmirrored(self) -> int:
        """Frames of mirrored ports that found no dump."""
        return self._forwarder.unmirrored

    def mirrored(self, rank: int) -> tuple[int, int]:
        """Return how many frames and bytes of a port a dump was given."""
        return self._forwarder.mirrored(rank)

    def mirror(self, rank: int, on: bool = True) -> None:
        """Begin, or end, the mirroring of a port."""
        self._forwarder.mirror(rank, on)

    def __enter__(self) -> Switch:
        self._listeners = [listen_local(host) for host in self.hosts]
        self._thread.start()
        return self

    def _run(self) -> None:
        """Move frames until `close`."""
        listening = {listener.fileno(): rank for rank, listener in enumerate(self._listeners)}
        connected: dict[int, tuple[int, socket.socket]] = {}
        latest: dict[int, socket.socket] = {}
        poll = select.poll()
        for descriptor in (self._stop, *listening):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = poll.poll(_LOOK_MS)
            for dump in self._dumps.values():  # before what has come is moved: a dump that listens gets all of it
                if dump.control is None:
                    dump.connect()
                    if dump.control is not None:
                        poll.register(dump.control, select.POLLIN)
            controls = {dump.control.fileno(): dump for dump in self._dumps.values() if dump.control is not None}
            for descriptor, _ in ready:
                if descriptor == self._stop:
                    for _, host in connected.values():
                        host.close()
                    return
                if descriptor in listening:
                    rank = listening[descriptor]
                    host, _ = self._listeners[rank].accept()
                    if not of_this_user(host):
                        host.close()
                        continue
                    give_room(host)
                    connected[host.fileno()], latest[rank] = (rank, host), host
                    poll.register(host, select.POLLIN)
                    self._forwarder.connect(rank, host.fileno())
                elif descriptor in controls:  # it has nothing to say but that it goes
                    poll.unregister(descriptor)
                    controls[descriptor].disconnect()
                elif not self._forwarder.forward(connected[descriptor][0], descriptor):
                    poll.unregister(descriptor)
                    rank, host = connected.pop(descriptor)
                    if latest[rank] is host:
                        self._forwarder.connect(rank, -1)
                    host.close()

    def close(self) -> None:
        """Take the network away."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)
        for dump in self._dumps.values():
            dump.drain()
            dump.disconnect()
        for listener in self._listeners:
            listener.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
