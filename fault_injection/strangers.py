# SPDX-License-Identifier: MIT
"""Traffic of others in the streams, and plans and captures that do not belong together."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from fault_injection.case import OTHER, Case, Shown
from fault_injection.frames import Header, mended
from fault_injection.jobs import OUTAGE_JOBS
from fault_injection.kinds import kind, several
from fault_injection.moved import Shift

__all__: list[str] = []


def _other_data(protocol: str, frame: bytearray, header: Header) -> None:
    """Change every data byte of a payload, and no flag."""
    payload = np.frombuffer(memoryview(frame)[header.payload : header.end], np.uint8)
    where = np.arange(len(payload))
    if protocol == "ll":
        payload[where % 8 < 4] ^= 0x5A
    elif protocol == "ll128":
        payload[where % 128 < 120] ^= 0x5A
    else:
        payload ^= 0x5A


def _foreign(case: Case, one: Shown, *, pairs: int, hosts: bool) -> Shown:
    """Return a frame of a job of equal sizes: other data, other queue pair numbers or other hosts."""
    header, frame = case.job.links[one.link].headers[one.index], bytearray(one.frame)
    if case.iteration(one) >= 0:
        _other_data(case.job.protocol, frame, header)
    struct.pack_into(">I", frame, header.bth + 4, int.from_bytes(frame[header.bth + 4 : header.bth + 8], "big") + pairs)
    if hosts:
        size = 16 if header.version == 6 else 4
        for end in (header.bth - 8, header.bth - 8 - size):
            frame[end - 2] ^= 0x40
    return Shown(mended(frame, header), one.ns, one.link, -1, OTHER)


def _beside(case: Case, *, pairs: int, hosts: bool) -> None:
    for name in case.some_streams():
        first, last = sorted(case.rng.sample(range(len(case.streams[name])), 2))
        out = []
        for at, one in enumerate(case.streams[name]):
            out.append(one)
            if first <= at < last:
                out.append(_foreign(case, one, pairs=pairs, hosts=hosts))
        case.streams[name] = out


@kind("foreign-job")
def foreign_job(case: Case) -> None:
    """Let a job of equal sizes run on the same hosts, on other queue pairs."""
    _beside(case, pairs=0x100000, hosts=False)


@kind("foreign-numbers")
def foreign_numbers(case: Case) -> None:
    """Let a job of equal sizes and equal queue pair numbers run on other hosts."""
    _beside(case, pairs=0, hosts=True)


@kind("restarted-rank")
def restarted_rank(case: Case) -> None:
    """From some iteration on the job comes from new queue pairs, whose numbers begin anew."""
    iteration, _ = case.span(1)
    for name, shown in case.streams.items():
        first: dict[tuple[int, int], int] = {}
        for at in range(case.begin(name, iteration), len(shown)):
            one = shown[at]
            header = case.job.links[one.link].headers[one.index]
            psn = header.psn - first.setdefault((one.link, header.queue_pair), header.psn)
            stranger = _foreign(case, one, pairs=0x200000, hosts=False)
            frame = (
                stranger.frame[: header.bth + 9]
                + struct.pack(">I", psn & 0xFFFFFF)[1:]
                + stranger.frame[header.bth + 12 :]
            )
            shown[at] = stranger._replace(frame=mended(frame, header))


@kind("restarted-equal-numbers", jobs=OUTAGE_JOBS)
def restarted_equal_numbers(case: Case) -> None:
    """Show the rest of an earlier attempt in front, of the same queue pairs and sequence numbers, as late mirrored frames are."""
    case.document["job"]["attempt"] = 2
    later_ns = case.rng.randint(50, 8000) * 10**6
    earlier = case.some_streams()
    for name, shown in case.streams.items():
        begin = case.rng.randrange(case.begin(name, 2), len(shown)) if name in earlier else len(shown)
        rest = [_foreign(case, one, pairs=0, hosts=False) for one in shown[begin:]]
        case.streams[name] = rest + [one._replace(ns=one.ns + later_ns) for one in shown]


@kind("irregular", lambda job: job.hook)
def irregular(case: Case) -> None:
    """Insert an operation that no plan names, equal to an iteration's last one or to all of it, on all connections."""
    iteration, _ = case.span(1)
    whole = case.rng.random() < 0.4
    for name, (number,) in case.job.streams.items():
        shown, link = case.streams[name], case.job.links[number]
        own = [at for at in case.data(name, iteration) if case.iteration(shown[at]) == iteration]
        last = link.operation[shown[own[-1]].index]
        own = [at for at in own if whole or link.operation[shown[at].index] == last]
        # A message's credit and the acknowledgement of that stand before it.
        begin, end = own[0] - 2, case.begin(name, iteration + 1) - 2
        shift = Shift(case.job, number, *link.carried(shown[at].index for at in own))
        after = [one._replace(frame=shift.of(one), index=-1, what=OTHER) for one in shown[begin:end] + shown[end:]]
        case.streams[name] = shown[:end] + after
    # With the second iteration come broadcasts of DDP's new buckets: of those the last frames lie two iterations further.
    case.lied.update(range(iteration, case.job.iterations + 3))


@kind("wrong-link", several)
def wrong_link(case: Case) -> None:
    """Give two streams each other's captures."""
    one, other = case.rng.sample(list(case.streams), 2)
    case.streams[one], case.streams[other] = case.streams[other], case.streams[one]


@kind("wrong-edge", lambda job: several(job) and job.shard["layout"]["channels"] == 1)
def wrong_edge(case: Case) -> None:
    """Have the plan exchange addresses and queue pairs of two edges, and the streams their captures: all but the credits agree."""
    one, other = case.rng.sample(list(case.streams), 2)
    connections = case.document["shards"][0]["connections"]
    a, b = (next(c for c in connections if [c["edge"]] == case.job.streams[name]) for name in (one, other))
    for key in ("source", "destination", "proof", "start_psn"):
        a[key], b[key] = b[key], a[key]
    case.streams[one], case.streams[other] = case.streams[other], case.streams[one]
    case.lied.update(range(case.job.iterations + 2))


@kind("capture-cut")
def capture_cut(case: Case) -> None:
    """Cut a capture file within a frame."""
    name = case.rng.choice(list(case.streams))
    shown = case.streams[name]
    at = case.rng.randrange(case.begin(name, 2), len(shown))
    left = case.rng.randrange(1, 16 + len(shown[at].frame))
    case.streams[name] = shown[:at]

    def cut(captures: dict[str, Path]) -> None:
        with open(captures[name], "ab") as file:
            whole = struct.pack(
                "<IIII", shown[at].ns // 10**9, shown[at].ns % 10**9, len(shown[at].frame), len(shown[at].frame)
            )
            file.write((whole + shown[at].frame)[:left])

    case.refused_first = cut


def _lose_records(case: Case, iterations: set[int], streams: list[str]) -> None:
    for name in streams:
        case.streams[name] = [
            one
            for one in case.streams[name]
            if case.iteration(one) not in iterations or not case.job.links[one.link].record[one.index]
        ]


@kind("record-lost", lambda job: job.hook)
def record_lost(case: Case) -> None:
    """Lose all packets of single step records, in every stream or in some."""
    some = case.rng.sample(range(2, case.job.iterations, 2), 3)
    _lose_records(case, set(some), list(case.streams) if case.rng.random() < 0.7 else case.some_streams())


@kind("record-lost-twice", lambda job: job.hook)
def record_lost_twice(case: Case) -> None:
    """Lose the step records of two iterations in a row, or of three, in every stream."""
    first, _ = case.span(1)
    _lose_records(case, set(range(first, first + case.rng.randint(2, 3))), list(case.streams))
