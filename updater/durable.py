# SPDX-License-Identifier: MIT
"""Durable file operations: what a checkpoint directory needs so that a crash at any instruction leaves it whole.

Every file is private to its owner (0600). A published file is written under a temporary name, synced, renamed, and
its folder synced; so it is there whole, or not at all. Errors of the operating system leave as one DiskError.
Whatever changes a checkpoint directory goes through `disk`, one method per system call.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from flowcheck.errors import ConfigError, DiskError

__all__ = [
    "TEMPORARY_SUFFIX",
    "Disk",
    "disk",
    "io_errors",
    "lock_directory",
    "make_folder",
    "publish",
    "remove_temporaries",
    "sha256_of",
    "write_all",
    "write_published",
]

TEMPORARY_SUFFIX = ".unfinished"
#: The kernel takes at most this many pieces in one writev (IOV_MAX).
_MOST_PIECES = 1024
_HASH_CHUNK_BYTES = 4 << 20
_HINTS = {
    errno.ENOSPC: "; free some space",
    errno.EDQUOT: "; raise the quota",
    errno.EFBIG: "; raise the file size limit",
}


@contextlib.contextmanager
def io_errors(what: str, path: str | Path) -> Iterator[None]:
    """Turn an OSError into a DiskError of one line that says what could not be done, on what, and why."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error).splitlines()[0]
        raise DiskError(f"{path}: cannot {what}: {reason}{_HINTS.get(error.errno, '')}") from error


class Disk:
    """The system calls that change a checkpoint directory. A test puts one in its place that notes them, or fails."""

    def create(self, path: Path) -> int:
        """Return a descriptor of a new, empty file, mode 0600, in place of any of that name."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def open(self, path: Path) -> int:
        """Return a descriptor, for reading and writing, of a file that is there."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        """Write pieces one after another from an offset on; returns how many bytes were taken, at least one."""
        return os.pwritev(fd, pieces, offset)

    def truncate(self, fd: int, size: int) -> None:
        """Cut a file to a size."""
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        """Make a file's content and size durable."""
        os.fsync(fd)

    def datasync(self, fd: int) -> None:
        """Make a file's content, and what of its size is needed to read it, durable."""
        os.fdatasync(fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def make_folder(self, path: Path) -> None:
        """Make a folder for its owner alone, unless it is there; its name is durable when `sync_folder` was called above it."""
        path.mkdir(mode=0o700, exist_ok=True)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name, in place of any file of that name."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


disk = Disk()


def write_all(fd: int, pieces: Sequence[memoryview | bytes], offset: int) -> int:
    """Write all pieces from an offset on, gathered without copying them together; returns the bytes written."""
    views = [view for piece in pieces if (view := memoryview(piece).cast("B")).nbytes]
    total = 0
    while views:
        written = disk.write(fd, views[:_MOST_PIECES], offset + total)
        total += written
        while views and written >= views[0].nbytes:
            written -= views.pop(0).nbytes
        if written:
            views[0] = views[0][written:]
    return total


def publish(temporary: Path, final: Path) -> None:
    """Give a file that is written and synced its final name, durably; replaces a file of that name."""
    disk.rename(temporary, final)
    disk.sync_folder(final.parent)


def write_published(path: Path, content: bytes) -> None:
    """Publish a small file in one go."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with io_errors("write", path):
        fd = disk.create(temporary)
        try:
            write_all(fd, [content], 0)
            disk.sync(fd)
        except OSError:
            with contextlib.suppress(OSError):
                disk.unlink(temporary)
            raise
        finally:
            disk.close(fd)
        publish(temporary, path)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, durably; what is there stays."""
    if not path.is_dir():
        make_folder(path.parent)
        disk.make_folder(path)
        disk.sync_folder(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what a crash left unfinished; only the owner of the directory's lock may."""
    for path in folder.glob("*" + TEMPORARY_SUFFIX):
        disk.unlink(path)


def sha256_of(path: Path) -> tuple[int, str]:
    """Return a file's length in bytes and its SHA-256 in hexadecimal, read in one pass."""
    digest, length = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
            length += len(chunk)
    return length, digest.hexdigest()


def lock_directory(path: Path) -> int:
    """Take a directory for this process alone; returns the descriptor that holds the lock until it is closed.

    The kernel drops the lock with the process, however it ends. ConfigError if another process has it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise ConfigError(f"{path}: another process writes to this directory; wait for it or choose another") from error
    return fd
