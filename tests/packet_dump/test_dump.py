# SPDX-License-Identifier: MIT
"""Frames arrive in the ring as they are in the file, by CPU and by DMA engines, also by ones that fail."""

import errno
import itertools
import os
import socket
import struct
import sys

import numpy as np
import pytest
from flowcheck._copy import CopyEngine

from flowcheck import interfaces
from flowcheck.eal import Eal
from flowcheck.errors import CaptureError, DeviceError
from flowcheck.ring import PacketRing
from packet_dump.dump import FileDump, InterfaceDump, PortDump
from tests import dma_faults, jobs, network, wire
from tests.capture_files import SECONDS, pcap, pcapng

pytestmark = pytest.mark.dpdk
_devices = itertools.count(100)


@pytest.fixture(scope="module")
def eal():
    return Eal.start()


def write(path, content):
    path.write_bytes(content)
    return path


def write_pcap(path, frames):
    return write(path, pcap(frames))


def frames_of(count, seed=0, longest=1200):
    rng = np.random.default_rng(seed)
    return [rng.bytes(int(rng.integers(14, longest))) for _ in range(count)]


def ring(tmp_path, records=1024, frame_bytes=1300, name="r"):
    plan = jobs.plan()
    path = tmp_path / name
    return PacketRing.create(path, frame_bytes=frame_bytes, records=records, identity=plan.identity(), stream="host0")


def run(dump, ring, limit=100_000):
    """Poll to the end, reading and giving back as a parser and an extractor would."""
    frames, times = [], []
    for _ in range(limit):
        dump.poll()
        while len(frames) < ring.written:
            record = ring.record(len(frames))
            assert int(record["sequence"][0]) == len(frames)
            assert int(record["decision"][0]) == int(record["verdict"][0]) == 0
            times.append(int(record["timestamp_ns"][0]))
            frames.append(ring.frame(len(frames)))
        jobs.publish(ring, "extracted", len(frames))
        if dump.finished:
            return frames, times
    raise AssertionError("the dump does not finish")


def engines(kind):
    names = {"cpu": (), "one": 1, "two": 2}[kind] or ()
    return CopyEngine([f"dma_skeleton{next(_devices)}" for _ in range(names)] if names else ())


@pytest.mark.parametrize("kind", ["cpu", "one", "two"])
def test_every_frame_arrives_in_order_through_a_small_ring(eal, tmp_path, kind):
    sent = frames_of(3000)
    path = write_pcap(tmp_path / "with, comma = and space.pcap", sent)
    engine = engines(kind)
    with ring(tmp_path, records=64) as target:
        dump = FileDump(eal, path, target, engine)
        got, times = run(dump, target)
        counters = dump.counters()
        dump.close()
        engine.close()
    assert got == sent
    assert times == [(SECONDS + n) * 10**9 + n * 1000 for n in range(3000)]
    assert counters["received"] == 3000 and counters["dropped_ring_full"] == 0
    assert counters["engine_bytes"] == (0 if kind == "cpu" else sum(map(len, sent)))


KINDS = {
    **{
        f"pcap {order} {unit}": (pcap, {"order": order, "nanoseconds": unit == 1}, unit)
        for order in "<>"
        for unit in (1000, 1)
    },
    "pcapng us": (pcapng, {}, 1000),
    "pcapng ns": (pcapng, {"power": 9}, 1),
    # What the driver is left with: it knows no nanoseconds, and no end.
    "odd": (pcapng, {"order": ">"}, 1000),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_its_frames_and_their_time_stamps(eal, tmp_path, kind):
    make, options, unit = KINDS[kind]
    sent = [b"", *frames_of(300, seed=3), b"", b"\x55", bytes(127), bytes(128), bytes(129), b""]
    path = write(tmp_path / "a", make(sent, **options))
    with ring(tmp_path, records=64) as target:
        dump = FileDump(eal, path, target)
        got, times = run(dump, target)
        dump.close()
    assert got == sent
    assert times == [(SECONDS + n) * 10**9 + n * unit for n in range(len(sent))]


def test_frames_that_the_capture_cut_are_as_long_as_it_holds_them(eal, tmp_path):
    sent = frames_of(100, seed=4)
    with ring(tmp_path) as target:
        dump = FileDump(eal, write(tmp_path / "a", pcap(sent, snap=200)), target)
        got, _ = run(dump, target)
        assert [int(target.record(n)["frame_length"][0]) for n in range(100)] == [len(f[:200]) for f in sent]
        dump.close()
    assert got == [f[:200] for f in sent]


def test_what_a_file_gets_after_it_was_validated_is_left_out(eal, tmp_path):
    sent = frames_of(100, seed=5)
    path = write_pcap(tmp_path / "a.pcap", sent)
    with ring(tmp_path, records=64) as target:
        dump = FileDump(eal, path, target)
        dump.poll()
        with open(path, "ab") as file:
            file.write(pcap(frames_of(50, seed=6))[24:])
        got, _ = run(dump, target)
        dump.close()
    assert got == sent


@pytest.mark.parametrize("size", [500_000, 503_807, 503_808, 503_809, 24 + 411 * 1216 + 8, 1_216_023])
@pytest.mark.parametrize("looked_at", [False, True])
def test_a_file_that_is_cut_while_it_is_dumped_is_an_error_and_leaves_no_wrong_frame(eal, tmp_path, size, looked_at):
    """Also where its last page was read before."""
    sent = [bytes([n % 255 + 1]) * 1200 for n in range(1000)]
    path = write_pcap(tmp_path / "a.pcap", sent)
    with ring(tmp_path) as target:
        dump = FileDump(eal, path, target)
        dump.poll()
        if looked_at:
            while target.written * 1216 < size - 160_000:
                dump.poll()
        before = target.written
        os.truncate(path, size)
        for _ in range(2):
            with pytest.raises(CaptureError, match="changed"):
                run(dump, target)
        assert 0 < before == target.written and not target.ended
        assert [target.frame(n) for n in range(before)] == sent[:before]
        dump.close()


def test_a_file_that_is_overwritten_while_it_is_dumped_is_an_error(eal, tmp_path):
    sent = frames_of(600, seed=7)
    path = write_pcap(tmp_path / "a.pcap", sent)
    with ring(tmp_path, records=64) as target:
        dump = FileDump(eal, path, target)
        dump.poll()
        with open(path, "r+b") as file:
            file.seek(24 + sum(16 + len(f) for f in sent[:300]))
            file.write(b"\xff" * 16)
        with pytest.raises(CaptureError, match="no frame can be read after 300"):
            run(dump, target)
        dump.close()


def _mapped():
    """Return the bytes of files that are in this process's memory."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssFile:"))


@pytest.mark.slow
def test_a_large_file_is_not_kept_in_memory(eal, tmp_path):
    part = pcap(frames_of(12_000, seed=8, longest=9000))[24:]
    path = tmp_path / "a.pcap"
    with open(path, "wb") as file:
        file.write(pcap([]))
        while file.tell() < 2.2 * 2**30:
            file.write(part)
    before = most = _mapped()
    with ring(tmp_path, records=4096, frame_bytes=9000) as target:
        dump = FileDump(eal, path, target)
        validated = _mapped()
        while not dump.finished:
            dump.poll()
            jobs.publish(target, "extracted", target.written)
            if target.written % 64 == 0:
                most = max(most, _mapped())
        assert target.written == 12_000 * (path.stat().st_size // len(part))
        dump.close()
    assert 0.9 * 2**30 < validated - before < 1.2 * 2**30 and most - before < 1.3 * 2**30


@pytest.mark.captures
def test_every_frame_of_the_real_captures_arrives(eal, captures, tmp_path):
    for number, path in enumerate(sorted(captures.glob("ll-*.pcapng"))):
        with ring(tmp_path, frame_bytes=4288, name=f"r{number}") as target:
            dump = FileDump(eal, path, target)
            got, _ = run(dump, target)
            dump.close()
        assert got == [frame[:4288] for frame in wire.frames(path)]


def test_copies_that_fail_are_done_again_and_counted(eal, tmp_path):
    sent = frames_of(1000, seed=1)
    engine = engines("two")
    faults = dma_faults.load(tmp_path)
    faults.fail_every(7)
    with ring(tmp_path) as target:
        dump = FileDump(eal, write_pcap(tmp_path / "a.pcap", sent), target, engine)
        got, _ = run(dump, target)
        counters = dump.counters()
        dump.close()
        engine.close()
    assert got == sent
    assert counters["engine_failed"] == faults.failed() > 100
    assert 0 < counters["engine_bytes"] < sum(map(len, sent))


def test_frames_longer_than_a_record_keep_their_length(eal, tmp_path):
    sent = [b"\x11" * 60, b"\x22" * 5000, b"\x33" * 20000, b"\x44" * 60]
    with ring(tmp_path, frame_bytes=512) as target:
        dump = FileDump(eal, write_pcap(tmp_path / "a.pcap", sent), target)
        got, _ = run(dump, target)
        lengths = [int(target.record(n)["frame_length"][0]) for n in range(4)]
        dump.close()
    assert got == [frame[:512] for frame in sent] and lengths == [60, 5000, 20000, 60]


@pytest.mark.parametrize("kind", ["pcap < 1000", "pcapng ns", "odd"])
def test_taken_over_at_any_burst_it_goes_on_where_it_was(eal, tmp_path, kind):
    make, options, _ = KINDS[kind]
    sent = frames_of(700, seed=2)
    path = write(tmp_path / "a", make(sent, **options))
    with ring(tmp_path) as target:
        for _ in range(100):
            dump = FileDump(eal, path, target)
            before = target.written
            while target.written == before and not dump.finished:
                dump.poll()
            done = dump.finished
            counters = dump.counters()
            dump.close()
            if done:
                break
        assert [target.frame(n) for n in range(target.written)] == sent and counters["received"] == 700


def test_another_file_than_the_ring_began_with_is_refused(eal, tmp_path):
    with ring(tmp_path) as target:
        dump = FileDump(eal, write_pcap(tmp_path / "a.pcap", frames_of(50)), target)
        run(dump, target)
        dump.close()
        with pytest.raises(CaptureError, match="earlier dump"):
            FileDump(eal, write_pcap(tmp_path / "b.pcap", frames_of(10)), target)


def test_a_port_drops_what_a_full_ring_cannot_take_and_counts_it(eal, tmp_path):
    with ring(tmp_path, records=64) as target:
        dump = PortDump(eal, f"net_null{next(_devices)},size=256", target)
        for _ in range(50):
            dump.poll()
        dump.stop()
        while not dump.finished:
            dump.poll()
        counters = dump.counters()
        dump.close()
        assert target.written == 64 and target.ended
    assert counters["dropped_ring_full"] > 1000
    assert counters["received"] == 64 + counters["dropped_ring_full"]


def test_no_frame_follows_the_end_of_a_port(eal, tmp_path):
    """The port never falls silent; what is behind the dump ends when it has drained what was there at the end."""
    with ring(tmp_path, records=64) as target:
        dump = PortDump(eal, f"net_null{next(_devices)},size=256", target)
        dump.stop()
        for _ in range(1000):
            dump.poll()
            jobs.publish(target, "extracted", target.written)
            if target.ended:
                break
        assert dump.finished and 0 < target.written < 200
        last = target.written
        assert dump.poll() == 0 and target.written == last
        dump.close()


def test_devices_that_are_not_there_are_device_errors(eal, tmp_path):
    with ring(tmp_path) as target, pytest.raises(DeviceError):
        PortDump(eal, "net_no_such_driver0", target)
    with pytest.raises(DeviceError):
        CopyEngine(["dma_no_such_driver0"])


def test_buffers_and_ports_are_given_back(eal, tmp_path):
    path = write_pcap(tmp_path / "a.pcap", frames_of(20))
    for number in range(60):  # each takes 10 MB of 512
        with ring(tmp_path, name=f"r{number}") as target:
            dump = FileDump(eal, path, target)
            run(dump, target)
            dump.close()
    assert sys.modules["packet_dump._dump"]


@network.needs_root
def test_the_group_of_packet_sockets_is_the_drivers(tmp_path, eal):
    def may_have(interface, group):
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as other:  # ETH_P_ALL
            other.bind((interface, 0))
            try:
                other.setsockopt(263, 18, group)  # SOL_PACKET, PACKET_FANOUT
            except OSError as error:
                assert error.errno == errno.EINVAL
                return False
            return True

    with network.cable() as (near, far), ring(tmp_path) as into:
        dump = InterfaceDump(eal, far, into)
        group = interfaces.fanout_group(far, os.getpid())
        assert may_have(near, group ^ 1) and not may_have(near, group)
        dump.close()
        assert may_have(near, group)


@pytest.mark.slow
@network.needs_root
def test_an_interface_is_dumped_however_large_an_iteration_is(tmp_path, eal):
    with network.cable() as (near, far), ring(tmp_path, frame_bytes=4200) as into:
        dump = InterfaceDump(eal, far, into, frames=1_000_000)  # 8 GB of frames, and as many to send
        frame = bytes(12) + struct.pack("!H", 0x88B5) + bytes(range(200))
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
            out.bind((near, 0))
            out.send(frame)
        for _ in range(100_000):
            if dump.poll():
                break
        assert into.written == 1 and into.frame(0) == frame
        dump.close()
