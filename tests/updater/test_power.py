# SPDX-License-Identifier: MIT
"""The power goes at any instant: what was reported committed is there afterwards, right, and can be written on."""

import json
import random
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.updater import job as jobs
from tests.updater import power
from tests.updater.outage import COMMITTED, cut_everywhere, go_on, traced
from tests.updater.power import Names, RecordingDisk, Remains, Sync, Trace
from updater.durable import Disk

KEPT = 12


@pytest.fixture
def shm():
    """A folder in memory: thousands of directories are laid there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def job():
    return jobs.made(60)


def test_every_change_of_a_run_is_in_its_trace(job, shm):
    trace = traced(job.keeping(snapshot_iterations=5), shm, 12)
    remains = Remains(trace)
    for place, operation in enumerate(trace.operations):
        remains.note(place, operation)
    there = {path.relative_to(shm): path.read_bytes() if path.is_file() else None for path in shm.rglob("*")}
    assert remains.image({}) == there
    changes = {name for name in vars(Disk) if not name.startswith("_")}
    assert changes <= set(vars(RecordingDisk))


def test_some_power_cuts_lose_nothing_that_was_committed(job, shm):
    kept = job.keeping(snapshot_iterations=10)
    root = shm / "run"
    root.mkdir()
    trace = traced(kept, root, 50)
    different = cut_everywhere(trace, kept, shm / "left", about=28)
    assert different > 15


@pytest.mark.parametrize("forgotten", ["a file", "a folder"])
def test_a_sync_left_out_is_found(job, shm, forgotten):
    root = shm / "run"
    root.mkdir()
    trace = traced(job, root, 4)
    folders = {0} | {n for o in trace.operations if isinstance(o, Names) and o.new_folder for _, n in o.changes}
    kept = [
        o for o in trace.operations if not (isinstance(o, Sync) and (o.node in folders) == (forgotten == "a folder"))
    ]
    with pytest.raises(AssertionError, match="power cut after operation"):
        cut_everywhere(Trace(trace.contents, trace.names, kept), job, shm / "left")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rules", [
    {"snapshot_iterations": 10},
    {"snapshot_iterations": 6, "retention": {"last_iterations": KEPT}},
], ids=json.dumps)  # fmt: skip
def test_no_power_cut_loses_anything_that_was_committed(job, shm, rules):
    kept = job.keeping(**rules)
    root = shm / "run"
    root.mkdir()
    trace = traced(kept, root, 50)
    different = cut_everywhere(trace, kept, shm / "left", kept=KEPT if "retention" in rules else None)
    assert different > 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_power_may_go_again_while_what_it_left_is_mended(job, shm):
    """Of a run's power cuts some are drawn, gone on from, and cut again at every operation."""
    kept = job.keeping(snapshot_iterations=5)
    root = shm / "run"
    root.mkdir()
    cuts = list(power.cuts(traced(kept, root, 12), random.Random(2)))
    for place, _, what, image, marks in random.Random(3).sample(cuts, 12):
        shutil.rmtree(root)
        root.mkdir()
        power.lay(image, root)
        disk = RecordingDisk(root)
        with power.in_place(disk):
            disk.trace.mark(COMMITTED, marks.get(COMMITTED, ()))
            there = go_on(kept, root / "out")
            disk.trace.mark(COMMITTED, there)
        assert cut_everywhere(disk.trace, kept, shm / "left") > 0, (place, what)


@pytest.mark.nightly
@pytest.mark.dpdk
@pytest.mark.timeout(1800)
def test_no_power_cut_loses_anything_of_a_recorded_job(shm):
    kept = jobs.recorded(shm, 51).keeping(snapshot_iterations=10)
    root = shm / "run"
    root.mkdir()
    trace = traced(kept, root, 50)
    different = cut_everywhere(trace, kept, shm / "left")
    assert different > 100
