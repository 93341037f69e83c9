# SPDX-License-Identifier: MIT
"""The library's connections as frames alone show them: queue pairs, credits, numbered messages; no plan, no layout.

A message of a queue pair is all up to a packet with immediate. What follows without a hole is a stretch; the number of
its messages on the connection comes from the credits: a slot's newest credit before a message is the message's own, or
an older one where that is lost. So the highest number that two messages of a stretch agree on is theirs.

Facts: NCCL src/transport/net_ib.cc (src/transport/net_ib/ from 2.29).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

import numpy as np

from flowcheck.errors import LearningError
from packet_parser._collect import Collector, gather

__all__ = ["MESSAGE_SEEN", "PIECE", "Seen", "observe"]

_FIRST, _ONLY, _ONLY_IMMEDIATE = 6, 10, 11
#: (bytes, tag, message number, key) of a credit's forms: offsets of little-endian fields (struct ncclIbSendFifo).
_CREDIT_FORMS = ((32, 20, 24, 12), (64, 24, 32, 12), (64, 36, 40, 16), (64, 52, 56, 16))

#: One queue pair's part of a message; `row` and `rows` are its packets in `Seen.packets`.
PIECE = np.dtype([
    ("number", "<i8"), ("queue_pair", "<i4"), ("wire", "<i8"), ("address", "<u8"), ("slot", "<u8"), ("psn", "<i8"),
    ("row", "<i8"), ("rows", "<i8"), ("bulk_split", "?"), ("immediate", "<u4"), ("time_ns", "<u8"), ("stretch", "<i8"),
])  # fmt: skip
#: A message of which all pieces are there; `piece` and `pieces` are in `Seen.pieces`.
MESSAGE_SEEN = np.dtype([
    ("number", "<i8"), ("wire", "<i8"), ("slot", "<u8"), ("piece", "<i8"), ("pieces", "<i8"), ("bulk_split", "?"),
    ("immediate", "<u4"), ("time_ns", "<u8"),
])  # fmt: skip


def text(address: bytes) -> str:
    """Return 16 bytes as the address that they are, IPv4 where mapped."""
    value = ipaddress.IPv6Address(address)
    return str(value.ipv4_mapped or value)


@dataclass
class Seen:
    """One connection: its ends, its queue pairs in the library's order, and its messages by number.

    `credit` is (bytes, tag, index) of a credit; `sender` the rank that credits name. `exact_addresses` is None where no
    empty piece of a split message shows how it is addressed.
    """

    source: bytes
    destination: bytes
    sender: int
    credit: tuple[int, int, int]
    data_queue_pairs: list[int]
    credit_queue_pairs: list[int]
    splits: bool
    exact_addresses: bool | None
    packets: np.ndarray
    pieces: np.ndarray
    messages: np.ndarray

    def __str__(self) -> str:
        return f"{text(self.source)} to {text(self.destination)}, queue pairs {self.data_queue_pairs}"

    def payload(self, spool: np.ndarray, message: np.void) -> np.ndarray:
        """Return a message's bytes as they were on the wire."""
        pieces = self.pieces[message["piece"] : message["piece"] + message["pieces"]]
        rows = np.concatenate([np.arange(p["row"], p["row"] + p["rows"]) for p in pieces])
        packets = self.packets[rows]
        return gather(spool, np.ascontiguousarray(packets["payload"]), np.ascontiguousarray(packets["length"]))


def _whole_messages(packets: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Return the whole messages (PIECE, numbers not set) in a flow's packets, which are in order of PSN."""
    rows = packets[begin:end]
    ends = np.flatnonzero(rows["has_immediate"]) + 1
    if not len(ends):
        return np.empty(0, PIECE)
    starts = np.r_[0, ends[:-1]]
    first, last = rows[starts], rows[ends - 1]
    count = ends - starts
    joined = np.r_[False, first["psn"][1:] == last["psn"][:-1] + 1]
    begins = (first["opcode"] == _FIRST) | ((first["opcode"] == _ONLY_IMMEDIATE) & (first["address"] != 0))
    whole = (last["psn"] - first["psn"] + 1 == count) & first["has_address"] & (begins | joined)
    out = np.zeros(len(ends), PIECE)
    out["wire"] = np.add.reduceat(rows["length"].astype(np.int64), starts)
    out["address"], out["psn"], out["time_ns"] = first["address"], first["psn"], first["time_ns"]
    out["row"], out["rows"] = begin + starts, count
    out["bulk_split"] = (count > 1) & (last["opcode"] == _ONLY_IMMEDIATE)
    out["immediate"] = last["immediate"]
    out["stretch"] = np.cumsum(~(joined & whole & np.r_[False, whole[:-1]]))
    return out[whole]


@dataclass
class _Credits:
    """The credits of a flow, those with a changed form aside: their form and fields."""

    key: tuple[bytes, bytes, int]
    form: tuple[int, int, int]
    sender: int
    addresses: np.ndarray
    keys: set[int]
    index: np.ndarray
    time_ns: np.ndarray

    @classmethod
    def of(cls, key: tuple[bytes, bytes, int], rows: np.ndarray, spool: np.ndarray) -> _Credits | None:
        """Return the credits that a flow's packets are; None if they are none."""
        size = int(rows["length"][0])
        if len(rows) < 2 or (rows["opcode"] != _ONLY).any() or (rows["length"] != size).any():
            return None
        data = gather(spool, np.ascontiguousarray(rows["payload"]), np.ascontiguousarray(rows["length"]))
        data = data.reshape(-1, size)

        def field(at: int, width: int) -> np.ndarray:
            return np.ascontiguousarray(data[:, at : at + width]).view(f"<u{width}")[:, 0].astype(np.int64)

        next_ = np.diff(rows["psn"].astype(np.int64)) == 1
        for length, tag, index, rkey in _CREDIT_FORMS:
            if length != size:
                continue
            number, sender = field(index, 8), field(tag, 4)
            if (
                (number > 0).all()
                and (np.diff(number)[next_] == 1).all()
                and next_.any()
                and (sender == sender[0]).all()
            ):
                keys = set(field(rkey, 4).tolist())
                return cls(key, (length, tag, index), int(sender[0]), field(0, 8), keys, number - 1, rows["time_ns"])
        return None

    def slots(self) -> np.ndarray:
        """Return the addresses that were credited, sorted."""
        return np.unique(self.addresses)

    def votes(self, pieces: np.ndarray) -> np.ndarray:
        """Return per piece the number of the newest credit for its slot that came before it, -1 if there was none."""
        out = np.full(len(pieces), -1, np.int64)
        for slot in np.unique(pieces["slot"]).tolist():
            given = np.flatnonzero(self.addresses == slot)
            given = given[np.argsort(self.time_ns[given], kind="stable")]
            of_slot = np.flatnonzero(pieces["slot"] == slot)
            place = np.searchsorted(self.time_ns[given], pieces["time_ns"][of_slot], "right") - 1
            out[of_slot] = np.where(place >= 0, self.index[given][place], -1)
        return out


def _port(one: int, other: int) -> int:
    """Return the UDP source port that a driver makes of two queue pair numbers where none is asked for (mlx5)."""
    value = one * other
    value ^= value >> 20
    value ^= value >> 40
    label = value & 0xFFFFF
    return (label & 0x3FFF) ^ (label >> 14) | 0xC000


def _reverse(flows: dict, key: tuple[bytes, bytes, int], credits_: _Credits) -> int | None:
    """Return the queue pair that a data flow's acknowledgements go to: both ways have the same source port."""
    source, destination, number = key
    port = flows[key][1]
    found = [k[2] for k, entry in flows.items() if k[:2] == (destination, source) and entry[1] == port]
    if len(found) > 1:
        found = [other for other in found if _port(number, other) == port]
    if len(found) > 1 and credits_.key[2] in found:
        return credits_.key[2]
    return found[0] if len(found) == 1 else None


def _number(pieces: np.ndarray, given: _Credits, turn: int) -> np.ndarray:
    """Return the messages of one queue pair that credits number, each `turn` after the one before it."""
    votes, kept = given.votes(pieces), []
    for stretch in np.unique(pieces["stretch"]):
        index = np.flatnonzero(pieces["stretch"] == stretch)
        place = np.arange(len(index)) * turn
        cast = (votes[index] - place)[votes[index] >= 0]
        if not len(cast):
            continue
        found, count = np.unique(cast, return_counts=True)
        found = found[count > 1]
        if not len(found):
            continue
        # A credit that is lost or late leaves an older one of its slot; none is ever newer than the message's own.
        part = pieces[index]
        part["number"] = found[-1] + place
        kept.append(part)
    return np.concatenate(kept) if kept else pieces[:0]


def _connection(given: _Credits, flows: dict, parts: dict, packets: np.ndarray) -> Seen:
    """Return the connection of a credit flow and the data flows that use its slots."""
    slots = given.slots().astype(np.uint64)
    pieces: dict[int, np.ndarray] = {}
    for key, own in parts.items():
        own["slot"] = slots[np.maximum(np.searchsorted(slots, own["address"], "right") - 1, 0)]
        pieces[key[2]] = own
    count = len(pieces)
    # A message that goes whole begins where its slot does; so do pieces of empty ones, but then there are more of them.
    splits = any((own["address"] != own["slot"]).any() for own in pieces.values())
    splits |= 2 * sum(map(len, pieces.values())) > (count + 1) * len(given.index) and count > 1
    turn = 1 if splits else count
    pieces = {number: _number(own, given, turn) for number, own in pieces.items()}
    if splits:
        order = sorted(pieces, key=lambda q: (int((pieces[q]["address"] - pieces[q]["slot"]).max(initial=0)), q))
    else:
        turns = {q: int(np.bincount(own["number"] % count).argmax()) if len(own) else -1 for q, own in pieces.items()}
        order = sorted(pieces, key=turns.__getitem__)
        if [turns[q] for q in order] != list(range(count)):
            raise LearningError(
                f"{text(given.key[1])} to {text(given.key[0])}: queue pairs {order} take the turns "
                f"{[turns[q] for q in order]} of a connection of {count}: frames of one are missing, or they are of several"
            )
    for place, queue_pair in enumerate(order):
        pieces[queue_pair]["queue_pair"] = place
    joined = np.concatenate([pieces[q] for q in order])
    joined = joined[np.lexsort((joined["queue_pair"], joined["number"]))]
    numbers, first, parts_of = np.unique(joined["number"], return_index=True, return_counts=True)
    messages = np.zeros(len(numbers), MESSAGE_SEEN)
    messages["number"], messages["piece"], messages["pieces"] = numbers, first, parts_of
    for name in ("slot", "immediate"):
        messages[name] = joined[name][first]
    if len(joined):
        messages["wire"] = np.add.reduceat(joined["wire"], first)
        messages["bulk_split"] = np.logical_or.reduceat(joined["bulk_split"], first)
        messages["time_ns"] = np.minimum.reduceat(joined["time_ns"], first)
    messages = messages[parts_of == (count if splits else 1)]
    exact = None
    if splits:
        total = np.repeat(messages["wire"], count)
        mine = joined[np.isin(joined["number"], messages["number"])]
        offset = (mine["address"] - mine["slot"]).astype(np.int64)
        if ((mine["wire"] == 0) & (total > 0)).any():
            exact = not (offset > total).any()
    back = [_reverse(flows, (given.key[1], given.key[0], q), given) for q in order]
    credit = [number for number in dict.fromkeys([*back, given.key[2]]) if number is not None]
    return Seen(
        given.key[1], given.key[0], given.sender, given.form, order, credit, splits, exact, packets, joined, messages
    )


def observe(collector: Collector, spool: np.ndarray) -> list[Seen]:
    """Return the connections whose data and credits were collected; data flows without credits belong to none."""
    packets = collector.packets()
    packets = packets[np.lexsort((packets["psn"], packets["flow"]))]  # stable: of repeats the first taken comes first
    repeat = (np.diff(packets["psn"]) == 0) & (np.diff(packets["flow"]) == 0)
    packets = packets[np.r_[True, ~repeat]] if len(packets) else packets
    credits_, data = [], {}
    for key, (number, _) in collector.flows.items():
        begin, end = np.searchsorted(packets["flow"], [number, number + 1])
        rows = packets[begin:end]
        if not len(rows):
            continue
        if rows["has_immediate"].any():
            data[key] = (
                begin,
                end,
                set(np.unique(rows["rkey"][rows["has_address"] & (rows["address"] != 0)]).tolist()),
            )
        elif (found := _Credits.of(key, rows, spool)) is not None:
            credits_.append(found)
    out = []
    for given in credits_:
        slots = given.slots()
        room = int(np.diff(slots).min()) if len(slots) > 1 else 1 << 24
        parts = {}
        for key, (begin, end, keys) in data.items():
            if key[:2] != (given.key[1], given.key[0]) or not keys & given.keys:
                continue
            own = _whole_messages(packets, begin, end)
            inside = (own["address"] >= slots[0]) & (own["address"] < slots[-1] + room)
            if inside.any():
                parts[key] = own
        if parts:
            out.append(_connection(given, collector.flows, parts, packets))
    return out
