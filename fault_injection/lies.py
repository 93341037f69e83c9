# SPDX-License-Identifier: MIT
"""Frames that lie: something in them was changed, and their ICRC fits all the same.

What a single source says with an ICRC that fits nobody can tell from the truth but the audit; so payloads are changed
only where every byte has two sources, and headers only where the true packet at the place they lie about is shown, too.
"""

from __future__ import annotations

import struct

from fault_injection.case import CONTRADICTS, LIE, Case, Shown
from fault_injection.frames import WRITE_LAST, WRITE_MIDDLE, Header, changed
from fault_injection.jobs import Job, Link
from fault_injection.kinds import kind

__all__: list[str] = []


def _chosen(case: Case, most: int, wanted=lambda case, one, header: True) -> list[tuple[str, int, Header]]:
    """Return data packets of iterations from 2 on, not of the last one, drawn by lot: (stream, place, header)."""
    out = []
    for name in case.some_streams():
        fit = []
        for at in case.data(name, 2):
            one = case.streams[name][at]
            header = case.job.links[one.link].headers[one.index]
            if case.iteration(one) < case.job.iterations and wanted(case, one, header):
                fit.append((name, at, header))
        out += case.rng.sample(fit, min(len(fit), case.rng.randint(1, most)))
    return out


def _lie(case: Case, name: str, at: int, header: Header, place: int, field: bytes, what: int = LIE) -> None:
    one = case.streams[name][at]
    if one.frame[place : place + len(field)] != field:
        case.streams[name][at] = one.broken(changed(one.frame, header, place, field), what)


def _position(case: Case, name: str, at: int) -> int:
    one = case.streams[name][at]
    return case.job.links[one.link].position[one.index]


def _between(case: Case, one: Shown, at_position: int) -> None:
    """Note that a packet claims to be at another place of some flow: what lies between may be taken for over."""
    link = case.job.links[one.link]
    iteration = link.iteration[one.index]
    claimed = [
        link.iteration[index]
        for index, position in enumerate(link.position)
        if link.flow[index] is not None and position == at_position
    ]
    for other in claimed or [case.job.iterations]:
        case.lied.update(range(min(iteration, other) - 1, max(iteration, other) + 3))


@kind("payload-mended", lambda job: job.least_sources >= 2)
def payload_mended(case: Case) -> None:
    """Change data bytes of a packet, in one stream."""
    flags = {"ll": (16, (4, 5, 6, 7, 12, 13, 14, 15)), "ll128": (128, range(120, 128)), "simple": (1, ())}[
        case.job.protocol
    ]
    name = case.rng.choice(list(case.streams))
    places = [at for at in case.data(name, 2) if case.iteration(case.streams[name][at]) < case.job.iterations]
    fit = []
    for at in places:
        one = case.streams[name][at]
        link = case.job.links[one.link]
        if link.units[one.index] is not None and not link.record[one.index]:
            fit.append(at)
    for at in case.rng.sample(fit, min(len(fit), case.rng.randint(1, 4))):
        one = case.streams[name][at]
        header = case.job.links[one.link].headers[one.index]
        offsets = [o for o in range(header.payload_bytes) if o % flags[0] not in flags[1]]
        offset = case.rng.choice(offsets)
        place = header.payload + offset
        _lie(case, name, at, header, place, bytes([one.frame[place] ^ 1 << case.rng.randrange(8)]))


@kind("psn-mended")
def psn_mended(case: Case) -> None:
    """Give packets the sequence number of another one."""
    for name, at, header in _chosen(case, 3):
        away = case.rng.choice([-8, -2, -1, 1, 2, 8, 100, 1 << 23, case.rng.randrange(1 << 24)])
        _between(case, case.streams[name][at], at_position=_position(case, name, at) + (away + 2**23) % 2**24 - 2**23)
        _lie(case, name, at, header, header.bth + 9, struct.pack(">I", header.psn + away & 0xFFFFFF)[1:])


@kind("opcode-mended")
def opcode_mended(case: Case) -> None:
    """Have packets without an address claim another place in their message."""
    alike = {WRITE_MIDDLE, WRITE_LAST}
    for name, at, header in _chosen(case, 4, lambda case, one, header: header.opcode == WRITE_MIDDLE):
        _lie(
            case,
            name,
            at,
            header,
            header.bth,
            bytes([case.rng.choice([*(alike - {header.opcode}), 0, 1, 2, 4])]),
            CONTRADICTS,
        )


@kind("address-mended")
def address_mended(case: Case) -> None:
    """Have the address of a message name another slot, or another length."""
    for name, at, header in _chosen(case, 3, lambda case, one, header: header.reth is not None):
        one = case.streams[name][at]
        if case.rng.random() < 0.5:
            address = struct.unpack_from(">Q", one.frame, header.reth)[0]
            away = case.rng.choice([1024, -1024, 65536, 1 << 20, -65536, 16, case.rng.randrange(1 << 40)])
            _lie(case, name, at, header, header.reth, struct.pack(">Q", address + away & 2**64 - 1), CONTRADICTS)
        else:
            length = struct.unpack_from(">I", one.frame, header.reth + 12)[0]
            other = max(0, length + case.rng.choice([16, -16, 1024, -1024, 128]))
            _lie(case, name, at, header, header.reth + 12, struct.pack(">I", other), CONTRADICTS)


@kind("immediate-mended")
def immediate_mended(case: Case) -> None:
    """Give the end of a message another immediate."""
    for name, at, header in _chosen(case, 3, lambda case, one, header: header.immediate is not None):
        _lie(case, name, at, header, header.immediate, case.rng.randbytes(4), CONTRADICTS)


@kind("psn-of-lost", lambda job: job.protocol == "simple")
def psn_of_lost(case: Case) -> None:
    """Give a message's first packet the place of a later one's, which is lost in all streams: only its address knows."""
    for name, at, header in _chosen(case, 1, lambda case, one, header: header.reth is not None and _brings(case, one))[
        :1
    ]:
        one = case.streams[name][at]
        link = case.job.links[one.link]
        following = next(
            (other for other in range(one.index + 1, len(link.frames)) if _could_be(link, one.index, other)), None
        )
        if following is None:
            continue
        field = struct.pack(">I", link.headers[following].psn)[1:]
        _lie(case, name, at, header, header.bth + 9, field)
        iteration, units = link.iteration[following], set(link.units[following].tolist())
        case.lied.update(range(link.iteration[one.index] - 1, iteration + 2))
        for other, shown in case.streams.items():
            case.streams[other] = [one for one in shown if not _of(case, one, iteration, units)]


def _could_be(link: Link, index: int, other: int) -> bool:
    """Whether a packet differs from a later one of its flow in nothing that the layout knows but the address."""
    one, two = link.headers[index], link.headers[other]
    if link.flow[other] != link.flow[index] or link.units[other] is None or two.opcode != one.opcode:
        return False
    address, length = slice(one.reth, one.reth + 8), slice(one.reth + 12, one.reth + 16)
    mine, others = link.frames[index], link.frames[other]
    return (
        mine[length] == others[length] and mine[address] != others[address] and one.payload_bytes == two.payload_bytes
    )


def _brings(case: Case, one: Shown) -> bool:
    return case.job.links[one.link].units[one.index] is not None


def _of(case: Case, one: Shown, iteration: int, units: set[int]) -> bool:
    """Whether an unchanged packet brings any of some units of an iteration."""
    if one.index < 0 or one.what == LIE or case.iteration(one) != iteration:
        return False
    own = case.job.links[one.link].units[one.index]
    return own is not None and not units.isdisjoint(own.tolist())


def _has_other_pairs(job: Job) -> bool:
    return any(len(c["proof"]["data"]) > 1 for c in job.shard["connections"]) or job.shard["layout"]["channels"] > 1


@kind("queue-pair-mended", _has_other_pairs)
def queue_pair_mended(case: Case) -> None:
    """Send packets to another queue pair of their stream."""
    for name, at, header in _chosen(case, 3):
        link = case.streams[name][at].link
        others = [pair for c in case.job.shard["connections"] if c["edge"] == link for pair in c["proof"]["data"]]
        other = case.rng.choice([pair for pair in others if pair != header.queue_pair])
        _between(case, case.streams[name][at], at_position=_position(case, name, at))
        _lie(case, name, at, header, header.bth + 5, struct.pack(">I", other)[1:])


@kind("flag-mended", lambda job: job.protocol != "simple")
def flag_mended(case: Case) -> None:
    """Give lines of LL or LL128 the flag of another step, and other data before it: what such a line holds is that step's."""
    line, flag, width = (16, 4, 4) if case.job.protocol == "ll" else (128, 120, 8)
    for name, at, header in _chosen(case, 3, lambda case, one, header: header.payload_bytes >= 128):
        frame = case.streams[name][at].frame
        place = header.payload + case.rng.randrange(header.payload_bytes // line) * line + flag
        if width == 4 and case.rng.random() < 0.5:
            place += 8
        value = int.from_bytes(frame[place : place + width], "little")
        other = value + case.rng.choice([-8, -1, 1, 8, 1 << 20]) & (1 << 8 * width) - 1
        data = bytes(byte ^ 0x5A for byte in frame[place - width : place])
        _lie(case, name, at, header, place - width, data + other.to_bytes(width, "little"), CONTRADICTS)


@kind("record-mended", lambda job: job.hook and job.protocol == "simple")
def record_mended(case: Case) -> None:
    """Change a word of a step record in every copy, in the same way: no second source contradicts."""
    for _ in range(case.rng.randint(1, 3)):
        iteration, _ = case.span(1)
        shape = case.job.shape(iteration)
        unit, bit = case.rng.randrange(shape.record, shape.repeated[0]), case.rng.randrange(64)
        for name, shown in case.streams.items():
            for at in case.data(name, iteration):
                one = shown[at]
                link = case.job.links[one.link]
                units = link.units[one.index]
                if (
                    link.iteration[one.index] != iteration
                    or not link.record[one.index]
                    or units is None
                    or unit not in units
                ):
                    continue
                header = link.headers[one.index]
                place = header.payload + int((units < unit).sum()) * 8 + bit // 8
                _lie(case, name, at, header, place, bytes([one.frame[place] ^ 1 << bit % 8]))
