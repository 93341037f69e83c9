# SPDX-License-Identifier: MIT
"""Compressing blocks of logged gradients, and deciding whether that pays.

Bits of equal weight of a block's elements are put side by side (blosc's bit shuffle): those of the exponents repeat, those
of the mantissas do not, and LZ4 takes the ones and passes over the others. Every block is packed by itself, so that a
record stays readable block by block. This module knows bytes, neither files nor plans. Why so, with figures:
docs/decisions/0012-compressing-the-log.md.

A packed block, little-endian: CRC32C of the block (4 bytes); a blosc frame of its whole elements, whose header says their
width and every length; the bytes of a last, cut element as they are.
"""

from __future__ import annotations

import statistics
import struct
from collections import deque
from functools import cache
from types import ModuleType

import google_crc32c
import numpy as np

__all__ = ["Judge", "compress", "decompress"]

_WIDTHS = (1, 2, 4, 8)
#: Of blosc's one to nine: lower ones cut a block into smaller pieces and save less, higher ones take longer.
_LEVEL = 5
#: A block is packed if that saves at least this share of it. On a disk slow enough to compress for, unpacking makes reading
#: a tenth to a seventh longer, and a record is read less often than written.
_LEAST_SAVING = 1 / 16
_CHECKSUM = struct.Struct("<I")
# version, version of the codec's format, flags, bytes of an element; bytes unpacked, of a piece, packed with this header
_FRAME = struct.Struct("<BBBBIII")
#: Versions of blosc 1's format and of its LZ4's.
_VERSIONS = (2, 1)
#: Bit shuffle (bit 2) and LZ4 (1 in the upper three bits); bit 4, that pieces are not split, is as the library likes.
_FLAGS, _FLAG_NOT_SPLIT = 0x24, 0x10


@cache
def _blosc() -> ModuleType:
    """Return the library; importing it takes longer than importing numpy, and few commands need it."""
    from numcodecs import blosc

    # Its own threads would make the order of a frame's pieces a matter of chance.
    blosc.use_threads = False
    return blosc


def compress(block: np.ndarray, width: int) -> bytes | None:
    """Return a block packed, or None if that does not make it at least a sixteenth smaller.

    May be called by several threads at once; while it packs, other threads run.

    Args:
        block: contiguous uint8, of any size; its last element may be cut.
        width: bytes of an element, 1, 2, 4 or 8; another than the gradient's packs worse, never wrong.

    Raises:
        ValueError: the block is no such array, or the width none of these.
    """
    if width not in _WIDTHS:
        raise ValueError(f"elements of {width} bytes, expected one of {', '.join(map(str, _WIDTHS))}")
    _check_block(block)
    whole = block.size - block.size % width
    if not whole:
        return None
    blosc = _blosc()
    frame = blosc.compress(block[:whole].view(f"u{width}"), b"lz4", _LEVEL, blosc.BITSHUFFLE)
    packed = _CHECKSUM.pack(google_crc32c.value(block)) + frame + block[whole:].tobytes()
    return packed if len(packed) <= block.size * (1 - _LEAST_SAVING) else None


def decompress(packed: bytes | memoryview, out: np.ndarray) -> None:
    """Unpack what `compress` gave into an array of the block's size; after an error that holds anything.

    Allocates no more than a few times the size of `out`, whatever `packed` says of itself. May be called by several threads at
    once.

    Args:
        packed: all bytes that `compress` returned.
        out: contiguous uint8, writable.

    Raises:
        ValueError: `packed` is something else, or of a block of another size, or `out` is no such array.
    """
    _check_block(out)
    if not out.flags.writeable:
        raise ValueError("a block is to be unpacked into an array that cannot be written")
    packed = memoryview(packed)
    whole = _check_frame(packed, out.size)
    end = packed.nbytes - (out.size - whole)
    try:
        _blosc().decompress(packed[_CHECKSUM.size : end], out[:whole])
    except RuntimeError as error:
        raise ValueError(f"a packed block of {out.size} bytes cannot be unpacked: {error}") from error
    out[whole:] = packed[end:]
    if google_crc32c.value(out) != _CHECKSUM.unpack_from(packed)[0]:
        raise ValueError(f"checksum of a packed block of {out.size} bytes is wrong")


def _check_block(block: np.ndarray) -> None:
    if block.dtype != np.uint8 or block.ndim != 1 or not block.flags.c_contiguous:
        raise ValueError(f"a block of {block.ndim} dimensions of {block.dtype}, expected one, contiguous, of uint8")


def _check_frame(packed: memoryview, size: int) -> int:
    """Return how many bytes the frame of a packed block of a size unpacks to.

    The library takes a frame's lengths as its header says them, whatever it was given: each is held against what is there.
    """
    if packed.nbytes < _CHECKSUM.size + _FRAME.size:
        raise ValueError(f"a packed block of {packed.nbytes} bytes, expected at least {_CHECKSUM.size + _FRAME.size}")
    *versions, flags, width, unpacked, piece, length = _FRAME.unpack_from(packed, _CHECKSUM.size)
    if tuple(versions) != _VERSIONS or flags & ~_FLAG_NOT_SPLIT != _FLAGS or width not in _WIDTHS:
        raise ValueError(f"a packed block begins with {bytes(packed[4:8]).hex()}: not known to this release")
    whole = size - size % width
    expected = packed.nbytes - _CHECKSUM.size - (size - whole)
    if (unpacked, length) != (whole, expected) or not width <= piece <= whole:
        raise ValueError(
            f"a packed block says that {length} bytes become {unpacked} in pieces of {piece}, expected {expected} and {whole}"
        )
    pieces = -(-whole // piece)
    if _FRAME.size + 4 * pieces > length:
        raise ValueError(f"a packed block of {length} bytes says that it has {pieces} pieces")
    return whole


class Judge:
    """Decides whether the next iteration is logged compressed: worth -> note -> worth ...

    Seconds are compared with seconds, as they came: with and without compression, of the last few iterations logged in
    each way, a byte of gradient. So what a sync costs however little is written is not taken for something that could be
    saved. What compression saves is not believed to be more than in proportion to the bytes: beyond that the disk has changed
    since it was last written to without. While one way is in use the other is tried every 64th iteration.
    """

    #: Iterations of each way that are remembered; the first are taken in turn.
    REMEMBERED = 5
    #: One in so many iterations is logged the other way.
    TRIED_EVERY = 64
    #: Compressed, an iteration must take at most this share of the time: cores are spent on it, too.
    MOST_SHARE = 0.95

    def __init__(self) -> None:
        """Begin without any experience."""
        self._plain: deque[float] = deque(maxlen=self.REMEMBERED)  # seconds a byte of gradient, to write and sync it
        self._packed: deque[tuple[float, float, float]] = deque(maxlen=self.REMEMBERED)  # the same; to compress; size
        self._since = [0, 0]  # iterations since the last one without, and the last one with compression

    def worth(self) -> bool:
        """Return whether to compress the next iteration; asks nothing but what was noted, and changes nothing."""
        if min(len(self._plain), len(self._packed)) < self.REMEMBERED:
            return len(self._packed) < len(self._plain)
        pays = self._pays()
        return pays != (self._since[not pays] + 1 >= self.TRIED_EVERY)

    def note(self, raw_bytes: int, packed_bytes: int, compress_s: float, write_s: float) -> None:
        """Take what logging an iteration took.

        Args:
            raw_bytes: of its gradient.
            packed_bytes: written for it.
            compress_s: seconds that the log waited for compression; 0.0 says that the iteration was not compressed.
            write_s: seconds for writing and syncing.

        Raises:
            ValueError: nothing was written, or of nothing.
        """
        if raw_bytes <= 0 or packed_bytes <= 0:
            raise ValueError(f"an iteration of {raw_bytes} bytes, logged as {packed_bytes}: expected both above 0")
        compressed = compress_s > 0
        self._since[compressed] = 0
        self._since[not compressed] += 1
        if compressed:
            self._packed.append((write_s / raw_bytes, compress_s / raw_bytes, packed_bytes / raw_bytes))
        else:
            self._plain.append(write_s / raw_bytes)

    def _pays(self) -> bool:
        write_s, compress_s, size = (statistics.median(values) for values in zip(*self._packed, strict=True))
        plain_s = min(statistics.median(self._plain), write_s / size)
        return write_s + compress_s <= self.MOST_SHARE * plain_s
