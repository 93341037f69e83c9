# SPDX-License-Identifier: MIT
"""What happens to the machine: stages die or stand still, the disk is full, fails, or is slow."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fault_injection.case import Case
from fault_injection.chain import Chain, Killed, Script
from fault_injection.kinds import kind
from updater import durable, updater

__all__: list[str] = []

#: Ports of a process, at most so many at once: a dump that was dropped keeps its own until the case is over.
_DUMPS = 4
SECTOR_BYTES = 512


class _Kills(Script):
    """Drops stages of one sort, each time at a turn drawn by lot, and makes them anew."""

    def __init__(
        self, rng: random.Random, stage: str, most: int, probabilities: Sequence[float] = (0.02, 0.1, 0.4)
    ) -> None:
        self._rng, self._stage, self._left = rng, stage, rng.randint(1, most)
        self._probability = rng.choice(probabilities)

    def before(self, chain: Chain, turn: int) -> None:
        names = [name for name in chain.stages if name.split()[0] == self._stage]
        if self._left and self._rng.random() < self._probability:
            self._left -= 1
            chain.kill(self._rng.choice(names))


@kind("kill-dump")
def kill_dump(case: Case) -> None:
    """Kill dumps."""
    # A file is in the ring after some ten turns: what is killed later has nothing left to lose.
    case.script = _Kills(case.rng, "dump", _DUMPS, (0.1, 0.4, 0.9))


@kind("kill-parser")
def kill_parser(case: Case) -> None:
    """Kill parsers."""
    case.script = _Kills(case.rng, "parse", 40)


@kind("kill-extractor")
def kill_extractor(case: Case) -> None:
    """Kill the extractor."""
    case.script = _Kills(case.rng, "extract", 40)


@kind("kill-updater")
def kill_updater(case: Case) -> None:
    """Kill the updater between two of its polls."""
    case.script = _Kills(case.rng, "update", 5)


@kind("killed-processes", share=0.1)
def killed_processes(case: Case) -> None:
    """Kill stages that are processes of their own."""
    case.kills = case.rng.randint(3, 8)


class _Dying(durable.Disk):
    """A disk at whose n-th operation the process dies, before or after it; again and again, so many times."""

    def __init__(self, rng: random.Random, times: int) -> None:
        self._rng, self._times = rng, times
        self._next = rng.randint(1, 60)

    def _reach(self) -> None:
        self._next -= 1
        if self._times and self._next <= 0:
            self._times -= 1
            self._next = self._rng.randint(1, 40)
            raise Killed

    def create(self, path: Path) -> int:
        self._reach()
        return super().create(path)

    def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        if self._times and self._next == 1:
            # What a kill leaves of a write is any part of it.
            data = b"".join(bytes(piece) for piece in pieces)
            os.pwrite(fd, data[: self._rng.randrange(len(data) + 1)], offset)
        self._reach()
        return super().write(fd, pieces, offset)

    def truncate(self, fd: int, size: int) -> None:
        self._reach()
        super().truncate(fd, size)

    def sync(self, fd: int) -> None:
        self._reach()
        super().sync(fd)

    def datasync(self, fd: int) -> None:
        super().datasync(fd)
        self._reach()

    def rename(self, source: Path, target: Path) -> None:
        self._reach()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._reach()
        super().unlink(path)

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self._reach()


@contextlib.contextmanager
def _in_place(disk: durable.Disk, retry_s: float | None = None) -> Iterator[None]:
    """Have the updater use a disk, and try one that took nothing again after so long."""
    before, pause = durable.disk, updater._RETRY_S
    durable.disk = disk
    if retry_s is not None:
        updater._RETRY_S = retry_s
    try:
        yield
    finally:
        durable.disk, updater._RETRY_S = before, pause


@kind("kill-in-write")
def kill_in_write(case: Case) -> None:
    """Kill the updater within disk operations."""
    case.surroundings.append(_in_place(_Dying(case.rng, case.rng.randint(1, 6))))


class _Torn(durable.Disk):
    """A disk that dies within writes to the log, and has taken of them all but some sectors, in any order, as a power cut leaves them."""

    def __init__(self, rng: random.Random, times: int) -> None:
        self._rng, self._times = rng, times
        self._next = rng.randint(3, 12)

    def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        if self._times and os.readlink(f"/proc/self/fd/{fd}").endswith(".fclog"):
            self._next -= 1
            if self._next <= 0:
                self._times, self._next = self._times - 1, self._rng.randint(2, 12)
                data = bytearray(b"".join(bytes(piece) for piece in pieces))
                for _ in range(self._rng.randint(0, 2)):
                    at = self._rng.randrange(len(data)) // SECTOR_BYTES * SECTOR_BYTES
                    data[at : at + SECTOR_BYTES] = bytes(len(data[at : at + SECTOR_BYTES]))
                os.pwrite(fd, data[: self._rng.choice([len(data), self._rng.randrange(len(data) + 1)])], offset)
                raise Killed
        return super().write(fd, pieces, offset)


@kind("torn-log")
def torn_log(case: Case) -> None:
    """Tear the log's tail."""
    case.surroundings.append(_in_place(_Torn(case.rng, case.rng.randint(1, 6))))


class _Stall(Script):
    """Has a stage stand still for some turns."""

    def __init__(self, rng: random.Random, stage: str, *, live: bool, first: int) -> None:
        self.live, self._stage = live, stage
        self._from = rng.randint(first, first + 40)
        self._to = self._from + rng.randint(10, 200)

    def may_poll(self, chain: Chain, stage: str, turn: int) -> bool:
        return stage != self._stage or not self._from <= turn < self._to


@kind("stall-extractor")
def stall_extractor(case: Case) -> None:
    """Have the extractor stand still while live ports go on: their rings run over."""
    case.script = _Stall(case.rng, "extract", live=True, first=1)
    case.exact = False


@kind("stall-updater")
def stall_updater(case: Case) -> None:
    """Have the updater stand still until the slots are full."""
    case.script = _Stall(case.rng, "update", live=False, first=3)


class _Failing(durable.Disk):
    """A disk some of whose operations fail with an error number: `times` of them, after `after` that succeed."""

    def __init__(self, number: int, calls: set[str], after: int, times: int) -> None:
        self._number, self._calls, self._after, self._times = number, calls, after, times

    def _meet(self, call: str) -> None:
        if call not in self._calls:
            return
        self._after -= 1
        if self._after < 0 < self._times:
            self._times -= 1
            raise OSError(self._number, os.strerror(self._number))

    def create(self, path: Path) -> int:
        self._meet("create")
        return super().create(path)

    def write(self, fd: int, pieces: Sequence[memoryview], offset: int) -> int:
        self._meet("write")
        return super().write(fd, pieces, offset)

    def sync(self, fd: int) -> None:
        self._meet("sync")
        super().sync(fd)

    def datasync(self, fd: int) -> None:
        self._meet("datasync")
        super().datasync(fd)


def _fails(case: Case, number: int, calls: set[str], times: int) -> None:
    # Not the very first operations: without a first snapshot nothing can begin, and the job is told so.
    case.surroundings.append(_in_place(_Failing(number, calls, case.rng.randint(30, 60), times), 0.05))
    case.live = case.volatile = True


@kind("disk-full")
def disk_full(case: Case) -> None:
    """Let the disk take nothing for a while."""
    _fails(case, errno.ENOSPC, {"create", "write"}, case.rng.choice([1, 3, 12]))


@kind("sync-fails")
def sync_fails(case: Case) -> None:
    """Let syncs fail."""
    _fails(case, errno.EIO, {"sync", "datasync"}, case.rng.choice([1, 1, 2, 5]))


class _Slow(durable.Disk):
    def datasync(self, fd: int) -> None:
        time.sleep(0.01)
        super().datasync(fd)


@kind("slow-disk")
def slow_disk(case: Case) -> None:
    """Let every sync of the log take ten milliseconds."""
    case.surroundings.append(_in_place(_Slow()))
