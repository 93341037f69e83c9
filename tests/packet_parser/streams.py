# SPDX-License-Identifier: MIT
"""Synthetic LL streams with their truth: the messages of a made-up job, sent over one connection by a plain generator.

Everything counts in unbounded Python integers and in the order of sending; nothing is looked up. What the parser must
say of each packet stands beside it.
"""

import struct
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from flowcheck.formats import ROW, SEGMENT
from tests.packet_parser.frames import RETH, ImmDt, fast_frame

SOURCE, DESTINATION = b"\xfe\x80" + bytes(13) + b"\x01", b"\xfe\x80" + bytes(13) + b"\x02"
DATA_QP, CREDIT_QP = 0x453, 0x12E2
MTU = 256
BASE = 0x602A00000
CONTROL, PARTIAL, PLACED, INITIAL, OTHER = 7, 3, 1, 5, 6


@dataclass(frozen=True)
class Message:
    """`data` bytes that count, the verdict on them, and where they go; `split` is the adaptive-routing form."""

    data: int
    verdict: int
    destination: int = 0
    lag: int = 0
    split: bool = False

    @property
    def wire(self):
        return 16 * ((self.data + 7) // 8)

    @property
    def packets(self):
        return max(1, (self.wire + MTU - 1) // MTU) + self.split


START = [Message(8, OTHER), Message(1000, INITIAL, 64), Message(8, OTHER)]
#: An iteration: partial sums and final chunks of two buckets, one of them empty, and its length no power of two.
ITERATION = [
    Message(1500, PARTIAL, 0, 2),
    Message(1404, PLACED, 1500, 2),
    Message(0, PLACED, 2904, 1),
    Message(8, PARTIAL, 2944, 1),
    Message(132, PLACED, 2952, 1),
]
SPLIT_ITERATION = [
    Message(0, PARTIAL, 0, 2),
    Message(1024, PARTIAL, 0, 2, split=True),
    Message(1100, PLACED, 1024, 2, split=True),
    Message(64, PLACED, 2124, 1),
]


def program(start=START, iteration=ITERATION):
    """Return the tables of a job: `start` once, then `iteration` for ever."""
    segments, rows, psn, step = [], [], 0, 0
    for messages, first, period, repeats in ((start, 0, 0, 1), (iteration, 1, 1, 0)):
        if not messages:
            continue
        segment = np.zeros((), SEGMENT)
        segment["first_psn"], segment["first_step"] = psn, step
        segment["period_psn"], segment["period_steps"] = sum(m.packets for m in messages), len(messages)
        segment["first_message"], segment["period_messages"] = step, len(messages)
        segment["first_row"], segment["rows"] = len(rows), len(messages)
        segment["first_iteration"], segment["period_iterations"], segment["repeats"] = first, period, repeats
        segments.append(segment)
        for index, message in enumerate(messages):
            row = np.zeros((), ROW)
            row["psn"], row["packets"] = sum(m.packets for m in messages[:index]), message.packets
            row["step"], row["wire_bytes"], row["message_bytes"] = index, message.wire, message.data
            row["message"], row["message_wire_bytes"] = index, message.wire
            row["destination"], row["verdict"], row["encoding"] = message.destination, message.verdict, 2
            row["bulk_split"], row["settled_lag"] = message.split, message.lag
            rows.append(row)
        psn, step = psn + int(segment["period_psn"]), step + len(messages)
    return SimpleNamespace(
        connection=3,
        edge=0,
        channel=0,
        source=SOURCE,
        destination=DESTINATION,
        data_queue_pairs=[DATA_QP],
        credit_queue_pairs=[CREDIT_QP],
        sender_rank=1,
        segments=[np.array(segments, SEGMENT)],
        rows=[np.array(rows, ROW)],
        slot_stride=65536,
        slots=8,
        encoding=2,
        start_psn=[0],
        big_endian_immediate=False,
        numbered_immediate=False,
        clean=[(0, 65536, 0, 65536 // MTU, 0)],
        credit=SimpleNamespace(bytes=32, tag=20, index=24),
        enter_before=[],
    )


@dataclass(frozen=True)
class Sent:
    """A packet as sent: its frame, what must be annotated if its place is proved, and whether it proves it alone."""

    frame: bytes
    number: int
    verdict: int
    iteration: int
    destination: int
    flag: int
    wire_offset: int
    message_bytes: int
    lag: int
    payload: int
    proof: bool
    begins: bool
    ends: bool


def lines(flag, length, seed):
    """Return LL lines: data that could be anything, and the flag in both flag words."""
    words = (struct.pack("<I", (seed * 2654435761 + i) & 0xFFFFFFFF) for i in range(length // 8))
    return b"".join(word + struct.pack("<I", flag) for word in words)


def send(start=START, iteration=ITERATION, iterations=3, first_psn=0, first_step=0, skip=0, each_reth=False):
    """Return the packets of a job in order; `skip` leaves out whole iterations before those, as if nobody had listened.

    `each_reth`: writes without immediate go out as one write per packet.
    """
    sent, number, step = [], 0, first_step
    passes = [(0, start), *((1 + skip + i, iteration) for i in range(iterations))]
    number += skip * sum(m.packets for m in iteration) if skip else 0
    step += skip * len(iteration)
    if skip:
        number, step = number + sum(m.packets for m in start), step + len(start)
        passes = passes[1:]
    for count, messages in passes:
        for message in messages:
            flag, address = (step + 1) & 0xFFFFFFFF, BASE + step % 8 * 65536
            content = lines(flag, message.wire, number)
            pieces = [content[at : at + MTU] for at in range(0, len(content), MTU)] or [b""]
            for index, piece in enumerate(pieces):
                first, last = index == 0, index + 1 == len(pieces)
                headers, imm = b"", bytes(ImmDt(immediate=int.from_bytes(struct.pack("<I", message.wire), "big")))
                with_imm = last and not message.split
                if message.split and each_reth:
                    opcode, headers = 10, bytes(RETH(va=address + index * MTU, rkey=7, dma_length=len(piece)))
                elif first:
                    opcode = (11 if with_imm else 10) if last else 6
                    headers = bytes(RETH(va=address, rkey=7, dma_length=len(content)))
                else:
                    opcode = (9 if with_imm else 8) if last else 7
                headers += imm if with_imm else b""
                sent.append(
                    Sent(
                        frame=fast_frame(opcode, DATA_QP, (first_psn + number) & 0xFFFFFF, headers, piece),
                        number=number,
                        verdict=message.verdict if piece or message.verdict == PARTIAL else CONTROL,
                        iteration=count,
                        destination=message.destination,
                        flag=flag,
                        wire_offset=index * MTU,
                        message_bytes=message.data,
                        lag=message.lag,
                        payload=len(piece),
                        proof=bool(piece) and (opcode in (6, 8, 9, 11) or (opcode == 10 and len(piece) < MTU)),
                        begins=first,
                        ends=with_imm,
                    )
                )
                number += 1
            if message.split:
                headers = bytes(RETH()) + imm
                frame = fast_frame(11, DATA_QP, (first_psn + number) & 0xFFFFFF, headers)
                verdict = PARTIAL if message.verdict == PARTIAL else CONTROL
                sent.append(
                    Sent(
                        frame,
                        number,
                        verdict,
                        count,
                        message.destination,
                        flag,
                        0,
                        message.data,
                        message.lag,
                        0,
                        False,
                        False,
                        True,
                    )
                )
                number += 1
            step += 1
    return sent


def credit(tag, index=1):
    """Return a credit (NCCL up to 2.19) that solicits data of rank `tag`."""
    element = struct.pack("<QIIIIQ", BASE, 65536, 7, 1, tag, index)
    return fast_frame(
        10, CREDIT_QP, index, bytes(RETH(va=0x7FDE5803A020, rkey=9, dma_length=32)), element, reverse=True
    )


def acknowledgement(qp, psn, reverse):
    return fast_frame(17, qp, psn, struct.pack(">I", 0x1F000001), reverse=reverse)
