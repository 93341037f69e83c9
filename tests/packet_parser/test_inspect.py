# SPDX-License-Identifier: MIT
"""`inspect`: captures made by hand, and the real ones against tshark."""

import ipaddress
import json
import shutil
import struct
import subprocess
from collections import Counter

import pytest

from flowcheck.errors import CaptureError
from packet_parser import _frames
from packet_parser.inspect import inspect
from tests.packet_parser.frames import DETH, RETH, SRC4, SRC6, ImmDt, fast_frame, frame
from tests.packet_parser.rings import read_frames
from tests.packet_parser.streams import DATA_QP, MTU, SPLIT_ITERATION, acknowledgement, credit, lines, send

NAMES = [
    "ll-1ch-10000f-1iter-bothways-mtu1024",
    "ll-1ch-5000f-20iter-bothways-mtu4096",
    "ll-1ch-5000f-20iter-oneway-mtu1024",
    "ll-2ch-5000f-bothways-with-p2p-mtu1024",
    "ll-2ch-adaptive-routing-mtu1024",
]


@pytest.fixture
def capture(tmp_path):
    def write(frames, snap=65535):
        path = tmp_path / "made.pcap"
        with path.open("wb") as file:
            file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, snap, 1))
            for number, data in enumerate(frames):
                file.write(struct.pack("<IIII", number, 0, min(len(data), snap), len(data)) + data[:snap])
        return path

    return write


def flow(report, queue_pair=DATA_QP):
    return next(f for f in report["flows"] if f["dest_qp"] == queue_pair)


@pytest.mark.parametrize("first_psn", [0, (1 << 24) - 20])
def test_a_stream_across_the_wrap(capture, first_psn):
    sent = send(iterations=3, first_psn=first_psn)
    found = inspect(capture([s.frame for s in sent] + [credit(1), acknowledgement(DATA_QP, 3, False)]), messages=True)
    data = flow(found)
    numbers = (
        "psn_first",
        "psn_last",
        "missing",
        "duplicates",
        "packets",
        "request_packets",
        "payload_bytes",
        "messages",
        "mtu",
    )
    assert [data[n] for n in numbers] == [
        first_psn, first_psn + len(sent) - 1, 0, 0, len(sent) + 1, len(sent), sum(s.payload for s in sent), sum(s.ends for s in sent), MTU,
    ]  # fmt: skip
    assert (data["src"], data["dst"], data["kind"], data["encoding"], data["ip_version"]) == (
        "fe80::1",
        "fe80::2",
        "data",
        "ll",
        6,
    )
    assert (flow(found, 0x12E2)["kind"], flow(found, 0x12E2)["encoding"]) == ("credit", "none")
    assert (found["frames"], found["roce_frames"], found["other_frames"], found["malformed"]) == (
        len(sent) + 2,
        len(sent) + 2,
        0,
        0,
    )
    assert found["icrc"] == {"ok": len(sent) + 2, "bad": 0}
    listed = data["message_list"]
    assert all(m["complete"] and struct.pack(">I", m["immediate"]) == struct.pack("<I", m["bytes"]) for m in listed)
    assert sum(m["packets"] for m in listed) == len(sent)
    assert [m["psn"] for m in listed] == [first_psn + s.number for s in sent if s.begins]


def test_loss_duplicates_and_latecomers(capture):
    sent = send(iterations=4)
    order = [s for s in sent if s.number not in (10, 11, 30)]
    order += order[20:25]
    order[40], order[44] = order[44], order[40]
    data = flow(inspect(capture([s.frame for s in order]), messages=True))
    assert (data["missing"], data["duplicates"], data["request_packets"]) == (3, 5, len(order))
    assert any(not m["complete"] for m in data["message_list"])


def test_kinds_and_encodings(capture):
    def plain(qp, psn, payload):
        return fast_frame(11, qp, psn, bytes(RETH(dma_length=len(payload))) + bytes(ImmDt()), payload)

    lines128 = b"".join(bytes(range(120)) + struct.pack("<Q", 5) for _ in range(16))
    frames = [
        plain(10, 0, bytes(range(200)) * 2),
        plain(11, 0, lines128),
        plain(12, 0, lines(9, 4096, 1)),
        plain(12, 1, bytes(range(200)) * 2),
        frame(100, 1, 0, bytes(DETH(source_qp=1)), b"probe!!!"),
        acknowledgement(14, 0, False),
        frame(10, 15, 0, bytes(RETH(dma_length=32)), bytes(32), version=4),
    ]
    found = inspect(capture(frames))
    kinds = {f["dest_qp"]: (f["kind"], f["encoding"]) for f in found["flows"]}
    assert kinds == {
        10: ("data", "plain"),
        11: ("data", "ll128"),
        12: ("data", "mixed"),
        1: ("management", "none"),
        14: ("other", "none"),
        15: ("credit", "none"),
    }
    assert (flow(found, 15)["src"], flow(found, 15)["ip_version"]) == (SRC4, 4)
    assert flow(found, 10)["src"] == SRC6 and "message_list" not in flow(found, 10)


def test_frames_that_are_cut_or_lie_are_counted_and_in_no_flow(capture):
    sent = send(iterations=2, iteration=SPLIT_ITERATION)
    lying = bytearray(sent[5].frame)
    lying[58:60] = b"\xff\xff"  # UDP length
    wrong = bytearray(sent[6].frame)
    wrong[-1] ^= 1
    frames = [bytes(lying), bytes(wrong), bytes(60), *(s.frame for s in sent)]
    found = inspect(capture(frames))
    assert (found["frames"], found["malformed"], found["icrc"]["bad"]) == (len(frames), 1, 1)
    assert (found["other_frames"], found["roce_frames"]) == (1, len(frames) - 1)
    cut = inspect(capture(frames, snap=200))
    long = sum(len(f) > 200 for f in frames)
    assert cut["malformed"] == long and cut["roce_frames"] == len(frames) - 1
    assert sum(f["packets"] for f in cut["flows"]) == len(frames) - 1 - long


@pytest.mark.parametrize(
    "content",
    [b"", b"no capture", struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101)],
    ids=["empty", "text", "raw IP"],
)
def test_files_that_are_no_ethernet_capture(tmp_path, content):
    path = tmp_path / "bad.pcap"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=r"bad\.pcap"):
        inspect(path)
    with pytest.raises(CaptureError, match="cannot read"):
        inspect(tmp_path / "absent.pcap")


def test_a_capture_cut_inside_a_frame_is_refused(capture):
    path = capture([s.frame for s in send(iterations=1)])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CaptureError, match="past frame"):
        inspect(path)


FIELDS = (
    "frame.number", "ipv6.src", "ipv6.dst", "infiniband.bth.opcode", "infiniband.bth.destqp", "infiniband.bth.psn",
    "infiniband.reth.va", "infiniband.reth.dmalen", "infiniband.immdt", "infiniband.aeth.msn",
)  # fmt: skip


def tshark(path):
    """Return per frame what tshark says of it, of the RoCE frames."""
    if shutil.which("tshark") is None:
        pytest.skip("tshark is not installed")
    command = ["tshark", "-r", str(path), "-Y", "infiniband", "-T", "fields", "-E", "occurrence=f"]
    done = subprocess.run(
        command + [w for f in FIELDS for w in ("-e", f)], check=True, capture_output=True, text=True, timeout=120
    )
    return [dict(zip(FIELDS, line.split("\t"), strict=True)) for line in done.stdout.splitlines()]


@pytest.mark.captures
@pytest.mark.parametrize("name", NAMES)
def test_real_captures_agree_with_tshark(captures, name):
    path = captures / f"{name}.pcapng"
    frames, theirs = read_frames(path), tshark(path)
    ours = {
        number: found
        for number, data in enumerate(frames, 1)
        if (found := _frames.decode(data))["result"] != "not_roce"
    }
    assert {int(t["frame.number"]) for t in theirs} == set(ours)
    for row in theirs:
        found = ours[int(row["frame.number"])]
        assert found["result"] == "ok"
        assert ipaddress.ip_address(row["ipv6.src"]).packed == found["source"]
        assert ipaddress.ip_address(row["ipv6.dst"]).packed == found["destination"]
        opcode = int(row["infiniband.bth.opcode"])
        assert (opcode, int(row["infiniband.bth.destqp"], 16), int(row["infiniband.bth.psn"])) == (
            found["opcode"],
            found["dest_qp"],
            found["psn"],
        )
        if opcode == 170:  # the vendor's probes carry no ICRC
            assert not found["icrc_right"]
            continue
        assert found["icrc_right"]
        assert row["infiniband.reth.va"] == ("" if found["va"] is None else f"0x{found['va']:016x}")
        assert row["infiniband.reth.dmalen"] == ("" if found["dma_length"] is None else str(found["dma_length"]))
        assert row["infiniband.immdt"] == ("" if found["immediate"] is None else f"{found['immediate']:08x}")
        assert row["infiniband.aeth.msn"] == ("" if found["aeth"] is None else str(found["aeth"] & 0xFFFFFF))
    report = inspect(path)
    flows = {(f["src"], f["dst"], f["dest_qp"]): f for f in report["flows"]}
    counted = Counter((t["ipv6.src"], t["ipv6.dst"], int(t["infiniband.bth.destqp"], 16)) for t in theirs)
    requests = Counter(
        (t["ipv6.src"], t["ipv6.dst"], int(t["infiniband.bth.destqp"], 16))
        for t in theirs
        if t["infiniband.bth.opcode"] != "17"
    )
    assert {k: f["packets"] for k, f in flows.items()} == counted
    assert {k: f["request_packets"] for k, f in flows.items() if f["request_packets"]} == requests
    assert (report["frames"], report["roce_frames"], report["malformed"]) == (len(frames), len(theirs), 0)
    assert report["icrc"]["bad"] == (7 if "adaptive" in name else 0)
    assert report["icrc"]["bad"] + report["icrc"]["ok"] == len(theirs)


@pytest.mark.captures
@pytest.mark.parametrize("name", NAMES)
def test_real_captures_are_whole_but_for_an_early_end(captures, name):
    report = inspect(captures / f"{name}.pcapng", messages=True)
    assert json.loads(json.dumps(report)) == report
    holes = [f for f in report["flows"] if f["missing"] or f["duplicates"]]
    assert len(holes) == ("10000f" in name)
    for found in report["flows"]:
        if found["kind"] != "data":
            assert found["encoding"] == "none" and found["kind"] in ("credit", "management")
            continue
        assert found["encoding"] in ("ll", "plain")
        assert found["mtu"] == (4096 if "mtu4096" in name else 1024)
        assert found["messages"] == len(found["message_list"])
        assert sum(m["bytes"] for m in found["message_list"]) == found["payload_bytes"]
        if not found["missing"] and "10000f" not in name:
            assert all(m["complete"] for m in found["message_list"])
    if "20iter" in name:
        data = [f for f in report["flows"] if f["encoding"] == "ll"]
        assert {f["messages"] for f in data} <= {41, 45}
        assert [f["messages"] for f in report["flows"] if f["encoding"] == "plain"] == [20]


@pytest.mark.captures
def test_the_parser_over_real_captures(captures, tmp_path):
    """What each capture's README says is in it, from its hand-written plan: only packets before the first flag have no place."""
    from pathlib import Path

    from flowcheck import plan as plans
    from packet_parser.parser import Parser
    from tests.packet_parser.rings import FilledRing, run

    unproved = {
        "ll-2ch-5000f-bothways-with-p2p-mtu1024": 1,
        "ll-2ch-adaptive-routing-mtu1024": 1,
    }  # an empty first message
    initial = {NAMES[0]: 79, NAMES[1]: 10, NAMES[2]: 40}
    for name in NAMES:
        plan = plans.load(Path(__file__).parents[2] / "examples" / "captures" / f"{name}.json")
        stream = plan.shard.streams[0].name
        filled = FilledRing(tmp_path / name, stream=stream, identity=plan.identity())
        filled.add(read_frames(captures / f"{name}.pcapng"))
        parser = Parser(filled.ring, plan, stream)
        run(parser)
        counters = parser.counters()
        assert counters["verdicts"]["unsynchronised"] == unproved.get(name, 0) == counters["unsynchronised"]["unproved"]
        assert counters["verdicts"]["initial_state"] == initial.get(name, 0)
        assert counters["verdicts"]["malformed"] == counters["verdicts"]["bad_icrc"] == 0 and counters["refused"] == []
        placed = Counter()
        for record in filled.annotations():
            if record["verdict"] == 1:
                placed[int(record["iteration"])] += int(record["payload_length"]) // 2
        if "10000f" not in name:
            assert placed == dict.fromkeys(
                range(1, 21 if "20iter" in name else 2), 12288 if "oneway" in name else 20000
            )
        parser.close()
