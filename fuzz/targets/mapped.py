# SPDX-License-Identifier: MIT
"""Input: which file, and edits of 5 bytes (offset 2, how 1, with what 2) on a ring or slot file before a stage opens it.

It is refused by name, or whoever opens it works: a parser and an extractor go over a ring that was taken.
"""

from __future__ import annotations

import os
import struct
import tempfile
from functools import cache
from pathlib import Path

from data_extractor.extractor import Extractor
from flowcheck.errors import ConfigError, FormatError
from flowcheck.ring import PacketRing
from flowcheck.slots import SlotFile
from fuzz.fixture import reduced
from packet_parser.parser import Parser

__all__ = ["one", "seeds"]

_RECORDS = 4


@cache
def _plan():
    return reduced()


@cache
def _images() -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        identity, stream = _plan().identity(), "host0"
        with PacketRing.create(
            folder / "ring", frame_bytes=256 + 192, records=_RECORDS, identity=identity, stream=stream
        ) as ring:
            first = bytes(ring.memory)
        with SlotFile.for_plan(folder / "slots", _plan()) as slots:
            return first, bytes(slots.memory)


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-mapped-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def one(data: bytes) -> None:
    """Open the file that an input makes, and let the stages at it."""
    if not data:
        return
    number = data[0] & 1
    content = bytearray(_images()[number])
    for at in range(1, len(data) - 4, 5):
        high, low, how, first, second = data[at : at + 5]
        place = (high << 8 | low) % len(content)
        if how & 3 == 3:
            place &= ~7
            value = struct.pack("<Q", ((1 << (first & 63)) - second) % 2**64 if first & 64 else first)
        elif how & 3 == 2:
            value = bytes([first, second])
        else:
            place %= 512
            value = bytes([first]) if how & 3 else struct.pack("<I", first | second << 24)
        content[place : place + len(value)] = value[: len(content) - place]
    if data[0] & 2:
        size = (data[-1] << 8 | data[-2]) if len(data) > 3 else 0
        content = (content + bytes(8192))[: size * 4 % (len(content) + 8192)]
    for name, image in zip(("ring", "slots"), _images(), strict=True):
        (_folder() / name).write_bytes(image)
    (_folder() / ("ring", "slots")[number]).write_bytes(content)
    try:
        _stages()
    except (FormatError, ConfigError) as error:
        if "\n" in str(error):
            raise AssertionError("an error is one line") from error


def _stages() -> None:
    plan = _plan()
    with (
        PacketRing.for_stream(_folder() / "ring", plan, "host0") as ring,
        SlotFile.for_plan(_folder() / "slots", plan) as slots,
    ):
        parser = Parser(ring, plan, "host0")
        extractor = Extractor([ring], plan, slots)
        try:
            for _ in range(3):
                parser.poll()
                extractor.poll()
            if ring.parsed > ring.written or ring.extracted > ring.parsed:
                raise AssertionError(f"cursors {ring.extracted}, {ring.parsed}, {ring.written}")
            for index in range(min(ring.records, ring.parsed)):
                if len(ring.frame(index)) > ring.record_bytes - 64:
                    raise AssertionError("a frame longer than its record")
        finally:
            extractor.close()
            parser.close()


def seeds() -> list[bytes]:
    """Return inputs to begin from."""
    written = bytes([0, 1, 0, 3, 64 + 2, 0])  # the written cursor, 4
    return [
        b"\0",
        b"\1",
        b"\2\0\0\0",
        b"\3\0\1\0",
        written,
        b"\0\1\x40\3\5\0",
        b"\0\1\x80\3\5\0",
        b"\1\0\xc0\3\5\0",
        b"\1\x01\0\3\5\0",
    ]
