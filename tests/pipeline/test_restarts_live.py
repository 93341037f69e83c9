# SPDX-License-Identifier: MIT
"""One `flowcheck run` through restarts of a live job: ranks are killed, and the job goes on in its folder from a restored state.

The fabric stands all the time; a restarted job of as many ranks has the very queue pairs, first sequence numbers and slots of the
one before.
"""

import json
import os
import random
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from flowcheck import plan as plans
from flowcheck.ring import PacketRing
from flowcheck.slots import SlotFile
from flowcheck.supervisor import scratch_folder
from tests import network
from tests.pipeline.live import LiveJob, until
from updater.restore import states_after
from workload_gen.truth import digest

pytestmark = [pytest.mark.dpdk, pytest.mark.slow, pytest.mark.timeout(3600), network.needs_root]

#: A rank dies in about these iterations; the next attempt goes on from the one so many before.
KILLS, BACK, LAST = (12, 30), 4, 44


def flowcheck(*words):
    done = subprocess.run(
        [sys.executable, "-m", "flowcheck", *map(str, words)], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def listed(out):
    return json.loads(flowcheck("list", out, "--json"))


def ranks_of(trainer):
    """Return the processes of a trainer's ranks: grandchildren, whose parent is the server that forks them."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(fields[3]) == trainer.pid:
            found[int(path.parent.name)] = int(fields[1])
    return sorted(pid for pid, parent in found.items() if parent in found and parent != trainer.pid)


class Restarts:
    """Attempts of a job, one after another in one folder, each of data of its own: what is mixed up shows in the bits."""

    def __init__(self, job, ranks):
        self.job, self.ranks, self.number, self.chance = job, ranks, 0, random.Random(len(set(ranks)))
        self.begun, self.trained = 0, {}

    def begin(self, *options):
        """Start the next attempt."""
        self.number += 1
        self.begun = len(self._rows())
        self.trainer = self.job.train("--ranks", self.ranks[self.number - 1], "--seed", self.number, *options)

    def _rows(self):
        path = self.job.job / "steps.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def note(self):
        """Return the digest after each iteration that the trainer of this attempt has noted."""
        rows = map(json.loads, self._rows()[self.begun :])
        self.trained[self.number] = {row["iteration"]: row["digest"] for row in rows}
        return self.trained[self.number]

    def kill_at(self, iteration):
        """Kill a rank in about an iteration; its job ends by that."""
        until(lambda: iteration in self.note() or self.trainer.poll() is not None, f"iteration {iteration}", 400)
        assert self.trainer.poll() is None, self.trainer.stderr.read()
        victims = ranks_of(self.trainer)
        assert len(victims) == self.ranks[self.number - 1]
        os.kill(self.chance.choice(victims), signal.SIGKILL)
        assert self.trainer.wait(200) != 0
        self.note()

    def resume(self, iteration):
        """Go on from a committed iteration, in the folder of the attempt before."""
        path = self.job.folder / f"restored-{iteration}.pt"
        flowcheck("restore", self.job.out, "--iteration", iteration, "--format", "torch", "--out", path)
        state = torch.load(path, weights_only=True)
        assert (state["attempt"], digest(state)) == (self.number, self.trained[self.number][iteration])
        self.begin("--resume", path)

    def captured(self, shadow):
        """Wait until this attempt is captured; nothing of another one is in memory."""
        acknowledgement = self.job.job / "shadow.json"

        def says():
            assert shadow.poll() is None, shadow.stderr.read()
            assert self.trainer.poll() in (None, 0), self.trainer.stderr.read()
            try:
                return json.loads(acknowledgement.read_text())["attempt"]
            except FileNotFoundError:
                return 0

        until(lambda: says() == self.number, f"attempt {self.number} captured", 400)
        scratch, plan = scratch_folder(self.job.out), plans.load(self.job.plan)
        assert plan.job.attempt == self.number and plan.job.world_size == self.ranks[self.number - 1]
        rings = list(scratch.glob("*.ring"))
        assert [ring.name for ring in rings] == ["host0.ring"]
        PacketRing.open(rings[0], plan.identity()).close()
        SlotFile.open(scratch / "slots", plan.identity()).close()
        stages = [stage["pid"] for stage in self.job.status()["stages"] if stage["pid"]]
        for pid in (shadow.pid, *stages):
            maps = Path(f"/proc/{pid}/maps")
            held = [line for line in maps.read_text().splitlines() if scratch.name in line and "(deleted)" in line]
            assert not held, (pid, held)

    def check(self, origins):
        """Each attempt has its own iterations, with its trainer's bits; `origins`: the iterations that were gone on from."""
        out, report = self.job.out, listed(self.job.out)
        assert [row["resumed"] for row in report["attempts"]] == [
            None,
            *({"attempt": number, "iteration": origin} for number, origin in enumerate(origins, 1)),
        ]
        for number, (begin, end) in enumerate(pairwise((0, *origins, LAST)), 1):
            truth, killed = self.trained[number], number <= len(origins)
            own = {row["iteration"]: row["state"] for row in report["iterations"] if row["attempt"] == number}
            assert set(truth) == set(range(begin + 1, max(truth) + 1))
            # The iteration that a rank died in may be seen, as far as it came; of the one before the step record may not have come.
            assert set(truth) <= set(own) <= set(truth) | ({max(truth) + 1} if killed else set())
            assert own == {i: "committed" if i <= end else "superseded" for i in own}
            found = {i: digest(state) for i, state in states_after(out, number)}
            assert set(truth) - ({max(truth)} if killed else set()) <= set(found)
            assert {i: found[i] for i in set(truth) & set(found)} == {i: truth[i] for i in set(truth) & set(found)}
            assert set(found) <= {begin} | set(own)
        for one, two in pairwise(self.trained.values()):
            assert set(one) & set(two) and not set(one.values()) & set(two.values())
        assert [row for row in report["iterations"] if row["state"] == "committed"][-1]["iteration"] == LAST
        assert report["alarms"] == []
        assert json.loads(flowcheck("verify", out, "--json"))["problems"] == []


@pytest.mark.parametrize(
    ("ranks", "protocol"),
    [((3, 3, 3), "simple"), ((3, 3, 3), "ll"), ((4, 3, 2), "simple")],
    ids=["same-simple", "same-ll", "fewer-simple"],
)
def test_a_job_that_is_killed_and_resumed_in_its_folder_is_followed_by_the_same_run(tmp_path, ranks, protocol):
    options = ("--protocol", protocol, "--shadow", 400)
    with LiveJob(tmp_path, ranks=max(ranks), iterations=LAST, options=options) as job:
        attempts = Restarts(job, ranks)
        attempts.begin()
        until(job.plan.exists, "the plan", 400)
        shadow = job.shadow()
        origins = []
        for kill in KILLS:
            attempts.kill_at(kill)
            origins.append(max(attempts.trained[attempts.number]) - BACK)
            attempts.resume(origins[-1])
            attempts.captured(shadow)
        assert attempts.trainer.wait(400) == 0, attempts.trainer.stderr.read()
        attempts.note()
        until(lambda: job.status()["last_committed"] == LAST, "the last iteration", 400)
        said = job.stop(shadow)
    for number in (2, 3):
        assert said.count(f"attempt {number} of run 'trained-gpt-seed1' has begun; ending attempt {number - 1}\n") == 1
    for words in ("discarding", "not drained", "cannot be drained", "starting it again", "ALARM"):
        assert words not in said, said
    assert not scratch_folder(job.out).exists() and not (job.job / "shadow.json").exists()
    attempts.check(origins)
