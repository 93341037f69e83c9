# SPDX-License-Identifier: MIT
"""Snapshots written beside the updater, by a child process, from a copy of the state in shared memory.

The updater waits for that copy alone. The child has memory, interpreter and disk waits of its own, the lowest priority,
and is only ever read from without waiting; it writes the temporary file and nothing else. It is started for the first
snapshot, kept for the next, and dies with its parent, however that ends.

Between the two stand the staging memory (a memfd that both map: the datasets, behind them the request as JSON), a pipe
that says where the request lies, and a pipe on which the answer comes back: each a line.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import platform
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flowcheck.errors import FlowCheckError
from updater import durable
from updater.durable import TEMPORARY_SUFFIX, io_errors
from updater.snapshot_file import Dataset, Request, Written, pieces, write_file

if TYPE_CHECKING:
    from flowcheck._copy import CopyEngine

    from updater.snapshot import State

__all__ = ["SnapshotWriter", "main"]

_COMMAND = [sys.executable, "-c", "from updater.snapshot_writer import main; main()"]
#: What of its time the child works at most. Priority alone is not enough: each time that it has a core, a thread of the
#: optimizer step may wait for that core, and the others for that thread.
_SHARE = 0.5
_PR_SET_PDEATHSIG = 1
#: ioprio_set(2): who 1 is a process, class 3 is idle; the number of the call by machine.
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS, _IOPRIO_CLASS_IDLE = 1, 3 << 13


class SnapshotWriter:
    """Writes one snapshot at a time: start -> poll until it is there -> start ...; close. One thread.

    What it writes keeps its temporary name; renaming it, and the manifest, are the owner's. The owner's thread must live as
    long as the writer: with it the kernel ends the child.
    """

    def __init__(self) -> None:
        """Make it; memory and child come with the first snapshot, or with `reserve`."""
        self._fd = -1
        self._memory: mmap.mmap | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._path: Path | None = None
        self._answer = b""

    @property
    def busy(self) -> bool:
        """Whether a snapshot was started whose end `poll` has not told yet."""
        return self._path is not None

    def reserve(self, state: State) -> None:
        """Make the memory for a state of this size, and the child, so that `start` has only to copy.

        Raises:
            FlowCheckError: there is not so much memory, or no process can be started.
        """
        from updater.snapshot import request_of  # only the parent has torch

        request, _ = request_of(state)
        self._make_room(request.room_bytes + len(request.encode()))
        self._start_child()

    def start(self, path: Path, state: State, engine: CopyEngine) -> None:
        """Copy a state and have it written for `path`; it may be stepped on when this returns.

        Raises:
            FlowCheckError: the one before is not done, memory or process cannot be had, or the state cannot be written.
        """
        if self._path is not None:
            raise FlowCheckError(f"{path}: cannot be written while {self._path} is; wait for that one")
        from updater.snapshot import request_of, stage

        request, contents = request_of(state)
        request.path = str(path.with_name(path.name + TEMPORARY_SUFFIX))
        document = request.encode()
        begin, end = request.room_bytes, request.room_bytes + len(document)
        self._make_room(end)
        with memoryview(self._memory) as memory:
            stage(request, contents, memory, engine)
            memory[begin:end] = document
        line = b"%d %d\n" % (begin, end)
        self._start_child()
        try:
            os.write(self._child.stdin.fileno(), line)
        except BrokenPipeError:
            # It has died since the last snapshot.
            self._end_child()
            self._start_child()
            os.write(self._child.stdin.fileno(), line)
        self._path = path

    def _make_room(self, size: int) -> None:
        """Have staging memory of at least so many bytes, every page of it there."""
        if self._memory is not None and len(self._memory) >= size:
            return
        with io_errors(f"reserve {size} bytes", "staging memory"):
            if self._fd < 0:
                self._fd = os.memfd_create("snapshot-staging")
            # Without it a machine that has no more memory would kill this process at the copy.
            os.posix_fallocate(self._fd, 0, size)
            self._memory = mmap.mmap(self._fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def _start_child(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            self._end_child()
        if self._child is None:
            with io_errors("start", "snapshot writer"):
                self._child = subprocess.Popen(
                    [*_COMMAND, str(self._fd), str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                    pass_fds=(self._fd,), start_new_session=True,
                )  # fmt: skip
            os.set_blocking(self._child.stdout.fileno(), False)
            self._answer = b""

    def _end_child(self) -> int:
        """Kill the child if it lives; returns its exit status."""
        self._child.kill()
        status = self._child.wait()
        self._child.stdin.close()
        self._child.stdout.close()
        self._child = None
        return status

    def poll(self) -> Written | None:
        """Return what was written if it just came to its end, None if not, or if nothing is being written; never waits.

        Raises:
            FlowCheckError: the disk refused, or the child has died; nothing of the file is there, and `start` works again.
        """
        if self._path is None:
            return None
        try:
            said = os.read(self._child.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return None
        self._answer += said
        if not said:
            self._died()
        if not self._answer.endswith(b"\n"):
            return None
        answer, path = json.loads(self._answer), self._path
        self._answer, self._path = b"", None
        if "error" in answer:
            with io_errors("write", path):
                raise OSError(*answer["error"])
        return Written(path.with_name(path.name + TEMPORARY_SUFFIX), answer["bytes"], answer["sha256"])

    def _died(self) -> None:
        status, path = self._end_child(), self._path
        self._path = None
        self._remove(path)
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise FlowCheckError(
            f"{path}: cannot write: the process that was at it {how}; the next snapshot starts another"
        )

    def _remove(self, path: Path) -> None:
        # What cannot be removed now is when the directory is opened next.
        with contextlib.suppress(OSError):
            durable.disk.unlink(path.with_name(path.name + TEMPORARY_SUFFIX))

    def wait(self) -> Written | None:
        """Wait for what is being written; as `poll`, but None only if nothing is."""
        while self._path is not None:
            waiting = select.poll()
            waiting.register(self._child.stdout, select.POLLIN)
            waiting.poll()
            if (written := self.poll()) is not None:
                return written
        return None

    def close(self) -> None:
        """End the child and give the memory back; what is being written is given up, and its file removed."""
        if self._child is not None:
            self._end_child()
        if self._path is not None:
            self._remove(self._path)
            self._path = None
        self._memory = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def main() -> None:
    """Be the child: write what is asked for, one after another, until the parent closes the pipe or ends."""
    fd, parent = map(int, sys.argv[1:])
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it ended before that was set
    os.setpriority(os.PRIO_PROCESS, 0, 19)  # whatever the parent's is
    if platform.machine() in _IOPRIO_SET:
        # A kernel that does not have it says so, and the child is only nice.
        libc.syscall(_IOPRIO_SET[platform.machine()], _IOPRIO_WHO_PROCESS, 0, _IOPRIO_CLASS_IDLE)
    for line in sys.stdin:
        begin, end = map(int, line.split())
        print(json.dumps(_write(fd, begin, end)), flush=True)


def _write(fd: int, begin: int, end: int) -> dict[str, object]:
    """Write what the request in staging memory asks for; returns the answer."""
    memory = mmap.mmap(fd, end, mmap.MAP_SHARED, mmap.PROT_READ)
    view = memoryview(memory)
    request = Request.decode(bytes(view[begin:]))

    def content(dataset: Dataset) -> Iterator[memoryview]:
        for piece in pieces(view[dataset.offset : dataset.offset + dataset.bytes]):
            yield piece
            # Only the mapping of what was read goes: this process keeps no pages of the staging memory.
            memory.madvise(mmap.MADV_DONTNEED)

    try:
        written = write_file(Path(request.path), request, content, _SHARE)
    except OSError as error:
        return {"error": [error.errno, error.strerror] if error.errno else [str(error)]}
    return {"bytes": written.bytes, "sha256": written.sha256}
