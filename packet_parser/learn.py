# SPDX-License-Identifier: MIT
"""Learns a layout from the mirrored frames of index patterns: which elements each message of each all-reduce carries.

`flowcheck.learning` says what the training side reduces. Nothing here knows how a library cuts an operation into
messages; what is assumed: an all-reduce of a kind (dtype, elements) always sends the same messages on a connection, a
message carries contiguous elements, a connection has eight steps of slots, and only passes run between passes.
docs/decisions/0010-learned-layouts.md says why it is done so.

A pass in which a frame is missing on a connection is no evidence there; another round is.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flowcheck import learning
from flowcheck.errors import LearningError
from flowcheck.layout import SLOTS, first_step, queue_pair_pieces
from flowcheck.learning import Pass
from flowcheck.plan import DTYPE_BYTES, LearnedLayout
from flowcheck.ring import PacketRing
from packet_parser._collect import Collector
from packet_parser.connections import Seen, observe, text

__all__ = ["Learned", "Learner"]

_Kind = tuple[str, int]

#: What a message's first element says of its pass; a pass may show its own class, and ZERO where not all ranks contribute.
_ZERO, _WHO, _WHERE, _CHECK, _EMPTY, _OTHER = range(6)
_CLASS = {"who": _WHO, "where": _WHERE, "check": _CHECK}
_UNIT_BYTES = {"ll": 8, "ll128": 1920}


def _words128() -> np.ndarray:
    """Return where, in a group of 16 lines of 16 words, each of its 240 data words lies (prims_ll128.h)."""
    word = np.arange(240)
    half, item, odd = word // 120, word % 120 // 2, word % 2
    low = item < 32
    line = np.where(low, item // 8, 4 + (item - 32) // 7)
    place = np.where(low, item % 8, (item - 32) % 7)
    crossing = low & (place == 7) & (odd == 1)
    return (8 * half + line + 4 * crossing) * 16 + 2 * place + np.where(crossing, 0, odd)


_WORDS128 = _words128()


@dataclass(frozen=True)
class Learned:
    """What a plan needs: its `layout`, `connections`, and the collectives before iterations, as its JSON has them.

    `startup` is all that the connections carried up to the first iteration, `before` what they carried between an
    iteration and passes that followed it. The layout's anchors are before `startup`; `ends` are anchors behind it, for who
    reads on where the passes ended and leaves `startup` out.
    """

    layout: dict[str, Any]
    connections: list[dict[str, Any]]
    startup: list[dict[str, Any]]
    before: list[dict[str, Any]]
    ends: list[dict[str, Any]]


@dataclass
class _Group:
    """The passes of one kind in one round; they follow each other in the list of passes from `index` on."""

    kind: _Kind
    index: int
    section: int
    passes: list[Pass]


@dataclass
class _Found:
    """Where a connection shows a group: the message (index) of its first data, the messages of a pass."""

    at: int
    length: int


@dataclass
class _Table:
    """The messages of one kind on one connection, from the first that is not empty on, then the rest in turn."""

    first: np.ndarray  # -1 where it does not show
    elements: np.ndarray
    ranks: np.ndarray  # whose contributions are in the sum
    wire: np.ndarray
    sure: np.ndarray  # elements that cannot be an undefined tail
    lead: int = 0  # how many of the last ones are empty and come first

    def turned(self) -> _Table:
        """Return the table from its first message on."""
        parts = (np.roll(part, self.lead) for part in (self.first, self.elements, self.ranks, self.wire, self.sure))
        return _Table(*parts, self.lead)

    def ranges(self, ranks: int) -> list[tuple[int, int]]:
        """Return the elements of each message that has the contributions of so many ranks."""
        own = (self.ranks == ranks) & (self.elements > 0)
        return list(zip(self.first[own].tolist(), (self.first + self.elements)[own].tolist(), strict=True))


class _Connection:
    """A connection's messages, decoded, and what was found in them."""

    def __init__(self, seen: Seen, spool: np.ndarray) -> None:
        self.seen, self.spool = seen, spool
        self.protocol, self.lag, first = self._protocol(seen.messages)
        self.messages = messages = seen.messages[first:]
        self.run = np.cumsum(np.r_[0, np.diff(messages["number"]) != 1]) if len(messages) else np.empty(0, np.int64)
        self.heads = self._heads(messages)
        self.found: dict[int, _Found] = {}  # by index of the group
        self.shown: dict[_Kind, list[tuple[_Table, list[int]]]] = {}  # each with the groups that show it
        self.tables: dict[_Kind, _Table] = {}
        self.why: dict[_Kind, str] = {}
        self.stride = self.steps = self.base = 0

    def _peek(self, messages: np.ndarray, size: int) -> np.ndarray:
        """Return the first `size` bytes of each message's first packet; of shorter ones what follows is anything."""
        rows = self.seen.pieces["row"][messages["piece"]]
        begin = self.seen.packets["payload"][rows].astype(np.int64)
        place = np.minimum(begin[:, None] + np.arange(size), max(len(self.spool) - 1, 0))
        return self.spool[place] if len(self.spool) else np.zeros((len(messages), size), np.uint8)

    def _protocol(self, messages: np.ndarray) -> tuple[str, int, int]:
        """Return (protocol, step - number, index of the first message): of all that end the connection alike.

        Flags count steps, one a message: what agrees with that over two messages is no data.
        """
        for protocol, size, at, width in (("ll", 16, 4, 4), ("ll128", 128, 120, 8)):
            data = np.flatnonzero(messages["wire"] > 0)
            if not len(data) or (messages["wire"][data[-2:]] < size).any():
                continue
            first = self._peek(messages[data], size)
            flags = np.ascontiguousarray(first[:, at : at + width]).view(f"<u{width}")[:, 0].astype(np.int64)
            lag = flags - 1 - messages["number"][data]
            same = lag == lag[-1]
            same &= messages["wire"][data] >= size
            if protocol == "ll":
                same &= np.ascontiguousarray(first[:, 12:16]).view("<u4")[:, 0] == flags
            agree = int(np.argmin(same[::-1])) if not same.all() else len(same)
            if agree >= 2:
                begin = 0 if agree == len(data) else int(data[len(data) - agree - 1]) + 1
                return protocol, int(lag[-1]), begin
        return "simple", 0, 0

    def _heads(self, messages: np.ndarray) -> np.ndarray:
        """Return the first eight data bytes of each message."""
        first = self._peek(messages, 16)
        if self.protocol == "ll":
            first = first[:, [0, 1, 2, 3, 8, 9, 10, 11]]
        return np.ascontiguousarray(first[:, :8])

    def classes(self, dtype: str, ranks: int) -> np.ndarray:
        """Return per message what its first element, taken as of `dtype`, says of its pass."""
        value = learning.values(self.heads.view(learning.DTYPES[dtype])[:, 0], dtype)
        counted = learning.counted(dtype, ranks)
        with np.errstate(invalid="ignore"):
            kinds = np.select(
                [self.messages["wire"] == 0, value == 0, (value >= 1) & (value <= counted), value > counted, value < 0],
                [_EMPTY, _ZERO, _WHO, _WHERE, _CHECK],
                _OTHER,
            )
        return kinds.astype(np.int8)

    def data(self, index: int) -> np.ndarray | None:
        """Return a message's data, undefined tail and all; None if a flag is not that of its step."""
        message = self.messages[index]
        payload = self.seen.payload(self.spool, message)
        if self.protocol == "simple":
            return payload
        flag = int(message["number"]) + self.lag + 1
        if self.protocol == "ll":
            if len(payload) % 16:
                return None
            lines = payload.view("<u4").reshape(-1, 4)
            right = (lines[:, 1::2] == flag & 0xFFFFFFFF).all()
            return np.ascontiguousarray(lines[:, 0::2]).view(np.uint8).reshape(-1) if right else None
        if len(payload) % 2048:
            return None
        groups = payload.view("<u8").reshape(-1, 256)
        right = (groups[:, 15::16] == flag).all()
        return np.ascontiguousarray(groups[:, _WORDS128]).view(np.uint8).reshape(-1) if right else None

    def show(self, group: _Group, table: _Table) -> None:
        """Add what a group shows to the evidence on its kind."""
        alike = self.shown.setdefault(group.kind, [])
        for known, groups in alike:
            if all(np.array_equal(getattr(known, n), getattr(table, n)) for n in ("wire", "ranks", "first")):
                known.elements = np.minimum(known.elements, table.elements)
                groups.append(group.index)
                return
        alike.append((table, [group.index]))

    def geometry(self) -> None:
        """Set slot distance, base address, and steps of a message, from the addresses used and the eight slots."""
        slots = np.unique(self.messages["slot"]).astype(np.int64)
        apart = int(np.gcd.reduce(np.diff(slots))) if len(slots) > 1 else 0
        count = int(slots[-1] - slots[0]) // apart + 1 if apart else len(slots)
        if not 2 <= count <= SLOTS:
            raise LearningError(f"{self.seen}: its messages went to {count} slots, expected 2 to {SLOTS}")
        count = 1 << (count - 1).bit_length()  # a slot may not have been used yet
        self.base, self.stride, self.steps = int(slots[0]), apart * count // SLOTS, SLOTS // count
        between = [np.arange(f.at, f.at + f.length - 1) for f in self.found.values()]
        strides = [self.step(int(i) + 1) - self.step(int(i)) for i in np.concatenate(between)]
        if strides:  # other collectives may take shorter ones
            self.steps = int(np.bincount(np.array(strides) % SLOTS).argmax())
        if self.protocol != "simple":
            # Flags tell the step, so the slot of each is known, whatever was seen of the eight.
            self.steps, self.stride = 1, apart
            turn = (self.messages["number"] + self.lag) % SLOTS * apart
            base = self.messages["slot"].astype(np.int64) - turn
            if (base != base[0]).any():
                raise LearningError(f"{self.seen}: its messages do not go round {SLOTS} slots, {apart} bytes apart")
            self.base = int(base[0])

    def step(self, index: int) -> int:
        """Return the step of a message; of Simple's, which nothing counts, modulo the slots."""
        if self.protocol != "simple":
            return int(self.messages["number"][index]) + self.lag
        return (int(self.messages["slot"][index]) - self.base) // self.stride

    def advances(self, begin: int, end: int) -> list[int]:
        """Return by how many steps each of some messages moves the counter on, the last to message `end`."""
        steps = [self.step(index) for index in range(begin, end + 1)]
        return [(b - a) % SLOTS or SLOTS for a, b in pairwise(steps)]


def _candidates(connection: _Connection, group: _Group, ranks: int, begin: int) -> Iterable[_Found]:
    """Yield where a group can be from message `begin` on: sizes repeat pass by pass, first elements are of the pass."""
    kinds = connection.classes(group.kind[0], ranks)
    wire, run = connection.messages["wire"], connection.run
    count = len(group.passes)
    partly = len(learning.rank_groups(group.kind[0], ranks)) > 1
    allowed = [{_CLASS[step.sort], *([_ZERO] if partly or step.sort != "who" else [])} for step in group.passes]
    for at in np.flatnonzero(np.isin(kinds, list(allowed[0]))):
        if at < begin:
            continue
        end = int(np.searchsorted(run, run[at], "right"))
        lengths = np.arange(1, (end - at - 1) // (count - 1) + 1)
        for number, step in enumerate(allowed[1:], 1):
            place = at + number * lengths
            inside = place < end
            lengths, place = lengths[inside], place[inside]
            right = (wire[place] == wire[at]) & np.isin(kinds[place], list(step))
            lengths = lengths[right]
        for length in lengths.tolist():
            data = np.flatnonzero(wire[at : at + length])
            # Behind its data the last pass ends in messages that are another's, if empty ones led the first.
            block = at + np.arange((count - 1) * length + int(data[-1]) + 1)
            if block[-1] >= end or (wire[block] != wire[at + (block - at) % length]).any():
                continue
            shown, turn = kinds[block], (block - at) // length
            if all(np.isin(shown[turn == number], [*step, _EMPTY]).all() for number, step in enumerate(allowed)):
                yield _Found(int(at), length)


def _prefix(right: np.ndarray) -> int:
    """Return how many leading values are true."""
    return len(right) if right.all() else int(np.argmin(right))


def _read(connection: _Connection, group: _Group, found: _Found, ranks: int, checks: list[np.ndarray]) -> _Table | str:
    """Return what a group shows of its kind's messages, or what is wrong with it."""
    dtype, elements = group.kind
    width, counts = DTYPE_BYTES[dtype], len(learning.rank_groups(dtype, ranks))
    counted, (base, digits) = learning.counted(dtype, ranks), learning.digits(dtype, elements, ranks)
    least = _UNIT_BYTES.get(connection.protocol, width) // width - 1  # elements of a tail at most
    rows = []
    for place in range(found.length):
        index = found.at + place
        wire = int(connection.messages["wire"][index]) if index < len(connection.messages) else 0
        if not wire:
            rows.append((-1, 0, 0, 0, 0))
            continue
        shown = [connection.data(index + number * found.length) for number in range(len(group.passes))]
        if any(part is None for part in shown):
            return f"message {place} has the flag of another"
        shown = [part[: len(part) // width * width].view(learning.DTYPES[dtype]) for part in shown]
        who = [learning.values(part, dtype) for part in shown[:counts]]
        capacity, contributed = len(shown[0]), int(sum(part[0] for part in who))
        good = np.logical_and.reduce([part == part[0] for part in who])
        position = np.zeros(capacity, np.int64)
        for digit, part in enumerate(shown[counts : counts + digits]):
            value = learning.values(part, dtype)
            position += (np.where(np.abs(value) < 2**62, value, 0).astype(np.int64) - counted - 1) * base**digit
        # Who contributes an element may not be in the sum yet: then it is zero.
        absent = np.logical_and.reduce([part == 0 for part in shown[counts:]])
        if contributed == ranks:
            absent[:] = False
        if absent.all():
            rows.append((-1, capacity, contributed, wire, capacity))
            continue
        present = int(np.argmin(absent))
        first = int(position[present]) - present
        if not 0 <= first < elements:
            return f"message {place} begins at element {first} of {elements}"
        there = position == first + np.arange(capacity)
        there, absent, good = (part[: elements - first] for part in (there, absent, good))
        for part, expected in zip(shown[counts + digits :], checks, strict=True):
            there = there & (part[: len(there)] == expected[first : first + len(there)])
        count = _prefix(good & (there | absent))
        if count < capacity - least:
            return f"message {place}, of {capacity} elements from {first} on, has only the first {count} right in every pass"
        sure = max(capacity - least, 1)
        if not there[:count].any():
            rows.append((-1, capacity, contributed, wire, capacity))
            continue
        # An element that does not show is no evidence against being a tail.
        count = max(int(np.flatnonzero(there[:count])[-1]) + 1, min(sure, count))
        rows.append((first, count, contributed, wire, sure))
    if all(first < 0 for first, *_ in rows):
        return "no message of it shows its place"
    return _Table(*(np.array(column, np.int64) for column in zip(*rows, strict=True)))


def _groups(passes: Sequence[Pass]) -> list[_Group]:
    groups: list[_Group] = []
    section = 0
    for index, step in enumerate(passes):
        if step.sort == "iteration":
            section += index > 0 and passes[index - 1].sort != "iteration"
        elif step.sort == "who" and step.number == 0:
            groups.append(_Group((step.dtype, step.elements), index, section, [step]))
        elif groups and groups[-1].kind == (step.dtype, step.elements):
            groups[-1].passes.append(step)
        else:
            raise LearningError(
                f"pass {index}, {step.document()}, follows none of its kind: expected who, where, check"
            )
    return groups


def _name(kind: _Kind) -> str:
    return f"all-reduce of {kind[1]} {kind[0]}"


class Learner:
    """Learns a job's layout: `add` frames or `add_ring`, then `learn`, again after more frames; last `close`.

    Payloads are kept in a temporary file until `close`; what is in memory are 64 bytes a packet.

    Args:
        ring: the ranks in ring order.
        mtu: payload bytes of a full packet.
        links: edges that the plan's streams show; connections of others are left out. None: all.
        link_gbps: of the links, for the plan.
        folder: for the temporary file.
    """

    def __init__(
        self, ring: Sequence[int], mtu: int, links: Iterable[int] | None = None, link_gbps: int = 400,
        folder: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.ring, self.mtu, self.link_gbps = tuple(ring), mtu, link_gbps
        self.links = None if links is None else set(links)
        self._file = tempfile.TemporaryFile(prefix="flowcheck-learn-", dir=folder)
        self._collector = Collector(self._file)

    def add(self, frame: bytes, time_ns: int) -> None:
        """Take a mirrored frame, received at `time_ns`; those of one connection may come in any order."""
        self._collector.add(frame, time_ns)

    def add_ring(self, ring: PacketRing, begin: int, end: int | None = None) -> int:
        """Take the frames of a ring's records from `begin` up to `end`, or all that are written; return where it ended."""
        end = ring.written if end is None else end
        for index in range(begin, end):
            self._collector.add(ring.frame(index), int(ring.record(index)["timestamp_ns"][0]))
        return end

    def close(self) -> None:
        """Give the temporary file up."""
        self._file.close()

    def learn(self, passes: Sequence[Pass]) -> Learned:
        """Return what the frames taken so far show, given all that was reduced, in order.

        LearningError: something is not shown, or contradicts itself; the message says what.
        """
        groups = _groups(passes)
        if not groups:
            raise LearningError("no passes were reduced: nothing can be learned")
        self._collector.packets()
        spool = np.memmap(self._file, np.uint8, "r") if self._file.tell() else np.empty(0, np.uint8)
        connections = []
        for seen in observe(self._collector, spool):
            if seen.sender not in self.ring:
                raise LearningError(f"{seen}: credits name rank {seen.sender}, the ring has {list(self.ring)}")
            if self.links is None or self.ring.index(seen.sender) in self.links:
                connections.append(_Connection(seen, spool))
        if not connections:
            raise LearningError("no connection was seen: none whose data and credits are both mirrored")
        connections.sort(key=lambda c: (self.ring.index(c.seen.sender), min(c.seen.data_queue_pairs)))
        self._find(connections, groups)
        connections = self._used(connections)
        for connection in connections:
            self._fill(connection, groups)
            connection.geometry()
        kinds = list(dict.fromkeys(group.kind for group in groups))
        self._cut_tails(connections, kinds)
        for kind in kinds:
            self._check(connections, kind)
        return _Document(self, connections, passes, groups, kinds).learned()

    def _find(self, connections: list[_Connection], groups: list[_Group]) -> None:
        """Find each group on each connection, and read it."""
        ranks = len(self.ring)
        behind = [0] * len(connections)
        for group in groups:
            checks = [learning.reduced(step, ranks) for step in group.passes if step.sort == "check"]
            for number, connection in enumerate(connections):
                for found in _candidates(connection, group, ranks, behind[number]):
                    table = _read(connection, group, found, ranks, checks)
                    if isinstance(table, str):
                        connection.why[group.kind] = table
                        continue
                    connection.show(group, table)
                    connection.found[group.index] = found
                    behind[number] = found.at + (len(group.passes) - 1) * found.length + 1
                    break
        for connection in connections:
            self._agree(connection)

    def _agree(self, connection: _Connection) -> None:
        """Keep, of each kind, what most repetitions on a connection show: loss can put messages in a false order."""
        for kind, shown in connection.shown.items():
            shown.sort(key=lambda alike: len(alike[1]))
            most = shown.pop()
            if shown and len(shown[-1][1]) == len(most[1]):
                raise LearningError(
                    f"{self._at(connection)}: repetitions of the {_name(kind)} differ: frames are missing, or the library does "
                    "not always do the same"
                )
            connection.tables[kind] = most[0]
            for _, groups in shown:
                for index in groups:
                    del connection.found[index]

    def _used(self, connections: list[_Connection]) -> list[_Connection]:
        """Return the connections that took part; one that sent data in the time of passes, and shows none, is an error."""
        begun = [c.messages["time_ns"][f.at] for c in connections for f in c.found.values()]
        used = []
        for connection in connections:
            sent = connection.messages["time_ns"][connection.messages["wire"] > 0]
            if connection.found:
                used.append(connection)
            elif not begun or (len(sent) and sent.max() >= min(begun)):
                why = next(iter(connection.why.items()), None)
                more = f": {_name(why[0])}: {why[1]}" if why else ": in every round frames are missing"
                raise LearningError(f"{self._at(connection)} shows no pass{more}")
        return used

    def _at(self, connection: _Connection) -> str:
        return f"{connection.seen} (edge {self.ring.index(connection.seen.sender)})"

    def _fill(self, connection: _Connection, groups: list[_Group]) -> None:
        """Find how many empty messages lead each kind, and how many those have of which all are empty.

        Between the data of two groups lie only empty messages: those that end the one, lead the other, or are all that
        groups listed between them sent. That is an equation for each two; where they leave it open, kinds of empty
        messages are taken to have equally many.
        """
        order = [group for group in groups if group.index in connection.found]
        empty = list(dict.fromkeys(group.kind for group in groups if group.kind not in connection.tables))
        unknown = {name: place for place, name in enumerate([*connection.tables, *empty])}
        rows, distances, between = [], [], set()
        for one, other in pairwise(order):
            begin, end = connection.found[one.index], connection.found[other.index]
            behind = begin.at + len(one.passes) * begin.length
            if (
                one.section != other.section
                or connection.run[begin.at] != connection.run[end.at]
                or (connection.messages["wire"][behind : end.at] > 0).any()
            ):
                continue
            skipped = groups[groups.index(one) + 1 : groups.index(other)]
            if any(group.kind in connection.tables for group in skipped):
                continue
            row = np.zeros(len(unknown))
            row[unknown[other.kind]] += 1
            row[unknown[one.kind]] -= 1
            for group in skipped:
                row[unknown[group.kind]] += len(group.passes)
                between.add(group.kind)
            rows.append(row)
            distances.append(end.at - behind)
        missing = [kind for kind in empty if kind not in between]
        if missing:
            why = connection.why.get(missing[0], "no repetition of it arrived without a hole")
            raise LearningError(f"{self._at(connection)}: the {_name(missing[0])} is not shown: {why}")
        for one, other in pairwise(empty):
            row = np.zeros(len(unknown))
            row[unknown[one]], row[unknown[other]] = 1e-6, -1e-6  # gives way to what was seen
            rows.append(row)
            distances.append(0)
        rows.append(np.eye(len(unknown))[0])  # only the difference of leads shows
        distances.append(0)
        equations, distances = np.array(rows), np.array(distances)
        counts = np.rint(np.linalg.lstsq(equations, distances, rcond=1e-12)[0]).astype(int)
        if np.abs(equations @ counts - distances).max() > 1e-3:
            raise LearningError(f"{self._at(connection)}: which all-reduce its empty messages belong to does not show")
        for kind in empty:
            count = int(counts[unknown[kind]])
            connection.tables[kind] = _Table(np.full(count, -1), *(np.zeros(count, np.int64) for _ in range(4)))
        lead = {kind: int(counts[unknown[kind]]) for kind in connection.tables if kind not in empty}
        # How many of the empty messages before a pass are its own only the end of all tells; else it does not matter.
        last = order[-1]
        end = connection.found[last.index].at + len(last.passes) * connection.found[last.index].length
        later = groups[groups.index(last) + 1 :]
        end += sum(len(group.passes) * len(connection.tables[group.kind].wire) for group in later)
        rest = end - len(connection.messages)
        move = rest - lead[last.kind] if rest >= 0 else 0
        move = max(move, -min(lead.values()))
        for kind, before in lead.items():
            table = connection.tables[kind]
            table.lead = min(before + move, _prefix(table.wire[::-1] == 0))

    def _cut_tails(self, connections: list[_Connection], kinds: list[_Kind]) -> None:
        """Cut a tail where any message begins that is fully reduced: that one brings what is there, and from there on.

        A tail may hold the neighbours' true data in every pass and not in training.
        """
        for kind in kinds:
            tables = [connection.tables[kind] for connection in connections]
            heads = np.unique(np.concatenate([t.first[(t.ranks == len(self.ring)) & (t.elements > 0)] for t in tables]))
            for table in tables:
                place = np.searchsorted(heads, table.first + table.sure)
                room = np.r_[heads, kind[1]][place] - table.first
                table.elements = np.where(table.first >= 0, np.minimum(table.elements, room), table.elements)

    def _check(self, connections: list[_Connection], kind: _Kind) -> None:
        """LearningError unless each edge carries an element once at most, and all edges together every one."""
        whole: list[tuple[int, int]] = []
        for edge in sorted({self.ring.index(c.seen.sender) for c in connections}):
            ranges = []
            for connection in connections:
                if self.ring.index(connection.seen.sender) == edge:
                    ranges += connection.tables[kind].ranges(len(self.ring))
            ranges.sort()
            for (_, end), (begin, _) in pairwise(ranges):
                if begin < end:
                    raise LearningError(f"edge {edge}: two messages of the {_name(kind)} carry element {begin}")
            whole += ranges
        end, missing = 0, []
        for begin, behind in [*sorted(whole), (kind[1], kind[1])]:
            if begin > end:
                missing.append((end, begin))
            end = max(end, behind)
        if missing:
            (begin, end), count = missing[0], sum(b - a for a, b in missing)
            raise LearningError(
                f"{count} of {kind[1]} elements of the {_name(kind)} are seen fully reduced on no mirrored connection, the "
                f"first {begin} to {end - 1}: mirror two links, or repeat the passes"
            )


class _Document:
    """Puts what the connections show into a plan's words."""

    def __init__(
        self, learner: Learner, connections: list[_Connection], passes: Sequence[Pass], groups: list[_Group],
        kinds: list[_Kind],
    ) -> None:  # fmt: skip
        self.ring, self.mtu, self.link_gbps = learner.ring, learner.mtu, learner.link_gbps
        self.connections, self.passes, self.groups, self.kinds = connections, passes, groups, kinds
        self.begins = [index for index, step in enumerate(passes) if step.sort == "iteration"]

    def _common(self, name: str, values: list[Any]) -> Any:
        known = {value for value in values if value is not None}
        if len(known) > 1:
            raise LearningError(f"connections differ in their {name}: {sorted(map(str, known))}")
        return known.pop() if known else None

    def _immediate(self) -> str:
        messages = np.concatenate([c.messages for c in self.connections])
        wire, number = messages["wire"].astype("<u4"), messages["number"].astype("<u4")
        shown = messages["immediate"].astype("<u4")
        for name, expected, value in (
            ("little_endian_bytes", wire, shown.byteswap()),
            ("big_endian_bytes", wire, shown),
            ("little_endian_number", number, shown.byteswap()),
            ("big_endian_number", number, shown),
        ):
            if (value == expected).all():
                return name
        raise LearningError("immediates are neither the messages' sizes nor their numbers, in either byte order")

    def _split_above(self) -> int | None:
        """Return the bytes above which a message is a write and an empty write; None: none is."""
        messages = np.concatenate([c.messages for c in self.connections])
        split, whole = messages["wire"][messages["bulk_split"]], messages["wire"][~messages["bulk_split"]]
        if not len(split):
            return None
        least, most = int(split.min()), int(whole.max(initial=0))
        if most >= least:
            raise LearningError(f"a message of {least} bytes has an empty write behind it, one of {most} has none")
        return 8192 if most <= 8192 < least else least - 1  # NCCL_IB_AR_THRESHOLD's default, if that is it

    def _layout(self) -> dict[str, Any]:
        """Return the plan's layout; its anchors are yet to come."""
        seen = [c.seen for c in self.connections]
        credit = self._common("form of credits", [s.credit for s in seen])
        return {
            "source": "learned",
            "protocol": self._common("protocol", [c.protocol for c in self.connections]),
            "ring": list(self.ring),
            "mtu": self.mtu,
            "link_gbps": self.link_gbps,
            "queue_pairs": self._common("number of queue pairs", [len(s.data_queue_pairs) for s in seen]),
            "split_queue_pairs": self._common("use of queue pairs", [s.splits for s in seen]),
            "exact_addresses": bool(self._common("addresses of empty pieces", [s.exact_addresses for s in seen])),
            "credit": dict(zip(("bytes", "tag", "index"), credit, strict=True)),
            "immediate": self._immediate(),
            "slot_bytes": self._common("distance of slots", [c.stride for c in self.connections]),
            "message_steps": self._common("steps of a message", [c.steps for c in self.connections]),
            "operation_steps": self._operation_steps(),
            "split_above": self._split_above(),
            "operations": [self._operation(kind) for kind in self.kinds],
            "anchors": [{"psn": [0] * len(s.data_queue_pairs), "message": 0, "step": 0} for s in seen],
        }

    def _operation(self, kind: _Kind) -> dict[str, Any]:
        tables = [connection.tables[kind].turned() for connection in self.connections]
        messages = [np.stack([t.first, t.elements, t.ranks], 1).tolist() for t in tables]
        return {"dtype": kind[0], "elements": kind[1], "messages": messages}

    def _start(self, connection: _Connection, section: int) -> int:
        """Return the number of the first message of a section's passes, as most groups found there have it."""
        starts: dict[int, list[int]] = {}
        for group in self.groups:
            if group.section == section and group.index in connection.found:
                at = connection.found[group.index].at
                number = int(connection.messages["number"][at]) - connection.tables[group.kind].lead
                number -= self._length(connection, self._first(section), group.index)
                starts.setdefault(number, []).append(group.index)
        order = sorted(starts, key=lambda number: len(starts[number]))
        if not order or (len(order) > 1 and len(starts[order[-1]]) == len(starts[order[-2]])):
            raise LearningError(
                f"{connection.seen}: the passes begin at messages {sorted(starts)}, by what arrived of them: expected one"
            )
        for number in order[:-1]:  # loss has misled what numbers them
            for index in starts[number]:
                del connection.found[index]
        return order[-1]

    def _first(self, section: int) -> int:
        return next(group.index for group in self.groups if group.section == section)

    def _operation_steps(self) -> int:
        """Return the least number of which every operation's first step is a multiple, as far as steps are skipped for it."""
        for multiple in (1, 2, 4, 8):
            if all(self._begins_on(connection, multiple) for connection in self.connections):
                return multiple
        raise LearningError("steps are skipped between all-reduces, and not to begin on a multiple of 2, 4 or 8")

    def _begins_on(self, connection: _Connection, multiple: int) -> bool:
        """Whether the messages of every group found go from step to step if its passes begin on multiples."""
        for group in self.groups:
            if group.index not in connection.found:
                continue
            found, table = connection.found[group.index], connection.tables[group.kind]
            data = int(np.flatnonzero(table.wire)[-1])
            step = connection.step(found.at)
            if (step - table.lead * connection.steps) % multiple:
                return False
            for place in range((len(group.passes) - 1) * found.length + data + 1):
                if place and (place + table.lead) % found.length == 0:
                    step = -(-step // multiple) * multiple
                if (connection.step(found.at + place) - step) % SLOTS:
                    return False
                step += connection.steps
        return True

    def _length(self, connection: _Connection, begin: int, end: int) -> int:
        """Return how many messages of a connection some of the passes are."""
        return sum(len(connection.tables[step.dtype, step.elements].wire) for step in self.passes[begin:end])

    def _raw(self, connection: _Connection, begin: int, end: int) -> list[list[int]] | None:
        """Return messages `begin` to before `end`, as bytes and steps each; None if not all were seen."""
        first, last = np.searchsorted(connection.messages["number"], [begin, end])
        if (
            last - first != end - begin
            or last == len(connection.messages)
            or connection.run[first] != connection.run[last]
        ):
            return None
        wire = connection.messages["wire"][first:last].tolist()
        return [list(pair) for pair in zip(wire, connection.advances(first, last), strict=True)]

    def _certain(self, connection: _Connection, section: int) -> np.ndarray:
        """Return the numbers of messages that a section's passes have shown by what they carry."""
        found = [
            (g, connection.found[g.index]) for g in self.groups if g.section == section and g.index in connection.found
        ]
        index = np.concatenate([f.at + np.arange((len(g.passes) - 1) * f.length + 1) for g, f in found])
        return connection.messages["number"][index]

    def _anchor(
        self, connection: _Connection, layout: LearnedLayout, start: int, raw: list[list[int]], section: int
    ) -> dict:
        """Return where the queue pairs stand before the raw messages that lead to message `start`, the first pass's."""
        begin = start - len(raw)
        ends = [index for index in self.begins if index > self._first(section)]
        steps = self.passes[self._first(section) : ends[0] if ends else None]
        wire = [np.array([size for size, _ in raw], np.int64)]
        wire += [connection.tables[step.dtype, step.elements].turned().wire for step in steps]
        wire = np.concatenate(wire).astype(np.int64)
        seen = connection.seen.pieces
        seen = seen[np.isin(seen["number"], self._certain(connection, section))]
        psn = []
        for queue_pair, number in enumerate(connection.seen.data_queue_pairs):
            pieces = queue_pair_pieces(layout, queue_pair, begin, wire)
            own = seen[seen["queue_pair"] == queue_pair]
            place = np.searchsorted(pieces.index + begin, own["number"])
            inside = (place < len(pieces.index)) & (own["number"] >= begin)
            own, place = own[inside], place[inside]
            before = np.cumsum(pieces.packets) - pieces.packets
            starts = np.unique((own["psn"] - before[place]) & 0xFFFFFF)
            if len(starts) != 1:
                raise LearningError(
                    f"{connection.seen}: queue pair {number} would begin at {len(starts)} sequence numbers: its packets are "
                    "not those of the messages learned"
                )
            psn.append(int(starts[0]))
        if raw:
            step = connection.step(int(np.searchsorted(connection.messages["number"], begin)))
        else:
            step = self._step_of(connection, layout, start, section)
        return {"psn": psn, "message": begin, "step": step % SLOTS if connection.protocol == "simple" else step}

    def _end(
        self, connection: _Connection, layout: LearnedLayout, anchor: dict, raw: list[list[int]], end: int
    ) -> dict:
        """Return where a connection stands when raw messages and the passes before `end` have followed an anchor."""
        tables = [connection.tables[step.dtype, step.elements] for step in self.passes[:end]]
        wire = np.array(
            [size for size, _ in raw] + [size for t in tables for size in t.turned().wire.tolist()], np.int64
        )
        step = anchor["step"] + sum(steps for _, steps in raw)
        for table in tables:
            if len(table.wire):
                step = first_step(layout, "all_reduce", step)[0] + len(table.wire) * layout.message_steps
        psn = [
            (start + int(queue_pair_pieces(layout, number, anchor["message"], wire).packets.sum())) % 2**24
            for number, start in enumerate(anchor["psn"])
        ]
        return {"psn": psn, "message": anchor["message"] + len(wire), "step": step}

    def _step_of(self, connection: _Connection, layout: LearnedLayout, start: int, section: int) -> int:
        """Return the step of the first message of a section's passes, counted back from the first group found there."""
        group = next(g for g in self.groups if g.section == section and g.index in connection.found)
        found, table = connection.found[group.index], connection.tables[group.kind]
        step, multiple = connection.step(found.at), layout.operation_steps
        step -= table.lead * layout.message_steps
        for pass_ in reversed(self.passes[self._first(section) : group.index]):
            step -= (
                -(-len(connection.tables[pass_.dtype, pass_.elements].wire) * layout.message_steps // multiple)
                * multiple
            )
        return step

    def learned(self) -> Learned:
        document = self._layout()
        layout = LearnedLayout.model_validate_json(json.dumps(document))
        sections = list(dict.fromkeys(group.section for group in self.groups))
        starts = [self._start(connection, sections[0]) for connection in self.connections]
        raws = []
        for connection, start in zip(self.connections, starts, strict=True):
            seen = int(connection.messages["number"][0])
            raws.append((self._raw(connection, seen, start) if seen < start else []) or [])
        anchors = [
            self._anchor(connection, layout, start, raw, sections[0])
            for connection, start, raw in zip(self.connections, starts, raws, strict=True)
        ]
        end = self.begins[0] if self.begins else len(self.passes)
        startup = self._operations(raws, 0, end)
        ends = [
            self._end(connection, layout, anchor, raw, end)
            for connection, anchor, raw in zip(self.connections, anchors, raws, strict=True)
        ]
        before: list[dict[str, Any]] = []
        for section in sections[1:]:
            first = self._first(section)
            between = []
            for connection, start in zip(self.connections, starts, strict=True):
                behind = start + self._length(connection, self._first(sections[0]), first)
                raw = self._raw(connection, behind, self._start(connection, section))
                if raw is None:
                    raise LearningError(
                        f"{connection.seen}: frames are missing between the iteration and the passes after it: what else "
                        "was sent there is not known"
                    )
                between.append(raw)
            before = self._operations(between, first, len(self.passes))
        return Learned(document | {"anchors": anchors}, self._named(), startup, before, ends)

    def _operations(self, raws: list[list[list[int]]], begin: int, end: int) -> list[dict[str, Any]]:
        raw = [{"op": "raw", "messages": raws}] if any(raws) else []
        return raw + [
            {"op": "all_reduce", "dtype": step.dtype, "elements": step.elements} for step in self.passes[begin:end]
        ]

    def _named(self) -> list[dict[str, Any]]:
        """Return the plan's connections; channels of an edge are numbered by their queue pairs."""
        out: list[dict[str, Any]] = []
        for connection in self.connections:
            seen = connection.seen
            edge = self.ring.index(seen.sender)
            out.append({
                "edge": edge,
                "channel": sum(other["edge"] == edge for other in out),
                "source": text(seen.source),
                "destination": text(seen.destination),
                "proof": {"kind": "learned", "data": seen.data_queue_pairs, "credit": seen.credit_queue_pairs},
            })  # fmt: skip
        return out
