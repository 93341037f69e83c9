# SPDX-License-Identifier: MIT
"""RoCEv2 frames for tests, made with scapy. Shares no constant with the code under test.

scapy's roce module has BTH and AETH; RETH, immediate, atomics, DETH and IETH are defined here from the InfiniBand
specification (volume 1, chapter 9). `fast_frame` makes the same bytes as `frame`, for streams of thousands of packets.
"""

import struct
import zlib

from scapy.contrib.roce import AETH, BTH
from scapy.fields import IntField, XIntField, XLongField
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

SRC4, DST4 = "192.0.2.1", "192.0.2.2"
SRC6, DST6 = "fe80::1", "fe80::2"


class RETH(Packet):
    name = "RETH"
    fields_desc = [XLongField("va", 0), XIntField("rkey", 0), IntField("dma_length", 0)]  # noqa: RUF012


class ImmDt(Packet):
    name = "ImmDt"
    fields_desc = [XIntField("immediate", 0)]  # noqa: RUF012


class IETH(Packet):
    name = "IETH"
    fields_desc = [XIntField("rkey", 0)]  # noqa: RUF012


class DETH(Packet):
    name = "DETH"
    fields_desc = [XIntField("qkey", 0), XIntField("source_qp", 0)]  # noqa: RUF012


class AtomicETH(Packet):
    name = "AtomicETH"
    fields_desc = [XLongField("va", 0), XIntField("rkey", 0), XLongField("swap", 0), XLongField("compare", 0)]  # noqa: RUF012


class AtomicAckETH(Packet):
    name = "AtomicAckETH"
    fields_desc = [XLongField("original", 0)]  # noqa: RUF012


#: Opcode of the reliable connection: its name, the headers that follow BTH, and whether it has payload (table 38).
OPCODES = {
    0: ("SEND_FIRST", (), True),
    1: ("SEND_MIDDLE", (), True),
    2: ("SEND_LAST", (), True),
    3: ("SEND_LAST_IMMEDIATE", (ImmDt,), True),
    4: ("SEND_ONLY", (), True),
    5: ("SEND_ONLY_IMMEDIATE", (ImmDt,), True),
    6: ("WRITE_FIRST", (RETH,), True),
    7: ("WRITE_MIDDLE", (), True),
    8: ("WRITE_LAST", (), True),
    9: ("WRITE_LAST_IMMEDIATE", (ImmDt,), True),
    10: ("WRITE_ONLY", (RETH,), True),
    11: ("WRITE_ONLY_IMMEDIATE", (RETH, ImmDt), True),
    12: ("READ_REQUEST", (RETH,), False),
    13: ("READ_RESPONSE_FIRST", (AETH,), True),
    14: ("READ_RESPONSE_MIDDLE", (), True),
    15: ("READ_RESPONSE_LAST", (AETH,), True),
    16: ("READ_RESPONSE_ONLY", (AETH,), True),
    17: ("ACKNOWLEDGE", (AETH,), False),
    18: ("ATOMIC_ACKNOWLEDGE", (AETH, AtomicAckETH), False),
    19: ("COMPARE_SWAP", (AtomicETH,), False),
    20: ("FETCH_ADD", (AtomicETH,), False),
    22: ("SEND_LAST_INVALIDATE", (IETH,), True),
    23: ("SEND_ONLY_INVALIDATE", (IETH,), True),
}


def bth(opcode, qp, psn, pad=0, **fields):
    return bytes(BTH(opcode=opcode, dqpn=qp, psn=psn, padcount=pad, icrc=0, **fields))[:12]


def ip_layers(version, extensions=(), sport=0xC123, **fields):
    """Return IP, with extension headers for version 6, and UDP."""
    ip = IP(src=SRC4, dst=DST4, flags="DF", **fields) if version == 4 else IPv6(src=SRC6, dst=DST6, **fields)
    for extension in extensions:
        ip = ip / extension
    return ip / UDP(sport=sport, dport=4791, chksum=0)


def with_icrc(layers, content):
    """Return the bytes from IP to ICRC: the checksum is taken over a copy with its own fields set to ones."""
    packet = layers / Raw(content + b"\0\0\0\0")
    masked = layers.copy() / Raw(content + b"\0\0\0\0")
    if IP in masked:
        masked[IP].tos, masked[IP].ttl, masked[IP].chksum = 0xFF, 0xFF, 0xFFFF
    else:
        masked[IPv6].tc, masked[IPv6].fl, masked[IPv6].hlim = 0xFF, 0xFFFFF, 0xFF
    masked[UDP].chksum = 0xFFFF
    masked[Raw].load = content[:4] + b"\xff" + content[5:] + b"\0\0\0\0"
    return bytes(packet)[:-4] + struct.pack("<I", zlib.crc32(b"\xff" * 8 + bytes(masked)[:-4]))


def ethernet(version, packet, vlans=()):
    layers = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    for number, vlan in enumerate(vlans):
        layers = layers / (Dot1AD(vlan=vlan) if number + 1 < len(vlans) else Dot1Q(vlan=vlan))
    layers.lastlayer().type = 0x0800 if version == 4 else 0x86DD
    return bytes(layers) + packet


def frame(
    opcode, qp, psn, headers=b"", payload=b"", version=6, vlans=(), extensions=(), sport=0xC123, ip=None, **fields
):
    """Return a whole frame; `headers` are those after BTH, `ip` further fields of the IP header."""
    pad = -len(payload) % 4
    content = bth(opcode, qp, psn, pad, **fields) + headers + payload + bytes(pad)
    return ethernet(version, with_icrc(ip_layers(version, extensions, sport, **(ip or {})), content), vlans)


def fast_frame(opcode, qp, psn, headers=b"", payload=b"", *, reverse=False, sport=0xC123):
    """Return the same IPv6 frame as `frame`, without scapy; `reverse` goes from the destination to the source."""
    pad = -len(payload) % 4
    content = struct.pack(">BBHII", opcode, pad << 4, 0xFFFF, qp, psn) + headers + payload + bytes(pad)
    length = 8 + len(content) + 4
    addresses = [b"\xfe\x80" + bytes(13) + bytes([n]) for n in ((2, 1) if reverse else (1, 2))]
    udp = struct.pack(">HHHH", sport, 4791, length, 0)
    ip = struct.pack(">IHBB", 0x60000000, length, 17, 64) + addresses[0] + addresses[1]
    masked = b"\xff" * 8 + b"\x6f\xff\xff\xff" + ip[4:7] + b"\xff" + ip[8:] + udp[:6] + b"\xff\xff"
    icrc = zlib.crc32(content[5:], zlib.crc32(masked + content[:4] + b"\xff"))
    ether = bytes.fromhex("02000000000202000000000186dd")
    return ether + ip + udp + content + struct.pack("<I", icrc)
