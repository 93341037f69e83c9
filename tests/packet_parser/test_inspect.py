# SPDX-License-Identifier: MIT
"""`flowcheck inspect` agrees with tshark, with the captures' description, and with frames made for it."""

import collections
import json
import random
import shutil
import struct
import subprocess
import sys

import pytest

from flowcheck.errors import CaptureError
from packet_parser.inspect import inspect
from tests import builders

NAMES = [
    "ll-1ch-10000f-1iter-bothways-mtu1024",
    "ll-1ch-5000f-20iter-bothways-mtu4096",
    "ll-1ch-5000f-20iter-oneway-mtu1024",
    "ll-2ch-5000f-bothways-with-p2p-mtu1024",
    "ll-2ch-adaptive-routing-mtu1024",
]
RESPONSES = {13, 14, 15, 16, 17, 18}


@pytest.mark.captures
@pytest.mark.skipif(not shutil.which("tshark"), reason="tshark is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_counts_agree_with_tshark(captures, name):
    path = captures / f"{name}.pcapng"
    fields = ("ipv6.src", "ipv6.dst", "infiniband.bth.destqp", "infiniband.bth.opcode", "infiniband.bth.psn")
    command = ["tshark", "-r", str(path), "-Y", "udp.dstport == 4791", "-T", "fields"]
    command += [word for field in fields for word in ("-e", field)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    flows = collections.defaultdict(list)
    for src, dst, qp, opcode, psn in (line.split("\t") for line in lines):
        flows[src, dst, int(qp, 0)].append((int(opcode), int(psn)))
    report = inspect(path)
    assert report["roce_frames"] == len(lines)
    assert {(f["src"], f["dst"], f["dest_qp"]): f["packets"] for f in report["flows"]} == {
        k: len(v) for k, v in flows.items()
    }
    for flow in report["flows"]:
        seen = flows[flow["src"], flow["dst"], flow["dest_qp"]]
        requests = [psn for opcode, psn in seen if opcode not in RESPONSES]
        assert flow["request_packets"] == len(requests)
        if flow["kind"] in ("data", "credit"):
            assert (flow["psn_first"], flow["psn_last"]) == (min(requests), max(requests))
            assert flow["missing"] == max(requests) - min(requests) + 1 - len(set(requests))
            assert flow["duplicates"] == len(requests) - len(set(requests))
            assert flow["messages"] == sum(opcode in (6, 10, 11) for opcode, _ in seen)


@pytest.mark.captures
@pytest.mark.parametrize("name", NAMES)
def test_what_the_captures_are_known_to_hold(captures, name):
    report = inspect(captures / f"{name}.pcapng", messages=True)
    assert report["malformed"] == 0
    assert report["icrc"] == {
        "ok": report["roce_frames"] - (7 if "adaptive" in name else 0),
        "bad": 7 if "adaptive" in name else 0,
    }
    gaps = [flow for flow in report["flows"] if flow["missing"] or flow["duplicates"]]
    assert len(gaps) == (1 if "10000f" in name else 0)  # that one ends early
    kinds = collections.Counter((f["kind"], f["encoding"]) for f in report["flows"])
    if "20iter-bothways" in name:
        assert kinds == {("data", "ll"): 2, ("data", "plain"): 1, ("credit", "none"): 3, ("management", "none"): 2}
        flow = next(f for f in report["flows"] if f["dest_qp"] == 0x453)
        sizes = [m["bytes"] for m in flow["message_list"]]
        assert sizes[:3] == [16, 64, 40000] and sizes[3:7] == [15424, 24576, 16, 16] and len(sizes) == 45
        assert all(m["complete"] for m in flow["message_list"]) and flow["mtu"] == 4096
    assert {f["mtu"] for f in report["flows"] if f["kind"] == "data"} == {4096 if "mtu4096" in name else 1024}


def write(path, frames):
    with open(path, "wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        for number, frame in enumerate(frames):
            file.write(struct.pack("<IIII", number, 0, len(frame), len(frame)) + frame)
    return path


def test_loss_repeats_and_wrap_are_counted(tmp_path):
    rng = random.Random(3)
    psn, sent = 2**24 - 50, []
    for number in range(30):
        wire = builders.ll_lines(rng.randbytes(2000), number + 1)
        sent += builders.message(77, psn, 0x1000, wire, 1024, version=4)
        psn += 4
    lost = set(rng.sample(range(5, 115), 12))
    kept = [f for n, f in enumerate(sent) if n not in lost]
    again = [kept[n] for n in (10, 20, 20)]
    report = inspect(write(tmp_path / "a.pcap", [*kept[:40], *again, *kept[40:]]), messages=True)
    (flow,) = report["flows"]
    assert (flow["missing"], flow["duplicates"]) == (12, 3)
    assert (flow["psn_first"], flow["psn_last"]) == (2**24 - 50, 2**24 - 50 + 119)
    assert flow["ip_version"] == 4 and flow["src"] == builders.V4[0] and flow["encoding"] == "ll"
    broken = {n // 4 for n in lost}
    whole = [m for m in flow["message_list"] if m["complete"]]
    assert len(whole) == 30 - len(broken) and all(m["bytes"] == 4000 and m["packets"] == 4 for m in whole)


def test_kinds_and_encodings_of_made_frames(tmp_path):
    lines = b"".join(bytes(range(1, 121)) + (5).to_bytes(8, "little") for _ in range(16))
    frames = [
        *builders.message(10, 0, 0, builders.ll_lines(bytes(800), 1), 1024),
        *builders.message(11, 0, 0, lines, 1024),
        *builders.message(12, 0, 0, bytes(range(256)) * 8, 1024),
        *builders.message(13, 0, 0, builders.ll_lines(bytes(800), 1), 1024),
        *builders.message(13, 2, 0, bytes(range(256)) * 8, 1024),
        builders.roce(17, 14, 0, extended=bytes(4)),
        builders.roce(10, 15, 0, reth=(0, 0, 64), payload=bytes(64)),
        builders.roce(100, 1, 0, extended=bytes(8), payload=bytes(64)),
        builders.roce(7, 16, 0, payload=bytes(64))[:-1],
        b"\0" * 60,
    ]
    report = inspect(write(tmp_path / "a.pcap", frames))
    found = {f["dest_qp"]: (f["kind"], f["encoding"]) for f in report["flows"]}
    assert found == {
        10: ("data", "ll"), 11: ("data", "ll128"), 12: ("data", "plain"), 13: ("data", "mixed"), 14: ("other", "none"),
        15: ("credit", "none"), 1: ("management", "none"),
    }  # fmt: skip
    assert report["malformed"] == 1 and report["other_frames"] == 1 and report["roce_frames"] == len(frames) - 1


def test_a_file_that_cannot_be_read_is_a_capture_error(tmp_path):
    path = write(tmp_path / "a.pcap", [builders.roce(7, 5, 0, payload=bytes(64))] * 3)
    path.write_bytes(path.read_bytes()[:-5])
    for bad in (path, tmp_path / "none", tmp_path):
        with pytest.raises(CaptureError):
            inspect(bad)
    command = [sys.executable, "-m", "flowcheck", "inspect", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 5 and done.stdout == "" and len(done.stderr.splitlines()) == 1


@pytest.mark.captures
def test_the_command_prints_one_document(captures):
    path = captures / f"{NAMES[0]}.pcapng"
    command = [sys.executable, "-m", "flowcheck", "inspect", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(json.dumps(inspect(path)))
