# SPDX-License-Identifier: MIT
"""LL's clean steps: eight messages out of every 2^31 fill their slot, and every later packet number moves on."""

import random
import struct

import pytest
from packet_parser._parser import RingParser

from tests.packet_parser import rings
from tests.packet_parser.frames import RETH, ImmDt, fast_frame
from tests.packet_parser.streams import BASE, DATA_QP, DESTINATION, ITERATION, MTU, SOURCE, program
from tests.witness.payload import payload

STEPS = len(ITERATION)


def job(before, iterations):
    """Return (tables, packets) of a job that comes to its clean steps `before` steps after its start.

    A packet is (frame, verdict, iteration, wire offset, flag, bytes that count in it).
    """
    first = 2**31 - 8 - before
    tables = program(start=[])
    tables.segments[0]["first_step"] = first
    sent, psn, step = [], 0, first
    for iteration in range(1, iterations + 1):
        for message in ITERATION:
            wire = payload("ll", random.Random(step).randbytes(message.data), step, b"\x77")
            pieces = [wire[at : at + MTU] for at in range(0, len(wire), MTU)] or [b""]
            for index, piece in enumerate(pieces):
                last = index + 1 == len(pieces)
                opcode = (11 if last else 6) if index == 0 else 9 if last else 7
                headers = bytes(RETH(va=BASE + step % 8 * 65536, rkey=7, dma_length=len(wire))) if index == 0 else b""
                if last:
                    headers += bytes(ImmDt(immediate=int.from_bytes(struct.pack("<I", len(wire)), "big")))
                frame = fast_frame(opcode, DATA_QP, psn % 2**24, headers, piece)
                verdict = message.verdict if piece else 7 if message.verdict == 1 else message.verdict
                sent.append((frame, verdict, iteration, index * MTU, (step + 1) % 2**32, len(piece)))
                psn += 1
            step += 1
    return tables, sent


@pytest.mark.parametrize("before", [0, 1, 3, 7, 12])
@pytest.mark.parametrize("loss", [0, 0.02, 0.4])
def test_packets_are_followed_through_them(tmp_path, before, loss):
    tables, sent = job(before, 8)
    rng = random.Random(before)
    large = sum(len(s[0]) for s in sent[:3])
    assert large and sum(s[3] + MTU == 65536 for s in sent) == 8  # the eight full slots are there
    seen = [s for n, s in enumerate(sent) if n == 0 or rng.random() >= loss]
    if loss:  # and some of it comes again, later
        seen += [rng.choice(sent) for _ in range(50)]
    filled = rings.FilledRing(tmp_path / "ring", frame_bytes=512, records=8192)
    filled.add([s[0] for s in seen])
    parser = RingParser(filled.ring, [tables], [SOURCE, DESTINATION], MTU, 10**9)
    rings.run(parser)
    assert sum(parser.counters()["unsynchronised"].values()) == 0
    for record, (_, verdict, iteration, offset, flag, _) in zip(filled.annotations(), seen, strict=True):
        found = tuple(int(record[name]) for name in ("verdict", "iteration", "wire_offset", "flag"))
        assert found == (verdict, iteration, offset, flag)
