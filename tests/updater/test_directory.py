# SPDX-License-Identifier: MIT
"""A checkpoint directory over its life: attempts, snapshots on the way, retention, older formats, a state that is behind."""

import json
import shutil
import threading
import time

import numpy as np
import pytest
import torch

from flowcheck.errors import CheckpointError, ConfigError, RestoreError
from tests.commands import flowcheck
from tests.fixtures import directory_v1
from tests.pipeline.recordings import same
from tests.updater.small import Slots, Truth, make, make_plan, open_updater, run
from updater.directory import Directory
from updater.gradient import read_gradient
from updater.listing import listing
from updater.restore import restore, states_after
from updater.shadow import Shadow
from updater.verify import verify


def states(out):
    return {(row["attempt"], row["iteration"]): row["state"] for row in listing(out)["iterations"]}


def checksummed(out):
    """Whether the directory holds nothing but what the manifest names."""
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    return files == {"manifest.json", *json.loads((out / "manifest.json").read_text())["files"]}


def test_snapshots_on_the_way_and_every_iteration_restored(tmp_path):
    out, truth = make(tmp_path, last=40, checkpoints={"snapshot_iterations": 7})
    report = listing(out)
    assert report["snapshots"] == [0, 7, 14, 21, 28, 35, 40]
    for iteration in range(41):
        assert same(restore(out, iteration), truth.states[iteration]) == [], iteration
    assert [i for i, _ in states_after(out)] == list(range(1, 41))
    assert verify(out)["ok"] and verify(out)["proved_to"] == 40 and checksummed(out)


def test_snapshots_by_seconds_and_by_bytes_of_log(tmp_path):
    for number, rules in enumerate(({"snapshot_seconds": 0.001}, {"snapshot_log_bytes": 5000})):
        folder = tmp_path / str(number)
        folder.mkdir()
        out, _ = make(folder, checkpoints=rules)
        assert len(listing(out)["snapshots"]) > 2


def test_a_resumed_run_is_a_new_attempt_and_the_old_one_stays_readable(tmp_path):
    out, first = make(tmp_path, last=10, checkpoints={"snapshot_iterations": 4})
    plan = make_plan(attempt=2, resumed=(1, 6))
    second = Truth(plan, first.states[6]).run(15)
    second.save(tmp_path)
    with open_updater(plan, Slots(plan, 15), out, tmp_path) as updater:
        run(updater)
    assert states(out) == {
        **{(1, i): "committed" if i <= 6 else "superseded" for i in range(1, 11)},
        **{(2, i): "committed" for i in range(7, 16)},
    }
    for iteration in range(16):
        expected = (first if iteration <= 6 else second).states[iteration]
        assert same(restore(out, iteration), expected) == [], iteration
    for iteration in range(7, 11):
        old = restore(out, iteration, attempt=1)
        assert same(old, first.states[iteration]) == [] and (old["attempt"], old["latest_attempt"]) == (1, 2)
        assert not np.array_equal(read_gradient(out, iteration), read_gradient(out, iteration, attempt=1))
    assert restore(out)["iteration"] == 15 and restore(out, attempt=1)["iteration"] == 10
    assert verify(out)["ok"] and verify(out)["proved_to"] == 15 and checksummed(out)
    with pytest.raises(RestoreError, match="attempt 3 is not there, only 1, 2"):
        restore(out, 3, attempt=3)
    text = flowcheck("restore", out, "--iteration", 9, "--attempt", 1, "--format", "torch", "--out", tmp_path / "s.pt")
    assert "iteration 9" in text
    assert same(torch.load(tmp_path / "s.pt", weights_only=True), first.states[9]) == []


def test_an_attempt_goes_on_from_the_one_that_it_names(tmp_path):
    """3 goes on from what 2 superseded: then 2 is superseded, and 1 counts as far as 3 says."""
    out, first = make(tmp_path, last=10)
    for attempt, resumed, last in ((2, (1, 4), 8), (3, (1, 7), 9)):
        plan = make_plan(attempt=attempt, resumed=resumed)
        truth = Truth(plan, first.states[resumed[1]]).run(last)
        truth.save(tmp_path)
        with open_updater(plan, Slots(plan, last), out, tmp_path) as updater:
            run(updater)
    assert states(out) == {
        **{(1, i): "committed" if i <= 7 else "superseded" for i in range(1, 11)},
        **{(2, i): "superseded" for i in range(5, 9)},
        **{(3, i): "committed" for i in (8, 9)},
    }
    assert same(restore(out), truth.states[9]) == [] and same(restore(out, 6), first.states[6]) == []


@pytest.mark.parametrize(
    ("attempt", "resumed", "words"),
    [
        (1, None, "attempt 2 of run 'captured-5000' has begun there, the plan is of attempt 1"),
        (5, (3, 2), "goes on from attempt 3 of run 'captured-5000', which is not there \\(there is 1, 2\\)"),
        (2, (1, 5), "another plan of run"),
    ],
)
def test_an_attempt_that_cannot_be_is_refused(tmp_path, attempt, resumed, words):
    out, first = make(tmp_path, last=6)
    plan = make_plan(attempt=2, resumed=(1, 4))
    truth = Truth(plan, first.states[4]).run(6)
    truth.save(tmp_path)
    with open_updater(plan, Slots(plan, 6), out, tmp_path) as updater:
        run(updater)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    plan = make_plan(attempt=attempt, resumed=resumed)
    with pytest.raises(ConfigError, match=words), open_updater(plan, Slots(plan, 7), out, tmp_path):
        pass
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_other_rules_for_keeping_are_no_other_plan(tmp_path):
    out, truth = make(tmp_path, last=6)
    plan = make_plan(checkpoints={"snapshot_iterations": 2})
    truth.run(12)
    with open_updater(plan, Slots(plan, 12, consumed=7), out, tmp_path) as updater:
        run(updater)
    assert same(restore(out), truth.states[12]) == [] and listing(out)["snapshots"] == [0, 6, 8, 10, 12]


class TestRetention:
    def test_the_last_iterations_and_every_nth_snapshot(self, tmp_path):
        rules = {"last_iterations": 10, "every_snapshot": 2}
        out, truth = make(tmp_path, last=60, checkpoints={"snapshot_iterations": 5, "retention": rules})
        left = Directory(out).restorable()
        assert set(range(51, 61)) <= set(left) and len(left) < 40 and checksummed(out) and verify(out)["ok"]
        for iteration in left:
            assert same(restore(out, iteration), truth.states[iteration]) == [], iteration
        gone = next(i for i in range(1, 50) if i not in left)
        with pytest.raises(RestoreError, match=f"iteration {gone} cannot be restored: it is not in the log"):
            restore(out, gone)

    def test_what_is_pinned_stays_and_a_limit_of_bytes_removes_the_oldest(self, tmp_path):
        out, truth = make(tmp_path, last=60, checkpoints={"snapshot_iterations": 5})
        whole = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        flowcheck("pin", out, 8)
        before = sorted(out.rglob("*"))
        dry = json.loads(flowcheck("prune", out, "--dry-run", "--most-bytes", whole // 2, "--json"))
        assert dry["removed"] and sorted(out.rglob("*")) == before
        done = json.loads(flowcheck("prune", out, "--most-bytes", whole // 2, "--json"))
        assert done["removed"] == dry["removed"] and done["left_bytes"] <= whole // 2
        left = Directory(out).restorable()
        assert {8, 60} <= set(left) and len(left) < 45 and checksummed(out) and verify(out)["ok"]
        for iteration in left:
            assert same(restore(out, iteration), truth.states[iteration]) == [], iteration
        assert json.loads(flowcheck("prune", out, "--json"))["removed"] == []  # the plan has no rule
        flowcheck("pin", out, 8, "--remove")
        assert "not pinned; pinned are: none" in flowcheck("pin", out, 8, "--remove", status=1)
        assert "manifest.json" in flowcheck("pin", tmp_path / "none", 8, status=5)
        flowcheck("prune", out, "--last-iterations", 1)
        left = Directory(out).restorable()
        assert 60 in left and 8 not in left and verify(out)["ok"]
        assert same(restore(out), truth.states[60]) == []

    def test_the_newest_snapshot_that_is_right_stays_with_its_log(self, tmp_path):
        out, truth = make(tmp_path, last=40, checkpoints={"snapshot_iterations": 5})
        newest = max((out / "snapshots").iterdir())
        content = bytearray(newest.read_bytes())
        content[len(content) // 2] ^= 4
        newest.write_bytes(content)
        flowcheck("prune", out, "--last-iterations", 1)
        assert same(restore(out), truth.states[40]) == []

    def test_nothing_goes_while_the_log_is_corrupt(self, tmp_path):
        out, _ = make(tmp_path, last=20, checkpoints={"snapshot_iterations": 5})
        segment = min((out / "log").iterdir())
        segment.write_bytes(segment.read_bytes()[:-70])
        before = sorted(out.rglob("*"))
        flowcheck("prune", out, "--last-iterations", 1, status=5)
        assert sorted(out.rglob("*")) == before

    def test_what_waits_is_limited(self, tmp_path):
        rules = {"last_iterations": 100, "most_waiting_bytes": 8000}
        plan = make_plan(checkpoints={"retention": rules})
        truth = Truth(plan).run(40)
        truth.save(tmp_path)
        out = tmp_path / "out"
        with open_updater(plan, Slots(plan, 40, lost=[5]), out, tmp_path, segment_bytes=3000) as updater:
            run(updater)
        flowcheck("prune", out)
        waiting = [i for (_, i), state in states(out).items() if state == "waiting"]
        assert 0 < len(waiting) < 15 and max(waiting) == 40 and same(restore(out), truth.states[4]) == []
        truth.save(tmp_path, 39)
        assert "committed to iteration 40" in flowcheck("rebase", out, tmp_path / "state-000039.pt")
        assert same(restore(out), truth.states[40]) == []

    def test_a_crash_between_manifest_and_removal_leaves_nothing_behind(self, tmp_path, monkeypatch):
        from updater import durable, retention
        from updater.manifest import Manifest

        out, truth = make(tmp_path, last=40, checkpoints={"snapshot_iterations": 5})

        def fail(_path):
            raise OSError(5, "gone")

        monkeypatch.setattr(durable.disk, "unlink", fail)
        rules = make_plan(checkpoints={"retention": {"last_iterations": 1}}).checkpoints.retention
        with pytest.raises(Exception, match="cannot remove"):
            retention.prune(Manifest.load(out), rules)
        monkeypatch.undo()
        assert not checksummed(out) and same(restore(out), truth.states[40]) == [] and verify(out)["ok"]
        plan = make_plan()
        with open_updater(plan, Slots(plan, 40, consumed=41), out, tmp_path) as updater:
            run(updater)
        assert checksummed(out) and same(restore(out), truth.states[40]) == []


class TestOlderFormats:
    @pytest.fixture
    def old(self, tmp_path):
        shutil.copytree(directory_v1.PATH, tmp_path / "old")
        return tmp_path / "old"

    def expected(self, iteration):
        weight = torch.nn.Parameter(directory_v1.initial())
        optimizer = torch.optim.SGD([weight], lr=directory_v1.RATE)
        for number in range(1, iteration + 1):
            weight.grad = torch.from_numpy(directory_v1.gradient(number)).reshape(1, -1)
            optimizer.step()
        return weight

    def test_version_1_is_read(self, old):
        assert states(old) == {
            (1, 1): "committed", (1, 2): "committed", (1, 3): "committed", (1, 4): "incomplete", (1, 5): "waiting",
            (1, 6): "waiting",
        }  # fmt: skip
        for iteration in range(4):
            assert torch.equal(restore(old, iteration)["model"]["weight"], self.expected(iteration))
        assert np.array_equal(read_gradient(old, 5), directory_v1.gradient(5))
        assert verify(old)["ok"] and verify(old)["proved_to"] == 3

    def test_version_1_is_gone_on_with(self, old, tmp_path):
        state = {"model": {"weight": self.expected(6).detach()}, "iteration": 6}
        state["optimizer"] = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=directory_v1.RATE).state_dict()
        torch.save(state, tmp_path / "state-000006.pt")
        flowcheck("rebase", old, tmp_path / "state-000006.pt")
        directory_v1.make(old, self.going_on())
        assert states(old)[1, 8] == "committed" and torch.equal(restore(old, 8)["model"]["weight"], self.expected(8))
        assert torch.equal(restore(old, 2)["model"]["weight"], self.expected(2))
        assert verify(old)["ok"] and checksummed(old)

    def going_on(self):
        slots = directory_v1.Slots(9)
        slots.consumed_next = 7
        return slots

    def test_a_later_version_is_refused_by_name(self, old):
        path = min((old / "log").iterdir())
        content = bytearray(path.read_bytes())
        content[8] = 3
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="version 3 of the gradient log; this release reads 1 to 2"):
            listing(old)


def test_a_state_that_is_being_rebuilt_holds_nothing_up(tmp_path, monkeypatch):
    """Slots are logged and given back while a start reads its snapshot; the state is stepped when it is there."""
    out, truth = make(tmp_path, last=10)
    truth.run(60)
    go = threading.Event()
    load = Shadow.begin_from_snapshot
    monkeypatch.setattr("updater.updater._LOAD_PATIENCE_S", 0.05)
    monkeypatch.setattr(Shadow, "begin_from_snapshot", lambda self, manifest: go.wait(60) and load(self, manifest))
    plan = make_plan()
    slots = Slots(plan, 60, consumed=11)
    with open_updater(plan, slots, out, tmp_path) as updater:
        run(updater, lambda: slots.consumed_next == 61)
        assert updater.counters()["applied"] == 0 and not updater.finished
        assert states(out)[1, 60] == "committed" and same(restore(out, 60), truth.states[60]) == []
        go.set()
        run(updater)
        assert updater.counters()["applied"] == 50
    assert same(restore(out), truth.states[60]) == [] and verify(out)["proved_to"] == 60


def test_an_attempts_first_snapshot_comes_before_its_first_record(tmp_path, monkeypatch):
    """However long its state takes to load: the job waits for the shadow then, and without a snapshot nothing is committed."""
    load = Shadow.begin_from_file
    monkeypatch.setattr("updater.updater._LOAD_PATIENCE_S", 0.05)
    monkeypatch.setattr(Shadow, "begin_from_file", lambda self, path: time.sleep(0.5) or load(self, path))
    plan = make_plan()
    Truth(plan).save(tmp_path)
    with open_updater(plan, Slots(plan, 10), tmp_path / "out", tmp_path):
        assert listing(tmp_path / "out")["snapshots"] == [0]


class TestABadDay:
    def test_restore_takes_the_snapshot_before_one_that_is_corrupt(self, tmp_path, caplog):
        out, truth = make(tmp_path, last=30, checkpoints={"snapshot_iterations": 8})
        for snapshot in sorted((out / "snapshots").iterdir())[1:]:
            snapshot.write_bytes(snapshot.read_bytes()[:-1])
        assert same(restore(out, 29), truth.states[29]) == []
        assert "restoring from an older snapshot" in caplog.text
        found = verify(out)
        assert not found["ok"] and found["offered"] == {"attempt": 1, "iteration": 30}
        assert all("snapshots/" in row["file"] for row in found["problems"])

    def test_verify_offers_the_newest_state_that_needs_no_bad_file(self, tmp_path):
        out, truth = make(tmp_path, last=30, checkpoints={"snapshot_iterations": 8})
        snapshots = listing(out)["snapshots"]
        path = sorted((out / "log").iterdir())[-1]
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
        (out / "snapshots" / f"000001-{30:012}.h5").unlink()
        found = verify(out)
        assert found["offered"] == {"attempt": 1, "iteration": snapshots[-2]}
        assert same(restore(out, snapshots[-2]), truth.states[snapshots[-2]]) == []
        text = flowcheck("verify", out, status=5)
        assert f"--iteration {snapshots[-2]}" in text and path.name in text
        flowcheck("restore", out, "--iteration", 30, "--format", "torch", "--out", tmp_path / "x.pt", status=5)
        assert not (tmp_path / "x.pt").exists()

    def test_without_an_iteration_an_older_one_is_never_taken_silently(self, tmp_path):
        out, _ = make(tmp_path, last=30)
        segment = max((out / "log").iterdir())
        segment.write_bytes(b"x" + segment.read_bytes()[1:])
        text = flowcheck("restore", out, "--iteration", 20, "--format", "torch", "--out", tmp_path / "x.pt", status=5)
        assert segment.name in text and "the newest iteration that can still be restored is 30" in text


def smooth(iteration, attempt=1, elements=300):
    """A gradient whose exponents hardly change: what compresses."""
    return (np.linspace(1, 1.5, elements) + iteration).astype("<f4")


def test_packed_records_are_restored_and_cost_less(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.updater.small.gradient", smooth)
    monkeypatch.setattr("updater.journal.Judge.worth", lambda self: True)
    plan = make_plan(elements=200_000, checkpoints={"compress": True})
    truth = Truth(plan).run(6)
    truth.save(tmp_path)
    out = tmp_path / "out"
    with open_updater(plan, Slots(plan, 6), out, tmp_path) as updater:
        run(updater)
        assert updater.counters()["logged_bytes"] < 0.8 * 6 * 800_000
    for iteration in (0, 3, 6):
        assert same(restore(out, iteration), truth.states[iteration]) == []
    assert np.array_equal(read_gradient(out, 5), smooth(5, elements=200_000))
    assert verify(out)["ok"]
    # Slots that bring the same once more are held against what was packed.
    with open_updater(plan, Slots(plan, 6), out, tmp_path) as updater:
        run(updater)
    other = Slots(plan, 6)
    other.gradient = lambda iteration: smooth(iteration + 1, elements=200_000).view(np.uint8)
    with (
        pytest.raises(CheckpointError, match="with another gradient"),
        open_updater(plan, other, out, tmp_path) as updater,
    ):
        run(updater)
    path = min((out / "log").iterdir())
    content = bytearray(path.read_bytes())
    for at in (400, len(content) // 2, len(content) - 100):
        content[at] ^= 1
        path.write_bytes(content)
        assert not verify(out)["ok"]
        content[at] ^= 1


def test_whether_packing_pays_is_found_out(tmp_path):
    """Whatever the disk is like: the first iterations are logged both ways, and all are restored."""
    plan = make_plan(elements=200_000, checkpoints={"compress": True})
    truth = Truth(plan).run(14)
    truth.save(tmp_path)
    with open_updater(plan, Slots(plan, 14), tmp_path / "out", tmp_path) as updater:
        run(updater)
    assert same(restore(tmp_path / "out"), truth.states[14]) == [] and verify(tmp_path / "out")["ok"]


def test_a_log_of_a_million_parameters_costs_its_gradients_and_a_hundredth(tmp_path):
    plan = make_plan(elements=1_000_000)
    truth = Truth(plan).run(20)
    truth.save(tmp_path)
    out = tmp_path / "out"
    with open_updater(plan, Slots(plan, 20), out, tmp_path) as updater:
        run(updater)
    size = sum(path.stat().st_size for path in (out / "log").iterdir())
    assert 20 * 4_000_000 <= size <= 1.01 * 20 * 4_000_000
