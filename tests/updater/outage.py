# SPDX-License-Identifier: MIT
"""Runs whose every disk operation is noted, and what must hold of all that a power cut may leave of them."""

import contextlib
import random
import shutil

import pytest

from flowcheck.errors import CheckpointError, FlowCheckError, RestoreError
from tests.pipeline.recordings import same
from tests.updater import job as jobs
from tests.updater import power
from tests.updater.power import RecordingDisk
from updater.durable import Disk
from updater.gradient import read_gradient
from updater.listing import listing
from updater.restore import restore
from updater.verify import verify

#: Marks in a trace: what any reader of the directory was told, and what the updater gave back of the slots.
COMMITTED, GIVEN_BACK = "reported committed", "given back"
SEGMENT_BYTES = 40_000


def committed(out):
    """Return the iterations that a directory lists as committed."""
    return {row["iteration"] for row in listing(out)["iterations"] if row["state"] == "committed"}


def watched(disk, out):
    """Have a recording disk read the list after each operation, and mark in its trace what that reports as committed."""
    known = set()

    def read():
        try:
            found = committed(out)
        except FlowCheckError:
            assert not known, "a reader finds no directory any more"
            return
        if not found <= known:
            disk.trace.mark(COMMITTED, found - known)
            known.update(found)

    disk.watch = read
    return disk


def traced(job, root, iterations):
    """Return the trace of a run in a folder, stopped in the middle and gone on with; marked with what it reported."""
    out, middle = root / "out", iterations // 2
    disk = watched(RecordingDisk(root), out)

    def give_back(consumed_next):
        disk.trace.mark(GIVEN_BACK, range(1, consumed_next))

    with power.in_place(disk):
        for first, last in ((0, middle), (middle + 1, iterations)):
            run = jobs.Shadowing(job, out, first, give_back, segment_bytes=SEGMENT_BYTES)
            run.bring(last)
            run.end() if last == iterations else run.leave()
    assert iterations in committed(out)
    return disk.trace


def go_on(job, out):
    """Start an updater on what is left, with slots that bring nothing; return what is then committed."""
    jobs.Shadowing(job, out, segment_bytes=SEGMENT_BYTES).leave()
    return committed(out)


def examine(image, job, folder, *, gaps=False):
    """Lay an image down on a disk without troubles and hold all that can be had of it against the truth; return the committed iterations.

    Where there may be `gaps`, iterations may be volatile, and others committed after them.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    power.lay(image, folder)
    with power.in_place(Disk()):
        return _examine(folder / "out", job, random.Random(power.digest(image)), gaps)


def _examine(out, job, rng, gaps):
    with contextlib.suppress(CheckpointError, RestoreError):  # before a start has mended it, what is there may say no
        left = restore(out)
        assert same(left, job.truth[left["iteration"]]) == []

    there, report = sorted(go_on(job, out)), listing(out)
    rows = [row["iteration"] for row in report["iterations"]]
    assert rows == list(range(rows[0], rows[-1] + 1)) if rows else True, rows
    assert {row["state"] for row in report["iterations"]} <= ({"committed", "volatile"} if gaps else {"committed"})
    found = verify(out)
    assert found["ok"], found["problems"]
    for iteration in {there[-1], rng.choice(there)} if there else report["snapshots"]:
        assert same(restore(out, iteration), job.truth[iteration]) == [], iteration
    for iteration in rng.sample(there, min(3, len(there))):
        assert read_gradient(out, iteration).tobytes() == job.gradient(iteration)

    last = max([*rows, *report["snapshots"]], default=-1)
    with pytest.raises(RestoreError):
        restore(out, last + 1)
    run = jobs.Shadowing(job, out, last + 1, segment_bytes=SEGMENT_BYTES)
    run.bring(max(last, 0) + 1)
    run.end()
    left = restore(out)
    assert left["iteration"] == max(last, 0) + 1 and same(left, job.truth[left["iteration"]]) == []
    return frozenset(there)


def cut_everywhere(trace, job, folder, *, about=None, kept=None, gaps=False):
    """Cut the power after each operation in many ways, or in about so many in all; return how many different disks were left.

    All that was reported committed must be there, or of it the newest `kept`; and where nothing but the process is lost, all
    that was given back, if there are no gaps.
    """
    found = {}
    for place, operation, what, image, marks in power.cuts(trace, random.Random(1), about):
        key = power.digest(image)
        try:
            if key not in found:
                found[key] = examine(image, job, folder, gaps=gaps)
            expected = marks.get(COMMITTED, frozenset())
            if what == "nothing lost" and not gaps:
                expected |= marks.get(GIVEN_BACK, frozenset())
            # A start may find more committed than was reported: what retention keeps counts from there.
            newest = max(expected | found[key], default=0)
            lost = {i for i in expected if kept is None or i > newest - kept} - found[key]
            assert not lost, f"lost: iterations {sorted(lost)}"
        except (AssertionError, FlowCheckError) as problem:
            raise AssertionError(f"power cut after operation {place}, {operation}; {what}: {problem!r}") from problem
    return len(found)
