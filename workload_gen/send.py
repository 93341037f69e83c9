# SPDX-License-Identifier: MIT
"""Plays a capture file onto an interface, frame by frame as they were captured."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from flowcheck import capture, interfaces
from flowcheck.errors import DeviceError

__all__ = ["Sent", "send"]

#: Bytes sent between two looks at the clock.
_SLICE_BYTES = 64 << 10
#: Ethernet header and one VLAN tag: what an interface carries beside its MTU.
_ETHERNET_BYTES = 18


@dataclass(frozen=True)
class Sent:
    """What was played: frames, their bytes, and how long it took."""

    frames: int
    bytes: int
    seconds: float


def send(path: str | Path, interface: str, gbps: float = 1.0) -> Sent:
    """Send every frame of a capture through an interface, at most `gbps` Gbit/s of frame bytes; a mirror has no flow control.

    The file is read to its end before the first frame leaves.

    Raises:
        CaptureError: the file cannot be read to its end.
        DeviceError: no such interface, it is down, frames are longer than it takes, or the permission is missing.
    """
    path = Path(path)
    interfaces.check(interface)
    longest = capture.validate(path).longest
    most = interfaces.mtu(interface) + _ETHERNET_BYTES
    if longest > most:
        raise DeviceError(
            f"{interface}: takes frames of {most} bytes, {path} has one of {longest}; "
            f"ip link set {interface} mtu {longest - 14}",
            errno.EMSGSIZE,
        )
    count = size = 0
    begin = time.monotonic()
    with contextlib.closing(interfaces.raw_socket(interface)) as out:
        out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        paced = 0
        for frame in capture.frames(path):
            try:
                out.send(frame)
            except OSError as error:
                raise DeviceError(
                    f"{interface}: does not send frame {count + 1} of {path}: {error.strerror}", error.errno or 0
                ) from error
            count, size = count + 1, size + len(frame)
            if size - paced > _SLICE_BYTES:
                paced = size
                time.sleep(max(0.0, begin + size * 8e-9 / gbps - time.monotonic()))
    return Sent(count, size, time.monotonic() - begin)
