# SPDX-License-Identifier: MIT
"""Captures of made-up jobs, built with scapy from `schedule` and `payload`; a second account that imports no FlowCheck.

RETH, immediate and AETH are defined here (InfiniBand specification volume 1, chapter 9); the invariant CRC is computed
from its definition (chapter 7 and annex A17).
"""

import random
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from scapy.fields import BitField, ByteField, IntField, ShortField, ThreeBytesField, XIntField, XLongField
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw
from scapy.utils import PcapWriter

from tests.witness import schedule
from tests.witness.payload import STRIDE, payload


class Base(Packet):
    name = "BTH"
    fields_desc = [  # noqa: RUF012
        ByteField("opcode", 0), BitField("solicited", 0, 1), BitField("migreq", 0, 1), BitField("pad", 0, 2),
        BitField("tver", 0, 4), ShortField("pkey", 0xFFFF), ByteField("congestion", 0), ThreeBytesField("dest_qp", 0),
        BitField("ackreq", 0, 1), BitField("reserved", 0, 7), ThreeBytesField("psn", 0),
    ]  # fmt: skip


class RETH(Packet):
    name = "RETH"
    fields_desc = [XLongField("va", 0), XIntField("rkey", 0), IntField("length", 0)]  # noqa: RUF012


class ImmDt(Packet):
    name = "ImmDt"
    fields_desc = [XIntField("immediate", 0)]  # noqa: RUF012


class AETH(Packet):
    name = "AETH"
    fields_desc = [ByteField("syndrome", 0x1F), ThreeBytesField("msn", 0)]  # noqa: RUF012


@dataclass
class Wire:
    """How frames travel: IP version, 802.1Q tag or None, first PSN of every queue pair."""

    ip: int = 6
    vlan: int | None = None
    start_psn: int = 0


@dataclass
class Connection:
    """One direction of a channel between neighbours, with its counters."""

    edge: int
    channel: int
    source: str
    destination: str
    data: list[int]
    credit: list[int]
    base: int
    psn: list[int]
    step: int = 0
    sent: int = 0
    table: list[dict] = field(default_factory=list)


def udp_port(a, b):
    v = a * b
    v ^= v >> 20
    v ^= v >> 40
    f = v & 0xFFFFF
    return ((f & 0x3FFF) ^ (f >> 14)) | 0xC000


class Writer:
    """A pcap file whose clock moves on by a microsecond a frame: however slow the writing, no flow falls silent."""

    def __init__(self, path):
        self._file = PcapWriter(str(path), linktype=1)
        self._file.write_header(None)
        self._count = 0

    def write(self, frame):
        self._count += 1
        self._file.write_packet(frame, sec=1_700_000_000 + self._count // 1_000_000, usec=self._count % 1_000_000)

    def close(self):
        self._file.close()


class Capture:
    """A job's frames, written link by link; `close` when all collectives are done."""

    def __init__(self, folder, job, links, wire=None, seed=0):
        self.job, self.wire, self.rng = job, wire or Wire(), random.Random(seed)
        self.files = {link: Path(folder) / f"witness-{link}.pcap" for link in links}
        self._writers = {link: Writer(path) for link, path in self.files.items()}
        numbers = self.rng.sample(range(0x100, 0xFFFFFF), 2 * job.queue_pairs * job.channels * len(links))
        self.connections = []
        for link in links:
            for channel in range(job.channels):
                data, credit = ([numbers.pop() for _ in range(job.queue_pairs)] for _ in range(2))
                base = self.rng.randrange(1 << 20, 1 << 40) * 4096
                ends = [self._address(link), self._address((link + 1) % job.ranks)]
                self.connections.append(
                    Connection(link, channel, *ends, data, credit, base, [self.wire.start_psn] * job.queue_pairs)
                )

    def _address(self, position):
        return f"fe80::1:{position + 1:x}" if self.wire.ip == 6 else f"10.1.0.{position + 1}"

    # -- collectives --

    def all_reduce(self, label, vectors):
        """Sum one tensor per position as the ring does, write what is mirrored, and return the sum."""
        job, n, count, width = self.job, self.job.ranks, len(vectors[0]), vectors[0].element_size()
        state, total = {}, torch.empty_like(vectors[0])
        for channel in range(job.channels):
            edges = [schedule.all_reduce(job, edge, channel, count, width) for edge in range(n)]
            # Message by message: every position sends, then every position receives and adds.
            per_loop = 2 * (n - 1) * (2 if job.protocol == "simple" else 1)
            for index in range(len(edges[0])):
                send_number = index % per_loop // (per_loop // (2 * (n - 1)))
                flying = []
                for position in range(n):
                    s = edges[position][index]
                    where = slice(s.first, s.first + s.elements)
                    held = vectors[position][where] if send_number == 0 else state[position, channel, s.first, s.chunk]
                    flying.append((s, held))
                    for connection in self._mirrored(position, channel):
                        self._send(connection, label, s, held.view(torch.uint8).numpy().tobytes())
                for position in range(n):
                    s, held = flying[(position - 1) % n]
                    where = slice(s.first, s.first + s.elements)
                    if send_number < n - 1:
                        held = vectors[position][where] + held
                    if send_number == n - 2 and s.elements:
                        total[where] = held
                    state[position, channel, s.first, s.chunk] = held
        return total

    def broadcast(self, label, data, root=0):
        """Write a broadcast of bytes."""
        for c in self.connections:
            for s in schedule.broadcast(self.job, c.edge, c.channel, len(data), root):
                self._send(c, label, s, data[s.first : s.first + s.elements])

    def all_gather(self, label, blocks):
        """Write an all-gather of one block of bytes a position."""
        data = b"".join(blocks)
        for c in self.connections:
            for s in schedule.all_gather(self.job, c.edge, c.channel, len(blocks[0])):
                self._send(c, label, s, data[s.first : s.first + s.elements])

    def _mirrored(self, edge, channel):
        return [c for c in self.connections if (c.edge, c.channel) == (edge, channel)]

    # -- messages --

    def _send(self, c, label, send, data):
        job = self.job
        broadcast = label.startswith("broadcast")
        stride = 1 if job.protocol != "simple" or broadcast else 2
        if job.protocol == "simple" and not broadcast and (not c.table or c.table[-1]["op"] != label):
            c.step = schedule.up(c.step, 4)
        slot = c.step % 8 * STRIDE[job.protocol]
        wire = payload(job.protocol, data, c.step, bytes([self.rng.randrange(256)]))
        self._credit(c, slot)
        order = "little" if int(job.version.split(".")[1]) <= 28 else "big"
        immediate = int.from_bytes(len(wire).to_bytes(4, order), "big")
        pieces = []
        if job.split:
            piece = schedule.up(schedule.ceil(len(wire), job.queue_pairs), 128)
            for qp in range(job.queue_pairs):
                begin, end = min(qp * piece, len(wire)), min((qp + 1) * piece, len(wire))
                exact = int(job.version.split(".")[1]) >= 29
                pieces.append((qp, begin, end, begin if exact else qp * piece))
        else:
            pieces.append((c.sent % job.queue_pairs, 0, len(wire), 0))
        rows = []
        for qp, begin, end, offset in pieces:
            first = c.psn[qp]
            self._write_message(c, qp, c.base + slot + offset, wire[begin:end], len(wire), immediate)
            rows.append((qp, first - self.wire.start_psn, c.psn[qp] - first, begin, end - begin))
        c.table.append(
            {"op": label, "step": c.step, "bytes": len(wire), "slot": slot, "final": send.final, "first": send.first,
             "elements": send.elements, "pieces": rows}
        )  # fmt: skip
        c.step += stride
        c.sent += 1

    def _write_message(self, c, qp, address, data, whole, immediate):
        job = self.job
        bulk = job.adaptive_routing and whole > 8192
        chunks = [data[i : i + job.mtu] for i in range(0, len(data), job.mtu)] or [b""]
        for index, chunk in enumerate(chunks):
            kind = (
                ("only" if len(chunks) == 1 else "first")
                if index == 0
                else "last"
                if index == len(chunks) - 1
                else "middle"
            )
            with_imm = kind in ("only", "last") and not bulk
            opcode = {"first": 6, "middle": 7, "last": 9 if with_imm else 8, "only": 11 if with_imm else 10}[kind]
            headers = b""
            if kind in ("first", "only"):
                headers += bytes(RETH(va=address, rkey=c.data[0], length=len(data)))
            if with_imm:
                headers += bytes(ImmDt(immediate=immediate))
            self._frame(c, qp, True, opcode, c.psn[qp], headers, chunk)
            c.psn[qp] += 1
        if bulk:
            self._frame(c, qp, True, 11, c.psn[qp], bytes(RETH()) + bytes(ImmDt(immediate=immediate)), b"")
            c.psn[qp] += 1
        self._frame(c, qp, False, 17, c.psn[qp] - 1, bytes(AETH(msn=c.sent + 1)), b"")

    def _credit(self, c, slot):
        minor = int(self.job.version.split(".")[1])
        element = bytearray(32 if minor <= 19 else 64)
        nreqs, tag, idx = (
            (16, 20, 24)
            if minor <= 19
            else (20, 24, 32)
            if minor <= 23
            else (32, 36, 40)
            if minor <= 29
            else (48, 52, 56)
        )
        struct.pack_into("<Q", element, 0, c.base + slot)
        struct.pack_into("<I", element, 8, {"ll": 65536, "ll128": 614400, "simple": 1048576}[self.job.protocol])
        struct.pack_into("<I", element, 12 if minor <= 23 else 16, c.data[0])
        struct.pack_into("<I", element, nreqs, 1)
        struct.pack_into("<I", element, tag, c.edge)
        struct.pack_into("<Q", element, idx, c.sent + 1)
        ring = 64 if minor <= 18 else 256
        va = 0x7F0000000020 + c.sent % ring * 8 * len(element)
        self._frame(c, 0, False, 10, c.sent, bytes(RETH(va=va, rkey=9, length=len(element))), bytes(element))

    def _frame(self, c, qp, forward, opcode, psn, headers, data):
        number, peer = (c.data[qp], c.credit[qp]) if forward else (c.credit[qp], c.data[qp])
        source, destination = (c.source, c.destination) if forward else (c.destination, c.source)
        pad = -len(data) % 4
        rest = headers + data + bytes(pad)

        def build(ones):
            network = {
                4: lambda: IP(src=source, dst=destination, flags="DF", ttl=255 if ones else 64, tos=255 if ones else 0),
                6: lambda: IPv6(
                    src=source,
                    dst=destination,
                    hlim=255 if ones else 64,
                    tc=255 if ones else 0,
                    fl=0xFFFFF if ones else 0,
                ),
            }[self.wire.ip]()
            if ones and self.wire.ip == 4:
                network.chksum = 0xFFFF
            udp = UDP(sport=udp_port(number, peer), dport=4791, chksum=0xFFFF if ones else 0)
            base = Base(opcode=opcode, pad=pad, dest_qp=number, psn=psn % 2**24, congestion=255 if ones else 0)
            return bytes(network / udp / Raw(bytes(base) + rest + bytes(4)))

        icrc = zlib.crc32(b"\xff" * 8 + build(True)[:-4])
        packet = build(False)[:-4] + struct.pack("<I", icrc)
        link = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02", type=0x0800 if self.wire.ip == 4 else 0x86DD)
        if self.wire.vlan is not None:
            link = Ether(src=link.src, dst=link.dst, type=0x8100) / Dot1Q(vlan=self.wire.vlan, type=link.type)
        self._writers[c.edge].write(bytes(link) + packet)

    def close(self):
        """Close the files."""
        for writer in self._writers.values():
            writer.close()
