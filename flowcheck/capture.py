# SPDX-License-Identifier: MIT
"""Capture files, validated and counted before a frame of them goes anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flowcheck import _capture
from flowcheck._guarded_file import GuardedFile
from flowcheck.errors import CaptureError

__all__ = ["CaptureSummary", "frames", "plain", "validate"]


@dataclass(frozen=True)
class CaptureSummary:
    """What a capture file holds.

    Attributes:
        frames: frames in the file.
        bytes: bytes of them in the file.
        cut: frames of which the file holds less than was on the wire.
        longest: bytes of the longest frame.
        matched: frames to one of the flows asked for.
    """

    frames: int
    bytes: int
    cut: int
    longest: int
    matched: int


def validate(path: str | Path, flows: Iterable[tuple[bytes, bytes, int]] = ()) -> CaptureSummary:
    """Read a pcap or pcapng file to its end and return what it holds.

    Args:
        path: the file.
        flows: (source, destination, queue pair) of flows whose frames are counted in `matched`; addresses as 16 bytes.

    Raises:
        CaptureError: the file is missing, cut, corrupt, or not of Ethernet frames.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CaptureError(f"{path}: cannot read the capture: {error.strerror}", str(path)) from error
    if size == 0:
        raise CaptureError(f"{path}: the file is empty; expected a pcap or pcapng file", str(path))
    if found := plain(path, flows):
        found[0].close()
        return found[1]
    error, link, *counts = _capture.scan(os.fsencode(path), list(flows))
    if link is not None:
        raise CaptureError(f"{path}: link type {link}; expected EN10MB (Ethernet)", str(path))
    if error is not None:
        raise CaptureError(f"{path}: cannot be read past frame {counts[0]}: {error}", str(path))
    return CaptureSummary(*counts)


def plain(
    path: str | Path, flows: Iterable[tuple[bytes, bytes, int]] = ()
) -> tuple[GuardedFile, CaptureSummary] | None:
    """Map a capture whose frames can be taken where they lie, and return it and what it holds; None if it is not such a one.

    It is one if it is a whole file of Ethernet frames, pcap or little-endian pcapng of one interface. Arguments as for `validate`.
    """
    try:
        file = GuardedFile(os.fsencode(path))
    except OSError:
        return None
    counts = _capture.scan_plain(file, list(flows))
    if counts is None or file.cut:
        file.close()
        return None
    return file, CaptureSummary(*counts)


def frames(path: str | Path) -> Iterator[bytes]:
    """Yield the frames of a capture file that `validate` took; CaptureError if it has changed since."""
    try:
        yield from _capture.Frames(os.fsencode(path))
    except ValueError as error:
        raise CaptureError(f"{path}: changed while it was read: {error}", str(path)) from error
