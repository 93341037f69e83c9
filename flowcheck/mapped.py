# SPDX-License-Identifier: MIT
"""Files that stages share by mapping them: made whole or not at all, private to their owner, mapped for both directions."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

from flowcheck.errors import FormatError

__all__ = ["PAGE", "create", "map_file", "populate", "unmap"]

PAGE = 4096
#: Of madvise(2), since Linux 5.14: map all pages now. Reading does not make those of a disk dirty, and those of memory can be written then.
_POPULATE_READ = 22


def create(path: Path, size: int, pieces: dict[int, bytes]) -> None:
    """Make a file of zeros with some pieces at their offsets; it gets its name when it is whole. Mode 0600.

    OSError if `path` exists or the file system has no room: all of it is allocated now, so that no later store fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
        for offset, piece in pieces.items():
            os.pwrite(descriptor, piece, offset)
        os.link(temporary, path)
    finally:
        os.close(descriptor)
        os.unlink(temporary)


def map_file(path: Path, what: str, error: type[FormatError]) -> mmap.mmap:
    """Map an existing file of at least a page for reading and writing; `error` if it is shorter than any `what` is."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size < PAGE:
            raise error(f"{path}: {size} bytes are too few for a {what}", str(path))
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def populate(*memories: mmap.mmap) -> None:
    """Let this process have all pages of mappings now: later, each would stop it at its first use for longer than a frame takes.

    Where the kernel does not know how, they come as they are used.
    """
    for memory in memories:
        with contextlib.suppress(OSError):
            memory.madvise(_POPULATE_READ)


def unmap(memory: mmap.mmap) -> None:
    """Give a mapping up; where views of it are still held, it goes with them."""
    try:
        memory.close()
    except BufferError:
        pass
