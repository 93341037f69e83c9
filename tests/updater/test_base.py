# SPDX-License-Identifier: MIT
"""After a loss that nothing repairs, a full state of the trainer brings the shadow back."""

import contextlib
import json
import time

import numpy as np
import pytest
import torch

from flowcheck import capture
from flowcheck.replay import replay
from tests.commands import flowcheck
from tests.jobs import settled
from tests.pipeline.recordings import recorded, same, streams
from updater.directory import Directory
from updater.model_state import bytes_of
from updater.restore import restore, states_after
from updater.shadow import load_snapshot
from updater.updater import Updater
from updater.verify import verify
from workload_gen.pcapng import PcapngWriter

pytestmark = pytest.mark.dpdk
ITERATIONS, LOST = 12, (4, 9)


def truth(folder, iteration):
    return folder / "truth" / f"iteration-{iteration:06}.pt"


def listed(out):
    return {row["iteration"]: row["state"] for row in json.loads(flowcheck("list", out, "--json"))["iterations"]}


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    """A recording of which each of two iterations lost a packet with a final sum on its only link."""
    folder = recorded(tmp_path_factory.mktemp("base") / "recording", iterations=ITERATIONS, optimizer="adamw")
    whole = replay(folder / "plan.json", streams(folder), folder.parent / "whole")
    assert [row["state"] for row in whole["iterations"]] == ["committed"] * ITERATIONS
    path = streams(folder)["link-0"]
    frames = list(capture.frames(path))
    data = [n for n, frame in enumerate(frames) if len(frame) > 1000]
    # Of equal parts: the start-up broadcast of about an iteration's bytes, then the iterations.
    part = len(data) / (ITERATIONS + 1)
    drop = {data[int((iteration + 0.9) * part)] for iteration in LOST}
    cut = folder / "cut.pcapng"
    writer = PcapngWriter(cut)
    for number, frame in enumerate(frames):
        if number not in drop:
            writer.write(frame, 10**18 + number)
    writer.close()
    return folder, {**streams(folder), "link-0": cut}


@pytest.fixture
def directory(lossy, tmp_path):
    folder, captures = lossy
    out = tmp_path / "out"
    replay(folder / "plan.json", captures, out)
    first, second = LOST
    expected = {i: "committed" if i < first else "waiting" for i in range(1, ITERATIONS + 1)}
    assert listed(out) == expected | {first: "incomplete", second: "incomplete"}
    return folder, out


def test_a_base_commits_what_waited_up_to_the_next_loss(directory):
    folder, out = directory
    said = flowcheck("rebase", out, truth(folder, 5))
    assert "base at iteration 5, committed to iteration 8" in said
    assert listed(out) == {
        **dict.fromkeys((1, 2, 3), "committed"), 4: "incomplete", 5: "superseded", **dict.fromkeys((6, 7, 8), "committed"),
        9: "incomplete", **dict.fromkeys((10, 11, 12), "waiting"),
    }  # fmt: skip
    for iteration in (1, 3, 5, 6, 7, 8):
        assert same(restore(out, iteration), torch.load(truth(folder, iteration), weights_only=True)) == [], iteration
    assert verify(out)["ok"] and verify(out)["proved_to"] == 8
    flowcheck("restore", out, "--iteration", 4, "--format", "torch", "--out", out.parent / "x.pt", status=1)

    flowcheck("rebase", out, truth(folder, 9))
    assert [i for i, state in listed(out).items() if state == "committed"] == [1, 2, 3, 6, 7, 8, 10, 11, 12]
    assert same(restore(out), torch.load(truth(folder, ITERATIONS), weights_only=True)) == []
    assert [i for i, _ in states_after(out)] == [1, 2, 3, 6, 7, 8, 10, 11, 12]
    assert verify(out)["ok"]


def test_a_base_that_is_committed_already_must_have_its_bits(directory, tmp_path):
    folder, out = directory
    before = listed(out)
    other = torch.load(truth(folder, 2), weights_only=True)
    key = next(iter(other["model"]))
    other["model"][key].view(-1)[0] += 1
    torch.save(other, tmp_path / "other.pt")
    assert "with other bits" in flowcheck("rebase", out, tmp_path / "other.pt", status=6)
    assert listed(out) == before and verify(out)["ok"]


def test_what_is_no_base_is_refused_and_changes_nothing(directory, tmp_path):
    folder, out = directory
    before = sorted((p.name, p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file())
    good = torch.load(truth(folder, 5), weights_only=True)
    for name, content, status, word in (
        ("list", [1], 3, "expected a dictionary"),
        ("bare", good["model"], 3, "expected a dictionary"),
        ("iteration", good | {"iteration": "5"}, 3, "'iteration' is '5'"),
        ("key", good | {"model": good["model"] | {"x": torch.zeros(1)}}, 3, "'x' is not in the plan"),
        ("shape", good | {"model": {k: v.double() for k, v in good["model"].items()}}, 3, "float64"),
        ("optimizer", good | {"optimizer": {"state": {}, "param_groups": []}}, 3, "does not fit"),
    ):
        torch.save(content, tmp_path / f"{name}.pt")
        assert word in flowcheck("rebase", out, tmp_path / f"{name}.pt", status=status), name
    (tmp_path / "cut.pt").write_bytes(truth(folder, 5).read_bytes()[:1000])
    assert "cannot be read" in flowcheck("rebase", out, tmp_path / "cut.pt", status=5)
    assert "cannot read the state" in flowcheck("rebase", out, tmp_path / "none.pt", status=3)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()) == before


class WholeSlots:
    """Slots that bring every iteration of a directory at once, but those that are lost."""

    def __init__(self, directory, lost):
        self.directory, self.lost = directory, lost
        self.settled_next, self.consumed_next, self.ended = ITERATIONS + 1, 0, 1
        self.volatile_from, self.skipped = 0, (0, 0)

    def gradient(self, iteration):
        if iteration:
            return self.directory.slot(iteration)[0]
        plan, first = self.directory.plan, load_snapshot(self.directory.manifest, 1, 0)
        content = np.zeros(plan.initial_bytes, np.uint8)
        for key, offset in plan.initial_offsets.items():
            value = bytes_of(first.model[key])
            content[offset : offset + value.size] = value
        return content

    def slot(self, iteration):
        return settled(iteration, incomplete=iteration in self.lost)

    def missing(self, iteration):
        return [(0, 8)]


def test_a_watching_updater_takes_the_earliest_base_that_helps(lossy, tmp_path):
    folder, _ = lossy
    states = tmp_path / "states"
    states.mkdir()
    (states / "state-000006.pt").write_bytes(b"no torch file")
    (states / "state-000005.pt").write_bytes(truth(folder, 7).read_bytes())  # its name says another iteration
    for iteration in (3, 7, 11):
        (states / f"state-{iteration:06}.pt").write_bytes(truth(folder, iteration).read_bytes())
    source, out = Directory(folder.parent / "whole"), tmp_path / "out"
    with contextlib.closing(Updater(source.plan, WholeSlots(source, LOST), out, bases=[states])) as updater:
        end = time.monotonic() + 20
        while updater.counters()["bases"] < 2 or updater.poll():
            updater.poll()
            assert time.monotonic() < end
        assert updater.finished
    assert [i for i, state in listed(out).items() if state == "committed"] == [1, 2, 3, 8, 12]
    assert same(restore(out), torch.load(truth(folder, ITERATIONS), weights_only=True)) == []
    assert verify(out)["ok"]


def test_a_state_that_is_not_bit_exact_goes_on_from_every_full_state_and_says_how_far_it_was(lossy, tmp_path):
    """The arithmetic is another in name only: so the trainer's states are no distance away, and a changed one is."""
    folder, _ = lossy
    states = tmp_path / "states"
    states.mkdir()
    for iteration in (3, 7):
        (states / f"state-{iteration:06}.pt").write_bytes(truth(folder, iteration).read_bytes())
    changed = torch.load(truth(folder, 9), weights_only=True)
    key = next(iter(changed["model"]))
    changed["model"][key].view(-1).view(torch.int32)[0] ^= 1 << 10
    torch.save(changed, states / "state-000009.pt")
    source, out = Directory(folder.parent / "whole"), tmp_path / "out"
    plan = source.plan.model_copy(
        update={"arithmetic": source.plan.arithmetic.model_copy(update={"capability": "another"})}
    )
    with contextlib.closing(Updater(plan, WholeSlots(source, ()), out, bases=[states])) as updater:
        end = time.monotonic() + 20
        while updater.counters()["bases"] < 3 or updater.poll() or not updater.finished:
            updater.poll()
            assert time.monotonic() < end
    report = json.loads(flowcheck("list", out, "--json"))
    assert not report["bit_exact"] and report["snapshots"] == [0, 3, 7, 9, ITERATIONS]
    assert [row["state"] for row in report["iterations"]] == ["committed"] * ITERATIONS
    first, second, third = report["distances"]
    assert [row["max_ulp"] for row in (first, second)] == [0, 0] and third["max_ulp"] >= 512
    assert {row["at"] for row in report["distances"]} == {ITERATIONS} and not third["over_limit"]
    for iteration in (2, 5, 8):
        assert same(restore(out, iteration), torch.load(truth(folder, iteration), weights_only=True)) == []
    assert restore(out, 10)["bit_exact"] is False
    assert verify(out)["ok"] and verify(out)["proved_to"] == ITERATIONS
