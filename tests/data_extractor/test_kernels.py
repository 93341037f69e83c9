# SPDX-License-Identifier: MIT
"""Payloads of each encoding in slots: cut anywhere, in any order, again, with any byte or flag another one."""

import random

import numpy as np
import pytest

from data_extractor.extractor import Extractor
from flowcheck.formats import RING_HEADER
from tests import builders, jobs

PLACED = 1
ENCODINGS = {"plain": 1, "ll": 2, "ll128": 3}
KERNELS = ("scalar", "auto")
FLAG = 0x1122334455667788
ROOM = 4096


def ll128_lines(data, flag):
    """Return LL128 lines of data, in whole halves of a warp's group; what is behind it must never count."""
    data = data + b"\xee" * (-len(data) % 960)
    out = b""
    for half in range(0, len(data), 960):
        words = [data[half + 8 * i : half + 8 * i + 8] for i in range(120)]
        last = flag.to_bytes(8, "little")
        out += b"".join(b"".join(words[16 * line : 16 * line + 15]) + last for line in range(4))
        for line in range(4):
            begin = 64 + 14 * line
            out += b"".join(words[begin : begin + 14]) + words[16 * line + 15] + last
    return out


def wire_of(encoding, data):
    """Return (the wire bytes of data, a line's bytes, the flag of its record)."""
    if encoding == "plain":
        return data, 8, 0
    if encoding == "ll":
        return builders.ll_lines(data, FLAG % 2**32), 16, FLAG % 2**32
    return ll128_lines(data, FLAG), 128, FLAG


def ring_of(folder, plan, pieces):
    """Return an annotated ring; a piece is a dict of the record's fields, with its payload beside them."""
    ring = jobs.ring_of(folder, plan, [bytes(54) + piece["payload"] for piece in pieces])
    for number, piece in enumerate(pieces):
        record = ring.record(number)
        record["verdict"], record["connection"], record["settled_lag"] = PLACED, 0, 2
        record["payload_offset"], record["payload_length"], record["iteration"] = 54, len(piece["payload"]), 1
        for name in piece.keys() - {"payload"}:
            record[name] = piece[name]
    jobs.publish(ring, "parsed", len(pieces))
    return ring


def cut(encoding, data, destination, sizes):
    """Return the pieces of a message that is cut into payloads of so many bytes, over and over."""
    wire, _, flag = wire_of(encoding, data)
    pieces, at = [], 0
    while at < len(wire):
        size = next(sizes)
        common = {"encoding": ENCODINGS[encoding], "message_bytes": len(data), "destination": destination, "flag": flag}
        pieces.append({**common, "payload": wire[at : at + size], "wire_offset": at})
        at += size
    return pieces


def placed(folder, pieces, kernel):
    """Return (the gradient, its missing ranges, the counters) that pieces lead to."""
    plan = jobs.plan(mtu=ROOM)
    slots = jobs.slots_of(folder, plan)
    extractor = Extractor([ring_of(folder, plan, pieces)], plan, slots, kernel=kernel)
    decided = jobs.drain([extractor], slots)
    return decided[1][3], decided[1][2], extractor.counters()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("seed", range(6))
def test_a_message_cut_anywhere_comes_together_in_any_order(tmp_path, encoding, kernel, seed):
    rng = random.Random(seed)
    line = wire_of(encoding, b"")[1]
    destination = rng.choice((0, 8, 16, 24, 32, 40, 64))
    data = rng.randbytes(jobs.TOTAL - destination - rng.choice((0, 0, 4, 12, 500, 4321)))
    most = 3 if seed % 2 else ROOM // line
    pieces = cut(encoding, data, destination, iter(lambda: line * rng.randint(1, most), 0))
    if seed > 1:
        rng.shuffle(pieces)
    again = [rng.choice(pieces) for _ in range(len(pieces) // 2)]
    gradient, missing, counts = placed(tmp_path, pieces + again, kernel)
    end = destination + len(data)
    whole = -(-end // 8) * 8 if end < jobs.TOTAL else end
    assert missing == [(0, destination)] * (destination > 0) + [(whole, jobs.TOTAL)] * (whole < jobs.TOTAL)
    assert gradient[destination:end] == data and not any(gradient[:destination]) and not any(gradient[end:])
    # What has data of the message behind its end brings nothing.
    assert counts["placed"] + counts["control"] >= len(pieces) and counts["duplicate"] + counts["control"] >= len(again)
    assert counts["conflict"] == counts["unsynchronised"] == 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("encoding", ["ll", "ll128"])
@pytest.mark.parametrize("again", [False, True], ids=["first", "second"])
def test_a_wrong_flag_in_any_line_is_seen(tmp_path, encoding, kernel, again):
    """The payload of each record is right but for one flag, and those bytes are nowhere done."""
    line = wire_of(encoding, b"")[1]
    data = random.Random(1).randbytes(1920)
    (piece,) = cut(encoding, data, 0, iter([ROOM]))
    wrong = []
    for number in range(len(piece["payload"]) // line):
        for at in (4, 7, 12, 15) if encoding == "ll" else range(120, 128):
            payload = bytearray(piece["payload"])
            payload[line * number + at] ^= 1 << number % 8
            wrong.append({**piece, "payload": bytes(payload)})
    gradient, missing, counts = placed(tmp_path, [piece] * again + wrong, kernel)
    assert counts["unsynchronised"] == len(wrong) and counts["placed"] == again and counts["conflict"] == 0
    assert missing == [(1920 * again, jobs.TOTAL)] and (not again or gradient[:1920] == data)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bytes_", [1920, 1916, 1500, 960, 44])
def test_a_byte_of_a_second_copy_that_differs_is_a_conflict_wherever_it_is(tmp_path, encoding, kernel, bytes_):
    rng = random.Random(bytes_)
    data = rng.randbytes(bytes_)
    (piece,) = cut(encoding, data, 8, iter([ROOM]))
    others = []
    for at in {*range(min(bytes_, 70)), *range(bytes_ - 40, bytes_), *rng.sample(range(bytes_), min(60, bytes_))}:
        other = bytearray(data)
        other[at] ^= 1 << at % 8
        (again,) = cut(encoding, bytes(other), 8, iter([ROOM]))
        others.append(again)
    gradient, _, counts = placed(tmp_path, [piece, *others, piece], kernel)
    assert counts["conflict"] == len(others) and counts["placed"] == counts["duplicate"] == 1
    assert gradient[8 : 8 + bytes_] == data


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_units_that_were_not_done_yet_are_placed_again(tmp_path, encoding):
    """An extractor ends before what it placed and decided was done, or before those bytes arrived."""
    rng = random.Random(3)
    line, data = wire_of(encoding, b"")[1], rng.randbytes(jobs.TOTAL)
    pieces = cut(encoding, data, 0, iter(lambda: line * rng.randint(1, 9), 0))
    pieces += [rng.choice(pieces) for _ in range(40)]
    plan = jobs.plan(mtu=ROOM)
    slots, ring = jobs.slots_of(tmp_path, plan), ring_of(tmp_path, plan, pieces)
    jobs.publish(ring, "ended", 0)
    before = Extractor([ring], plan, slots)
    while before.poll():
        pass
    assert slots.settled_next == 0 and slots.gradient(1).tobytes() == data
    counts = before.counters()
    slot, begin = slots.slot(1), slots.offset(1)
    done = np.frombuffer(slots.memory, np.uint64, 40, begin + int(slot["done_offset"]))
    units = np.frombuffer(slots.memory, np.uint64, jobs.TOTAL // 8, begin + int(slot["data_offset"]))
    for unit in rng.sample(range(len(units)), 900):
        done[unit // 64] &= ~np.uint64(1 << unit % 64)
        units[unit] = rng.getrandbits(64)
    header = np.frombuffer(ring.memory, RING_HEADER, 1)[0]
    for copy in range(2):
        at = int(header["extract_state_offset"]) + copy * int(header["extract_state_bytes"])
        ring.memory[at : at + 8] = bytes(8)
    jobs.publish(ring, "ended", 1)
    after = Extractor([ring], plan, slots)
    decided = jobs.drain([after], slots)
    assert decided[1][3] == data and decided[1][2] == []
    assert after.counters() == counts
