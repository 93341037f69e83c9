# SPDX-License-Identifier: MIT
"""The dump stage: frames from a capture file or a DPDK port into a packet ring.

A stage is polled: `poll` does one burst and returns how much it did, `finished` says when nothing is left, `close` gives
everything back. Killed at any instruction and made anew over the same ring, it goes on where it was.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

from flowcheck._copy import CopyEngine

from flowcheck import interfaces
from flowcheck.capture import plain, validate
from flowcheck.errors import CaptureError, DeviceError
from flowcheck.mapped import PAGE
from flowcheck.ring import PacketRing
from packet_dump._dump import DumpLoop, FileLoop

__all__ = ["FileDump", "InterfaceDump", "PortDump"]

#: A capture file gives a frame at every poll until its end; so many empty polls mean that something is wrong.
EMPTY_POLLS = 10_000
_numbers = itertools.count()
#: What the kernel puts before a frame in a packet socket's ring: header, address, room for a VLAN tag (packet(7)).
PACKET_SOCKET_BYTES = 128
#: Frames that a packet socket's ring holds at least: what comes while the dump does not run for some milliseconds.
SOCKET_FRAMES = 4096
#: And the bytes that it has at most: the driver maps two of them, one to send, and counts their bytes in 32 bits.
MOST_SOCKET_BYTES = 1 << 30
#: Between two looks at an interface's counters while nothing comes.
COUNT_S = 0.02


class _Dump:
    """What file and port have in common."""

    _loop: DumpLoop | FileLoop

    def _open_port(
        self, ring: PacketRing, devargs: str, *, live: bool, waits: bool, frames: int, engine: CopyEngine | None
    ) -> None:
        engine = engine or CopyEngine()  # without devices: there is nothing to give back
        engine.register(ring.memory)
        self._loop = DumpLoop(ring.memory, devargs, live, waits, frames, engine)

    def poll(self) -> int:
        """Move one burst; return how many frames came."""
        return self._loop.poll()

    @property
    def finished(self) -> bool:
        """Whether no frame follows."""
        return self._loop.finished

    def counters(self) -> dict[str, int]:
        """Return frames `received`, `written`, `dropped_ring_full`, `missed_by_port`, and what a DMA engine copied."""
        state = self._loop.state_values
        del state["interface_base"]
        return {"received": state["written"] + state["dropped_ring_full"], **state}

    def close(self) -> None:
        """Stop the port and give its buffers back."""
        self._loop.close()


class FileDump(_Dump):
    """Dumps a capture file; a full ring makes it wait.

    A plain file's frames are copied from where they lie in it, mapped. What is not plain (`flowcheck.capture.plain`) comes through
    DPDK's pcap driver, and so does all if DMA engines copy: they reach the driver's buffers, not a file's pages.

    Args:
        eal: DPDK, started.
        path: a pcap or pcapng file of Ethernet frames; read to its end once before, CaptureError if it cannot be.
        ring: where the frames go; one that an earlier dump of the same file began is gone on with.
        engine: copies the frames; the CPU if none is given.
    """

    def __init__(self, eal: object, path: str | Path, ring: PacketRing, engine: CopyEngine | None = None) -> None:
        self._path = Path(path)
        found = None if engine is not None and engine.names else plain(path)
        self._file, summary = found or (None, validate(path))
        if summary.frames < ring.written:
            raise CaptureError(
                f"{path}: {summary.frames} frames, but the ring has {ring.written} of an earlier dump", str(path)
            )
        self._folder: Path | None = None
        if self._file is not None:
            self._loop = FileLoop(ring.memory, self._file, summary.frames)
            return
        # Device arguments know neither quoting nor escapes: the driver gets a name without commas.
        self._folder = Path(tempfile.mkdtemp(prefix="flowcheck-dump-"))
        link = self._folder / "capture"
        link.symlink_to(self._path.resolve())
        devargs = f"net_pcap_fc{os.getpid()}_{next(_numbers)},rx_pcap={link}"
        try:
            self._open_port(ring, devargs, live=False, waits=True, frames=summary.frames, engine=engine)
        except BaseException:
            shutil.rmtree(self._folder)
            raise

    def poll(self) -> int:
        """Move one burst; return how many frames came."""
        moved = self._loop.poll()
        if not moved and (self._loop.changed if self._file is not None else self._loop.empty_polls > EMPTY_POLLS):
            taken = self._loop.state_values["written"]
            raise CaptureError(
                f"{self._path}: no frame can be read after {taken}; was the file changed?", str(self._path)
            )
        return moved

    def close(self) -> None:
        """Give the file, or the port and its buffers, back."""
        if self._file is not None:
            self._file.close()
            return
        super().close()
        if self._folder is not None and self._folder.exists():
            shutil.rmtree(self._folder)


class PortDump(_Dump):
    """Dumps a DPDK port until `stop`; what a full ring cannot take is counted `dropped_ring_full`.

    A memif port is left alone while the ring is full: what feeds it may wait, as no mirror can.

    Args:
        eal: DPDK, started.
        devargs: the port's device arguments, e.g. "net_af_packet0,iface=mon0" or a PCI address.
        ring: where the frames go.
        engine: copies the frames; the CPU if none is given.
    """

    def __init__(self, eal: object, devargs: str, ring: PacketRing, engine: CopyEngine | None = None) -> None:
        if not devargs:
            raise DeviceError("no port is named")
        self._last: float | None = None  # frames taken when it ends, once it is told to
        self._waits = devargs.startswith("net_memif")
        self._ring = ring
        self._open_port(ring, devargs, live=True, waits=self._waits, frames=0, engine=engine)

    def poll(self) -> int:
        """Move one burst; return how many frames came."""
        moved = self._loop.poll()
        if self._last is not None and ((not moved and not self._loop.held) or self._loop.frames_taken >= self._last):
            self._loop.stop()
        return moved

    def stop(self) -> None:
        """Take what waits at the port, then say that no frame follows: the stages behind end when they have drained the ring.

        The first poll that finds nothing ends it, or the ring's room of further frames: a mirror may never fall silent.
        What a memif port was kept from sending is all taken.
        """
        if self._last is None:
            self._last = math.inf if self._waits else self._loop.frames_taken + self._ring.records


class InterfaceDump(PortDump):
    """Dumps an interface of the kernel through a packet socket's ring (DPDK's af_packet driver).

    Args:
        eal: DPDK, started.
        interface: its name; DeviceError if it is missing, down, or the permission for packet sockets is.
        ring: where the frames go.
        engine: copies the frames; the CPU if none is given.
        frames: room of the socket's ring, at least SOCKET_FRAMES and at most MOST_SOCKET_BYTES.
    """

    def __init__(
        self, eal: object, interface: str, ring: PacketRing, engine: CopyEngine | None = None, frames: int = 0
    ) -> None:
        interfaces.check(interface)
        interfaces.raw_socket(interface).close()  # says what is wrong better than the driver does
        size = 1 << (ring.record_bytes + PACKET_SOCKET_BYTES - 1).bit_length()
        frames = min(1 << (max(frames, SOCKET_FRAMES) - 1).bit_length(), MOST_SOCKET_BYTES // size)
        super().__init__(
            eal,
            f"net_af_packet_fc{os.getpid()}_{next(_numbers)},iface={interface},blocksz={max(size, PAGE)},framesz={size},"
            f"framecnt={frames}",
            ring,
            engine,
        )
        self._interface, self._looked = interface, 0.0
        self._loop.note_interface(interfaces.received(interface))

    def poll(self) -> int:
        """Move one burst; return how many frames came."""
        now = time.monotonic()
        if now - self._looked < COUNT_S:
            return super().poll()
        self._looked = now
        count = self._count()
        moved = super().poll()
        if not moved and count is not None:
            self._loop.note_interface(count)
        return moved

    def _count(self) -> int | None:
        try:
            return interfaces.received(self._interface)
        except OSError:
            return None  # taken away; what came of it is in the ring
