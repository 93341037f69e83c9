# SPDX-License-Identifier: MIT
"""One `flowcheck run` over attempt after attempt of a job, each of which plays its recorded mirror into the run's ports."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from flowcheck.run_folder import RunFolder
from flowcheck.supervisor import scratch_folder, status
from tests.pipeline.live import until
from tests.pipeline.recordings import same
from updater.directory import Directory
from updater.listing import listing
from updater.restore import restore
from updater.verify import verify
from workload_gen.record import Recording, record

pytestmark = pytest.mark.dpdk
JOB = {"parameters": 4000, "bucket_mb": 0.01, "optimizer": "adamw", "hook": True, "truth": "states"}


class Run:
    """A job's folder, and the run that follows it."""

    def __init__(self, folder):
        self.folder, self.out, self.lines = folder / "job", folder / "checkpoints", []

    def show(self, recording, first, **changes):
        """Put the plan of a recorded attempt into the folder as its trainer would; its captures come out of the ports."""
        folder = recording.out
        document = json.loads((folder / "plan.json").read_text())
        for stream in document["shards"][0]["streams"]:
            stream["port"] = f"net_pcap0,rx_pcap={folder / stream['name']}.pcapng"
        document["ring_bytes"] = 64 << 20
        document["job"] |= changes
        own = RunFolder(self.folder)
        own.begin(first - 1)
        own.save("initial.pt", lambda path: shutil.copyfile(folder / "initial.pt", path))
        own.save_plan(document)

    @contextlib.contextmanager
    def running(self):
        command = [sys.executable, "-m", "flowcheck", "run", self.folder / "plan.json", "--out", self.out]
        self.process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr))
        reader.start()
        try:
            yield self
        finally:
            self.process.kill()
            self.process.wait()
            reader.join()
            self.process.stdout.close()
            self.process.stderr.close()
            shutil.rmtree(scratch_folder(self.out), ignore_errors=True)

    def said(self, words):
        return sum(words in line for line in self.lines)

    def committed(self, attempt):
        """Return what is listed as committed of an attempt."""
        if self.process.poll() is not None:
            raise AssertionError("".join(self.lines))
        if not (self.out / "manifest.json").exists():
            return set()
        rows = listing(self.out)["iterations"]
        return {row["iteration"] for row in rows if (row["state"], row["attempt"]) == ("committed", attempt)}

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, "".join(self.lines)

    def check(self, recordings):
        """Every state of every attempt is its trainer's."""
        for recording, attempt, iterations, _ in recordings:
            for iteration in iterations:
                truth = recording.out / "truth" / f"iteration-{iteration:06}.pt"
                theirs = torch.load(truth, weights_only=True)
                assert same(restore(self.out, iteration, attempt=attempt), theirs) == [], (attempt, iteration)
        assert verify(self.out)["problems"] == []


def resumed(before, iteration, **changes):
    """Record the attempt that goes on from another one's full state."""
    state = before.out / "states" / f"state-{iteration:06}.pt"
    out = before.out.with_name(f"{before.out.name}-on")
    recording = replace(before, out=out, resume=state, **changes)
    record(recording)
    return recording


def follow(tmp_path, more):
    """Follow two attempts of a run, the second of another number of ranks and queue pairs, or three."""
    first = Recording(out=tmp_path / "first", ranks=2, iterations=4, full_state_every=1, protocol="ll", **JOB)
    record(first)
    second = resumed(first, 3, ranks=3, iterations=6, protocol="simple", queue_pairs=2)
    run = Run(tmp_path)
    run.show(first, 1)
    expected = [(first, 1, range(1, 5), 3), (second, 2, range(4, 7), 6)]
    with run.running():
        until(lambda: len(run.committed(1)) == 4, "attempt 1")
        run.show(first, 1, run_id="another")
        until(lambda: run.said("is of run 'another' now, expected 'trained-gpt-seed1'"), "a refusal")
        run.show(second, 4)
        until(lambda: run.committed(2) >= {4, 5, 6}, "attempt 2")
        assert json.loads((run.folder / "shadow.json").read_text())["attempt"] == 2
        assert status(run.out)["last_committed"] == 6
        if more:
            third = resumed(second, 5, ranks=3, iterations=7, protocol="simple", queue_pairs=2)
            run.show(third, 6)
            until(lambda: run.committed(3) >= {6, 7}, "attempt 3")
            expected = [expected[0], (second, 2, range(4, 7), 5), (third, 3, (6, 7), 7)]
        run.stop()
    assert run.said("has begun; ending attempt") == len(expected) - 1 and not run.said("discarding"), run.lines
    assert {(row["attempt"], row["iteration"]): row["state"] for row in listing(run.out)["iterations"]} == {
        (attempt, i): "committed" if i <= last else "superseded" for _, attempt, own, last in expected for i in own
    }
    run.check(expected)


def test_an_attempt_with_other_ranks_and_queue_pairs_is_followed_by_the_same_run(tmp_path):
    follow(tmp_path, more=False)


@pytest.mark.slow
def test_a_third_attempt_forks_off_before_the_end_of_the_second(tmp_path):
    follow(tmp_path, more=True)


@pytest.mark.slow
def test_a_job_that_begins_anew_as_the_same_attempt_is_never_mixed_with_what_it_did_before(tmp_path):
    """The same numbers, the same plan: what was captured before is drained, and new rings begin."""
    first = Recording(out=tmp_path / "first", ranks=2, iterations=6, protocol="ll", **JOB)
    record(first)
    run = Run(tmp_path)
    run.show(first, 1)
    with run.running():
        until(lambda: len(run.committed(1)) == 6 and (run.folder / "shadow.json").exists(), "the attempt")
        inode = os.stat(scratch_folder(run.out) / "link-0.ring").st_ino
        run.show(first, 1)
        until(lambda: run.said("capturing") == 2, "the attempt anew")
        assert os.stat(scratch_folder(run.out) / "link-0.ring").st_ino != inode
        until(lambda: status(run.out)["packets"]["placed"] > 0, "its packets")
        run.stop()
    assert run.said("has begun; ending attempt 1") == 1, run.lines
    assert {row.state for row in Directory(run.out).iterations} == {"committed"}
    run.check([(first, 1, range(1, 7), 6)])
