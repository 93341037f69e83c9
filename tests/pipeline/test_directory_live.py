# SPDX-License-Identifier: MIT
"""The checkpoint directory under live jobs that are killed, resumed and run out of disk, against the trainers' own digests."""

import bisect
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

from flowcheck import interfaces
from flowcheck import plan as plans
from flowcheck.ring import PacketRing
from flowcheck.supervisor import scratch_folder
from tests import network
from tests.pipeline.live import LiveJob, states, until
from tests.pipeline.test_run import alive
from updater.directory import Directory
from updater.export import export
from updater.listing import listing
from updater.restore import restore, restore_state, states_after
from updater.verify import verify
from workload_gen.truth import digest

pytestmark = [pytest.mark.dpdk, network.needs_root]


def flowcheck(*words):
    done = subprocess.run(
        [sys.executable, "-m", "flowcheck", *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def committed(out, attempt=None):
    """Return the iterations that are listed as committed."""
    rows = listing(out)["iterations"]
    return {row["iteration"] for row in rows if row["state"] == "committed" and attempt in (None, row["attempt"])}


def names_all(out):
    """Whether the directory holds its manifest, what that names, and nothing else."""
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    return found == {"manifest.json", *Directory(out).manifest.files}


def truth_of(job):
    return {iteration: row["digest"] for iteration, row in job.steps().items()}


def hold_more(job):
    """Make the ring of a run, yet to be started, longer than its plan asks for.

    A mirror cannot be told to wait: what it brings must lie somewhere while stages share two cores with the ranks, and
    while one of them starts again, which takes seconds there.
    """
    until(job.plan.exists, "the plan")
    scratch = scratch_folder(job.out)
    scratch.mkdir(mode=0o700)
    plan = plans.load(job.plan, incomplete=True)
    PacketRing.for_stream(scratch / "host0.ring", plan, "host0", records=2**17).close()


def most_behind(out, steps):
    """Return how many iterations that had ended were not committed yet, at most, whenever a step ended."""
    _, logged = states(out)
    at = sorted(logged.values())
    return max(iteration - bisect.bisect_right(at, row["ended_ns"]) for iteration, row in steps.items())


@pytest.mark.nightly
def test_a_thousand_iterations_any_of_which_can_be_restored(tmp_path):
    """How fast, how far behind and how many snapshots is printed."""
    last, every = 1000, 50
    options = ("--fused", "--snapshot-iterations", every)
    with LiveJob(tmp_path, iterations=last, params=100_000) as job:
        trainer = job.train(*options)
        hold_more(job)
        shadow = job.shadow()
        until((job.job / "shadow.json").exists, "the shadow")
        before = interfaces.received_bytes(job.fabric.monitors[0])
        assert trainer.wait(250) == 0, trainer.stderr.read()
        mirrored = interfaces.received_bytes(job.fabric.monitors[0]) - before
        until(lambda: job.status()["last_committed"] == last, "the last iteration")
        packets = job.status()["packets"]
        job.stop(shadow)
        steps, truth = job.steps(), truth_of(job)
    assert packets["missed_by_port"] == packets["dropped_ring_full"] == 0
    report = listing(job.out)
    assert [row["state"] for row in report["iterations"]] == ["committed"] * last
    assert report["audited_to"] == last - 1 and report["alarms"] == []
    snapshots = report["snapshots"]
    # One is begun when the one before is there and so many iterations have come since; the last is that of the end.
    assert snapshots[0] == 0 and snapshots[-1] == last and len(snapshots) > last / every / 2
    for iteration in random.Random(1).sample(range(1, last + 1), 100):
        state = restore(job.out, iteration)
        assert (state["iteration"], digest(state)) == (iteration, truth[iteration])
    assert verify(job.out)["problems"] == [] and names_all(job.out)
    seconds = (steps[last]["ended_ns"] - steps[1]["ended_ns"]) / 1e9
    print(
        f"\n{mirrored * 8 / seconds / 1e9:.2f} Gbit/s mirrored over {seconds:.1f} s, most behind "
        f"{most_behind(job.out, steps)}, {len(snapshots)} snapshots"
    )


def wait_for_room(job, trainer):
    """Have the job pause, as a job may, until the updater has caught up, if the ring is filling up."""
    if job.status()["streams"][0]["ring_used"] > 0.25:
        os.killpg(trainer.pid, signal.SIGSTOP)
        until(lambda: job.status()["streams"][0]["ring_used"] < 0.02, "an updater that catches up", 300)
        os.killpg(trainer.pid, signal.SIGCONT)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "kills", [pytest.param(10, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.nightly)]
)
def test_an_updater_that_is_killed_often_misses_no_iteration(tmp_path, kills):
    chance = random.Random(2)
    with LiveJob(tmp_path, ranks=2, iterations=10**6, params=20_000) as job:
        # A message of the Simple protocol in the middle of which a job is made to pause proves no place (docs/decisions/0006).
        trainer = job.train("--snapshot-iterations", 200, "--protocol", "ll")
        hold_more(job)
        shadow = job.shadow()
        until(lambda: len(job.steps()) >= 3, "three steps")
        killed, known = set(), set()
        while len(killed) < kills:
            assert trainer.poll() is None and shadow.poll() is None, shadow.stderr.read()
            wait_for_room(job, trainer)
            pid = next((stage["pid"] for stage in job.status()["stages"] if stage["name"] == "update"), None)
            if pid in killed or not pid or not alive(pid):
                continue
            known |= committed(job.out)
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
            assert known <= committed(job.out)
            time.sleep(chance.uniform(0, 5))
        os.killpg(trainer.pid, signal.SIGKILL)
        truth = truth_of(job)
        # Killed so often an updater hardly comes to a snapshot: the last one has much of the log to step.
        until(lambda: max(listing(job.out)["snapshots"]) >= max(truth), "the last iteration", 900)
        packets = job.status()["packets"]
        said = job.stop(shadow)
    assert known <= committed(job.out)
    assert said.count("update was killed by signal 9; starting it again") == kills, said
    assert packets["missed_by_port"] == packets["dropped_ring_full"] == 0
    # What the end cut off was never an iteration of the training.
    listed, _ = states(job.out)
    assert [state for iteration, state in listed.items() if iteration in truth] == ["committed"] * len(truth)
    found = {iteration: digest(state) for iteration, state in states_after(job.out)}
    assert {iteration: found[iteration] for iteration in truth} == truth
    assert verify(job.out)["problems"] == [] and names_all(job.out)
    print(f"\n{kills} kills over {len(truth)} iterations, {len(listing(job.out)['snapshots'])} snapshots")


class Attempts:
    """Attempts of one run, one after another in one checkpoint directory; each trains in a folder of its own."""

    def __init__(self, job, last):
        self.job, self.last, self.number, self.truth, self.steps = job, last, 0, {}, {}

    def begin(self, *options):
        """Start the next attempt, and a new shadow of it."""
        self.number += 1
        self.job.job = self.job.folder / f"attempt-{self.number}"
        self.job.plan = self.job.job / "plan.json"
        self.trainer = self.job.train(*options, out=self.job.job)
        self.shadow = self.job.shadow()

    def resume(self, iteration, *options):
        """Restore a state, and go on from it."""
        path = self.job.folder / f"restored-{self.number}.pt"
        export(restore_state(self.job.out, iteration), "torch", path)
        self.begin("--resume", path, *options)

    def kill_after(self, iteration, chance):
        """Kill the trainers somewhere in an iteration after this one."""
        until(lambda: self.job.steps().get(iteration) or self.trainer.poll() is not None, f"iteration {iteration}")
        time.sleep(chance.uniform(0, 0.05))
        assert self.trainer.poll() is None, self.trainer.stderr.read()
        os.killpg(self.trainer.pid, signal.SIGKILL)
        self.trainer.wait()
        self.note()

    def finish(self):
        """Let the attempt end by itself."""
        assert self.trainer.wait(200) == 0, self.trainer.stderr.read()
        until(lambda: self.job.status()["last_committed"] == self.last, "the last iteration")
        self.note()
        self.job.stop(self.shadow)

    def note(self):
        """Keep what the trainers noted: what was resumed has the bits of what was never stopped."""
        own = truth_of(self.job)
        assert all(self.truth.setdefault(iteration, found) == found for iteration, found in own.items())
        self.steps[self.number] = set(own)

    def check(self, origins):
        """All that was trained is there; `origins`: per attempt after the first, the iteration that it went on from."""
        out, rows = self.job.out, listing(self.job.out)["iterations"]
        for number in range(1, self.number + 1):
            end = min(origins[number - 1 :], default=self.last)
            own = {row["iteration"]: row["state"] for row in rows if row["attempt"] == number}
            assert self.steps[number] <= set(own)
            for iteration, state in own.items():
                assert state == ("committed" if iteration <= end else "superseded"), (number, iteration)
            found = {iteration: digest(state) for iteration, state in states_after(out, number)}
            assert self.steps[number] <= set(found)
            assert found == {iteration: self.truth[iteration] for iteration in found}
        assert committed(out) == set(range(1, self.last + 1))
        assert verify(out)["problems"] == [] and names_all(out)


def go_on_from(tmp_path, origins, last=80):
    """Train a run whose attempts each go on from an earlier iteration than the one that its trainers were killed in."""
    chance = random.Random(3)
    with LiveJob(tmp_path, ranks=2, iterations=last, params=20_000) as job:
        attempts = Attempts(job, last)
        attempts.begin()
        begun = 0
        for origin in origins:
            attempts.kill_after(max(begun, origin) + 3, chance)
            begun = origin
            job.stop(attempts.shadow)
            attempts.resume(origin)
        attempts.finish()
    attempts.check(origins)
    return job.out, attempts.truth


@pytest.mark.slow
def test_a_resumed_attempt_goes_into_the_directory_of_the_one_before(tmp_path):
    out, truth = go_on_from(tmp_path, (9,))
    assert digest(restore(out, 11, attempt=1)) == digest(restore(out, 11)) == truth[11]


@pytest.mark.slow
def test_three_attempts_one_of_which_forks_off_before_the_other(tmp_path):
    out, truth = go_on_from(tmp_path, (14, 9))
    path = tmp_path / "superseded.pt"
    flowcheck("restore", out, "--iteration", 16, "--attempt", 1, "--format", "torch", "--out", path)
    state = torch.load(path, weights_only=True)
    assert (state["attempt"], state["iteration"], digest(state)) == (1, 16, truth[16])


@pytest.mark.slow
def test_attempts_resumed_after_everything_was_killed(tmp_path):
    """Trainers, supervisor and stages go at once, and with them what lay in memory: what a reboot leaves."""
    chance = random.Random(4)
    last, origins = 240, []
    with LiveJob(tmp_path, iterations=last, params=60_000) as job:
        attempts = Attempts(job, last)
        attempts.begin("--snapshot-iterations", 30)
        for kill in (80, 160):
            until(lambda: job.steps().get(kill) or attempts.trainer.poll() is not None, f"iteration {kill}")  # noqa: B023
            time.sleep(chance.uniform(0, 0.2))
            stages = [stage["pid"] for stage in job.status()["stages"] if stage["pid"]]
            known = committed(job.out)
            attempts.shadow.kill()
            for pid in stages:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            attempts.kill_after(kill, chance)
            until(lambda: not any(map(alive, stages)), "the end of all stages")  # noqa: B023
            shutil.rmtree(scratch_folder(job.out))
            assert known <= committed(job.out) and max(known) > max(origins, default=0)
            origins.append(max(Directory(job.out).restorable()))
            # What was trained after it went with the memory.
            attempts.steps[attempts.number] &= committed(job.out)
            attempts.resume(origins[-1], "--snapshot-iterations", 30)
        attempts.finish()
        attempts.check(tuple(origins))


@contextlib.contextmanager
def small_disk(path, size):
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", path], check=True)
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}", path], check=True)
    finally:
        subprocess.run(["umount", path], check=True)


def step_ms(steps, first, last):
    ended = [steps[iteration]["ended_ns"] for iteration in range(first, last + 1)]
    return statistics.median(after - before for before, after in itertools.pairwise(ended)) / 1e6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_disk_that_fills_up_stops_nobody_and_is_used_again_when_it_has_room(tmp_path):
    last, said = 2500, b""
    with contextlib.ExitStack() as stack:
        job = LiveJob(tmp_path, ranks=2, iterations=last, params=20_000)
        give_room = stack.enter_context(small_disk(job.out, "8m"))
        stack.enter_context(job)
        clean = job.train("--shadow", "0", "--iterations", 800, out=tmp_path / "clean")
        assert clean.wait(200) == 0, clean.stderr.read()
        trainer = job.train("--snapshot-iterations", 100)
        hold_more(job)
        shadow = job.shadow()
        os.set_blocking(shadow.stderr.fileno(), False)
        until(lambda: len(job.steps()) >= 3, "three steps")
        until(lambda: job.status()["volatile"], "a full disk")
        began = max(job.steps())
        until(lambda: max(job.steps()) > began + 100, "a hundred steps")
        with contextlib.suppress(BlockingIOError):
            said = os.read(shadow.stderr.fileno(), 1 << 16)
        report = json.loads(flowcheck("status", job.out, "--json"))
        first, to = report["volatile"]
        assert b"VOLATILE" in said and b"durable again" not in said, said
        assert report["last_committed"] == first - 1 and first + 50 < to <= max(job.steps()) + 1
        # What is listed as committed can be restored, now.
        durable = committed(job.out)
        assert durable == set(range(1, first))
        found = {iteration: digest(state) for iteration, state in states_after(job.out)}
        assert found == {iteration: found_ for iteration, found_ in truth_of(job).items() if iteration in durable}
        snapshots = listing(job.out)["snapshots"]
        full = max(job.steps())
        give_room("400m")
        until(lambda: not job.status()["volatile"], "a snapshot behind the gap")
        until(lambda: job.status()["last_committed"] > full + 50, "iterations that are logged again")
        assert trainer.poll() is None, "the job was too short"
        assert trainer.wait(200) == 0, trainer.stderr.read()
        until(lambda: job.status()["last_committed"] == last, "the last iteration")
        said += job.stop(shadow).encode()
        steps, truth, report = job.steps(), truth_of(job), listing(job.out)
        rows = map(json.loads, (tmp_path / "clean" / "steps.jsonl").read_text().splitlines())
        untouched = {row["iteration"]: row for row in rows}
        assert {iteration: row["digest"] for iteration, row in untouched.items()}.items() <= truth.items()
        assert b"everything is durable again" in said, said
        gap = [row["iteration"] for row in report["iterations"] if row["state"] == "volatile"]
        assert gap == list(range(first, gap[-1] + 1)) and gap[-1] >= to
        assert {row["iteration"] for row in report["iterations"]} == set(range(1, last + 1))
        assert committed(job.out) == set(range(1, last + 1)) - set(gap)
        assert gap[-1] in report["snapshots"] and gap[-1] not in snapshots
        found = {iteration: digest(state) for iteration, state in states_after(job.out)}
        assert found == {iteration: truth[iteration] for iteration in committed(job.out)}
        assert digest(restore(job.out, gap[-1])) == truth[gap[-1]]
        assert verify(job.out)["problems"] == [] and names_all(job.out)
        durable_ms, volatile_ms = step_ms(steps, 20, first - 1), step_ms(steps, first, full)
        clean_ms = step_ms(untouched, 20, 800)
    print(
        f"\nvolatile from {first} to {gap[-1]}; a step took {volatile_ms:.1f} ms then, {durable_ms:.1f} ms before, "
        f"{clean_ms:.1f} ms without a shadow"
    )
    assert volatile_ms < 3 * durable_ms
