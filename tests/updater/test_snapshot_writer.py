# SPDX-License-Identifier: MIT
"""A snapshot is written beside the process that steps the state, from a copy, and whatever becomes of the child is named."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from flowcheck._copy import CopyEngine

from flowcheck.errors import FlowCheckError
from tests.updater.test_snapshots import big_state, bits, edge_state, same
from updater.snapshot import State, read_state, write_now
from updater.snapshot_writer import SnapshotWriter

ROOT = Path(__file__).parents[2]


def children():
    """Process ids of the writers that this process has started, those that have ended and were not waited for with them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text, command = path.read_text(), (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        # One that has ended has no command any more; other tests' helpers have another.
        if int(text.rpartition(")")[2].split()[1]) == os.getpid() and (not command or b"snapshot_writer" in command):
            found.append(int(path.parent.name))
    return found


def test_the_child_makes_the_file_that_the_process_itself_makes(tmp_path):
    here = write_now(tmp_path / "here.h5", edge_state())
    with closing(SnapshotWriter()) as writer:
        writer.start(tmp_path / "s.h5", edge_state(), CopyEngine())
        written = writer.wait()
    assert (written.bytes, written.sha256) == (here.bytes, here.sha256)
    assert written.path.read_bytes() == here.path.read_bytes()
    assert written.path.parent == tmp_path and written.path.name != "s.h5" and not (tmp_path / "s.h5").exists()
    assert written.path.stat().st_mode & 0o777 == 0o600
    assert same(read_state(written.path), edge_state())


def test_what_is_written_is_the_state_at_the_start(tmp_path):
    generator = torch.Generator().manual_seed(6)
    parameters = [torch.nn.Parameter(torch.randn(200_000, generator=generator)) for _ in range(4)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)

    def step():
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    def state(number):
        model = {f"p{n}": parameter for n, parameter in enumerate(parameters)}
        return State("run", 1, number, True, {}, model, optimizer.state_dict())

    step()
    with closing(SnapshotWriter()) as writer:
        for number in range(3):
            before = {name: bits(tensor) for name, tensor in state(number).tensors()}
            writer.start(tmp_path / f"{number}.h5", state(number), CopyEngine())
            assert writer.busy
            steps = 0
            while (written := writer.poll()) is None:
                step()
                steps += 1
                time.sleep(0.01)  # the child takes what its owner leaves
            assert steps and not writer.busy and writer.poll() is None
            found = read_state(written.path)
            assert found.iteration == number and {name: bits(tensor) for name, tensor in found.tensors()} == before


def test_memory_grows_with_the_state_and_is_used_again(tmp_path):
    with closing(SnapshotWriter()) as writer:
        for number, state in enumerate([edge_state(), big_state(9), edge_state(), big_state(9)]):
            writer.start(tmp_path / f"{number}.h5", state, CopyEngine())
            assert same(read_state(writer.wait().path), state)
        assert len(children()) == 1


def test_one_at_a_time(tmp_path):
    with closing(SnapshotWriter()) as writer:
        assert writer.wait() is None and writer.poll() is None
        writer.start(tmp_path / "a.h5", edge_state(), CopyEngine())
        with pytest.raises(FlowCheckError, match=r"b\.h5: cannot be written while .*a\.h5 is"):
            writer.start(tmp_path / "b.h5", edge_state(), CopyEngine())
        assert same(read_state(writer.wait().path), edge_state())


def test_a_child_that_is_killed_while_it_writes_leaves_nothing_but_its_name(tmp_path):
    state = big_state(60)
    with closing(SnapshotWriter()) as writer:
        writer.start(tmp_path / "s.h5", state, CopyEngine())
        (child,) = children()
        while not any(path.stat().st_size for path in tmp_path.iterdir()):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        with pytest.raises(FlowCheckError, match=r"s\.h5: .*process.*was killed by SIGKILL"):
            writer.wait()
        assert not writer.busy and not os.listdir(tmp_path) and not children()
        writer.start(tmp_path / "s.h5", state, CopyEngine())
        assert same(read_state(writer.wait().path), state)


def test_a_child_that_died_between_two_snapshots_is_not_missed(tmp_path):
    with closing(SnapshotWriter()) as writer:
        writer.reserve(edge_state())
        for _ in range(2):
            (child,) = children()
            os.kill(child, signal.SIGKILL)
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            writer.start(tmp_path / "s.h5", edge_state(), CopyEngine())
            assert same(read_state(writer.wait().path), edge_state())


def test_a_child_that_stands_still_does_not_stop_its_owner(tmp_path):
    """Also with more to say than a pipe takes."""
    state = State("run", 1, 5, True, {}, {f"{'long' * 20}.{n}": torch.ones(2) for n in range(1500)}, None)
    with closing(SnapshotWriter()) as writer:
        writer.reserve(state)
        (child,) = children()
        os.kill(child, signal.SIGSTOP)
        writer.start(tmp_path / "s.h5", state, CopyEngine())
        assert writer.poll() is None and writer.busy
        os.kill(child, signal.SIGCONT)
        assert same(read_state(writer.wait().path), state)
        os.kill(child, signal.SIGSTOP)
        writer.start(tmp_path / "t.h5", state, CopyEngine())
    assert not children() and len(os.listdir(tmp_path)) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=False, capture_output=True
    ).returncode:
        pytest.skip("cannot mount a tmpfs (needs root)")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_and_the_next_snapshot_works(small_disk):
    with closing(SnapshotWriter()) as writer:
        writer.start(small_disk / "s.h5", big_state(9), CopyEngine())
        with pytest.raises(FlowCheckError, match=r"s\.h5: cannot write: No space left on device; free some space"):
            writer.wait()
        assert not os.listdir(small_disk) and not writer.busy
        writer.start(small_disk / "s.h5", edge_state(), CopyEngine())
        assert same(read_state(writer.wait().path), edge_state())
    with pytest.raises(FlowCheckError, match="No space left on device"):
        write_now(small_disk / "t.h5", big_state(9))
    assert len(os.listdir(small_disk)) == 1


def test_the_child_needs_no_memory_of_the_size_of_the_state(tmp_path):
    """Its peak counts shared memory too; the same state in a process's own memory would be in it."""
    peaks = {}
    with closing(SnapshotWriter()) as writer:
        for megabytes in (1, 200):
            writer.start(tmp_path / "s.h5", big_state(megabytes), CopyEngine())
            assert writer.wait().bytes > megabytes * 1_000_000
            (child,) = children()
            status = dict(line.split(":", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines())
            peaks[megabytes] = int(status["VmHWM"].split()[0]) / 1000
        assert os.getpriority(os.PRIO_PROCESS, child) == 19
    assert peaks[200] < peaks[1] + 40, peaks
    assert peaks[200] < 150, peaks


def test_nothing_is_left_open(tmp_path):
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        writer = SnapshotWriter()
        writer.start(tmp_path / "s.h5", big_state(9), CopyEngine())
        writer.close()
        writer.close()
        assert not writer.busy and not os.listdir(tmp_path)
    write_now(tmp_path / "s.h5", edge_state())
    assert sorted(os.listdir("/proc/self/fd")) == before and not children()


def test_the_child_ends_with_its_parent(tmp_path):
    script = """
import os, sys
from pathlib import Path
from flowcheck._copy import CopyEngine
from tests.updater.test_snapshot_writer import big_state, children
from updater.snapshot_writer import SnapshotWriter
writer = SnapshotWriter()
writer.start(Path(sys.argv[1]), big_state(30), CopyEngine())
(child,) = children()
while not any(path.stat().st_size for path in Path(sys.argv[1]).parent.iterdir()):
    pass
os.kill(child, 19)
print(child, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "s.h5")], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{int(done.stdout)}") and time.monotonic() < end:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{int(done.stdout)}")


def test_the_child_loads_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import updater.snapshot_writer; assert 'torch._C' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
