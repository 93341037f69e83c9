# SPDX-License-Identifier: MIT
"""RoCEv2 frames by scapy, which computes checksums and ICRC itself; RETH, immediate and AETH are defined here."""

import struct
import zlib

from scapy.contrib.roce import BTH
from scapy.fields import IntField, LongField, XIntField
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

V6 = ("fe80::1", "fe80::2")
V4 = ("10.1.0.1", "10.1.0.2")


class RETH(Packet):
    fields_desc = [LongField("va", 0), XIntField("rkey", 0), IntField("length", 0)]  # noqa: RUF012


def network(version, src, dst, options=b"", extensions=()):
    """Return the IP layers."""
    if version == 4:
        layer = IP(src=src, dst=dst, flags="DF", options=[])
        return IP(src=src, dst=dst, flags="DF", options=options) if options else layer
    layer = IPv6(src=src, dst=dst)
    for extension in extensions:
        layer = layer / extension
    return layer


def roce(
    opcode, qp, psn, *, version=6, ends=None, vlans=(), reth=None, extended=b"", payload=b"", sport=50000, ip=None
):
    """Return a whole frame: reth is (va, rkey, length), extended any further transport headers."""
    src, dst = ends or (V6 if version == 6 else V4)
    layers = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    for vlan in vlans:
        layers = layers / Dot1Q(vlan=vlan)
    layers = layers / (ip if ip is not None else network(version, src, dst))
    layers = layers / UDP(sport=sport, dport=4791, chksum=0)
    layers = layers / BTH(opcode=opcode, dqpn=qp, psn=psn, padcount=-len(payload) % 4)
    body = b""
    if reth:
        body += bytes(RETH(va=reth[0], rkey=reth[1], length=reth[2]))
    body += extended + payload + bytes(-len(payload) % 4)
    return bytes(layers / Raw(body)) if body else bytes(layers)


def mended(frame):
    """Return a frame without VLAN whose last four bytes are the ICRC of those before: what a switch may change counts as ones."""
    masked = bytearray(frame[14:-4])
    if masked[0] >> 4 == 6:
        bth, fields = 40 + 8, (1, 2, 3, 7)  # class, flow label, hop limit
        masked[0] |= 0x0F
    else:
        bth, fields = 20 + 8, (1, 8, 10, 11)  # type of service, time to live, checksum
    for at in (*fields, bth - 2, bth - 1, bth + 4):  # and UDP's checksum, the BTH's congestion bits
        masked[at] = 0xFF
    return bytes(frame[:-4]) + struct.pack("<I", zlib.crc32(b"\xff" * 8 + masked))


def ll_lines(data, flag):
    """Return LL lines of data (any length; the tail is filled with what must never count)."""
    data = data + b"\xee" * (-len(data) % 8)
    word = flag.to_bytes(4, "little")
    return b"".join(data[i : i + 4] + word + data[i + 4 : i + 8] + word for i in range(0, len(data), 8))


def message(qp, psn, va, wire, mtu, **options):
    """Return the frames of one write with immediate."""
    pieces = [wire[i : i + mtu] for i in range(0, len(wire), mtu)] or [b""]
    out = []
    for number, piece in enumerate(pieces):
        first, last = number == 0, number == len(pieces) - 1
        opcode = (11 if last else 6) if first else (9 if last else 7)
        extended = len(wire).to_bytes(4, "little") if last else b""
        reth = (va, 0x1234, len(wire)) if first else None
        out.append(roce(opcode, qp, (psn + number) % 2**24, reth=reth, extended=extended, payload=piece, **options))
    return out
