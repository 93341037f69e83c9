# SPDX-License-Identifier: MIT
"""The recorder's frames against the witness's: the same opcodes, numbers, addresses and lengths, in the same order."""

import struct

import pytest
import torch
from scapy.utils import PcapNgReader, PcapReader

from flowcheck.plan import Layout
from tests.witness.capture import Capture
from tests.witness.schedule import Job
from workload_gen.wire import LinkTap, connections

BTH = 14 + 40 + 8


def told(frames, data, credit, base):
    """Return per direction and queue pair what each frame says, in order; addresses from the connection's base."""
    out = {}
    for frame in frames:
        opcode, number = frame[BTH], int.from_bytes(frame[BTH + 5 : BTH + 8], "big")
        way = ("data", data.index(number)) if number in data else ("credit", credit.index(number))
        psn, at = int.from_bytes(frame[BTH + 9 : BTH + 12], "big"), BTH + 12
        fields = [opcode, psn, len(frame)]
        if opcode in (6, 10, 11):
            va, _, length = struct.unpack_from(">QII", frame, at)
            fields += [va - base if way[0] == "data" and va else 0, length]
            at += 16
        if opcode in (9, 11):
            fields.append(frame[at : at + 4])
        if opcode == 17:
            fields.append(frame[at : at + 4])
        out.setdefault(way, []).append(fields)
    return out


@pytest.mark.parametrize(
    "job",
    [
        Job("2.12", "ll", 3), Job("2.19", "ll128", 2, queue_pairs=2), Job("2.18", "simple", 4, queue_pairs=3, split=False),
        Job("2.21", "ll", 2, queue_pairs=4), Job("2.22", "ll128", 3, adaptive_routing=True), Job("2.25", "simple", 3),
        Job("2.28", "ll", 5, queue_pairs=8, split=False, mtu=256), Job("2.30", "simple", 2, queue_pairs=2, adaptive_routing=True),
    ],
    ids=str,
)  # fmt: skip
def test_the_same_frames(tmp_path, job):
    layout = Layout(
        source="modelled", library="nccl", version=job.version, protocol=job.protocol, ring=tuple(range(job.ranks)),
        queue_pairs=job.queue_pairs, split_queue_pairs=job.split, mtu=job.mtu, adaptive_routing=job.adaptive_routing,
    )  # fmt: skip
    link, counts = job.ranks - 1, (20_001, 3, 9_000)
    theirs = Capture(tmp_path, job, [link])
    links = connections(layout, link, 6, None, 0)
    ours = LinkTap(layout, links, tmp_path / "ours.pcapng")
    theirs.all_gather("all_gather", [bytes(8)] * job.ranks)
    ours.all_gather(bytes(8 * job.ranks), 8)
    theirs.broadcast("broadcast", bytes(70_000), 0)
    ours.broadcast(bytes(70_000), 0)
    for number, count in enumerate(counts):
        theirs.all_reduce(f"all_reduce {number}", [torch.zeros(count)] * job.ranks)
        ours.all_reduce(torch.zeros(count), torch.zeros(count))
    theirs.close()
    ours.close()
    with PcapReader(str(theirs.files[link])) as reader:
        expected = [bytes(packet) for packet in reader]
    with PcapNgReader(str(tmp_path / "ours.pcapng")) as reader:
        found = [bytes(packet) for packet in reader]
    c, d = theirs.connections[0], links[0]
    a = told(expected, c.data, c.credit, c.base)
    b = told(found, d.data_queue_pairs, d.credit_queue_pairs, d.base_address)
    for way in a:
        if way[0] == "data":
            assert [f for f in b[way] if f[0] != 17] == [f for f in a[way] if f[0] != 17], way
        else:
            assert [f[:3] for f in b[way] if f[0] == 10] == [f[:3] for f in a[way] if f[0] == 10], way
    assert set(a) == set(b)
