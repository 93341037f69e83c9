# SPDX-License-Identifier: MIT
"""A live job in tests: a fabric, `flowcheck-workload train` on it, `flowcheck run` beside it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

from flowcheck.supervisor import scratch_folder, status
from updater.directory import Directory
from updater.restore import states_after
from workload_gen.fabric import Fabric
from workload_gen.truth import digest


def until(condition, what, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not after {seconds} s"
        time.sleep(0.02)


class LiveJob:
    """Fabric, trainer and shadow; everything is taken away at the end of the `with`."""

    def __init__(self, folder, *, ranks=4, mirrored=(0,), iterations=12, params=60_000, options=()):
        self.folder, self.job, self.out = folder, folder / "job", folder / "checkpoints"
        self.ranks, self.mirrored, self.iterations, self.params = ranks, mirrored, iterations, params
        self.options = options
        self.plan = self.job / "plan.json"
        self._processes = []

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.fabric = stack.enter_context(Fabric(self.ranks, self.mirrored))
            self.fabric.network.store(self.folder / "network.json")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, problem, *_):
        for process in self._processes:
            process.kill()
            said = process.communicate()
            if problem:  # pytest shows it
                print(*process.args[2:5], *said, sep="\n")
        shutil.rmtree(scratch_folder(self.out), ignore_errors=True)
        self._stack.close()

    def start(self, *command, **environment):
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        self._processes.append(process)
        return process

    def train(self, *options, out=None):
        words = ["--ranks", self.ranks, "--iterations", self.iterations, "--params", self.params, "--bucket-mb", "0.1"]
        command = [sys.executable, "-c", "from workload_gen.cli import main; main()", "train", *words]
        command += ["--network", self.folder / "network.json", "--out", out or self.job, *self.options, *options]
        return self.start(*command)

    def shadow(self, **environment):
        until(self.plan.exists, "the plan")
        return self.start(sys.executable, "-m", "flowcheck", "run", self.plan, "--out", self.out, **environment)

    def status(self):
        return status(self.out)

    def steps(self):
        path = self.job / "steps.jsonl"
        return (
            {row["iteration"]: row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
        )

    def stop(self, shadow):
        """End the shadow as a user would; return what it said."""
        shadow.send_signal(signal.SIGTERM)
        try:
            out, err = shadow.communicate(timeout=120)
        except subprocess.TimeoutExpired as problem:
            stages = {path.name: path.read_text() for path in scratch_folder(self.out).glob("*.stderr")}
            raise AssertionError(f"not ended: {problem.stderr}\n{stages}\n{self.status()}") from problem
        assert shadow.returncode == 0, err
        return out + err


def states(out):
    """Return the listed state of each iteration, and when each was logged."""
    rows = Directory(out).iterations
    return {row.number: row.state for row in rows}, {row.number: row.entry.header.time_ns for row in rows if row.entry}


def digests(out):
    """Return the digest of the state after every committed iteration, stepped from the first snapshot."""
    return {iteration: digest(state) for iteration, state in states_after(out)}
