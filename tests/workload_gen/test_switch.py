# SPDX-License-Identifier: MIT
"""The wire without root: sums as without a network, and every frame of a mirrored port in a live dump."""

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from workload_gen._nic import Nic

from flowcheck.eal import Eal
from flowcheck.errors import DeviceError
from flowcheck.ring import PacketRing
from packet_dump.dump import PortDump
from tests import jobs
from tests.pipeline.live import until
from tests.workload_gen.ranks import running
from tests.workload_gen.test_transport import collectives
from workload_gen.fabric import Network, adapter_socket
from workload_gen.record import Recording
from workload_gen.switch import Switch
from workload_gen.transport import FabricRing
from workload_gen.wire import connections

SIMPLE = {"ranks": 4, "protocol": "simple", "mtu": 4096, "ip": 4}


@pytest.mark.parametrize(
    "options", [{"ranks": 2}, SIMPLE, {"ranks": 3, "protocol": "ll128", "channels": 2, "pin_channels": True}], ids=str
)
def test_the_sums_are_those_without_a_network(options):
    counts = (5, 70_001, 1_000_000)  # the last fills the sockets
    with Switch(options["ranks"], ()) as switch, running(collectives, switch, options, ("float32",), counts) as results:
        for wrong, counters in results():
            assert wrong == []
            assert counters["bad_icrc"] == counters["refused"] == counters["repeated"] == 0 < counters["sent"]


def dump_until_told(path, devargs, records, pause_s):
    """Dump a port into a ring, and take frames out of it with pauses, until SIGTERM; print what came."""
    ring = PacketRing.create(path, frame_bytes=4300, records=int(records), identity=bytes(128), stream="s")
    dump = PortDump(Eal.start(), devargs, ring)
    signal.signal(signal.SIGTERM, lambda *_: dump.stop())
    print("open", flush=True)
    lengths, addresses = [], collections.Counter()
    while not dump.finished:
        if not dump.poll() and ring.written > len(lengths):
            time.sleep(float(pause_s))
            for number in range(len(lengths), ring.written):
                frame = ring.frame(number)
                lengths.append(len(frame))
                addresses.update({frame[0:6], frame[6:12]})
            jobs.publish(ring, "extracted", len(lengths))
    print(json.dumps(dump.counters() | {"bytes": sum(lengths), "of_one": addresses.most_common(1)[0][1]}))


@contextlib.contextmanager
def dumping(path, devargs, records=4096, pause_s=0.0):
    code = "from tests.workload_gen import test_switch as here; here.dump_until_told(*__import__('sys').argv[1:])"
    words = [sys.executable, "-c", code, *map(str, (path, devargs, records, pause_s))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "open\n"
            yield process
        finally:
            process.kill()


def told(process):
    process.send_signal(signal.SIGTERM)
    return json.loads(process.communicate(timeout=60)[0])


@pytest.mark.dpdk
def test_a_dump_that_is_slow_gets_every_frame_of_a_mirrored_port(tmp_path):
    with Switch(4, (1,)) as switch, dumping(tmp_path / "ring", switch.monitors[1], 64, 0.002) as dump:
        with running(collectives, switch, SIMPLE, ("float32",), (5, 300_000)) as results:
            adapter = results()[1][1]
        found = told(dump)
        handed = switch.mirrored(1)
        assert switch.unmirrored == 0
    assert found["dropped_ring_full"] == found["missed_by_port"] == 0
    assert found["received"] == adapter["sent"] + adapter["received"] == handed[0] == found["of_one"] > 1000
    assert found["bytes"] == handed[1]


def test_frames_that_find_no_dump_are_counted():
    with Switch(4, (0,)) as switch, running(collectives, switch, SIMPLE, ("float32",), (5,)) as results:
        adapter = results()[0][1]
        assert switch.unmirrored == adapter["sent"] + adapter["received"] > 0
        assert switch.mirrored(0) == (0, 0)


def sums(rank, host, store, folder):
    """Do small all-reduces until a file says that it is enough; return how many, the adapter's frames, all right."""
    layout = Recording(out=None, **SIMPLE).layout()
    nic = Nic(adapter_socket(host, ""), layout.mtu)
    ring = FabricRing(layout, rank, nic, lambda edge: connections(layout, edge, 4, None, 0))
    done, right = 0, True
    while True:
        data = torch.tensor([1.0, float((folder / "enough").exists())])
        ring.all_reduce(data)
        done += 1
        right = right and data[0].item() == 4
        (folder / f"done{rank}").write_text(str(done))
        if data[1]:  # the same answer for all
            break
    ring.close()
    return done, nic.sent + nic.received, right


@pytest.mark.dpdk
def test_a_dump_that_is_killed_stops_nothing_and_the_next_one_goes_on(tmp_path):
    def done():
        path = tmp_path / "done0"
        return int((path.exists() and path.read_text()) or 0)

    with Switch(4, (0,)) as switch, running(sums, switch, tmp_path) as results:
        with dumping(tmp_path / "first", switch.monitors[0]) as first:
            until(lambda: done() > 50, "some sums")
            first.kill()
            first.communicate()
        reached = done()
        until(lambda: done() > reached + 50, "sums without a dump")
        with dumping(tmp_path / "second", switch.monitors[0]) as second:
            reached = done()
            until(lambda: done() > reached + 50, "sums with another")
            (tmp_path / "enough").touch()
            answers = results()
            taken = told(second)["received"]
        handed, lost = switch.mirrored(0)[0], switch.unmirrored
    assert all(right for _, _, right in answers)
    assert taken > 500 and lost > 500
    # What the first had not taken when it was killed was handed over, and is lost.
    assert answers[0][1] <= handed + lost <= answers[0][1] + 2048


def test_only_this_users_processes_are_let_in(tmp_path):
    with Switch(2, ()) as switch:
        network = switch.network
        network.store(tmp_path / "network.json")
        assert Network.load(tmp_path / "network.json") == network and network.transport == "in-process"
        adapter_socket(network.hosts[0], network.interface).close()
        if os.geteuid() == 0:
            child = os.fork()
            if child == 0:
                os.setuid(65534)
                try:
                    adapter_socket(network.hosts[0], network.interface)
                except DeviceError:
                    os._exit(7)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with pytest.raises(DeviceError, match="is the process that made it there still"):
        adapter_socket(network.hosts[0], network.interface)
