# SPDX-License-Identifier: MIT
"""Decoding of one frame: every field, every cut, every lie."""

import random
import struct

import pytest
from packet_parser._frames import decode
from scapy.layers.inet import IP, IPOption_Router_Alert
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, PadN

from tests import builders, wire

RETH, IMM, AETH, ATOMIC, ATOMIC_ACK, IETH = 16, 4, 4, 28, 8, 4
# IBTA volume 1, table 38: extended headers of the reliable connection's opcodes, and whether payload may follow
RC = {
    0: (0, True), 1: (0, True), 2: (0, True), 3: (IMM, True), 4: (0, True), 5: (IMM, True), 6: (RETH, True), 7: (0, True),
    8: (0, True), 9: (IMM, True), 10: (RETH, True), 11: (RETH + IMM, True), 12: (RETH, False), 13: (AETH, True),
    14: (0, True), 15: (AETH, True), 16: (AETH, True), 17: (AETH, False), 18: (AETH + ATOMIC_ACK, False),
    19: (ATOMIC, False), 20: (ATOMIC, False), 22: (IETH, True), 23: (IETH, True),
}  # fmt: skip


def frame_of(opcode, **options):
    headers, payload = RC[opcode]
    body = bytes(range(1, 101)) if payload else b""
    if headers >= RETH and opcode in (6, 10, 11, 12):
        options["reth"] = (0x1122334455667788, 0xABCD, 100 if opcode in (10, 11, 12) else 4000)
        headers -= RETH
    return builders.roce(opcode, 0x123456, 0xFFFFFE, extended=bytes(range(headers)), payload=body, **options)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("opcode", RC)
def test_every_reliable_connection_opcode(opcode, version):
    found = decode(frame_of(opcode, version=version))
    assert found["result"] == "ok"
    assert (found["opcode"], found["dest_qp"], found["psn"]) == (opcode, 0x123456, 0xFFFFFE)
    assert len(found["payload"]) == (100 if RC[opcode][1] else 0)
    assert found["icrc_right"]
    if opcode in (6, 10, 11, 12):
        assert (found["va"], found["rkey"]) == (0x1122334455667788, 0xABCD)
    assert found["ip_version"] == version


def decorated():
    yield "vlan", builders.roce(6, 5, 1, vlans=[7], reth=(0, 0, 200), payload=bytes(100))
    yield "vlans", builders.roce(6, 5, 1, version=4, vlans=[7, 8, 9], reth=(0, 0, 200), payload=bytes(100))
    options = IP(src=builders.V4[0], dst=builders.V4[1], options=[IPOption_Router_Alert()])
    yield "options", builders.roce(6, 5, 1, version=4, ip=options, reth=(0, 0, 200), payload=bytes(100))


@pytest.mark.parametrize(("name", "frame"), list(decorated()), ids=lambda v: v if isinstance(v, str) else "")
def test_tags_and_options_are_stepped_over(name, frame):
    found = decode(frame)
    assert found["result"] == "ok" and len(found["payload"]) == 100 and found["dest_qp"] == 5


def test_ipv6_extension_headers_are_stepped_over():
    base = builders.roce(7, 5, 1, payload=bytes(64))
    extension = bytes(IPv6ExtHdrHopByHop(nh=60, options=[PadN(optdata=b"\0" * 4)]))
    extension += bytes(IPv6ExtHdrDestOpt(nh=17, options=[PadN(optdata=b"\0" * 12)]))
    header = bytearray(base[14:54])
    header[4:6] = struct.pack(">H", struct.unpack(">H", base[18:20])[0] + len(extension))
    header[6] = 0
    found = decode(base[:14] + bytes(header) + extension + base[54:])
    assert found["result"] == "ok" and len(found["payload"]) == 64


def test_fragments_are_refused():
    ip = IP(src=builders.V4[0], dst=builders.V4[1], flags="MF")
    assert decode(builders.roce(7, 5, 1, version=4, ip=ip, payload=bytes(64)))["result"] == "fragment"
    ip = IPv6(src=builders.V6[0], dst=builders.V6[1]) / IPv6ExtHdrFragment(m=1)
    assert decode(builders.roce(7, 5, 1, ip=ip, payload=bytes(64)))["result"] in ("fragment", "not_roce")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("opcode", [6, 7, 11, 17, 19])
def test_cut_at_every_byte_it_is_never_taken(opcode, version):
    frame = frame_of(opcode, version=version, vlans=[5])
    assert decode(frame)["result"] == "ok"
    for length in range(len(frame)):
        assert decode(frame[:length])["result"] not in ("ok",), length


@pytest.mark.parametrize("opcode", [6, 7, 17])
def test_trailing_bytes_are_padding(opcode):
    frame = frame_of(opcode)
    assert decode(frame + bytes(20)) == decode(frame)


def test_lengths_that_lie_are_malformed_at_every_layer():
    frame = frame_of(6)
    for offset, value in (
        (18, 0), (18, 7), (18, 30), (18, 0xFFFF),  # IPv6 payload length
        (58, 0), (58, 7), (58, 25), (58, 0xFFFF),  # UDP length
    ):  # fmt: skip
        bad = bytearray(frame)
        bad[offset : offset + 2] = struct.pack(">H", value)
        assert decode(bytes(bad))["result"] not in ("ok", "not_roce"), (offset, value)
    four = frame_of(6, version=4)
    for offset, value in ((16, 0), (16, 19), (16, 0xFFFF), (14, 0x4400), (14, 0x4F00), (14, 0x6500)):
        bad = bytearray(four)
        bad[offset : offset + 2] = struct.pack(">H", value)
        assert decode(bytes(bad))["result"] != "ok", (offset, value)
    short = builders.roce(11, 5, 1, reth=(0, 0, 0), extended=bytes(4))
    bad = bytearray(short)
    bad[63] |= 3 << 4  # pads where there is no payload
    assert decode(bytes(bad))["result"] == "pad"
    wrong = builders.roce(10, 5, 1, reth=(0, 0, 99), payload=bytes(64))
    assert decode(wrong)["result"] == "dma_length"


def test_one_wrong_bit_anywhere_under_the_icrc_is_seen():
    for version in (4, 6):
        frame = frame_of(6, version=version)
        ip = 14
        free = {ip + 1, ip + 8, ip + 10, ip + 11} if version == 4 else {ip, ip + 1, ip + 2, ip + 3, ip + 7}
        udp = ip + (20 if version == 4 else 40)
        free |= {udp + 6, udp + 7, udp + 8 + 4}
        for offset in range(14, len(frame)):
            bad = bytearray(frame)
            bad[offset] ^= 0x04
            found = decode(bytes(bad))
            if offset in free:
                continue  # may change on the way
            assert found["result"] != "ok" or not found["icrc_right"], (version, offset)


def test_fields_that_may_change_on_the_way_are_not_covered():
    frame = frame_of(6, version=4)
    for offset in (15, 22, 24, 25, 40, 41, 46):
        bad = bytearray(frame)
        bad[offset] ^= 0x04
        assert decode(bytes(bad))["icrc_right"], offset


def test_random_bytes_never_crash():
    rng = random.Random(11)
    base = [frame_of(o, version=v) for o in RC for v in (4, 6)]
    for _ in range(20_000):
        frame = bytearray(rng.choice(base))
        for _ in range(rng.randint(1, 8)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        decode(bytes(frame[: rng.randint(0, len(frame))]))


@pytest.mark.captures
def test_every_real_frame_has_a_right_icrc(captures):
    for path in sorted(captures.glob("ll-*.pcapng")):
        wrong = [f for f in map(decode, wire.frames(path)) if f["result"] == "ok" and not f["icrc_right"]]
        probes = [f for f in wrong if f["opcode"] == 170]
        assert len(wrong) == len(probes) == (7 if "adaptive" in path.name else 0)
