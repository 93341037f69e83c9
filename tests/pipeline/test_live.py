# SPDX-License-Identifier: MIT
"""Captures played over a real cable into live stages, against `replay` of the same files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowcheck.ring import PacketRing
from tests import network

PLANS = Path(__file__).parents[2] / "examples" / "captures"
pytestmark = [pytest.mark.dpdk, network.needs_root]


def command(module, *words):
    return [sys.executable, "-c", f"from {module}.cli import main; main()", *map(str, words)]


def run(*words, status=0):
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def replayed(plan, capture, out):
    words = [sys.executable, "-m", "flowcheck", "replay", plan, "--stream", f"host0={capture}", "--out", out, "--json"]
    return json.loads(run(*map(str, words)))


def capabilities(pid):
    sets = []
    for task in os.listdir(f"/proc/{pid}/task"):
        for line in Path(f"/proc/{pid}/task/{task}/status").read_text().splitlines():
            if line.startswith(("CapInh", "CapPrm", "CapEff")):
                sets.append(int(line.split()[1], 16))
    return sets


def until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not after {seconds} s"
        time.sleep(0.02)


class Stages:
    """The four stages on one stream, processes of their own; the dump listens to an interface."""

    def __init__(self, plan, interface, folder):
        self.ring, self.folder = folder / "ring", folder
        slots, self.out = folder / "slots", folder / "out"
        ring = ("--stream", "host0", "--ring", self.ring)
        commands = {
            "dump": command("packet_dump", plan, *ring, "--interface", interface, "--json"),
            "parse": command("packet_parser", plan, *ring, "--json"),
            "extract": command("data_extractor", plan, "--ring", self.ring, "--slots", slots, "--json"),
            "update": command("updater", plan, "--slots", slots, "--out", self.out, "--json"),
        }
        self.processes = {
            name: subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for name, words in commands.items()
        }
        until(self.ring.exists, "the ring")
        until(lambda: not any(capabilities(self.processes["dump"].pid)), "the dump without capabilities")

    @property
    def written(self):
        with PacketRing.open(self.ring) as ring:
            return ring.written

    def stop(self):
        """Stop the dump as a supervisor would; the others end by themselves. Return what each reports."""
        self.processes["dump"].send_signal(signal.SIGTERM)
        reports = {}
        for name, process in self.processes.items():
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, (name, err)
            reports[name] = json.loads(out)
        return reports

    def kill(self):
        for process in self.processes.values():
            process.kill()
            process.communicate()


@pytest.mark.captures
@pytest.mark.parametrize(
    "name",
    [
        "ll-1ch-5000f-20iter-bothways-mtu4096",
        pytest.param("ll-1ch-5000f-20iter-oneway-mtu1024", marks=pytest.mark.slow),
        pytest.param("ll-1ch-10000f-1iter-bothways-mtu1024", marks=pytest.mark.slow),
        pytest.param("ll-2ch-5000f-bothways-with-p2p-mtu1024", marks=pytest.mark.slow),
        "ll-2ch-adaptive-routing-mtu1024",
    ],
)
def test_a_real_capture_over_a_cable_gives_what_replay_gives(captures, tmp_path, name):
    plan, capture = PLANS / f"{name}.json", captures / f"{name}.pcapng"
    expected = replayed(plan, capture, tmp_path / "replayed")
    packets = expected.pop("packets")
    with network.cable() as (near, far):
        stages = Stages(plan, far, tmp_path)
        try:
            sent = json.loads(run(*command("workload_gen", "send", capture, "--interface", near, "--json")))
            assert sent["frames"] == packets["received"]
            until(lambda: stages.written == sent["frames"], "all frames in the ring")
            for name, process in stages.processes.items():
                until(lambda pid=process.pid: not any(capabilities(pid)), f"{name} without capabilities")
            reports = stages.stop()
        finally:
            stages.kill()
    assert {k: v for k, v in reports["extract"].items() if k != "per_stream"} == {
        k: v for k, v in packets.items() if k != "per_stream"
    }
    listed = json.loads(run(sys.executable, "-m", "flowcheck", "list", str(tmp_path / "out"), "--json"))
    assert listed == expected
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o600}, modes


def test_what_the_sockets_ring_cannot_hold_is_counted_as_missed(tmp_path):
    """A dump that is stopped sees nothing; the interface's own count says how much that was."""
    from scapy.layers.l2 import Ether
    from scapy.utils import wrpcap

    wrpcap(str(tmp_path / "flood.pcap"), [Ether(b"\x02" * 12 + b"\x88\xb5" + bytes(1000))] * 30_000)
    with network.cable() as (near, far):
        stages = Stages(PLANS / "ll-1ch-5000f-20iter-bothways-mtu4096.json", far, tmp_path)
        try:
            stages.processes["dump"].send_signal(signal.SIGSTOP)
            run(*command("workload_gen", "send", tmp_path / "flood.pcap", "--interface", near, "--gbps", "10"))
            stages.processes["dump"].send_signal(signal.SIGCONT)
            until(lambda: stages.written > 1000, "what the socket held")
            time.sleep(0.5)
            report = stages.stop()["extract"]
        finally:
            stages.kill()
    assert report["missed_by_port"] > 1000
    assert report["received"] + report["missed_by_port"] == 30_000
    assert report["foreign"] + report["dropped_ring_full"] == report["received"]


def test_an_interface_that_cannot_be_dumped_is_a_device_error(tmp_path):
    plan = PLANS / "ll-1ch-5000f-20iter-bothways-mtu4096.json"

    def dump(interface, prefix=()):
        words = command("packet_dump", plan, "--stream", "host0", "--ring", tmp_path / "ring", "--interface", interface)
        return run(*prefix, *words, status=4)

    assert "no interface 'fcnone'" in dump("fcnone")
    assert not (tmp_path / "ring").exists()
    with network.cable() as (near, far):
        bare = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--")
        assert "no permission for raw frames" in dump(far, bare)
        network.ip("link", "set", near, "down")
        assert "no carrier" in dump(far)
        network.ip("link", "set", far, "down")
        assert "is down" in dump(far)
        send = command("workload_gen", "send", "nothing.pcap", "--interface", far)
        assert "is down" in run(*send, status=4)


def test_frames_longer_than_the_interface_takes_are_refused_before_the_first_leaves(tmp_path):
    from scapy.layers.l2 import Ether
    from scapy.utils import wrpcap

    wrpcap(str(tmp_path / "a.pcap"), [Ether(bytes(100)), Ether(bytes(3000))])
    with network.cable(mtu=1500) as (near, far):
        before = network.received(far)
        assert "one of 3000" in run(
            *command("workload_gen", "send", tmp_path / "a.pcap", "--interface", near), status=4
        )
        assert network.received(far) == before
    whole = (tmp_path / "a.pcap").read_bytes()
    (tmp_path / "cut.pcap").write_bytes(whole[:-7])
    with network.cable() as (near, far):
        before = network.received(far)
        assert "cannot be read" in run(
            *command("workload_gen", "send", tmp_path / "cut.pcap", "--interface", near), status=5
        )
        assert network.received(far) == before
