# SPDX-License-Identifier: MIT
"""What a mirror does to the frames of a stream: it loses, repeats, moves, delays, mixes and marks them."""

from __future__ import annotations

import struct

from fault_injection.case import BROKEN, OTHER, Case, Shown
from fault_injection.chain import Chain, Script
from fault_injection.jobs import OUTAGE_JOBS
from fault_injection.kinds import kind, several
from fault_injection.moved import Shift

__all__: list[str] = []


def _begin(case: Case, name: str) -> int:
    """Return from where on a stream is spoilt: mostly not at start-up, without which no state can be."""
    return 0 if case.rng.random() < 0.1 else case.begin(name, 1)


def _keep(case: Case, name: str, lost: set[int]) -> None:
    case.streams[name] = [one for at, one in enumerate(case.streams[name]) if at not in lost]


@kind("drop")
def drop(case: Case) -> None:
    """Lose each frame with a probability of its own."""
    probability = case.rng.choice([0.0005, 0.002, 0.01, 0.05])
    for name in case.some_streams():
        first = _begin(case, name)
        _keep(case, name, {at for at in range(first, len(case.streams[name])) if case.rng.random() < probability})


@kind("drop-burst")
def drop_burst(case: Case) -> None:
    """Lose runs of frames: a queue that overflows loses what comes next to each other."""
    for name in case.some_streams():
        first, count = _begin(case, name), len(case.streams[name])
        lost: set[int] = set()
        for _ in range(case.rng.randint(1, 4)):
            begin = case.rng.randrange(first, count)
            lost.update(range(begin, begin + int(case.rng.paretovariate(0.7)) + 1))
        _keep(case, name, lost)


@kind("drop-address")
def drop_address(case: Case) -> None:
    """Lose packets that carry the address of their message, and no others."""
    probability = case.rng.choice([0.02, 0.2, 0.7])
    for name in case.some_streams():
        lost = {
            at for at in case.data(name) if _header(case, name, at).reth is not None and case.rng.random() < probability
        }
        _keep(case, name, lost)


def _header(case: Case, name: str, at: int):
    one = case.streams[name][at]
    return case.job.links[one.link].headers[one.index]


@kind("drop-credit")
def drop_credit(case: Case) -> None:
    """Lose credits and acknowledgements, of all streams, from some iteration on or altogether."""
    probability = case.rng.choice([0.3, 1.0])
    for name in case.streams:
        first = case.begin(name, case.rng.choice([0, 1, 4]))
        lost = {
            at
            for at in range(first, len(case.streams[name]))
            if case.iteration(case.streams[name][at]) < 0 and case.rng.random() < probability
        }
        _keep(case, name, lost)


@kind("duplicate")
def duplicate(case: Case) -> None:
    """Show frames twice, one right behind the other or a few frames later."""
    for name in case.some_streams():
        probability, out = case.rng.choice([0.01, 0.2]), []
        waiting: list[tuple[int, Shown]] = []
        for at, one in enumerate(case.streams[name]):
            out += [late for due, late in waiting if due <= at]
            waiting = [(due, late) for due, late in waiting if due > at]
            out.append(one)
            if case.rng.random() < probability:
                waiting.append((at + case.rng.choice([0, 1, 5]), one))
        case.streams[name] = out + [late for _, late in waiting]


@kind("double-mirror")
def double_mirror(case: Case) -> None:
    """Show every frame of a stream twice."""
    for name in case.some_streams():
        case.streams[name] = [one for one in case.streams[name] for _ in range(2)]


@kind("retransmit")
def retransmit(case: Case) -> None:
    """Repeat a queue pair's packets from one to the end of its message, as go-back-N does, right behind it."""
    for name in case.some_streams():
        shown, after = case.streams[name], {}
        for at in case.rng.sample(case.data(name), min(12, len(case.data(name)))):
            link = case.job.links[shown[at].link]
            end, again = at, [shown[at]]
            while end + 1 < len(shown) and _message(case, shown[end + 1]) == link.message[shown[at].index]:
                end += 1
                if link.flow[shown[end].index] == link.flow[shown[at].index]:
                    again.append(shown[end])
            after[end] = again
        case.streams[name] = [one for at, here in enumerate(shown) for one in (here, *after.get(at, ()))]


def _message(case: Case, one: Shown) -> tuple[int, int] | None:
    return case.job.links[one.link].message[one.index] if one.index >= 0 else None


@kind("late-duplicate")
def late_duplicate(case: Case) -> None:
    """Show packets again some iterations later, when theirs was decided."""
    for name in case.some_streams():
        shown = list(case.streams[name])
        for _ in range(case.rng.randint(1, 6)):
            iteration, _ = case.span(1)
            behind = case.begin(name, min(iteration + case.rng.choice([2, 3, 8]), case.job.iterations))
            some = [one for one in case.streams[name] if case.iteration(one) == iteration]
            begin = case.rng.randrange(len(some))
            again = [
                one._replace(ns=shown[min(behind, len(shown) - 1)].ns)
                for one in some[begin : begin + case.rng.randint(1, 30)]
            ]
            shown[behind:behind] = again
        case.streams[name] = shown


@kind("replayed-old")
def replayed_old(case: Case) -> None:
    """Show packets of long ago in place of those that should come."""
    for name in case.some_streams():
        shown = case.streams[name]
        first, last = case.span(4)
        begin, end = case.begin(name, first), case.begin(name, last)
        source = case.begin(name, max(1, first - case.rng.randint(1, 12)))
        for at in range(begin, end):
            old = shown[min(source + at - begin, begin - 1)]
            shown[at] = old._replace(ns=shown[at].ns)


@kind("reorder")
def reorder(case: Case) -> None:
    """Let frames change places within a window."""
    window = case.rng.choice([2, 8, 40])
    for name in case.some_streams():
        first, probability = _begin(case, name), case.rng.choice([0.02, 0.3, 1.0])
        keys = [
            at + (case.rng.random() * window if at >= first and case.rng.random() < probability else 0.0)
            for at in range(len(case.streams[name]))
        ]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        shown = case.streams[name]
        case.streams[name] = [shown[at]._replace(ns=shown[place].ns) for place, at in enumerate(order)]


@kind("pause")
def pause(case: Case) -> None:
    """Have streams show nothing for some iterations, each from any frame on, or all from the same iteration on."""
    together = case.rng.random() < 0.3
    first, last = case.span(10)
    for name in case.streams if together else case.some_streams():
        begin, end = case.begin(name, first), case.begin(name, last)
        if not together:
            begin, end = sorted(case.rng.sample(range(case.begin(name, 1), len(case.streams[name])), 2))
        _keep(case, name, set(range(begin, end)))


@kind("long-outage", jobs=OUTAGE_JOBS, share=0.5)
def long_outage(case: Case) -> None:
    """Have all streams come back after more than 2^24 packets of a queue pair, each stopping and beginning where it likes.

    Every second time the next number of a queue pair is the one that should have come.
    """
    job = case.job
    # In so many iterations each of them carries as many packets as in the next ones.
    pairs = job.shard["layout"]["queue_pairs"]
    first, around = case.rng.randint(5 + pairs, job.iterations - pairs), case.rng.choice([2, 3]) << 24
    own = {
        number: link.carried(at for at, iteration in enumerate(link.iteration) if first <= iteration < first + pairs)
        for number, link in job.links.items()
    }
    edge = case.rng.choice(list(own))
    flow, count = own[edge][0].most_common(1)[0]
    turns, comes_round = around // count, case.rng.random() < 0.5
    by_ns = case.rng.randint(10, 1000) * 10**9
    case.later = first, turns * pairs
    for name, (number,) in job.streams.items():
        shown, link = case.streams[name], job.links[number]
        shift = Shift(job, number, *({key: turns * some for key, some in part.items()} for part in own[number]))
        begin = case.begin(name, first)
        cut = case.rng.randrange(case.begin(name, 3), begin + 1)
        resumed = case.rng.randrange(begin, case.begin(name, first + pairs))
        if number == edge and comes_round:
            places = {link.position[one.index]: at for at, one in enumerate(shown) if link.flow[one.index] == flow}
            # Where numbers come round, so many packets are between what is seen of both turns.
            missed = around - turns * count
            following = min(
                next(position for position, at in places.items() if at >= resumed),
                next(position for position, at in places.items() if at >= begin) + missed,
            )
            cut, resumed = places[following - missed], places[following]
        after = [one._replace(frame=shift.of(one), ns=one.ns + by_ns) for one in shown[resumed:]]
        case.streams[name] = shown[:cut] + after


@kind("cable-cut", several)
def cable_cut(case: Case) -> None:
    """End a stream for good at any frame."""
    for name in case.rng.sample(list(case.streams), case.rng.randint(1, len(case.streams))):
        case.streams[name] = case.streams[name][: case.rng.randrange(case.begin(name, 2), len(case.streams[name]))]


@kind("late-start", several)
def late_start(case: Case) -> None:
    """Have a stream begin at any frame."""
    for name in case.rng.sample(list(case.streams), case.rng.randint(1, len(case.streams) - 1)):
        case.streams[name] = case.streams[name][case.rng.randrange(1, case.begin(name, case.job.iterations - 2)) :]


class _Behind(Script):
    """Holds the dump of a stream back until the others have settled all they can without it."""

    def __init__(self, streams: list[str], turns: int, every: int) -> None:
        self._names, self._turns, self._every = {f"dump {name}" for name in streams}, turns, every

    def may_poll(self, chain: Chain, stage: str, turn: int) -> bool:
        return stage not in self._names or (turn >= self._turns and turn % self._every == 0)


@kind("delay", several)
def delay(case: Case) -> None:
    """Have streams come later than the others, and slower."""
    some = case.rng.sample(list(case.streams), case.rng.randint(1, len(case.streams) - 1))
    case.script = _Behind(some, case.rng.randint(5, 200), case.rng.choice([1, 3, 7]))


@kind("swapped-cables", several)
def swapped_cables(case: Case) -> None:
    """From some iteration on have two streams show each other's frames."""
    one, other = case.rng.sample(list(case.streams), 2)
    iteration, _ = case.span(1)
    a, b = case.begin(one, iteration), case.begin(other, iteration)
    first, second = case.streams[one], case.streams[other]
    case.streams[one], case.streams[other] = first[:a] + second[b:], second[:b] + first[a:]


@kind("crosstalk", several)
def crosstalk(case: Case) -> None:
    """Have a stream show another's frames beside its own."""
    into, source = case.rng.sample(list(case.streams), 2)
    strange, probability = iter(case.streams[source]), case.rng.choice([0.1, 1.0])
    out = []
    for one in case.streams[into]:
        out.append(one)
        guest = next(strange, None)
        if guest is not None and case.rng.random() < probability:
            out.append(guest._replace(ns=one.ns))
    case.streams[into] = out


def tagged(frame: bytes, number: int) -> bytes:
    """Return a frame with one more VLAN tag."""
    return frame[:12] + struct.pack(">HH", 0x8100, number) + frame[12:]


@kind("vlan-copies")
def vlan_copies(case: Case) -> None:
    """Show frames again with a VLAN tag, or only with it."""
    for name in case.some_streams():
        probability, both, out = case.rng.choice([0.05, 1.0]), case.rng.random() < 0.6, []
        for one in case.streams[name]:
            copy = one.broken(tagged(one.frame, case.rng.randrange(1, 4095)), one.what)
            marked = case.rng.random() < probability
            out += [one, copy] if marked and both else [copy if marked else one]
        case.streams[name] = out


@kind("trailer")
def trailer(case: Case) -> None:
    """Append bytes to frames."""
    for name in case.some_streams():
        count = case.rng.choice([1, 4, 8, 18])
        case.streams[name] = [
            one.broken(one.frame + case.rng.randbytes(count), one.what) if case.rng.random() < 0.7 else one
            for one in case.streams[name]
        ]


@kind("marked")
def marked(case: Case) -> None:
    """Change what switches change: congestion marks, hops, in the BTH as well."""
    for name in case.some_streams():
        out = []
        for one in case.streams[name]:
            header, frame = case.job.links[one.link].headers[one.index], bytearray(one.frame)
            if header.version == 6:
                frame[header.ip + 1] |= 0x30
                frame[header.ip + 7] -= 1
            else:
                frame[header.ip + 1] |= 3
                frame[header.ip + 8] -= 1
            frame[header.bth + 4] |= 0xC0
            out.append(one.broken(bytes(frame), one.what))
        case.streams[name] = out


@kind("non-roce")
def non_roce(case: Case) -> None:
    """Put other traffic between the frames: ARP, LLDP, TCP, fragments, runts, RoCE headers that end early."""
    for name in case.some_streams():
        out, probability = [], case.rng.choice([0.05, 1.0])
        for one in case.streams[name]:
            if case.rng.random() < probability:
                out.append(Shown(_noise(case, one), one.ns, one.link, -1, OTHER))
            out.append(one)
        case.streams[name] = out


def _noise(case: Case, one: Shown) -> bytes:
    rng, header = case.rng, case.job.links[one.link].headers[one.index]
    choice = rng.randrange(7)
    if choice == 0:
        return b"\xff" * 6 + rng.randbytes(6) + b"\x08\x06" + rng.randbytes(28)
    if choice == 1:
        return rng.randbytes(12) + b"\x88\xcc" + rng.randbytes(rng.randint(0, 200))
    if choice == 2:
        return rng.randbytes(rng.randint(1, 13))
    frame = bytearray(one.frame)
    if choice == 3:  # TCP
        frame[header.ip + (6 if header.version == 6 else 9)] = 6
    elif choice == 4:  # another UDP port
        frame[header.bth - 6 : header.bth - 4] = b"\x12\xb6"
    elif choice == 5:  # a header that ends the frame
        return bytes(frame[: rng.randint(15, header.bth + 11)])
    elif header.version == 4:  # a fragment
        frame[header.ip + 6 : header.ip + 8] = b"\x20\x10"
    else:
        frame[header.ip + 6] = 44
    return bytes(frame)


@kind("clock-jump")
def clock_jump(case: Case) -> None:
    """Have the time stamps of a stream jump, back or forward, by more or less than a sequence takes."""
    for name in case.some_streams():
        for _ in range(case.rng.randint(1, 3)):
            at = case.rng.randrange(len(case.streams[name]))
            jump = case.rng.choice([-1, 1]) * case.rng.choice([2_000_000, 200_000_000, 3600 * 10**9, 10**18])
            shown = case.streams[name]
            case.streams[name] = shown[:at] + [one._replace(ns=max(1, one.ns + jump)) for one in shown[at:]]


@kind("truncate")
def truncate(case: Case) -> None:
    """Cut frames, as a capture with a snap length does, or a switch that mirrors only headers."""
    for name in case.some_streams():
        probability, shown = case.rng.choice([0.005, 0.1]), case.streams[name]
        longest = case.rng.choice([None, 96, 128])
        for at in range(_begin(case, name), len(shown)):
            frame = shown[at].frame
            size = min(longest or case.rng.randrange(1, len(frame)), len(frame))
            if size < len(frame) and case.rng.random() < probability:
                wire = len(frame) if longest or case.rng.random() < 0.5 else 0
                shown[at] = shown[at].broken(frame[:size])._replace(wire=wire)


@kind("corrupt")
def corrupt(case: Case) -> None:
    """Flip bits behind the Ethernet header of frames, in what the ICRC covers, and leave the ICRC."""
    for name in case.some_streams():
        probability, shown = case.rng.choice([0.005, 0.1]), case.streams[name]
        for at in range(_begin(case, name), len(shown)):
            if case.rng.random() < probability:
                header = case.job.links[shown[at].link].headers[shown[at].index]
                frame = bytearray(shown[at].frame)
                for _ in range(case.rng.randint(1, 4)):
                    # Not the bits that a switch may change: they are not covered.
                    place = case.rng.choice([case.rng.randrange(header.ip + 10 if header.version == 6 else header.ip + 12, header.bth - 8),
                                             case.rng.randrange(header.bth + 5, len(frame))])  # fmt: skip
                    frame[place] ^= 1 << case.rng.randrange(8)
                if bytes(frame) != shown[at].frame:
                    shown[at] = shown[at].broken(bytes(frame), BROKEN)
