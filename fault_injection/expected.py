# SPDX-License-Identifier: MIT
"""What must come of a case, from what its streams show alone: no word of the run that is judged is asked.

Of each iteration two sets of units are made. *Delivered*: a copy with the right bytes reached a stream that is to show it;
what was placed without is untrue. *Usable*: such a copy was on time and its place was provable, by the rules of docs/reliability.md; what is
listed as missing in spite of one is untrue, too, and an iteration of which all is usable must be whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fault_injection.case import BROKEN, CONTRADICTS, INTACT, LIE, Case, Shown
from fault_injection.frames import WRITE_FIRST, WRITE_LAST, WRITE_LAST_IMMEDIATE, WRITE_ONLY, WRITE_ONLY_IMMEDIATE
from fault_injection.jobs import Link

__all__ = ["Expected", "expect"]

#: A pause in the time stamps after which a packet number alone need not be believed any more; the parser waits longer.
_SILENCE_NS = 10_000_000
#: So many messages at most between a credit and a packet that it is asked to prove; the parser allows more.
_CREDIT_NEAR = 32
#: So many frames at most between a packet of Simple and the address that proves it; the parser looks further.
_LOOK_AHEAD = 100
#: Packets of LL and LL128 that begin or end a message: with their flag they are where they are, whatever came before.
_ENDS = {WRITE_FIRST, WRITE_ONLY_IMMEDIATE, WRITE_LAST, WRITE_LAST_IMMEDIATE}


@dataclass
class Expected:
    """The two sets, and what follows from them.

    Attributes:
        delivered, usable: by iteration (0: the initial state), bool per unit.
        lied: iterations of which a frame lied with an ICRC that fits, or that stand beside one.
        hit: iterations that were spoilt.
        highest: the newest iteration that must be listed; 0: none.
    """

    delivered: dict[int, np.ndarray]
    usable: dict[int, np.ndarray]
    lied: set[int] = field(default_factory=set)
    hit: set[int] = field(default_factory=set)
    highest: int = 0


@dataclass
class _Flow:
    """A queue pair as a reader knows it."""

    synchronised: bool = False
    known: bool = False
    started: bool = False
    doubt: int = 0  # packets that may be taken for a contradiction after a frame that lied
    last_ns: int = 0
    proved_from: int = 0
    proved_to: int = 0


def _is_near(message: int, credited: int | None) -> bool:
    return credited is not None and abs(message - credited) <= _CREDIT_NEAR


class _Stream:
    """Reads one stream as docs/reliability.md says that FlowCheck must be able to."""

    def __init__(self, case: Case, shown: list[Shown], links: list[int]) -> None:
        self.job, self.shown, self.links = case.job, shown, links
        self.simple = self.job.protocol == "simple"
        self.flows: dict[tuple, _Flow] = {}
        self.credits: dict[tuple[int, int], tuple[int, int]] = {}
        #: The last credit that was far from all before it: it is late, or much was missed, which only a second one tells.
        self.doubted: dict[tuple[int, int], int] = {}
        self.newest: dict[tuple[int, int], int] = {}
        self.resumes = case.later[0]
        self.elsewhere: set[tuple[int, int]] = set()
        self.line = {"ll": 16, "ll128": 128, "simple": 1}[self.job.protocol]
        self.credit_pairs = {
            (c["edge"], pair): c["channel"] for c in self.job.shard["connections"] for pair in c["proof"]["credit"]
        }
        self.next_address = self._addresses() if self.simple else {}

    def _addresses(self) -> dict[int, tuple[int, Shown] | None]:
        """Return per place in the stream the next frame of the same flow that has an address."""
        following: dict[tuple, tuple[int, Shown]] = {}
        out: dict[int, tuple[int, Shown] | None] = {}
        for at in range(len(self.shown) - 1, -1, -1):
            one = self.shown[at]
            if one.what == BROKEN or one.index < 0:
                continue
            link = self.job.links[one.link]
            if link.flow[one.index] is None:
                continue
            key = (one.link, link.flow[one.index])
            out[at] = following.get(key)
            if link.headers[one.index].reth is not None or one.what != INTACT:
                following[key] = (at, one)
        return out

    def usable(self, at: int, one: Shown) -> bool:
        """Take the next frame; return whether a reader must be able to use what it brings."""
        if one.index < 0 or one.link not in self.links:
            return False
        link = self.job.links[one.link]
        if one.what in (CONTRADICTS, LIE):
            for key, flow in self.flows.items():
                if key[0] == one.link:
                    flow.synchronised, flow.doubt = False, 2
            return False
        if one.what != INTACT:
            return False
        flow_key = link.flow[one.index]
        if self.resumes and link.iteration[one.index] >= self.resumes:
            self._come_back()
        if flow_key is None:
            self._take_credit(one, link)
            return False
        flow = self.flows.setdefault((one.link, flow_key), _Flow())
        good = self._simple(at, one, link, flow) if self.simple else self._flagged(one, link, flow)
        flow.started = True
        connection, iteration = (one.link, flow_key[0]), link.iteration[one.index]
        on_time = iteration >= self.newest.get(connection, 0)
        self.newest[connection] = max(iteration, self.newest.get(connection, 0))
        return good and on_time

    def _come_back(self) -> None:
        """Forget where everything was: of each flow the first packet, of each connection the first credit only says that it is elsewhere."""
        self.resumes = 0
        self.credits.clear()
        self.elsewhere = {(number, channel) for number in self.links for channel in set(self.credit_pairs.values())}
        for flow in self.flows.values():
            flow.synchronised, flow.known, flow.doubt = False, False, 1

    def _take_credit(self, one: Shown, link: Link) -> None:
        header = link.headers[one.index]
        channel = self.credit_pairs.get((one.link, header.queue_pair))
        if channel is not None and header.opcode == WRITE_ONLY:
            # The n-th credit allows the n-th message; its number is the last field but padding, so it is counted here.
            connection, number = (one.link, channel), self._number(one, link)
            if connection in self.elsewhere:
                self.elsewhere.remove(connection)
            elif connection in self.credits and not (
                _is_near(number, self.credits[connection][1]) or _is_near(number, self.doubted.get(connection))
            ):
                self.doubted[connection] = number
                for key, flow in self.flows.items():
                    flow.synchronised = flow.synchronised and (key[0], key[1][0]) != connection
            else:
                self.doubted.pop(connection, None)
                self.credits[connection] = (one.ns, number)

    def _number(self, one: Shown, link: Link) -> int:
        """Return the message that a credit allows: the recorder writes it right before that one."""
        return next(
            message[1]
            for message in link.message[one.index : one.index + 8 * len(self.job.links)]
            if message is not None
        )

    def _flagged(self, one: Shown, link: Link, flow: _Flow) -> bool:
        header = link.headers[one.index]
        if header.opcode in _ENDS and header.payload_bytes >= self.line:
            if flow.doubt:
                flow.doubt -= 1
                flow.synchronised = False
            else:
                flow.synchronised = True
        return flow.synchronised

    def _simple(self, at: int, one: Shown, link: Link, flow: _Flow) -> bool:
        header, position = link.headers[one.index], link.position[one.index]
        if flow.synchronised and abs(one.ns - flow.last_ns) >= _SILENCE_NS:
            flow.synchronised = False
        if header.reth is not None:
            packets = max(1, -(-int.from_bytes(one.frame[header.reth + 12 : header.reth + 16], "big") // self._mtu))
            if flow.doubt:
                flow.doubt -= 1
                flow.synchronised = False
            elif not flow.synchronised:
                flow.synchronised = self._counts(one, link, flow)
                if flow.synchronised:
                    flow.proved_from, flow.proved_to = position, position + packets
            else:
                flow.proved_to = max(flow.proved_to, position + packets)
            good = flow.synchronised
        else:
            good = flow.synchronised and (
                flow.proved_from <= position < flow.proved_to
                or (position >= flow.proved_to and self._proved_later(at, one, position))
            )
        if good:
            flow.last_ns, flow.known = one.ns, True
        return good

    @property
    def _mtu(self) -> int:
        return self.job.shard["layout"]["mtu"]

    def _counts(self, one: Shown, link: Link, flow: _Flow) -> bool:
        channel, number = link.message[one.index]
        credit = self.credits.get((one.link, channel))
        if credit is not None and abs(one.ns - credit[0]) < _SILENCE_NS:
            return _is_near(number, credit[1])
        if credit is not None and abs(one.ns - credit[0]) < 100 * _SILENCE_NS:
            return False
        if flow.known:
            return abs(one.ns - flow.last_ns) < _SILENCE_NS
        return not flow.started and link.position[one.index] == 0

    def _proved_later(self, at: int, one: Shown, position: int) -> bool:
        found = self.next_address.get(at)
        if found is None or found[0] - at > _LOOK_AHEAD or found[1].what != INTACT or found[1].link != one.link:
            return False
        return abs(found[1].ns - one.ns) < _SILENCE_NS and self.job.links[one.link].position[found[1].index] > position


def expect(case: Case) -> Expected:
    """Return what must come of a case."""
    job = case.job
    sizes = {number: job.shape(number).units for number in range(job.iterations + 1)}
    out = Expected(
        {number: np.zeros(size, bool) for number, size in sizes.items()},
        {number: np.zeros(size, bool) for number, size in sizes.items()},
        lied=set(case.lied),
        hit=set(case.touched),
    )
    for name, shown in case.streams.items():
        links, seen = job.streams[name], {number: set() for number in job.streams[name]}
        stream = _Stream(case, shown, links)
        for at, one in enumerate(shown):
            usable = stream.usable(at, one)
            if one.index < 0 or one.link not in links:
                continue
            link = job.links[one.link]
            iteration, units = link.iteration[one.index], link.units[one.index]
            if iteration < 0:
                continue
            if one.what == LIE:
                out.lied.update((iteration - 1, iteration, iteration + 1))
                out.hit.add(iteration)
                continue
            if one.what not in (INTACT, CONTRADICTS):
                continue
            if one.what == INTACT:
                seen[one.link].add(one.index)
            if units is None:
                continue
            # A reader may use what contradicts: where it knew no better, its bytes are right.
            out.delivered[iteration][units] = True
            if usable:
                out.usable[iteration][units] = True
                out.highest = max(out.highest, iteration)
        for number, indices in seen.items():
            link = job.links[number]
            out.hit.update(
                iteration
                for index, iteration in enumerate(link.iteration)
                if iteration > 0 and link.units[index] is not None and index not in indices
            )
    return out


def must_be_whole(case: Case, expected: Expected, iteration: int) -> bool:
    """Whether an iteration has every unit, and its step record or the repetition of it, in usable copies."""
    shape, usable = case.job.shape(iteration), expected.usable[iteration]
    if not case.exact or iteration in expected.lied or not usable[: shape.gradient_units].all():
        return False
    if shape.record is None or usable[shape.record :].all():
        return True
    following = iteration + 1
    if following > case.job.iterations or following in expected.lied or following > expected.highest:
        return False
    begin, end = case.job.shape(following).repeated
    return bool(expected.usable[following][begin:end].all())


def ranges_of(case: Case, iteration: int, units: np.ndarray) -> list[tuple[int, int]]:
    """Return units of an iteration's gradient (bool) as ranges of its flat bytes."""
    shape: Any = case.job.shape(iteration)
    return shape.flat_ranges(units[: shape.gradient_units])
