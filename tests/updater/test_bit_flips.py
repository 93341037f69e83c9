# SPDX-License-Identifier: MIT
"""Whatever happens to a file of a finished directory is found, names the file, and never leads to other bits."""

import json
import random
import shutil
import subprocess
import sys

import pytest

from flowcheck.errors import CheckpointError
from tests.commands import in_process
from tests.pipeline.recordings import same
from tests.updater import job as jobs
from updater.listing import listing
from updater.restore import restore
from updater.verify import verify

ITERATIONS, SEGMENT_BYTES = 24, 16_000


@pytest.fixture(scope="module")
def job():
    return jobs.made(ITERATIONS).keeping(snapshot_iterations=7)


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    """A directory with several segments and snapshots."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run = jobs.Shadowing(job, out, segment_bytes=SEGMENT_BYTES)
    run.bring(ITERATIONS)
    run.end()
    report = listing(out)
    assert [row["state"] for row in report["iterations"]] == ["committed"] * ITERATIONS
    assert verify(out)["ok"]
    return out


PLAN = "plans/000001.json"


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def content(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


class Needed:
    """Which iterations' states must be refused when a byte of a file is other: told by where the truth's bytes lie."""

    def __init__(self, job, out):
        files, self.snapshots = content(out), listing(out)["snapshots"]
        self._everything = [0, 1, ITERATIONS // 2, ITERATIONS]
        self._gradients = {}  # file -> (begin, end, iteration) of each gradient in it
        for iteration in range(1, ITERATIONS + 1):
            piece = job.gradient(iteration)
            (name, at), *others = [(name, data.find(piece)) for name, data in files.items() if piece in data]
            assert name.startswith("log/") and not others
            self._gradients.setdefault(name, []).append((at, at + len(piece), iteration))
        assert len(self._gradients) >= 3 and len(self.snapshots) >= 2
        assert set(files) == {"manifest.json", PLAN, *self._gradients, *map(self._snapshot, self.snapshots)}

    @staticmethod
    def _snapshot(iteration):
        return f"snapshots/000001-{iteration:012}.h5"

    def by(self, name, at=None):
        """Return iterations that cannot be restored without the byte of a file at an offset, or without the file."""
        if name in ("manifest.json", PLAN):
            return self._everything
        if name in self._gradients:
            hit = [i for begin, end, i in self._gradients[name] if at is None or begin <= at < end]
            return [iteration for iteration in hit if iteration not in self.snapshots]
        iteration = next(i for i in self.snapshots if self._snapshot(i) == name)
        if iteration != self.snapshots[0]:
            return []  # the snapshot before it and the log lead there as well
        later = iteration + 1
        return [iteration] if later > ITERATIONS or later in self.snapshots else [iteration, later]


@pytest.fixture(scope="module")
def needed(job, finished):
    return Needed(job, finished)


def flips(out, rng, count):
    """Flip bits by lot, one at a time, each put right again; yield the file and the byte's offset."""
    files = content(out)
    names = sorted(files)
    for _ in range(count):
        name = rng.choice(names)
        at, bit = rng.randrange(len(files[name])), rng.randrange(8)
        with (out / name).open("r+b", buffering=0) as file:
            for flipped in (files[name][at] ^ 1 << bit, files[name][at]):
                file.seek(at)
                file.write(bytes([flipped]))
                if flipped != files[name][at]:
                    yield name, at, bit


def is_found(out, *names):
    """Verify says that something is wrong with exactly these files, or with the folder that one is missing from."""
    found = verify(out)
    assert not found["ok"]
    told = {problem["file"] for problem in found["problems"]}
    assert set(names) <= told <= {*names, *(name.split("/")[0] for name in names)}, found["problems"]
    assert all(len(problem["what"].splitlines()) == 1 for problem in found["problems"])


def is_refused(job, out, iterations, others):
    """No state is restored that needs what is wrong; any other is right, or refused too."""
    for iteration in iterations:
        with pytest.raises(CheckpointError):
            restore(out, iteration)
    for iteration in others:
        try:
            found = restore(out, iteration)
        except CheckpointError:
            continue
        assert same(found, job.truth[iteration]) == [], f"iteration {iteration} has other bits than the trainer's"


@pytest.mark.parametrize("count", [
    150,
    pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
])  # fmt: skip
def test_a_flipped_bit_is_found_and_never_restored(job, out, needed, count):
    rng, before = random.Random(count), content(out)
    for name, at, bit in flips(out, rng, count):
        try:
            is_found(out, name)
            is_refused(job, out, needed.by(name, at), [rng.randrange(ITERATIONS + 1)])
        except BaseException as problem:
            problem.add_note(f"bit {bit} of byte {at} of {name} was flipped")
            raise
    assert content(out) == before and verify(out)["ok"]


def as_a_process(*words):
    command = [sys.executable, "-m", "flowcheck", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("flowcheck", "count"), [
    (in_process, 5),
    pytest.param(in_process, 100, marks=pytest.mark.slow),
    pytest.param(as_a_process, 10, marks=pytest.mark.slow),
])  # fmt: skip
def test_commands_say_in_one_line_which_file_it_is_and_write_nothing(job, out, needed, tmp_path, flowcheck, count):
    rng = random.Random(count)
    for name, at, _ in flips(out, rng, count):
        flipped = content(out)
        status, said, complained = flowcheck("verify", out, "--json")
        assert (
            status == 5 and name in {problem["file"] for problem in json.loads(said)["problems"]} and complained == ""
        )
        status, said, complained = flowcheck("verify", out)
        assert status == 5 and name.rpartition("/")[2] in said and "Traceback" not in complained
        for iteration in needed.by(name, at)[:1]:
            target = tmp_path / "state.pt"
            restored = flowcheck("restore", out, "--iteration", iteration, "--format", "torch", "--out", target)
            compared = flowcheck("diff", f"{out}@{iteration}", f"{out}@{iteration}")
            for status, said, complained in (restored, compared):
                assert status == 5 and said == "", (name, at)
                (line,) = complained.splitlines()
                assert line.startswith("flowcheck: ") and name.rpartition("/")[2] in line
        assert content(out) == flipped and list(tmp_path.iterdir()) == [out]


def test_what_is_not_as_long_as_it_was_is_found(job, out, needed):
    rng = random.Random(1)
    for name, data in content(out).items():
        lengths = sorted({0, len(data) - 1, rng.randrange(len(data)), rng.randrange(len(data))})
        for other in [*(data[:length] for length in lengths), data + b"\0", data + rng.randbytes(100)]:
            (out / name).write_bytes(other)
            is_found(out, name)
            cut_to = min(len(other), len(data) - 1)
            is_refused(
                job, out, needed.by(name, cut_to if other != b"" else None)[-1:], [rng.randrange(ITERATIONS + 1)]
            )
        (out / name).write_bytes(data)


def test_a_missing_file_is_found(job, out, needed, tmp_path):
    for name in content(out):
        shutil.move(out / name, tmp_path / "away")
        is_found(out, name)
        is_refused(job, out, needed.by(name)[-1:], [0, ITERATIONS // 2])
        shutil.move(tmp_path / "away", out / name)


def test_two_files_that_changed_places_are_found(job, out, needed):
    for kind in ("log/", "snapshots/"):
        first, *_, last = (name for name in content(out) if name.startswith(kind))
        swapped = [(out / name).read_bytes() for name in (first, last)]
        for name, data in zip((first, last), reversed(swapped), strict=True):
            (out / name).write_bytes(data)
        is_found(out, first, last)
        for name in (first, last):
            is_refused(job, out, needed.by(name), range(0, ITERATIONS, 5))
        for name, data in zip((first, last), swapped, strict=True):
            (out / name).write_bytes(data)
