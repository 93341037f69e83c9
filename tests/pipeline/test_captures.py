# SPDX-License-Identifier: MIT
"""`flowcheck replay` over captures of real jobs, against what a plain reader sees on the wire."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import wire
from tests.commands import in_process

PLANS = Path(__file__).parents[2] / "examples" / "captures"
BOTHWAYS = "ll-1ch-5000f-20iter-bothways-mtu4096"
ONEWAY = "ll-1ch-5000f-20iter-oneway-mtu1024"
TRUNCATED = "ll-1ch-10000f-1iter-bothways-mtu1024"
pytestmark = [pytest.mark.captures, pytest.mark.dpdk]


def flowcheck(*arguments, status=0):
    command = [sys.executable, "-m", "flowcheck", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout


def replay(captures, name, out, *options, plan=None, streams=("host0",), status=0):
    pairs = [x for s in streams for x in ("--stream", f"{s}={captures / name}.pcapng")]
    text = flowcheck("replay", PLANS / f"{plan or name}.json", *pairs, "--out", out, "--json", *options, status=status)
    return json.loads(text)


def gradient(out, iteration, tmp_path):
    flowcheck("gradient", out, "--iteration", iteration, "--out", tmp_path / "g.npy")
    return np.load(tmp_path / "g.npy")


def sums_up(packets):
    parts = [
        v
        for k, v in packets.items()
        if k not in ("received", "missed_by_port", "per_stream", "engine_bytes", "engine_failed")
    ]
    return packets["received"] == sum(parts)


@pytest.fixture(scope="module")
def bothways(captures, tmp_path_factory):
    out = tmp_path_factory.mktemp("bothways") / "out"
    return out, replay(captures, BOTHWAYS, out)


def test_twenty_iterations_of_a_real_job_are_committed(bothways):
    _, report = bothways
    assert [
        (i["iteration"], i["state"], i["bytes"], i["placed_bytes"], i["missing"]) for i in report["iterations"]
    ] == [(n, "committed", 20000, 20000, []) for n in range(1, 21)]
    assert report["snapshots"][0] == 0 and report["snapshots"][-1] == 20


def test_retention_removes_old_gradients_unless_all_are_to_be_kept(captures, tmp_path):
    plan = json.loads((PLANS / f"{BOTHWAYS}.json").read_text())
    plan["checkpoints"] = {"snapshot_iterations": 2, "retention": {"last_iterations": 2}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    stream = f"host0={captures / BOTHWAYS}.pcapng"

    def logs(*options):
        out = tmp_path / f"out{len(options)}"
        done = in_process("replay", tmp_path / "plan.json", "--stream", stream, "--out", out, *options)
        assert done[0] == 0, done
        return [in_process("gradient", out, "--iteration", n, "--out", tmp_path / "g.npy")[0] for n in (1, 20)]

    assert logs() == [1, 0]
    assert logs("--keep-gradients") == [0, 0]


def test_every_packet_of_a_real_job_is_accounted_for(bothways, captures):
    _, report = bothways
    counts = report["packets"]
    assert counts["received"] == len(wire.frames(captures / f"{BOTHWAYS}.pcapng")) == 1634
    assert sums_up(counts) and sums_up(counts["per_stream"]["host0"])
    # 6 + 4 packets a message: 20 iterations, one final and one partial message in each direction
    assert counts["placed"] == 20 * (6 + 4) and counts["partial_sum"] == 20 * (6 + 4)
    assert counts["initial_state"] == 10
    assert counts["unsynchronised"] == counts["bad_icrc"] == counts["malformed"] == counts["conflict"] == 0


def test_point_to_point_copies_equal_the_gradients_byte_for_byte(bothways, captures, tmp_path):
    out, _ = bothways
    copies = wire.messages(captures / f"{BOTHWAYS}.pcapng", "58f8", "282d", 0x456)
    assert len(copies) == 20
    for iteration, copy in enumerate(copies, 1):
        assert gradient(out, iteration, tmp_path)[3072:5000].tobytes() == copy


def test_restored_model_equals_plain_torch_on_the_wire_bytes(bothways, captures, tmp_path):
    """Truth from the messages alone: the broadcast, then SGD with the two final chunks of each iteration."""
    out, _ = bothways
    path = captures / f"{BOTHWAYS}.pcapng"
    rank0 = wire.messages(path, "58f8", "282d", 0x453)
    rank1 = wire.messages(path, "282d", "58f8", 0x12E3)
    initial = wire.ll_data(next(m for m in rank0 if len(m) == 40000))
    low = [wire.ll_data(m)[:12288] for m in rank0 if len(m) == 24576]
    high = [wire.ll_data(m)[:7712] for m in rank1 if len(m) == 15424]
    weight = torch.nn.Parameter(torch.frombuffer(bytearray(initial), dtype=torch.float32).reshape(1, 5000))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    flowcheck("restore", out, "--iteration", 0, "--format", "torch", "--out", tmp_path / "0.pt")
    assert torch.load(tmp_path / "0.pt", weights_only=True)["model"]["weight"].numpy().tobytes() == initial
    for iteration in range(1, 21):
        flat = low[iteration - 1] + high[iteration - 1]
        weight.grad = torch.frombuffer(bytearray(flat), dtype=torch.float32).reshape(1, 5000)
        optimizer.step()
        if iteration in (1, 7, 20):
            flowcheck("restore", out, "--iteration", iteration, "--format", "torch", "--out", tmp_path / "n.pt")
            state = torch.load(tmp_path / "n.pt", weights_only=True)
            assert state["iteration"] == iteration
            assert state["model"]["weight"].numpy().tobytes() == weight.detach().numpy().tobytes()


def test_one_direction_names_exactly_what_it_cannot_see(captures, tmp_path):
    report = replay(captures, ONEWAY, tmp_path / "out")
    assert [(i["iteration"], i["state"], i["missing"], i["placed_bytes"]) for i in report["iterations"]] == [
        (n, "incomplete", [[12288, 20000]], 12288) for n in range(1, 21)
    ]
    assert report["snapshots"] == [0]  # nothing applied: the state is the initial one
    assert sums_up(report["packets"])
    replay(captures, ONEWAY, tmp_path / "again", "--require-complete", status=6)


def test_truncated_capture_names_the_missing_ranges(captures, tmp_path):
    report = replay(captures, TRUNCATED, tmp_path / "out")
    (row,) = report["iterations"]
    # The two final messages, 40,960 bytes in packets of 1,024 from PSN 120 and 39,040 from PSN 41: which came?
    got = bytearray(40000)
    for packet in wire.packets(captures / f"{TRUNCATED}.pcapng"):
        if packet.opcode in (6, 7, 9) and packet.src == "58f8" and packet.qp == 0x514 and packet.psn >= 120:
            begin = (packet.psn - 120) * 512
        elif packet.opcode in (6, 7, 9) and packet.src == "282d" and packet.qp == 0xC99 and packet.psn >= 41:
            begin = 20480 + (packet.psn - 41) * 512
        else:
            continue
        got[begin : begin + len(packet.payload) // 2] = b"\1" * (len(packet.payload) // 2)
    edges = [0, *[i for i in range(1, 40000) if got[i] != got[i - 1]], 40000]
    missing = [[a, b] for a, b in itertools.pairwise(edges) if not got[a]]
    assert row["state"] == "incomplete" and row["missing"] == missing and len(missing) >= 2
    assert row["placed_bytes"] == sum(got)


@pytest.mark.parametrize("name", ["ll-2ch-5000f-bothways-with-p2p-mtu1024", "ll-2ch-adaptive-routing-mtu1024"])
def test_two_channels_without_a_model_end_whole(captures, tmp_path, name):
    report = replay(captures, name, tmp_path / "out", "--require-complete")
    assert [(i["iteration"], i["state"], i["missing"]) for i in report["iterations"]] == [(1, "whole", [])]
    vector = gradient(tmp_path / "out", 1, tmp_path)
    assert vector.dtype == np.int32
    # Both ranks contributed the same small ramp: even numbers that begin again every nine elements, from 0 up to 18.
    assert vector[:3].tolist() == [0, 2, 4] and (vector % 2 == 0).all() and vector.max() <= 18
    if "p2p" in name:
        path = captures / f"{name}.pcapng"
        first = wire.messages(path, "58f8", "282d", 0x366)[0]
        rest = wire.messages(path, "58f8", "282c", 0x83E)[0]
        assert vector[: len(first) // 4].tobytes() == first
        assert vector[-(len(rest) // 4) :].tobytes() == rest


def test_two_streams_of_one_capture_give_the_same_bits(bothways, captures, tmp_path):
    report = replay(
        captures, BOTHWAYS, tmp_path / "out", plan=f"{BOTHWAYS}-two-streams", streams=("inbound", "outbound")
    )
    assert [i["state"] for i in report["iterations"]] == ["committed"] * 20
    flowcheck("diff", f"{bothways[0]}@20", f"{tmp_path / 'out'}@20")


def test_dma_engines_copy_the_same_bits(bothways, captures, tmp_path):
    report = replay(captures, BOTHWAYS, tmp_path / "out", "--dma", "dma_skeleton0", "--dma", "dma_skeleton1")
    assert [i["state"] for i in report["iterations"]] == ["committed"] * 20
    by_cpu, by_engine = bothways[1]["packets"], report["packets"]
    frames = sum(len(frame) for frame in wire.frames(captures / f"{BOTHWAYS}.pcapng"))
    assert by_engine.pop("engine_bytes")["dump"] == frames and by_cpu["engine_bytes"]["dump"] == 0
    assert {k: v for k, v in by_engine.items() if k != "per_stream"} == {
        k: by_cpu[k] for k in by_engine if k != "per_stream"
    }
    flowcheck("diff", f"{bothways[0]}@20", f"{tmp_path / 'out'}@20")


def test_replay_goes_on_with_its_own_directory(bothways, captures, tmp_path):
    out = tmp_path / "out"
    first = replay(captures, BOTHWAYS, out)
    assert replay(captures, BOTHWAYS, out)["iterations"] == first["iterations"] == bothways[1]["iterations"]
