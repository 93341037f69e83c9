# SPDX-License-Identifier: MIT
"""The stages as processes of their own, killed at random moments: the same bits and the same counters."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PLANS = Path(__file__).parents[2] / "examples" / "captures"
CAPTURE = "ll-1ch-5000f-20iter-bothways-mtu4096"
PLAN = PLANS / f"{CAPTURE}-two-streams.json"
pytestmark = [pytest.mark.captures, pytest.mark.dpdk]

COMMANDS = {
    "dump-inbound": ["packet_dump", "--stream", "inbound", "--capture", "CAPTURE", "--ring", "DIR/in.ring", "--records", "64"],
    "dump-outbound": ["packet_dump", "--stream", "outbound", "--capture", "CAPTURE", "--ring", "DIR/out.ring", "--records", "64"],
    "parse-inbound": ["packet_parser", "--stream", "inbound", "--ring", "DIR/in.ring", "--direction", "inbound"],
    "parse-outbound": ["packet_parser", "--stream", "outbound", "--ring", "DIR/out.ring", "--direction", "outbound"],
    "extract": ["data_extractor", "--ring", "DIR/in.ring", "--ring", "DIR/out.ring", "--slots", "DIR/slots"],
    "update": ["updater", "--slots", "DIR/slots", "--out", "DIR/out"],
}  # fmt: skip


def start(name, folder, captures):
    package, *words = COMMANDS[name]
    words = [w.replace("DIR", str(folder)).replace("CAPTURE", str(captures / f"{CAPTURE}.pcapng")) for w in words]
    command = [sys.executable, "-c", f"from {package}.cli import main; main()", str(PLAN), *words, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes):
    reports = {}
    for name, process in processes.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, (name, err)
        reports[name] = json.loads(out)
    return reports


def listing(folder):
    command = [sys.executable, "-m", "flowcheck", "list", str(folder / "out"), "--json", "--require-complete"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def snapshot(folder, path):
    command = [
        sys.executable,
        "-m",
        "flowcheck",
        "restore",
        str(folder / "out"),
        "--format",
        "hdf5",
        "--out",
        str(path),
    ]
    subprocess.run(command, check=True, capture_output=True)
    import h5py

    with h5py.File(path) as file:
        return file["model/weight"][...].tobytes()


@pytest.fixture(scope="module")
def undisturbed(captures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    reports = finish({name: start(name, folder, captures) for name in COMMANDS})
    return reports, listing(folder), snapshot(folder, folder / "20.h5")


def test_stages_by_hand_give_what_replay_gives(undisturbed, captures, tmp_path):
    reports, states, weight = undisturbed
    assert [i["state"] for i in states["iterations"]] == ["committed"] * 20
    command = [sys.executable, "-m", "flowcheck", "replay", str(PLANS / f"{CAPTURE}.json"), "--json"]
    command += ["--stream", f"host0={captures / CAPTURE}.pcapng", "--out", str(tmp_path / "out")]
    replayed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert snapshot(tmp_path, tmp_path / "20.h5") == weight
    for verdict in ("placed", "partial_sum", "initial_state", "other_collective", "bad_icrc", "malformed"):
        assert reports["extract"][verdict] == replayed["packets"][verdict]


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=() if seed < 4 else pytest.mark.slow) for seed in range(20)])
def test_a_killed_stage_goes_on_with_the_same_bits_and_counters(undisturbed, captures, tmp_path, seed):
    rng = random.Random(seed)
    victim = list(COMMANDS)[seed % len(COMMANDS)]
    processes = {name: start(name, tmp_path, captures) for name in COMMANDS}
    # Start-up takes most of a short run: aim at the moments when data flows, told by the files that appear.
    marker = tmp_path / {"update": "slots", "extract": "slots"}.get(victim, "in.ring")
    while not marker.exists():
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.5))
    processes[victim].send_signal(signal.SIGKILL)
    processes[victim].communicate()
    processes[victim] = start(victim, tmp_path, captures)
    reports = finish(processes)
    before, states, weight = undisturbed
    assert reports["extract"] == before["extract"]
    for name in ("parse-inbound", "parse-outbound", "dump-inbound", "dump-outbound"):
        assert reports[name] == before[name]
    assert listing(tmp_path)["iterations"] == states["iterations"]
    assert snapshot(tmp_path, tmp_path / "20.h5") == weight


def test_files_are_private_to_their_owner(captures, tmp_path):
    umask = os.umask(0)
    try:
        finish({name: start(name, tmp_path, captures) for name in COMMANDS})
    finally:
        os.umask(umask)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes and set(modes.values()) == {0o600}, modes
