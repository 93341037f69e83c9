# SPDX-License-Identifier: MIT
"""The stages between port and slot, each alone and all together, over captures that are made here.

A capture holds both edges of a two-rank job in one stream: half of its data packets are partial sums, the others bring the
gradient. Rings and slots hold all of it, so that each stage can be run alone; between runs they are put back to their
beginning, not made anew, so that no page is touched for the first time while a clock runs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import Clock, Results, Sizes
from bench.yardsticks import PIECE, Yardsticks
from data_extractor.extractor import Extractor
from flowcheck import mapped
from flowcheck import plan as plans
from flowcheck.capture import validate
from flowcheck.errors import FormatError
from flowcheck.formats import RECORD
from flowcheck.ring import PacketRing
from flowcheck.slots import WHOLE, SlotFile
from flowcheck.verdicts import VERDICTS
from packet_dump.dump import FileDump, PortDump
from packet_parser.parser import Parser
from workload_gen.wire import LinkTap, connections

__all__ = [
    "ENCODINGS", "FRAMES_TO_SLOT", "PAYLOADS", "Rig", "capture",
    "drain", "extraction", "frames_to_slot", "plan_of", "poll_for", "second_copies", "suffix",
]  # fmt: skip

#: Bytes of a full packet's payload; figures of the first have no suffix.
PAYLOADS = (4096, 1024)


@dataclass(frozen=True)
class Encoding:
    """What a protocol's extraction is called and held against: a loop of the yardsticks; slot bytes of 128 on the wire."""

    name: str
    loop: str
    yardstick: str
    slot_bytes: int


ENCODINGS = {
    "simple": Encoding("plain", "copy", "memcpy of the same payloads", 128),
    "ll": Encoding("ll", "copy_half", "copy that reads 16 and writes 8", 64),
    "ll128": Encoding("ll128", "copy_lines", "copy that reads 128 and writes 120", 120),
}
#: One per slot of the file, the fewest that a plan may have: nothing has to be given back.
ITERATIONS = 3
_PAGE = 4096
_FILL = "memcpy of the same frames into the same ring"
#: Of `frames_to_slot`: name, unit, what is counted, what is timed; the yardstick, and what is timed for it.
_ROWS = (
    ("validate", "bytes/s", "packed", "validate", _FILL, "fill"),
    ("dump", "bytes/s", "packed", "dump", _FILL, "fill"),
    ("dump_null", "bytes/s", "null", "dump_null", _FILL, "fill_null"),
    ("parse", "frames/s", "frames", "parse", "touching two lines of each frame", "touch"),
    ("parse_icrc", "bytes/s", "packed", "parse_icrc", "reading the same frames", "read"),
    ("extract_plain", "bytes/s", "payloads", "extract", ENCODINGS["simple"].yardstick, "copy"),
    ("chain_1core", "bytes/s", "packed", "chain", _FILL, "fill"),
    ("chain_2cores", "bytes/s", "packed", "both", "the same on one core", "chain"),
)
#: Their names.
FRAMES_TO_SLOT = tuple(row[0] for row in _ROWS)
#: Buffers that DPDK's null driver hands out in turn, as many as the dump gives it.
_NULL_FRAMES = 1024
_numbers = itertools.count()


def capture(
    path: Path, protocol: str, payload: int, data_bytes: int, iterations: int = ITERATIONS
) -> plans.Layout:  # fmt: skip
    """Write a capture whose packets bring so many bytes, on the wire, of gradients; the partial sums come on top.

    Fewer `iterations` bring less: the first ones of it.
    """
    layout = plans.Layout(
        source="modelled", library="nccl", version="2.24", protocol=protocol, ring=(0, 1), mtu=payload
    )
    links = [connection for edge in (0, 1) for connection in connections(layout, edge, 4, None, 0)]
    elements = _elements(protocol, data_bytes)
    partial, result = torch.randn(elements), torch.randn(elements)
    tap = LinkTap(layout, links, path)
    for _ in range(iterations):
        tap.all_reduce(partial, result)
    tap.close()
    return layout


def _elements(protocol: str, data_bytes: int) -> int:
    return data_bytes * ENCODINGS[protocol].slot_bytes // 128 // 4 // ITERATIONS // 2 * 2


def plan_of(layout: plans.Layout, data_bytes: int, streams: Iterable[str]) -> plans.Plan:
    """Return the plan of a capture, which each of the streams shows."""
    bucket = {"dtype": "float32", "elements": _elements(layout.protocol, data_bytes)}
    shard = {
        "name": "model",
        "revisions": [{"from_iteration": 1, "buckets": [bucket]}],
        "layout": layout.model_dump(mode="json", exclude_none=True),
        "connections": [
            {
                "edge": edge, "channel": c.channel, "source": c.forward.source, "destination": c.forward.destination,
                "proof": {"kind": "queue_pair", "data": c.data_queue_pairs, "credit": c.credit_queue_pairs},
            }
            for edge in (0, 1)
            for c in connections(layout, edge, 4, None, 0)
        ],
        "streams": [{"name": name, "links": [0, 1]} for name in streams],
    }  # fmt: skip
    job = {"run_id": "bench", "attempt": 1, "world_size": 2}
    document = {"format": "flowcheck-plan", "version": 1, "job": job, "shards": [shard], "slots": ITERATIONS}
    return plans.parse(json.dumps(document))


def drain(*stages: Any) -> None:
    """Poll stages in turn until all are finished."""
    while not all(stage.finished for stage in stages):
        for stage in stages:
            stage.poll()


class Rig:
    """Rings and slots for a capture, and the stages over them; use it in a `with`.

    `restart` puts all back to the beginning. Stages are made anew for each use: they take up what they find.
    """

    def __init__(self, folder: Path, eal: object, path: Path, plan: plans.Plan) -> None:
        self.plan, self._eal, self._path = plan, eal, path
        self.frames = validate(path).frames
        records = max(256, 1 << (self.frames - 1).bit_length())
        names = [stream.name for stream in plan.shard.streams]
        self._stack = contextlib.ExitStack()
        self.rings = [
            self._stack.enter_context(PacketRing.for_stream(folder / f"{name}.ring", plan, name, records))
            for name in names
        ]
        self.slots = self._stack.enter_context(SlotFile.for_plan(folder / "slots", plan))
        #: Memory of the kind that slots have, with room behind, for yardsticks to write into.
        spare = folder / "spare"
        mapped.create(spare, len(self.slots.memory) + (1 << 20), {})
        self.spare = mapped.map_file(spare, "spare file", FormatError)
        self._stack.callback(mapped.unmap, self.spare)
        for made in (*(ring.path for ring in self.rings), self.slots.path, spare):
            self._stack.callback(made.unlink)
        self._begin = self.mark()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def mark(self) -> list[tuple[Any, int, bytes]]:
        """Return where the stages are: cursors, states, headers of slots, but no record and no coverage."""
        places = [(ring.memory, 0, ring.header_bytes) for ring in self.rings]
        places += [(self.slots.memory, 0, _PAGE)]
        places += [(self.slots.memory, self.slots.offset(i), _PAGE) for i in range(1, ITERATIONS + 1)]
        return [(memory, at, memory[at : at + size]) for memory, at, size in places]

    def back(self, mark: list[tuple[Any, int, bytes]]) -> None:
        """Put the stages back to where they were; none may be open."""
        for memory, at, content in mark:
            memory[at : at + len(content)] = content

    def restart(self) -> None:
        """Put all back to the beginning: a slot's coverage is cleared when it is opened anew."""
        self.back(self._begin)

    @contextlib.contextmanager
    def dump(self, stream: int = 0) -> Iterator[FileDump]:
        """Open the dump of a stream, from the capture."""
        with contextlib.closing(FileDump(self._eal, self._path, self.rings[stream])) as dump:
            yield dump

    @contextlib.contextmanager
    def null_dump(self, frame_bytes: int) -> Iterator[PortDump]:
        """Open a dump from DPDK's null driver, which hands out frames without end and without writing them."""
        devargs = f"net_null_bench{next(_numbers)},size={frame_bytes}"
        with contextlib.closing(PortDump(self._eal, devargs, self.rings[0])) as dump:
            yield dump

    def parser(self, stream: int = 0, check_icrc: bool = True) -> Parser:
        """Return a stream's parser."""
        ring = self.rings[stream]
        return Parser(ring, self.plan, ring.stream, check_icrc=check_icrc)

    def extractor(self) -> Extractor:
        """Return the extractor."""
        return Extractor(self.rings, self.plan, self.slots)

    def fill(self) -> None:
        """Dump and parse every stream."""
        for stream in range(len(self.rings)):
            with self.dump(stream) as dump:
                drain(dump)
            drain(self.parser(stream))

    def check(self) -> None:
        """Make sure that every iteration is whole."""
        states = [int(self.slots.slot(i)["state"]) for i in range(1, ITERATIONS + 1)]
        assert states == [WHOLE] * ITERATIONS and self.slots.settled_next == ITERATIONS + 1, states

    # -- what yardsticks walk ------------------------------------------------------------------------------------------

    def _records(self) -> np.ndarray:
        ring = self.rings[-1]
        strides = (ring.record_bytes,)
        return np.ndarray((self.frames,), RECORD, buffer=ring.memory, offset=ring.header_bytes, strides=strides)

    def largest_frame(self) -> int:
        """Return the bytes of the largest frame in the last stream's ring, once it is dumped."""
        return int(self._records()["stored_length"].max())

    def _frame_offsets(self, count: int) -> np.ndarray:
        ring = self.rings[-1]
        return ring.header_bytes + ring.record_bytes * np.arange(count, dtype=np.uint64) + RECORD.itemsize

    def frame_pieces(self) -> np.ndarray:
        """Return the frames in the last stream's ring: `source` as they lie packed, `target` in the ring."""
        pieces = np.empty(self.frames, PIECE)
        pieces["length"] = self._records()["stored_length"]
        pieces["source"] = np.concatenate(([0], np.cumsum(pieces["length"])[:-1]))
        pieces["target"] = self._frame_offsets(self.frames)
        return pieces

    def payload_pieces(self) -> np.ndarray:
        """Return the payloads that bring gradient bytes, in the last stream's ring, and about where in the slots they go."""
        records = self._records()
        which = np.flatnonzero((records["verdict"] == VERDICTS.index("placed")) & (records["payload_length"] > 0))
        records = records[which]
        share = ENCODINGS[self.plan.shard.layout.protocol].slot_bytes
        places = np.array(
            [self.slots.offset(i) + int(self.slots.slot(i)["data_offset"]) for i in range(1, ITERATIONS + 1)], np.uint64
        )
        pieces = np.empty(len(which), PIECE)
        pieces["source"] = self._frame_offsets(self.frames)[which] + records["payload_offset"]
        pieces["target"] = places[records["iteration"] - 1] + records["destination"]
        pieces["target"] += records["wire_offset"].astype(np.uint64) * share // 128
        pieces["length"] = records["payload_length"]
        return pieces

    def null_pieces(self, frame_bytes: int) -> np.ndarray:
        """Return what the null driver's frames are: a full ring of them, out of a few buffers."""
        count = self.rings[0].records
        pieces = np.empty(count, PIECE)
        pieces["source"] = np.arange(count, dtype=np.uint64) % _NULL_FRAMES * (-(-frame_bytes // 64) * 64)
        pieces["target"], pieces["length"] = self._frame_offsets(count), frame_bytes
        return pieces


def _turned(pieces: np.ndarray) -> np.ndarray:
    """Return pieces with source and target exchanged."""
    turned = pieces.copy()
    turned["source"], turned["target"] = pieces["target"], pieces["source"]
    return turned


def suffix(payload: int) -> str:
    """Return what the names of rows of a payload end in."""
    return "" if payload == PAYLOADS[0] else f"_{payload}"


def _both_cores(rig: Rig, core: int) -> float:
    """Return the seconds from the first frame to the last iteration, dump on this core, parser and extractor on another."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def behind() -> None:
        os.sched_setaffinity(0, {core})
        mapped.populate(*(ring.memory for ring in rig.rings), rig.slots.memory)
        stages = (rig.parser(), rig.extractor())
        ready.set()
        drain(*stages)

    with rig.dump() as dump:
        child = context.Process(target=behind)
        child.start()
        while not ready.wait(0.1):
            assert child.is_alive(), "parser and extractor do not begin"
        begin = time.perf_counter()
        drain(dump)
        while not rig.slots.ended and child.is_alive():
            pass
        taken = time.perf_counter() - begin
        child.join()
    assert child.exitcode == 0, child.exitcode
    return taken


def frames_to_slot(
    results: Results, sizes: Sizes, folder: Path, eal: object, loops: Yardsticks, payload: int, other_core: int | None
) -> None:
    """Measure dump, parser, the plain extraction, and all of them on one core and on two."""
    path = folder / "capture"
    plan = plan_of(capture(path, "simple", payload, sizes.data_bytes), sizes.data_bytes, ["a"])
    clock = Clock(sizes)
    with Rig(folder, eal, path, plan) as rig:
        ring = rig.rings[0]
        rig.fill()
        frames, payloads = rig.frame_pieces(), rig.payload_pieces()
        packed = np.empty(int(frames["length"].sum()), np.uint8)
        loops.copy(_turned(frames), ring.memory, packed)
        largest = rig.largest_frame()
        null_pieces, null_frames = rig.null_pieces(largest), np.ones(_NULL_FRAMES * (-(-largest // 64) * 64), np.uint8)
        in_ring = _turned(frames)
        for _ in clock.turns():
            rig.restart()
            clock("fill_null", lambda: loops.copy_frames(null_pieces, null_frames, ring.memory))
            with rig.null_dump(largest) as dump:
                clock("dump_null", lambda dump=dump: poll_for(dump, ring.records))
            rig.restart()
            clock("fill", lambda: loops.copy_frames(frames, packed, ring.memory))
            # Not just before the parser, as the other yardsticks: the lines that it touches would all stay in the cache.
            clock("touch", lambda: loops.touch(in_ring, ring.memory))
            clock("validate", lambda: validate(path))
            with rig.dump() as dump:
                clock("dump", lambda dump=dump: drain(dump))
            dumped = rig.mark()
            parser = rig.parser(check_icrc=False)
            clock("parse", lambda parser=parser: drain(parser))
            rig.back(dumped)
            clock("read", lambda: loops.read_all(in_ring, ring.memory))
            parser = rig.parser()
            clock("parse_icrc", lambda parser=parser: drain(parser))
            clock("copy", lambda: loops.copy(payloads, ring.memory, rig.spare))
            extractor = rig.extractor()
            clock("extract", lambda extractor=extractor: drain(extractor))
            rig.check()
            rig.restart()
            with rig.dump() as dump:
                stages = (dump, rig.parser(), rig.extractor())
                clock("chain", lambda stages=stages: drain(*stages))
            rig.check()
            if other_core is not None:
                rig.restart()
                clock.times["both"].append(_both_cores(rig, other_core))
                rig.check()
        records = ring.records
    path.unlink()

    moved = {
        "packed": len(packed),
        "null": records * largest,
        "payloads": int(payloads["length"].sum()),
        "frames": len(frames),
    }
    for name, unit, amount, timed, yardstick, theirs in _ROWS:
        if timed in clock.times:
            results.add(
                name + suffix(payload), unit, moved[amount], clock.times[timed], yardstick, moved[amount], clock.times[theirs],
                packets=records if amount == "null" else len(frames), payload=payload,
            )  # fmt: skip


def poll_for(stage: PortDump, count: int) -> None:
    """Poll a stage that never ends until it has moved so many frames."""
    while count > 0:
        count -= stage.poll()


def extraction(
    results: Results, sizes: Sizes, folder: Path, eal: object, loops: Yardsticks, payload: int, protocol: str
) -> None:
    """Measure the extraction of LL or LL128 lines."""
    path = folder / "capture"
    plan = plan_of(capture(path, protocol, payload, sizes.data_bytes), sizes.data_bytes, ["a"])
    encoding = ENCODINGS[protocol]
    loop = getattr(loops, encoding.loop)
    clock = Clock(sizes)
    with Rig(folder, eal, path, plan) as rig:
        rig.fill()
        payloads = rig.payload_pieces()
        for _ in clock.turns():
            rig.restart()
            rig.fill()
            clock("copy", lambda: loop(payloads, rig.rings[0].memory, rig.spare))
            extractor = rig.extractor()
            clock("extract", lambda extractor=extractor: drain(extractor))
            rig.check()
        count = rig.frames
    path.unlink()
    _add_extraction(results, f"extract_{encoding.name}", payload, payloads, clock, count, encoding.yardstick)


def second_copies(
    results: Results, sizes: Sizes, folder: Path, eal: object, loops: Yardsticks, payload: int
) -> None:  # fmt: skip
    """Measure the comparison of second copies: a stream brings what another one has brought before."""
    path = folder / "capture"
    plan = plan_of(capture(path, "simple", payload, sizes.data_bytes), sizes.data_bytes, ["a", "b"])
    clock = Clock(sizes)
    with Rig(folder, eal, path, plan) as rig:
        rig.fill()
        payloads = rig.payload_pieces()
        for _ in clock.turns():
            rig.restart()
            for stream in (0, 1):
                with rig.dump(stream) as dump:
                    drain(dump)
            drain(rig.parser(0))
            extractor = rig.extractor()
            while extractor.poll():
                pass  # the first stream's copies; nothing is settled before the second stream's have come
            assert rig.slots.settled_next == 1 and rig.rings[0].extracted == rig.frames
            drain(rig.parser(1))
            clock("copy", lambda: loops.compare(payloads, rig.rings[1].memory, rig.slots.memory))
            clock("extract", lambda extractor=extractor: drain(extractor))
            rig.check()
        assert loops.compare(payloads, rig.rings[1].memory, rig.slots.memory) == 0
        count = rig.frames
    path.unlink()
    _add_extraction(results, "extract_second", payload, payloads, clock, count, "memcmp of the same payloads and slots")


def _add_extraction(
    results: Results, name: str, payload: int, payloads: np.ndarray, clock: Clock, frames: int, yardstick: str
) -> None:
    moved, times = int(payloads["length"].sum()), clock.times
    results.add(
        f"{name}{suffix(payload)}", "bytes/s", moved, times["extract"], yardstick, moved, times["copy"],
        packets=frames, payload=payload,
    )  # fmt: skip
