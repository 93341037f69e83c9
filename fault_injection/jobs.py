# SPDX-License-Identifier: MIT
"""The jobs of the campaign: recorded once, and what the recorder and the trainer say of every frame, byte and state.

Bytes are counted in units of 8, the granularity that FlowCheck promises for ranges. The units of an iteration are those of
its buckets in order, then those of its step record; where a unit travels is the recorder's word (`workload_gen.frame_index`),
how a payload is laid out is the writer's (`workload_gen.wire`), what is right is the trainer's (`truth`).
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fault_injection.frames import Header, read_capture
from workload_gen.frame_index import index_path
from workload_gen.wire import decode, encode

__all__ = ["JOBS", "OUTAGE_JOBS", "Iteration", "Job", "Link", "record_job"]

UNIT = 8

#: Options of `workload_gen.record.Recording` by name; small models, so that many iterations fit in a second. In ll-2 the sequence
#: numbers of both links come round within a message whose bytes are shown nowhere else.
JOBS: dict[str, dict[str, Any]] = {
    "ll-2": {"ranks": 2, "protocol": "ll", "parameters": 2000, "hook": True, "optimizer": "sgd", "start_psn": 0xFFFF06},
    "ll128-3": {
        "ranks": 3, "protocol": "ll128", "nccl": "2.23", "parameters": 6000, "links": (0, 1, 2), "hook": True, "optimizer": "adamw",
    },
    "simple-3": {
        "ranks": 3, "protocol": "simple", "nccl": "2.23", "parameters": 9000, "links": (0, 1, 2), "optimizer": "sgd", "fused": True,
    },
    "simple-4-hook": {
        "ranks": 4, "protocol": "simple", "nccl": "2.26", "parameters": 9000, "links": (0, 1, 2, 3), "hook": True, "queue_pairs": 2,
        "split_queue_pairs": False, "optimizer": "adamw", "ip": 4,
    },
    "ll-4": {
        "ranks": 4, "protocol": "ll", "nccl": "2.21", "parameters": 3000, "links": (0, 1, 2), "channels": 2, "optimizer": "adamw",
        "fused": True, "start_psn": 0xFFFF80,
    },
    "ll128-2": {"ranks": 2, "protocol": "ll128", "nccl": "2.29", "parameters": 6000, "optimizer": "sgd", "vlan": 7},
    "ll-3-hook": {
        "ranks": 3, "protocol": "ll", "nccl": "2.18", "parameters": 3000, "links": (0, 2), "hook": True, "optimizer": "adamw",
        "queue_pairs": 2, "bucket_mb": 0.004, "start_psn": 0xFFF000,
    },
}  # fmt: skip

#: Of kinds in which sequence numbers come round: small packets, so that they do after few iterations, and no step records, which
#: would have to say other iterations.
OUTAGE_JOBS = {
    "outage-ll-2": {"ranks": 2, "protocol": "ll", "parameters": 20000, "mtu": 256, "optimizer": "sgd"},
    "outage-simple-3": {
        "ranks": 3, "protocol": "simple", "nccl": "2.23", "parameters": 30000, "mtu": 256, "links": (0, 1, 2), "optimizer": "sgd",
        "queue_pairs": 2, "split_queue_pairs": False, "start_psn": 0xFFF000,
    },
    "outage-ll128-2": {"ranks": 2, "protocol": "ll128", "nccl": "2.26", "parameters": 30000, "mtu": 256, "optimizer": "sgd"},
}  # fmt: skip
_OTHERS = {
    "loss-4": {
        "ranks": 4, "protocol": "ll", "nccl": "2.23", "parameters": 4000, "links": (0, 1, 2), "hook": True, "optimizer": "sgd",
    },
}  # fmt: skip
_OPTIONS = {**JOBS, **OUTAGE_JOBS, **_OTHERS}


@dataclass
class Iteration:
    """Where the units of an iteration lie.

    Attributes:
        buckets: (first unit, bytes) of each bucket.
        record: first unit of the step record; None without one.
        repeated: units [first, last) of the record that repeat the record before.
        units: in all, the record's with them.
    """

    buckets: list[tuple[int, int]]
    record: int | None
    repeated: tuple[int, int]
    units: int

    @property
    def gradient_units(self) -> int:
        """Units of the buckets."""
        return self.units if self.record is None else self.record

    def flat_ranges(self, missing: np.ndarray) -> list[tuple[int, int]]:
        """Return units (bool, of the gradient) as byte ranges of the flat gradient, ascending, joined."""
        out: list[tuple[int, int]] = []
        at = 0
        for first, size in self.buckets:
            own = missing[first : first - (-size // UNIT)].astype(np.int8)
            edges = np.flatnonzero(np.diff(own, prepend=0, append=0)) * UNIT
            for begin, end in edges.reshape(-1, 2).tolist():
                begin, end = at + begin, at + min(end, size)
                if out and out[-1][1] == begin:
                    begin = out.pop()[0]
                out.append((begin, end))
            at += size
        return out


@dataclass
class Link:
    """The frames of one mirrored link; lists run over the frames of its capture.

    Attributes:
        frames, ns: each frame and its time stamp.
        headers: decoded from the frame itself.
        iteration: of data packets, 0 at start-up, -1 of all else.
        flow: of data packets (channel, queue pair), else None.
        position: of data packets, their number on the flow.
        message: of data packets, (channel, number of the message on the connection), else None.
        operation: of data packets, the number of the collective, else -1.
        units: which units a packet brings fully reduced; None: none.
        record: whether a packet is of a step record.
    """

    frames: list[bytes]
    ns: list[int]
    headers: list[Header]
    iteration: list[int] = field(default_factory=list)
    flow: list[tuple[int, int] | None] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    message: list[tuple[int, int] | None] = field(default_factory=list)
    units: list[np.ndarray | None] = field(default_factory=list)
    record: list[bool] = field(default_factory=list)
    operation: list[int] = field(default_factory=list)

    def carried(self, indices: Iterable[int]) -> tuple[Counter[tuple[int, int]], Counter[int]]:
        """Return how many packets each flow carries among some data packets, and how many messages each channel."""
        own = list(indices)
        messages = {self.message[index] for index in own}
        return Counter(self.flow[index] for index in own), Counter(channel for channel, _ in messages)


def _carried_units(protocol: str, size: int, offset: int, count: int) -> np.ndarray:
    """Return which units of a message of `size` bytes its payload bytes [offset, offset + count) bring."""
    units = _units_of_words(protocol, size)[offset // 8 : -(-(offset + count) // 8)]
    return units[units >= 0]


@functools.lru_cache(maxsize=256)
def _units_of_words(protocol: str, size: int) -> np.ndarray:
    """Return per 8 bytes of a message's payload the unit that lies there (of LL: half of it), -1: none.

    Found by having the writer lay out a message whose data number its own units.
    """
    units = -(-size // UNIT)
    numbers = (np.arange(units, dtype="<u8") + 1) * 0x1_0000_0001  # either half of a unit gives its number
    payload = np.frombuffer(encode(protocol, numbers.tobytes(), 0, bytes(8)), np.uint8)
    if decode(protocol, payload, 8 * units, 0).tobytes() != numbers.tobytes():
        raise AssertionError("the writer reads something else than it wrote")
    words = payload.view("<u8") & 0xFFFFFFFF
    if protocol == "ll":
        words = payload.view("<u4")[0::2].astype(np.int64)  # data, flag
    elif protocol == "ll128":
        words = words.copy()
        words[15::16] = 0  # the flag
    return words.astype(np.int64) - 1


class Job:
    """A recorded job, its frames and its truth, read only; with only so many of its streams if a number is given.

    Attributes:
        name, folder: of the recording.
        document: its plan, as JSON.
        links: by number.
        iterations: how many there are.
        state_digests: by iteration, of the trainer's state after it.
        gradient_digests: by iteration, SHA-256 of each bucket.
    """

    def __init__(self, folder: Path, streams: int | None = None) -> None:
        self.name, self.folder = folder.name, folder
        self.document = json.loads((folder / "plan.json").read_text())
        self.shard = self.document["shards"][0]
        self.shard["streams"] = self.shard["streams"][:streams]
        shown = {link for stream in self.shard["streams"] for link in stream["links"]}
        self.shard["connections"] = [c for c in self.shard["connections"] if c["edge"] in shown]
        self.state_digests = {int(k): v for k, v in json.loads((folder / "digests.json").read_text()).items()}
        self.iterations = max(self.state_digests)
        self.protocol, self.ranks = self.shard["layout"]["protocol"], len(self.shard["layout"]["ring"])
        self.hook = bool(self.shard.get("step_record"))
        self.streams = {stream["name"]: stream["links"] for stream in self.shard["streams"]}
        self.links = {link: self._read(link) for links in self.streams.values() for link in links}

    # -- what the plan says of sizes ---------------------------------------------------------------------------------

    @functools.cached_property
    def plan(self) -> Any:
        """The plan that the document is."""
        from flowcheck import plan as plans

        return plans.parse(json.dumps(self.document))

    def _revision(self, iteration: int) -> dict[str, Any]:
        return next(r for r in reversed(self.shard["revisions"]) if r["from_iteration"] <= max(1, iteration))

    def shape(self, iteration: int) -> Iteration:
        """Return where the units of an iteration lie; of 0 those of the initial state."""
        return self._shape(0 if iteration == 0 else self._revision(iteration)["from_iteration"])

    @functools.cache  # noqa: B019
    def _shape(self, first: int) -> Iteration:
        width = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
        if first == 0:
            entries = [op for op in self.shard.get("startup", []) if op.get("carries")]
        else:
            entries = self._revision(first)["buckets"]
        buckets, at = [], 0
        for entry in entries:
            size = entry["elements"] * width[entry["dtype"]]
            buckets.append((at, size))
            at += -(-size // UNIT)
        if not self.hook or first == 0:
            return Iteration(buckets, None, (0, 0), at)
        form = self.plan.record_form
        words = 4 * form.words // UNIT
        return Iteration(buckets, at, (at + words, at + 2 * words), at - (-4 * form.elements // UNIT))

    # -- what the recorder says of frames ----------------------------------------------------------------------------

    def _operations(self, operations: np.ndarray) -> list[tuple[int, int | None]]:
        """Return per recorded operation (iteration, first unit of what it brings or None)."""
        rows: list[tuple[int, int | None]] = []
        for iteration in range(1, self.iterations + 1):
            revision, shape = self._revision(iteration), self.shape(iteration)
            if revision["from_iteration"] == iteration:
                rows += [(iteration, None)] * len(revision.get("before", []))
            rows += [(iteration, first) for first, _ in shape.buckets]
            if shape.record is not None:
                rows.append((iteration, shape.record))
        startup = len(operations) - len(rows)
        planned = self.shard.get("startup", [])
        if startup != len(planned):
            raise AssertionError(
                f"{self.folder}: {startup} operations before the first iteration, the plan has {len(planned)}"
            )
        initial = iter(first for first, _ in self.shape(0).buckets)
        return [(0, next(initial) if op.get("carries") else None) for op in planned] + rows

    def _read(self, number: int) -> Link:
        capture = self.folder / f"link-{number}.pcapng"
        frames, ns = read_capture(capture)
        headers = [Header.of(frame) for frame in frames]
        link = Link(frames, ns, headers)
        count = len(frames)
        link.iteration, link.position, link.record = [-1] * count, [-1] * count, [False] * count
        link.operation = [-1] * count
        link.flow, link.message, link.units = [None] * count, [None] * count, [None] * count
        with np.load(index_path(capture)) as file:
            rows, operations = file["frames"], file["operations"]
        places = self._operations(operations)
        self._note_gradients(operations, places)
        on_flow: dict[tuple[int, int], int] = {}
        for row in rows.tolist():
            frame, operation, message, number_on, channel, pair, first, size, offset, wire, final, _same = row
            flow = (channel, pair)
            iteration, begin = places[operation]
            link.iteration[frame], link.flow[frame] = iteration, flow
            link.message[frame], link.operation[frame] = (channel, number_on), operation
            link.position[frame] = on_flow[flow] = on_flow.get(flow, -1) + 1
            if begin is None or not size:
                continue
            is_record = iteration > 0 and begin == self.shape(iteration).record
            link.record[frame] = is_record
            limit = None
            if not final:
                if not is_record or not self._shows_record(number, message):
                    continue
                limit = self.shape(iteration).repeated[1] - begin  # not of the digests, to which every rank adds
            if first % UNIT:
                raise AssertionError(f"{capture}: a message begins at byte {first}, within a unit")
            units = first // UNIT + _carried_units(self.protocol, size, offset, wire)
            if limit is not None:
                units = units[units < limit]
            if len(units):
                link.units[frame] = np.unique(units) + begin
        return link

    def _shows_record(self, link: int, message: int) -> bool:
        """Whether a partial sum of a step record has all but the receiver's part, and the receiver adds zeros."""
        slices = 2 if self.protocol == "simple" else 1
        ring = self.shard["layout"]["ring"]
        send = message // slices % (2 * (self.ranks - 1))
        return send == self.ranks - 2 and ring[(link + 1) % self.ranks] != self.shard["step_record"]["contributor"]

    def _note_gradients(self, operations: np.ndarray, places: list[tuple[int, int | None]]) -> None:
        self.gradient_digests: dict[int, list[bytes]] = {}
        for (iteration, begin), operation in zip(places, operations, strict=True):
            if iteration and begin is not None and begin != self.shape(iteration).record:
                self.gradient_digests.setdefault(iteration, []).append(operation["sha256"].tobytes())

    @functools.cached_property
    def least_sources(self) -> int:
        """In how many streams the gradient byte that the fewest show is to be seen, in the last iteration."""
        counts = np.zeros(self.shape(self.iterations).gradient_units, int)
        for links in self.streams.values():
            seen = np.zeros(len(counts), bool)
            for link in (self.links[number] for number in links):
                for iteration, units in zip(link.iteration, link.units, strict=True):
                    if iteration == self.iterations and units is not None:
                        seen[units[units < len(seen)]] = True
            counts += seen
        return int(counts.min())


def record_job(name: str, folder: Path, iterations: int, seed: int) -> Path:
    """Record a job of this module into a folder, unless it is there; return the folder."""
    out = folder / f"{name}-{iterations}-{seed}"
    if (out / "digests.json").exists():
        return out
    import shutil

    import torch

    from workload_gen.record import Recording, record
    from workload_gen.truth import digest

    shutil.rmtree(out, ignore_errors=True)
    record(Recording(out=out, iterations=iterations, index=True, seed=seed, **_OPTIONS[name]))
    states = sorted((out / "truth").glob("iteration-*.pt"))
    digests = {int(path.stem[10:]): digest(torch.load(path, weights_only=True)) for path in states}
    partial = out / "digests.unfinished"
    partial.write_text(json.dumps(digests))
    partial.rename(out / "digests.json")
    return out
