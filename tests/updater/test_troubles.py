# SPDX-License-Identifier: MIT
"""A disk that is full, or fails: the state goes on being stepped, nothing false is reported, and logging comes back by itself."""

import contextlib
import errno
import os
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from flowcheck.errors import FlowCheckError, RestoreError
from tests.pipeline.recordings import same
from tests.updater import job as jobs
from tests.updater import power
from tests.updater.outage import committed, cut_everywhere, examine, go_on, watched
from tests.updater.power import RecordingDisk, Sync, Write
from updater.durable import Disk
from updater.listing import listing
from updater.restore import restore
from updater.updater import Updater
from updater.verify import verify

#: Iterations before the trouble, during it, and at least so many after.
BEFORE, DURING, AFTER = 8, 12, 4
#: Seconds in which logging must be back, and between two iterations until then.
BACK_S, PAUSE_S = 20, 0.5
#: Room for about two iterations: so the trouble also meets a new segment.
SEGMENT_BYTES = 5000
EVERYTHING = ("create", "write", "truncate", "sync", "datasync", "rename", "unlink", "sync_folder")


class Trouble(Disk):
    """A disk whose calls fail on command, and take no more than `most_bytes` of a write at once.

    `fail` begins it: the calls named fail with an error number, after so many that still succeed, so many times, on paths
    that have a word in them. `mend` ends it.
    """

    def __init__(self):
        self.most_bytes, self.met = None, 0
        self.mend()

    def mend(self):
        self._calls = ()

    def fail(self, error, *calls, after=0, times=None, within=""):
        self._error, self._calls, self._after, self._within = error, calls, after, within
        self._left = times

    def _meet(self, call, target):
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        if call not in self._calls or self._within not in path or self._left == 0:
            return
        if self._after:
            self._after -= 1
            return
        self._left = self._left and self._left - 1
        self.met += 1
        raise OSError(self._error, os.strerror(self._error), path)

    def create(self, path):
        self._meet("create", path)
        return super().create(path)

    def write(self, fd, pieces, offset):
        self._meet("write", fd)
        if self.most_bytes is not None:
            pieces = [memoryview(b"".join(bytes(piece) for piece in pieces)[: self.most_bytes])]
        return super().write(fd, pieces, offset)

    def truncate(self, fd, size):
        self._meet("truncate", fd)
        super().truncate(fd, size)

    def sync(self, fd):
        self._meet("sync", fd)
        super().sync(fd)

    def datasync(self, fd):
        self._meet("datasync", fd)
        super().datasync(fd)

    def rename(self, source, target):
        self._meet("rename", source)
        super().rename(source, target)

    def unlink(self, path):
        self._meet("unlink", path)
        super().unlink(path)

    def sync_folder(self, path):
        self._meet("sync_folder", path)
        super().sync_folder(path)


@pytest.fixture(scope="module")
def job():
    return jobs.made(80).keeping(snapshot_iterations=50)


@pytest.fixture
def shm():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def trouble():
    return Trouble()


@pytest.fixture
def recording(trouble, shm):
    """A disk in the updater's place that notes all and may fail; all of it below `run`, the directory is `run/out`."""
    root = shm / "run"
    root.mkdir()
    with power.in_place(watched(RecordingDisk(root, trouble), root / "out")) as disk:
        yield disk


def begun(job, out):
    """An updater that has committed what came before the trouble."""
    run = jobs.Shadowing(job, out, segment_bytes=SEGMENT_BYTES)
    run.bring(BEFORE)
    until(run, lambda: committed(out) == set(range(1, BEFORE + 1)))
    return run


def until(run, done):
    """Poll until the directory shows something, without anything new from the network."""
    end = time.monotonic() + BACK_S
    while not done():
        run.updater.poll()
        assert time.monotonic() < end, "the directory does not come to show it"


def comes_back(run, out):
    """Bring iterations until one of them is committed; return the last that was brought before."""
    before = run.slots.settled_next - 1
    end = time.monotonic() + BACK_S
    while max(committed(out)) <= before:
        assert time.monotonic() < end, "logging does not come back"
        run.bring(run.slots.settled_next)
        enough = time.monotonic() + PAUSE_S
        while time.monotonic() < enough and max(committed(out)) <= before:
            if not run.updater.poll():
                time.sleep(0.01)
    return before


def holds_the_truth(job, out, *, volatile):
    """Every iteration is listed; those committed restore with the trainer's bits, those volatile do not restore."""
    report = listing(out)
    states = {row["iteration"]: row["state"] for row in report["iterations"]}
    assert list(states) == list(range(1, len(states) + 1))
    assert set(states.values()) == ({"committed", "volatile"} if volatile else {"committed"})
    gone = [iteration for iteration, state in states.items() if state == "volatile"]
    there = sorted(committed(out))
    for iteration in {there[0], *there[-2:], *random.Random(1).sample(there, 4)} | set(report["snapshots"]):
        assert same(restore(out, iteration), job.truth[iteration]) == [], iteration
    for iteration in set(gone) - set(report["snapshots"]):
        with pytest.raises(RestoreError):
            restore(out, iteration)
    found = verify(out)
    assert found["ok"], found["problems"]
    return gone, report["snapshots"]


def survives(job, out, run, fail, mend):
    """Let a disk fail and be mended under an updater at work; return what became volatile."""
    fail()
    run.bring(BEFORE + DURING)
    during = committed(out)
    assert during >= set(range(1, BEFORE + 1))
    for iteration in (BEFORE, max(during)):
        assert same(restore(out, iteration), job.truth[iteration]) == []
    mend()
    last = comes_back(run, out)
    run.bring(run.slots.settled_next - 1 + AFTER)
    run.end()
    gone, snapshots = holds_the_truth(job, out, volatile=True)
    assert gone == list(range(gone[0], gone[-1] + 1)) and BEFORE < gone[0] and gone[-1] >= last - 1
    # The gap is bridged by a snapshot of a state behind it, and what follows that is committed.
    bridge = min(iteration for iteration in snapshots if iteration >= gone[-1])
    assert committed(out) >= set(range(bridge + 1, run.slots.settled_next))
    return gone


TROUBLES = [
    (errno.ENOSPC, ("write",)),
    (errno.ENOSPC, ("create", "write")),
    (errno.EIO, ("sync", "datasync")),
    (errno.EIO, ("sync_folder",)),
    (errno.EIO, ("rename",)),
    (errno.EROFS, EVERYTHING),
]


@pytest.mark.parametrize(("error", "calls"), TROUBLES)
def test_iterations_are_volatile_until_the_disk_takes_again(job, recording, trouble, shm, error, calls):
    out = shm / "run" / "out"
    run = begun(job, out)
    survives(job, out, run, lambda: trouble.fail(error, *calls), trouble.mend)
    assert trouble.met


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("error", "calls"), TROUBLES)
def test_no_power_cut_in_the_trouble_loses_what_was_committed(job, recording, trouble, shm, error, calls):
    out = shm / "run" / "out"
    run = begun(job, out)
    survives(job, out, run, lambda: trouble.fail(error, *calls), trouble.mend)
    different = cut_everywhere(recording.trace, job, shm / "left", about=400, gaps=True)
    assert different > 80


@pytest.mark.parametrize("after", [0, *(pytest.param(after, marks=pytest.mark.slow) for after in (1, 2, 3))])
def test_a_sync_that_failed_once_is_not_tried_again_on_the_same_pages(job, recording, trouble, shm, after):
    out = shm / "run" / "out"
    run = begun(job, out)
    trouble.fail(errno.EIO, "sync", "datasync", after=after, times=1, within="/log/")
    run.bring(BEFORE + DURING)
    comes_back(run, out)
    run.end()
    assert trouble.met == 1
    operations = recording.trace.operations
    at, failed = next((n, o) for n, o in enumerate(operations) if isinstance(o, Sync) and o.failed)
    gradients = [job.gradient(iteration) for iteration in range(1, run.slots.settled_next)]
    for operation in operations[at + 1 :]:
        if isinstance(operation, Write) and operation.node == failed.node:
            assert not any(gradient in operation.content for gradient in gradients), "the segment is gone on with"
    holds_the_truth(job, out, volatile="volatile" in {row["state"] for row in listing(out)["iterations"]})
    assert cut_everywhere(recording.trace, job, shm / "left", about=12, gaps=True) > 6


def test_writes_that_take_a_part_lose_nothing(job, recording, trouble, shm):
    out = shm / "run" / "out"
    trouble.most_bytes = 700
    run = begun(job, out)
    run.bring(BEFORE + DURING)
    run.end()
    holds_the_truth(job, out, volatile=False)
    assert max(len(o.content) for o in recording.trace.operations if isinstance(o, Write)) == 700
    assert cut_everywhere(recording.trace, job, shm / "left", about=8) > 4


def test_a_record_of_which_a_part_was_taken_is_not_there(job, recording, trouble, shm):
    """The disk takes 700 bytes of a record, then no more."""
    out = shm / "run" / "out"
    run = begun(job, out)
    trouble.most_bytes = 700

    def fail():
        trouble.fail(errno.ENOSPC, "write", after=1)

    survives(job, out, run, fail, trouble.mend)
    assert cut_everywhere(recording.trace, job, shm / "left", about=8, gaps=True) > 4


def test_snapshots_that_fail_leave_the_log_going(job, recording, trouble, shm):
    often, out = job.keeping(snapshot_iterations=5), shm / "run" / "out"
    run = begun(often, out)
    trouble.fail(errno.ENOSPC, "write", within="/snapshots/")
    run.bring(BEFORE + DURING)
    until(run, lambda: max(committed(out)) == BEFORE + DURING)
    assert trouble.met and max(listing(out)["snapshots"]) <= BEFORE
    trouble.mend()
    run.bring(BEFORE + DURING + 6)
    until(run, lambda: max(listing(out)["snapshots"]) > BEFORE)
    run.end()
    holds_the_truth(often, out, volatile=False)


@pytest.mark.parametrize("calls", [("write",), ("sync", "datasync"), EVERYTHING], ids=lambda calls: calls[0])
def test_ending_in_the_trouble_keeps_what_was_committed(job, recording, trouble, shm, calls, monkeypatch):
    monkeypatch.setattr("updater.updater._END_PATIENCE_S", 1.0)
    out = shm / "run" / "out"
    run = begun(job, out)
    trouble.fail(errno.ENOSPC, *calls)
    run.bring(BEFORE + DURING)
    reported = committed(out)
    with contextlib.suppress(FlowCheckError):
        run.end()
    run.leave()
    trouble.mend()
    assert go_on(job, out) >= reported >= set(range(1, BEFORE + 1))
    for iteration in (BEFORE, max(reported)):
        assert same(restore(out, iteration), job.truth[iteration]) == []
    assert verify(out)["ok"]


def test_a_process_that_dies_in_the_trouble_keeps_what_was_committed(job, recording, trouble, shm):
    out = shm / "run" / "out"
    run = begun(job, out)
    trouble.fail(errno.ENOSPC, "write", "create")
    run.bring(BEFORE + DURING)
    reported = committed(out)
    image = {
        path.relative_to(shm / "run"): path.read_bytes() if path.is_file() else None for path in out.parent.rglob("*")
    }
    trouble.mend()
    recording.watch = None
    run.leave()
    assert examine(image, job, shm / "left", gaps=True) >= reported


def test_a_start_that_has_nothing_volatile_says_so(job, recording, trouble, shm):
    """What was refused and never applied lies in its slot still, and is logged by the process that comes next."""
    out = shm / "run" / "out"
    begun(job, out).leave()
    slots = jobs.Slots(job, BEFORE + 1)
    slots.volatile_from = BEFORE + 1
    with contextlib.closing(Updater(job.plan, slots, out)):
        assert slots.volatile_from == 0


def test_a_small_state_bridges_the_gap_however_busy_the_snapshot_process_is(job, recording, trouble, shm, monkeypatch):
    """It has the lowest priority: where the cores are taken it may need longer than slots and rings can hold."""
    monkeypatch.setattr("tests.updater.power.InThisProcess.poll", lambda self: None)
    out = shm / "run" / "out"
    run = begun(job, out)
    survives(job, out, run, lambda: trouble.fail(errno.ENOSPC, "write"), trouble.mend)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root to mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_file_system_that_is_given_room_is_written_on(job, small_disk):
    out, ballast = small_disk / "out", small_disk / "ballast"
    run = begun(job, out)

    def fill():
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1000)):
                pass

    survives(job, out, run, fill, ballast.unlink)
