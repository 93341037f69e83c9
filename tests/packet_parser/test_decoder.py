# SPDX-License-Identifier: MIT
"""The decoder and the ICRC: every opcode and encapsulation, whole, cut at every byte, and with lengths that lie."""

import ctypes
import ipaddress
import mmap
import os
import random
import struct
import zlib

import pytest
from scapy.layers.inet import IP, IPOption
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting, PadN

from packet_parser import _frames
from tests.packet_parser.frames import (
    AETH,
    DETH,
    DST4,
    DST6,
    IETH,
    OPCODES,
    RETH,
    SRC4,
    SRC6,
    AtomicAckETH,
    AtomicETH,
    ImmDt,
    bth,
    ethernet,
    fast_frame,
    frame,
    ip_layers,
    with_icrc,
)

PAGE = mmap.PAGESIZE
VA, RKEY, IMMEDIATE = 0x0123456789ABCDEF, 0xCAFEBABE, 0x10203040
#: RETH lengths that agree with a payload of so many bytes
FIRSTS = {6: 9999}


@pytest.fixture(scope="module")
def guarded():
    """Decode with the frame's last byte right before a page that cannot be read: one byte too far is the end of pytest."""
    memory = mmap.mmap(-1, 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + PAGE), PAGE, 0) == 0

    def decode(data):
        memory[PAGE - len(data) : PAGE] = data
        return _frames.decode(memoryview(memory)[PAGE - len(data) : PAGE])

    yield decode
    libc.mprotect(ctypes.c_void_p(address + PAGE), PAGE, mmap.PROT_READ | mmap.PROT_WRITE)


def headers_of(opcode, payload):
    made = {
        RETH: RETH(va=VA, rkey=RKEY, dma_length=FIRSTS.get(opcode, len(payload))),
        ImmDt: ImmDt(immediate=IMMEDIATE),
        IETH: IETH(rkey=RKEY),
        AETH: AETH(syndrome=0x1F, msn=77),
        AtomicETH: AtomicETH(va=VA, rkey=RKEY, swap=3, compare=5),
        AtomicAckETH: AtomicAckETH(original=9),
    }
    return b"".join(bytes(made[kind]) for kind in OPCODES[opcode][1])


def payload_of(opcode):
    return bytes(range(64)) if OPCODES[opcode][2] else b""


SHAPES = {
    "ipv4": {"version": 4},
    "ipv4-options": {"version": 4, "ip": {"options": [IPOption(b"\x01" * 8)]}},
    "ipv4-vlan": {"version": 4, "vlans": (7,)},
    "ipv6": {"version": 6},
    "ipv6-vlans": {"version": 6, "vlans": (9, 8, 7)},
    "ipv6-extensions": {
        "version": 6,
        "extensions": (
            IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(12))]),
            IPv6ExtHdrRouting(),
            IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(4))]),
        ),
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("opcode", OPCODES, ids=lambda o: OPCODES[o][0])
def test_every_opcode_in_every_encapsulation(guarded, opcode, shape):
    payload, kinds = payload_of(opcode), OPCODES[opcode][1]
    options = SHAPES[shape]
    data = frame(opcode, 0xABCDEF, 0xFEDCBA, headers_of(opcode, payload), payload, ackreq=1, **options)
    source, destination = (SRC4, DST4) if options["version"] == 4 else (SRC6, DST6)
    prefix = b"\0" * 10 + b"\xff\xff" if options["version"] == 4 else b""
    remote = RETH in kinds or AtomicETH in kinds
    expected = {
        "result": "ok",
        "source": prefix + ipaddress.ip_address(source).packed,
        "destination": prefix + ipaddress.ip_address(destination).packed,
        "ip_version": options["version"],
        "source_port": 0xC123,
        "opcode": opcode,
        "dest_qp": 0xABCDEF,
        "psn": 0xFEDCBA,
        "ack_request": True,
        "pad": 0,
        "va": VA if remote else None,
        "rkey": RKEY if remote or IETH in kinds else None,
        "dma_length": FIRSTS.get(opcode, len(payload)) if RETH in kinds else None,
        "immediate": IMMEDIATE if ImmDt in kinds else None,
        "aeth": 0x1F00004D if AETH in kinds else None,
        "atomic_data": 3 if AtomicETH in kinds else 9 if AtomicAckETH in kinds else None,
        "atomic_compare": 5 if AtomicETH in kinds else None,
        "payload": payload,
        "length": len(data),
        "icrc_right": True,
    }
    assert guarded(data) == expected
    assert guarded(data + b"\xa5" * 18) == expected  # Ethernet padding or a frame check sequence
    for end in range(len(data)):
        assert guarded(data[:end]) == {"result": "cut"}, end


@pytest.mark.parametrize("length", range(8))
def test_pad_is_left_out_of_the_payload(guarded, length):
    payload = b"x" * length
    found = guarded(frame(10, 5, 6, bytes(RETH(va=1, rkey=2, dma_length=length)), payload))
    assert (found["payload"], found["pad"], found["icrc_right"]) == (payload, -length % 4, True)


def test_fast_builder_makes_the_same_bytes():
    headers = bytes(RETH(va=VA, rkey=RKEY, dma_length=33))
    assert fast_frame(10, 77, 88, headers, b"y" * 33) == frame(10, 77, 88, headers, b"y" * 33)


def changed(data, at, value):
    return data[:at] + value + data[at + len(value) :]


V4, V6 = (frame(7, 5, 6, payload=bytes(64), version=v) for v in (4, 6))
ONLY, FIRST, LAST = (
    frame(10, 5, 6, bytes(RETH(va=1, rkey=2, dma_length=64)), bytes(64)),
    frame(6, 5, 6, bytes(RETH(va=1, rkey=2, dma_length=999)), bytes(64)),
    frame(8, 5, 6, payload=bytes(64)),
)
BTH6 = 14 + 40 + 8
LIES = {
    "IPv4 in an IPv6 frame": (changed(V6, 14, b"\x45"), "ip_version"),
    "IPv6 in an IPv4 frame": (changed(V4, 14, b"\x65"), "ip_version"),
    "IPv4 header of 16 bytes": (changed(V4, 14, b"\x44"), "ip_length"),
    "IPv4 header of 60 bytes": (changed(V4, 14, b"\x4f"), None),
    "IPv4 total length above the frame": (changed(V4, 16, struct.pack(">H", len(V4) - 14 + 1)), "cut"),
    "IPv4 total length one short": (changed(V4, 16, struct.pack(">H", len(V4) - 14 - 1)), "udp_length"),
    "IPv4 total length 0": (changed(V4, 16, b"\0\0"), "ip_length"),
    "IPv4 total length ends in UDP": (changed(V4, 16, struct.pack(">H", 24)), "ip_length"),
    "IPv6 payload length above the frame": (changed(V6, 18, b"\xff\xff"), "cut"),
    "IPv6 payload length 0": (changed(V6, 18, b"\0\0"), "ip_length"),
    "UDP length one more": (changed(V6, 58, struct.pack(">H", len(V6) - 54 + 1)), "udp_length"),
    "UDP length one less": (changed(V6, 58, struct.pack(">H", len(V6) - 54 - 1)), "udp_length"),
    "UDP length 0": (changed(V6, 58, b"\0\0"), "udp_length"),
    "no whole BTH": (ethernet(6, bytes(ip_layers(6) / bytes(15))), "bth"),
    "BTH without ICRC": (ethernet(6, bytes(ip_layers(6) / bth(7, 5, 6))), "bth"),
    "RETH cut by the length": (ethernet(6, with_icrc(ip_layers(6), bth(10, 5, 6) + bytes(12))), "headers"),
    "atomic header cut by the length": (ethernet(6, with_icrc(ip_layers(6), bth(19, 5, 6) + bytes(24))), "headers"),
    "transport version 1": (changed(V6, BTH6 + 1, b"\x01"), "bth"),
    "pad in a MIDDLE packet": (changed(V6, BTH6 + 1, b"\x10"), "pad"),
    "pad longer than the payload": (ethernet(6, with_icrc(ip_layers(6), bth(8, 5, 6, pad=3))), "pad"),
    "payload not padded": (ethernet(6, with_icrc(ip_layers(6), bth(8, 5, 6) + bytes(63))), "pad"),
    "MIDDLE without payload": (frame(7, 5, 6), "payload"),
    "LAST without payload": (frame(8, 5, 6), "payload"),
    "ACK with payload": (frame(17, 5, 6, bytes(4), bytes(8)), "payload"),
    "READ REQUEST with payload": (frame(12, 5, 6, bytes(16), bytes(8)), "payload"),
    "RETH of ONLY announces more": (frame(10, 5, 6, bytes(RETH(dma_length=65)), bytes(64)), "dma_length"),
    "RETH of ONLY announces less": (frame(10, 5, 6, bytes(RETH(dma_length=63)), bytes(64)), "dma_length"),
    "RETH of FIRST announces one packet": (frame(6, 5, 6, bytes(RETH(dma_length=64)), bytes(64)), "dma_length"),
    "RETH of FIRST announces nothing": (frame(6, 5, 6, bytes(RETH(dma_length=0)), bytes(64)), "dma_length"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lengths_that_lie_are_malformed(guarded, lie):
    data, reason = LIES[lie]
    for tail in (b"", bytes(40)):
        if tail and reason == "cut":
            continue  # with more bytes the lie is another one
        found = guarded(data + tail)["result"]
        assert found == reason if reason else found not in ("ok", "cut" if tail else "ok")


def test_extension_headers_that_lie(guarded):
    data = frame(7, 5, 6, payload=bytes(64), extensions=(IPv6ExtHdrHopByHop(),))
    assert guarded(data)["result"] == "ok"
    for length in range(1, 256):  # the header swallows UDP, BTH, payload, and more
        assert guarded(changed(data, 54 + 1, bytes([length])))["result"] in (
            "cut",
            "not_roce",
            "ip_extensions",
            "ip_length",
            "udp_length",
        )
    long = frame(
        7,
        5,
        6,
        payload=bytes(64),
        extensions=tuple(IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(60))]) for _ in range(5)),
    )
    assert guarded(long)["result"] == "ip_extensions"


@pytest.mark.parametrize("flags, offset, result", [("MF", 0, "fragment"), (0, 8, "not_roce"), ("MF", 8, "not_roce")])
def test_ipv4_fragments_are_refused(guarded, flags, offset, result):
    layers = ip_layers(4)
    layers[IP].flags, layers[IP].frag = flags, offset
    assert guarded(ethernet(4, with_icrc(layers, bth(7, 5, 6) + bytes(64))))["result"] == result


@pytest.mark.parametrize(
    "offset, more, result", [(0, 1, "fragment"), (0, 0, "fragment"), (8, 1, "not_roce"), (8, 0, "not_roce")]
)
def test_ipv6_fragments_are_refused(guarded, offset, more, result):
    layers = ip_layers(6, (IPv6ExtHdrFragment(offset=offset, m=more),))
    assert guarded(ethernet(6, with_icrc(layers, bth(7, 5, 6) + bytes(64))))["result"] == result


@pytest.mark.parametrize(
    "data",
    [changed(V6, 56, b"\x12\xb6"), changed(V6, 20, b"\x06"), changed(V4, 23, b"\x06"), changed(V6, 12, b"\x08\x06")],
    ids=["another port", "TCP over IPv6", "TCP over IPv4", "ARP"],
)
def test_other_traffic_is_not_roce(guarded, data):
    assert guarded(data) == {"result": "not_roce"}


def test_unknown_opcodes_are_whole_frames(guarded):
    known = {*OPCODES, 100, 101}
    for opcode in set(range(256)) - known:
        found = guarded(frame(opcode, 5, 6, payload=b"abc"))
        assert (found["result"], found["payload"], found["icrc_right"]) == ("ok", b"abc", True)


def test_datagram_header_is_not_payload(guarded):
    assert guarded(frame(100, 1, 6, bytes(DETH(source_qp=1)), b"probe"))["payload"] == b"probe"


def test_random_damage_never_reads_outside(guarded):
    rng = random.Random(1)
    frames = [V4, V6, ONLY, FIRST, LAST, frame(18, 5, 6, bytes(12), version=4, vlans=(3, 4))]
    for _ in range(20000):
        data = bytearray(rng.choice(frames))
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        found = guarded(bytes(data[: rng.randrange(1, len(data) + 1)]))
        if found["result"] == "ok":
            assert found["length"] <= len(data) and found["payload"] in bytes(data)


@pytest.fixture(params=["tables", "folding", "wide"])
def kernel(request):
    if not _frames.select_kernel(request.param):
        pytest.skip(f"this CPU has no {request.param} kernel")
    yield request.param
    _frames.select_kernel("best")


def test_crc_kernels_equal_zlib(kernel):
    data = os.urandom(5000)
    for length in [*range(600), 1024, 4096, 4999]:
        for begin in (0, 1, 7):
            assert _frames.crc32(data[begin : begin + length]) == zlib.crc32(data[begin : begin + length]), length


@pytest.mark.parametrize("shape", SHAPES)
def test_icrc_covers_what_it_must_and_nothing_else(kernel, shape):
    data = frame(7, 5, 6, payload=os.urandom(256), **SHAPES[shape])
    options = SHAPES[shape]
    ip = 14 + 4 * len(options.get("vlans", ()))
    header_bytes = len(data) - ip - 8 - 12 - 256 - 4
    udp = ip + header_bytes
    variant = {ip + 1, ip + 8, ip + 10, ip + 11} if options["version"] == 4 else {ip, ip + 1, ip + 2, ip + 3, ip + 7}
    variant |= {udp + 6, udp + 7, udp + 8 + 4}
    assert _frames.decode(data)["icrc_right"]
    for at in range(len(data)):
        found = _frames.decode(changed(data, at, bytes([data[at] ^ 0x01])))
        if found["result"] == "ok":
            assert found["icrc_right"] == (at < ip or at in variant), at
