# SPDX-License-Identifier: MIT
"""Unpacks blocks that are forged inside, between pages that nobody may touch: one step too far ends this process.

Headers stay right, so that the library itself meets what was forged: where its pieces begin, how long they are, what is in
them. Prints how many were refused and how many came back unharmed.
"""

import ctypes
import mmap
import struct
import sys

import numpy as np

from updater.compression import compress, decompress

PAGE = mmap.PAGESIZE
#: In a packed block: the length of a piece, and where each piece begins (counted from byte 4).
PIECE_BYTES, STARTS = 12, 20
EXTREMES = (0, 1, 15, 16, 2**31 - 1, 2**31, 2**32 - 1)


def fenced(size, at_end):
    """Return an array that ends right before, or begins right after, a page that cannot be touched."""
    pages = -(-size // PAGE)
    memory = np.frombuffer(mmap.mmap(-1, (pages + 2) * PAGE), np.uint8)
    for fence in (0, (pages + 1) * PAGE):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.ctypes.data + fence), PAGE, 0):
            raise OSError("mprotect failed")
    begin = (pages + 1) * PAGE - size if at_end else PAGE
    return memory[begin : begin + size]


def forge(packed, size, random):
    """Return a packed block with something wrong inside."""
    forged = bytearray(packed)
    (piece,) = struct.unpack_from("<I", forged, PIECE_BYTES)
    pieces = -(-size // piece)
    start = STARTS + 4 * int(random.integers(pieces))
    value = int(random.choice([*EXTREMES, len(packed) - 4, len(packed) - 5, random.integers(len(packed))]))
    kind = random.integers(4)
    if kind == 0:
        struct.pack_into("<I", forged, start, value)
    elif kind == 1:  # the length that stands at a piece's begin
        struct.pack_into("<I", forged, 4 + struct.unpack_from("<I", forged, start)[0], value)
    elif kind == 2:
        struct.pack_into("<I", forged, PIECE_BYTES, 8 * int(random.integers(1, size // 8)))
    for _ in range(int(random.integers(1, 20)) if kind == 3 else 0):
        forged[random.integers(STARTS + 4 * pieces, len(forged))] = random.choice([0, 15, 240, 255])
    return bytes(forged)


def main(trials):
    """Forge so many blocks."""
    random = np.random.default_rng(5)
    refused = unharmed = 0
    for trial in range(0, trials, 100):
        size, width = int(random.choice([1000, 20_000, 100_000])), int(random.choice([1, 2, 4, 8]))
        block = random.normal(0, 0.01, size // 4).astype(np.float32).view(np.uint8)
        block[: size // 2] = np.resize(np.arange(37, dtype=np.uint8), size // 2)
        packed = compress(block, width)
        source, out = fenced(len(packed), trial % 200 == 0), fenced(size, trial % 400 < 200)
        for _ in range(100):
            source[:] = np.frombuffer(forge(packed, size, random), np.uint8)
            try:
                decompress(memoryview(source), out)
            except ValueError:
                refused += 1
            else:
                unharmed += 1
                if not np.array_equal(out, block):
                    raise AssertionError("other bytes were taken for right")
    print(refused, unharmed)


if __name__ == "__main__":
    main(int(sys.argv[1]))
