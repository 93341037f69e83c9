# SPDX-License-Identifier: MIT
"""What is lost is named to the byte, whatever the protocol: frames are left out of the witness's captures.

Two ranks, so that every byte is on one link only; the truth is counted from the witness's own message table.
"""

import contextlib
import random

import pytest
from scapy.utils import PcapReader

from flowcheck.replay import replay
from tests.witness.capture import Writer
from tests.witness.schedule import Job
from tests.witness.test_witness import Witnessed

pytestmark = pytest.mark.dpdk

#: Data bytes in so many wire bytes, where a packet begins on a multiple of 1,024.
SHARE = {"ll": (1, 2), "ll128": (960, 1024), "simple": (1, 1)}


def packets(case):
    """Yield (link, data queue pair, PSN, iteration, begin, end) of every packet of a final chunk: its flat bytes."""
    job, width = case.job, 4
    part, whole = SHARE[job.protocol]
    offsets = {}
    for revision, counts in ((1, case.first), (2, case.rest)):
        at = 0
        for number, count in enumerate(counts):
            offsets[revision, number] = at
            at += count * width
    for c in case.capture.connections:
        for message in c.table:
            if not message["op"].startswith("all_reduce") or not message["final"]:
                continue
            iteration, number = map(int, message["op"].split()[1].split("."))
            base = offsets[min(iteration, 2), number] + message["first"] * width
            end = base + message["elements"] * width
            for qp, psn, count, begin, length in message["pieces"]:
                for index in range(count):
                    low = base + (begin + index * job.mtu) * part // whole
                    high = base + (begin + min((index + 1) * job.mtu, length)) * part // whole
                    yield c.edge, c.data[qp], psn + index, iteration, min(low, end), min(high, end)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("protocol", ["ll", "ll128", "simple"])
def test_exactly_the_lost_bytes_are_missing(tmp_path, protocol, seed):
    job = Job("2.24", protocol, 2, queue_pairs=1 + seed % 2, split=seed < 2)
    case = Witnessed(tmp_path, job, first=(20_000,), rest=(12_000, 9_000), iterations=4)
    rng, lost = random.Random(seed), {}
    every = list(packets(case))
    ends = {(link, qp): max(p[2] for p in every if p[:2] == (link, qp)) for link, qp, *_ in every}
    for link, qp, psn, iteration, begin, end in every:
        # The last messages stay: with Simple nothing comes behind them that could prove what is left of one.
        if rng.random() < 0.06 and psn + 80 < ends[link, qp]:
            lost[link, qp, psn] = (iteration, begin, end)
    assert lost
    streams = {}
    for link, path in case.capture.files.items():
        kept = tmp_path / f"cut-{link}.pcap"
        with PcapReader(str(path)) as reader, contextlib.closing(Writer(kept)) as writer:
            for packet in reader:
                frame = bytes(packet)
                at = 14 + 40 + 8
                key = (
                    link,
                    int.from_bytes(frame[at + 5 : at + 8], "big"),
                    int.from_bytes(frame[at + 9 : at + 12], "big"),
                )
                if frame[at] == 17 or key not in lost:
                    writer.write(frame)
        streams[f"link-{link}"] = kept
    (tmp_path / "plan.json").write_text(case.json())
    report = replay(tmp_path / "plan.json", streams, tmp_path / "out")
    for row in report["iterations"]:
        expected = merged((begin, end) for iteration, begin, end in lost.values() if iteration == row["iteration"])
        assert row["missing"] == expected, row["iteration"]
        assert row["state"] == ("incomplete" if expected else "whole")
    assert report["packets"]["unsynchronised"] == 0


def merged(ranges):
    out = []
    for begin, end in sorted(r for r in ranges if r[0] < r[1]):
        if out and out[-1][1] >= begin:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([begin, end])
    return out
