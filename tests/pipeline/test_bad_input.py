# SPDX-License-Identifier: MIT
"""Bad files, plans and disks: one line on stderr, the right exit status, nothing half written."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

PLANS = Path(__file__).parents[2] / "examples" / "captures"
CAPTURE = "ll-1ch-5000f-20iter-bothways-mtu4096"
pytestmark = [pytest.mark.captures, pytest.mark.dpdk]


def flowcheck(*arguments, prefix=()):
    command = [*prefix, sys.executable, "-m", "flowcheck", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def replay(plan, capture, out, *options, stream="host0", prefix=()):
    return flowcheck("replay", plan, "--stream", f"{stream}={capture}", "--out", out, *options, prefix=prefix)


def refused(done, status, *words):
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("flowcheck: "), done.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def plan():
    return PLANS / f"{CAPTURE}.json"


@pytest.fixture
def capture(captures):
    return captures / f"{CAPTURE}.pcapng"


@pytest.fixture(scope="module")
def checkpoint(captures, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    done = replay(PLANS / f"{CAPTURE}.json", captures / f"{CAPTURE}.pcapng", out)
    assert done.returncode == 0, done.stderr
    return out


def test_cut_capture_files(plan, capture, tmp_path):
    data = capture.read_bytes()
    for length in (1, 4, 27, len(data) // 2 + 1, len(data) - 1):
        bad = tmp_path / "cut.pcapng"
        bad.write_bytes(data[:length])
        refused(replay(plan, bad, tmp_path / "out"), 5, "cut.pcapng")
        assert not (tmp_path / "out").exists()


def test_an_empty_a_missing_and_a_strange_file(plan, tmp_path):
    empty = tmp_path / "empty.pcap"
    empty.touch()
    refused(replay(plan, empty, tmp_path / "out"), 5, "empty")
    refused(replay(plan, tmp_path / "none.pcap", tmp_path / "out"), 5, "No such file")
    strange = tmp_path / "strange.pcap"
    strange.write_bytes(b"\x7fELF" + bytes(1000))
    refused(replay(plan, strange, tmp_path / "out"), 5, "strange.pcap")
    assert not (tmp_path / "out").exists()


def test_another_link_type(plan, tmp_path):
    cooked = tmp_path / "cooked.pcap"
    cooked.write_bytes(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 113))
    refused(replay(plan, cooked, tmp_path / "out"), 5, "LINUX_SLL", "Ethernet")


def test_a_file_with_a_header_and_no_frame_is_no_error(plan, tmp_path):
    bare = tmp_path / "bare.pcap"
    bare.write_bytes(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
    done = replay(plan, bare, tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["packets"]["received"] == 0 and report["iterations"] == []


def test_frames_cut_by_a_snap_length_are_malformed_and_leave_holes(plan, capture, tmp_path):
    from tests import wire

    cut = tmp_path / "cut.pcap"  # packets of 4,096 bytes are cut, the last of each message is whole
    with cut.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 3500, 1))
        for number, frame in enumerate(wire.frames(capture)):
            file.write(struct.pack("<IIII", number, 0, min(len(frame), 3500), len(frame)) + frame[:3500])
    done = replay(plan, cut, tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["packets"]["malformed"] > 250 and report["packets"]["received"] == 1634
    assert {i["state"] for i in report["iterations"]} == {"incomplete"}
    assert report["iterations"][0]["placed_bytes"] > 0 and report["snapshots"] == []


def test_a_stream_of_no_link_of_the_plan(plan, captures, capture, tmp_path):
    refused(replay(plan, capture, tmp_path / "out", stream="host7"), 3, "host7", "host0")
    other = captures / "ll-2ch-adaptive-routing-mtu1024.pcapng"
    refused(replay(plan, other, tmp_path / "out"), 3, "none of the 175 frames")
    assert not (tmp_path / "out").exists()


def test_plans_that_cannot_be_used(plan, capture, tmp_path):
    bad = tmp_path / "plan.json"
    bad.write_text("{")
    refused(replay(bad, capture, tmp_path / "out"), 3, "not JSON")
    document = json.loads(plan.read_text())
    document["shards"][0]["layout"]["mtu"] = 9000
    bad.write_text(json.dumps(document))
    refused(replay(bad, capture, tmp_path / "out"), 3, "shards[0].layout.mtu", "9000")
    refused(replay(tmp_path / "none.json", capture, tmp_path / "out"), 3, "none.json")
    assert not (tmp_path / "out").exists()


def test_edges_swapped_in_the_plan_never_commit(plan, capture, tmp_path):
    document = json.loads(plan.read_text())
    for connection in document["shards"][0]["connections"]:
        connection["edge"] = 1 - connection["edge"]
    for credit in (True, False):
        if not credit:
            for connection in document["shards"][0]["connections"]:
                del connection["proof"]["credit"]
        swapped = tmp_path / f"swapped-{credit}.json"
        swapped.write_text(json.dumps(document))
        done = replay(swapped, capture, tmp_path / f"out-{credit}", "--json")
        states = {i["state"] for i in json.loads(done.stdout)["iterations"]}
        assert "committed" not in states and "whole" not in states


def test_usage_errors_end_with_2(plan, capture, tmp_path):
    assert flowcheck("replay", plan, "--out", tmp_path / "out").returncode == 2
    assert replay(plan, capture, tmp_path / "out", "--no-such-option").returncode == 2
    assert flowcheck("replay", plan, "--stream", "host0", "--out", tmp_path / "out").returncode == 2


def test_a_directory_of_another_run(checkpoint, captures):
    name = "ll-1ch-5000f-20iter-oneway-mtu1024"
    before = {p: p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
    refused(replay(PLANS / f"{name}.json", captures / f"{name}.pcapng", checkpoint), 3, "captured-5000f-bothways")
    assert {p: p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()} == before


def test_an_iteration_that_is_not_there_names_the_nearest(checkpoint, tmp_path):
    done = flowcheck("restore", checkpoint, "--iteration", 25, "--format", "torch", "--out", tmp_path / "x.pt")
    refused(done, 1, "25", "20")
    refused(flowcheck("list", tmp_path / "nowhere"), 5, "nowhere")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root to mount a small file system")
def test_a_full_disk_ends_with_one_line_and_keeps_what_was_committed(plan, capture, tmp_path):
    """On 256 KiB a few iterations of 20,000 bytes fit; then the same directory, given room, goes on."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=256k none {disk} && "$@"; status=$?; cp -a {disk}/out {out}; exit $status'
    prefix = ("unshare", "-m", "sh", "-c", script, "sh")
    done = replay(plan, capture, disk / "out", prefix=prefix)
    refused(done, 1, "No space left")
    listed = json.loads(flowcheck("list", out, "--json").stdout)
    kept = [i["iteration"] for i in listed["iterations"] if i["state"] == "committed"]
    assert 0 < len(kept) < 20 and kept == list(range(1, len(kept) + 1))
    assert json.loads(flowcheck("verify", out, "--json").stdout)["ok"]
    done = replay(plan, capture, out, "--json", "--require-complete")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["iterations"]) == 20
