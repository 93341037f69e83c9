# SPDX-License-Identifier: MIT
"""What `record` leaves replays to the trainer's own bits, at every iteration."""

import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from scapy.contrib.roce import BTH
from scapy.layers.l2 import Ether
from scapy.utils import PcapNgReader

from flowcheck.errors import ConfigError, FlowCheckError
from tests.pipeline.recordings import check, recorded, same, shadowed
from updater.export import export
from updater.restore import restore_state
from workload_gen import gpt
from workload_gen.record import Recording, record

pytestmark = pytest.mark.dpdk


def flowcheck(*arguments, status=0):
    command = [sys.executable, "-m", "flowcheck", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout


def replay(folder, out):
    streams = [s["name"] for s in json.loads((folder / "plan.json").read_text())["shards"][0]["streams"]]
    pairs = [word for name in streams for word in ("--stream", f"{name}={folder / name}.pcapng")]
    return json.loads(flowcheck("replay", folder / "plan.json", *pairs, "--out", out, "--json", "--require-complete"))


def truth(folder, iteration):
    return torch.load(folder / "truth" / f"iteration-{iteration:06}.pt", weights_only=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ranks": 2, "channels": 2, "optimizer": "adamw", "mtu": 4096, "parameters": 60_000},
        {"ranks": 3, "optimizer": "adamw", "fused": True, "ip": 4, "start_psn": 2**24 - 60, "bucket_mb": 0.02},
        {"ranks": 4, "adaptive_routing": True, "nccl": "2.14", "mtu": 512, "parameters": 90_000, "links": (1, 2)},
        {"ranks": 5, "channels": 3, "pin_channels": True, "mtu": 256, "fused": True},
        {"ranks": 3, "links": (0, 1, 2), "mtu": 2048},
    ],
    ids=str,
)
def test_every_iteration_has_the_trainers_bits(tmp_path, options):
    folder, out = recorded(tmp_path / "recording", iterations=4, **options), tmp_path / "out"
    report = shadowed(folder, out)
    packets = check(folder, out, report)
    assert report["bit_exact"]
    if options.get("ranks", 2) > 2:
        assert packets["duplicate"] > 0  # some chunks are on two links, and were compared


def test_the_commands_do_the_same(tmp_path):
    folder, out = recorded(tmp_path / "recording", iterations=2), tmp_path / "out"
    report = replay(folder, out)
    assert [i["state"] for i in report["iterations"]] == ["committed"] * 2 and report["bit_exact"]
    flowcheck("diff", f"{out}@2", folder / "truth" / "iteration-000002.pt")


def test_the_sums_are_those_of_a_plain_ring(tmp_path):
    """Truth from torch alone: gradients per rank, added chunk by chunk in ring order; 3 ranks, so that order matters."""
    ranks, recording = 3, Recording(out=tmp_path / "r", ranks=3, iterations=1, seed=9)
    record(recording)
    model = gpt.build(recording.parameters, 9)
    flats, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for rank in range(ranks):
        inputs, targets = gpt.batch(9, rank, 1)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        flats.append(torch.cat([(p.grad * (1 / ranks)).flatten() for p in model.parameters()]).numpy())
    torch.set_num_threads(threads)
    count = len(flats[0])
    # LL, one channel, 512 threads of two elements each: chunks are multiples of 1,024 elements, at most 8,192
    total, begin = np.empty(count, np.float32), 0
    while begin < count:
        chunk = min(8192, -(-(count - begin) // (ranks * 1024)) * 1024)
        for number in range(ranks):
            piece = slice(min(begin + number * chunk, count), min(begin + (number + 1) * chunk, count))
            running = flats[(number + 1) % ranks][piece]
            for hop in range(2, ranks + 1):
                running = flats[(number + hop) % ranks][piece] + running
            total[piece] = running
        begin += ranks * 8192
    assert not np.array_equal(total, (flats[0] + flats[1]) + flats[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    pieces = torch.from_numpy(total).split([p.numel() for p in model.parameters()])
    for parameter, piece in zip(model.parameters(), pieces, strict=True):
        parameter.grad = piece.view_as(parameter)
    optimizer.step()
    found = truth(recording.out, 1)["model"]
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("ranks", "source"), [(2, "directory"), (3, "truth"), (4, "file")])
def test_a_resumed_run_ends_with_the_bits_of_one_never_stopped(tmp_path, ranks, source):
    """From the trainer's own state, from a checkpoint directory, and from a file that was restored out of one."""
    options = {"ranks": ranks, "iterations": 7, "optimizer": "adamw", "bucket_mb": 0.02}
    whole = recorded(tmp_path / "whole", **options)
    at = whole / "truth" / "iteration-000003.pt"
    if source != "truth":
        shadowed(whole, tmp_path / "checkpoints")
        at = f"{tmp_path / 'checkpoints'}@3"
    if source == "file":
        export(restore_state(tmp_path / "checkpoints", 3), "torch", at := tmp_path / "restored.pt")
    rest = recorded(tmp_path / "rest", **options, resume=at)
    assert same(truth(rest, 7), truth(whole, 7)) == []
    job = json.loads((rest / "plan.json").read_text())["job"]
    assert (job["attempt"], job["resumed"]) == (2, {"attempt": 1, "iteration": 3})


def test_resuming_with_other_buckets_is_refused(tmp_path):
    options = {"ranks": 2, "iterations": 4}
    whole = recorded(tmp_path / "whole", **options, bucket_mb=0.02)
    shadowed(whole, tmp_path / "checkpoints")
    with pytest.raises(FlowCheckError, match=r"bucket 0 of 1 has other parameters.*bucket_cap_mb"):
        recorded(tmp_path / "rest", **options, bucket_mb=25.0, resume=f"{tmp_path / 'checkpoints'}@3")


def test_resuming_with_another_optimizer_is_refused_and_leaves_nothing(tmp_path):
    options = {"ranks": 2, "iterations": 2}
    whole = recorded(tmp_path / "whole", **options, optimizer="adamw")
    (tmp_path / "there").mkdir()
    for out, left in ((tmp_path / "there", True), (tmp_path / "rest", False)):
        with pytest.raises(ConfigError, match=r"no option '\w+'; is it another optimizer's"):
            record(Recording(out=out, **options, optimizer="sgd", resume=whole / "truth" / "iteration-000001.pt"))
        assert out.exists() == left and not list(tmp_path.glob(f"{out.name}/*"))


@pytest.mark.parametrize("ip", [4, 6])
def test_frames_are_what_scapy_builds_from_their_fields(tmp_path, ip):
    record(Recording(out=tmp_path / "r", iterations=1, ip=ip))
    with PcapNgReader(str(tmp_path / "r" / "link-0.pcapng")) as reader:
        frames = [bytes(packet) for packet in reader]
    assert len(frames) > 50
    for frame in frames[:60]:
        packet = Ether(frame)
        assert BTH in packet
        right = packet[BTH].icrc
        packet[BTH].icrc = None
        assert Ether(bytes(packet))[BTH].icrc == right
    assert {zlib.crc32(frame) for frame in frames} and {frame[12:14] for frame in frames} == {
        b"\x08\x00" if ip == 4 else b"\x86\xdd"
    }


def test_options_that_cannot_be_are_refused(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from workload_gen.cli import main; main()",
        "record",
        "--out",
        str(tmp_path / "r"),
    ]
    for words, status in (
        (["--nccl", "2.31"], 2), (["--protocol", "tree"], 2), (["--mtu", "1500"], 2), (["--links", "x"], 2),
        (["--links", "0,2"], 3), (["--qps", "9"], 2), (["--nccl", "2.17", "--no-split-qps"], 2),
        (["--resume", str(tmp_path / "none")], 3), (["--attempt", "2"], 2), (["--snapshot-iterations", "0"], 2),
    ):  # fmt: skip
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert done.returncode == status, (words, done.stderr)
        assert "pydantic" not in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "r").exists(), words


def peak_kib(*arguments):
    """Return the largest resident set of a command."""
    process = subprocess.Popen([sys.executable, "-m", "flowcheck", *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    assert status == 0
    return usage.ru_maxrss


@pytest.mark.slow
def test_memory_does_not_grow_with_the_run(tmp_path):
    """The peak of 1,000 iterations is within 5% of that of 10."""
    peaks = []
    for iterations in (10, 1000):
        recording = Recording(out=tmp_path / f"r{iterations}", iterations=iterations, parameters=5000, mtu=4096)
        record(recording)
        pairs = [w for n in (0, 1) for w in ("--stream", f"link-{n}={recording.out}/link-{n}.pcapng")]
        peaks.append(
            peak_kib("replay", recording.out / "plan.json", *pairs, "--out", tmp_path / f"o{iterations}", "--json")
        )
    assert peaks[1] < 1.05 * peaks[0], peaks
