# SPDX-License-Identifier: MIT
"""Files and folders for the user, written as streams and published whole or not at all.

What libraries write goes through `durable.disk`, so it is private to its owner, synced before its name is given to it,
and fails as any other write does. A crash leaves at most something called `*.unfinished`, which the next writer of
that path replaces.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flowcheck.errors import ConfigError
from updater import durable

__all__ = ["cause", "created", "published", "published_folder", "refuse_present"]


class _DiskFile(io.RawIOBase):
    """A new file that is written from its beginning on, and synced by closing it."""

    def __init__(self, path: Path) -> None:
        self._fd = durable.disk.create(path)
        self._at = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, content: memoryview) -> int:
        written = durable.disk.write(self._fd, [memoryview(content).cast("B")], self._at)
        self._at += written
        return written

    def close(self) -> None:
        if not self.closed:
            try:
                durable.disk.sync(self._fd)
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Close without syncing; nothing if it is closed already."""
        if not self.closed:
            super().close()
            durable.disk.close(self._fd)


@contextlib.contextmanager
def created(path: Path) -> Iterator[BinaryIO]:
    """Give a new file of mode 0600, in place of any of that name; synced when the block ends or closes it."""
    raw = _DiskFile(path)
    file = io.BufferedWriter(raw)
    try:
        yield file
        file.close()
    finally:
        raw.abandon()


@contextlib.contextmanager
def published(*paths: Path) -> Iterator[list[BinaryIO]]:
    """Give files that appear under these paths of one folder when the block ends, the last one first; none if it fails.

    Files of those paths are replaced. All are written and synced before the first is renamed; of several a crash between
    two renames leaves some new and some old, so their content must say what belongs together.

    Raises:
        FlowCheckError: the disk refused.
    """
    unfinished = [path.with_name(path.name + durable.TEMPORARY_SUFFIX) for path in paths]
    with durable.io_errors("write", paths[0]):
        try:
            with contextlib.ExitStack() as stack:
                yield [stack.enter_context(created(temporary)) for temporary in unfinished]
            for temporary, path in reversed(list(zip(unfinished, paths, strict=True))):
                durable.disk.rename(temporary, path)
            durable.disk.sync_folder(paths[0].parent)
        except BaseException:
            for temporary in unfinished:
                with contextlib.suppress(OSError):
                    durable.disk.unlink(temporary)
            raise


@contextlib.contextmanager
def published_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder that appears under a path when the block ends; nothing does if it fails.

    The block makes files in it by `created`, and no folders.

    Raises:
        ConfigError: the path is there already, or another process is writing to it.
        FlowCheckError: the disk refused.
    """
    refuse_present(path)
    temporary = path.with_name(path.name + durable.TEMPORARY_SUFFIX)
    with durable.io_errors("write", path):
        durable.disk.make_folder(temporary)
        lock = durable.lock_directory(temporary)
        try:
            _empty(temporary)  # of what a crash left
            yield temporary
            durable.disk.sync_folder(temporary)
            durable.publish(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                _empty(temporary)
                durable.disk.remove_folder(temporary)
            raise
        finally:
            os.close(lock)


def refuse_present(path: Path) -> None:
    """Raise ConfigError if something is there under the path of a folder to be made."""
    if os.path.lexists(path):
        raise ConfigError(
            f"{path}: is there already, expected a folder that can be made new; name another or move it away"
        )


def _empty(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        durable.disk.unlink(path)


def cause(error: BaseException) -> BaseException:
    """Return what is behind an error of torch's, which says only that the file took no more: an OSError, an interruption."""
    behind: BaseException | None = error
    while isinstance(behind, RuntimeError):
        behind = behind.__cause__ or behind.__context__
    return behind or OSError((str(error) or type(error).__name__).splitlines()[0])
