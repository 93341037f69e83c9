# SPDX-License-Identifier: MIT
"""The job plan: everything that the shadow must know about a job, one JSON document, validated when it is loaded.

docs/plan.md describes every field. This module knows the document and what follows from it by arithmetic (sizes,
offsets, identity); what the plan means on the wire is `flowcheck.layout`'s.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import math
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flowcheck.errors import ConfigError
from flowcheck.formats import IDENTITY
from flowcheck.learned import LearnedLayout, RawOperation, UnlearnedLayout
from flowcheck.step_record import RecordForm

__all__ = [
    "DTYPE_BYTES",
    "Arithmetic",
    "Audit",
    "Bucket",
    "Checkpoints",
    "Collective",
    "Connection",
    "ExtraState",
    "InitialState",
    "Layout",
    "LearnedLayout",
    "Optimizer",
    "OptimizerName",
    "Plan",
    "RawOperation",
    "Resumed",
    "Retention",
    "Revision",
    "Shard",
    "StateEntry",
    "StepRecord",
    "Stream",
    "UnlearnedLayout",
    "load",
    "parse",
]

#: Bytes of one element on the wire.
DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
}
DtypeName = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8"]

#: A message longer than this is split in the adaptive-routing form (net_ib.cc, NCCL_IB_AR_THRESHOLD).
BULK_SPLIT_BYTES = 8192

#: Each bucket begins on such a boundary in a slot, so that its bytes are aligned however long its neighbours are.
BUCKET_ALIGNMENT = 64

#: Classes of torch.optim that step from gradients and options alone: none that takes a closure or sparse gradients.
OptimizerName = Literal[
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"
]

Positive = Annotated[int, Field(gt=0, lt=2**40)]
Count = Annotated[int, Field(ge=0, lt=2**40)]
QueuePair = Annotated[int, Field(ge=2, lt=2**24)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class Resumed(_Model):
    """The state from which an attempt goes on: that after `iteration` of an earlier attempt of the run."""

    attempt: Annotated[int, Field(ge=1, lt=2**32)]
    iteration: Annotated[int, Field(ge=0, lt=2**32)]


class Job(_Model):
    """Whose job it is: repeated in every file made from the plan."""

    run_id: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9._:-]+$")]
    attempt: Annotated[int, Field(ge=1, lt=2**32)] = 1
    resumed: Resumed | None = None
    world_size: Annotated[int, Field(ge=2, lt=2**20)]
    model_fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _later(self) -> Job:
        if self.resumed and self.resumed.attempt >= self.attempt:
            raise ValueError(
                f"attempt {self.attempt} cannot go on from attempt {self.resumed.attempt}: expected an earlier one"
            )
        return self


class Collective(_Model):
    """One collective of the communicator that is not a gradient bucket."""

    op: Literal["all_gather", "broadcast", "all_reduce"]
    dtype: DtypeName
    elements: Positive  # per rank for all_gather
    root: Count = 0  # rank, for broadcast
    carries: Literal["initial_state"] | None = None

    @model_validator(mode="after")
    def _only_a_broadcast_carries(self) -> Collective:
        if self.carries and self.op != "broadcast":
            raise ValueError(f"an {self.op} cannot carry the initial state: a broadcast does")
        return self

    @property
    def bytes(self) -> int:
        """Bytes of one rank's data."""
        return self.elements * DTYPE_BYTES[self.dtype]


#: What a communicator carried beside buckets.
Operation = Annotated[Collective | RawOperation, Field(discriminator="op")]


class BucketParameter(_Model):
    """Where in its bucket a parameter's gradient lies; `offset` counts elements."""

    name: Annotated[str, Field(min_length=1)]
    shape: tuple[Count, ...]
    offset: Count

    @property
    def elements(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)


class Bucket(_Model):
    """A flat tensor that DDP reduces in one all-reduce."""

    dtype: DtypeName
    elements: Positive
    parameters: tuple[BucketParameter, ...] = ()

    @model_validator(mode="after")
    def _parameters_fit(self) -> Bucket:
        end = 0
        for parameter in sorted(self.parameters, key=lambda p: p.offset):
            if parameter.offset < end:
                raise ValueError(
                    f"parameter {parameter.name!r} begins at element {parameter.offset}, inside the one before it, which ends at {end}"
                )
            end = parameter.offset + parameter.elements
        if end > self.elements:
            raise ValueError(f"parameters end at element {end}, the bucket has {self.elements}")
        return self

    @property
    def bytes(self) -> int:
        """Bytes on the wire."""
        return self.elements * DTYPE_BYTES[self.dtype]


class Revision(_Model):
    """The tensors reduced in each iteration from `from_iteration` on.

    `before` are collectives that run once, before that iteration's first bucket. Where gradients are accumulated without
    `no_sync`, every bucket is reduced `reductions` times an iteration; the last time counts.
    """

    from_iteration: Annotated[int, Field(ge=1, lt=2**32)]
    before: tuple[Operation, ...] = ()
    reductions: Annotated[int, Field(ge=1, lt=2**16)] = 1
    buckets: Annotated[tuple[Bucket, ...], Field(min_length=1)]

    @cached_property
    def bucket_offsets(self) -> list[int]:
        """Byte offset of each bucket in a slot."""
        return [begin for begin, _ in self.slot_ranges]

    @cached_property
    def gradient_bytes(self) -> int:
        """Bytes of one iteration's gradient, flat, without padding."""
        return sum(bucket.bytes for bucket in self.buckets)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one iteration's gradient in a slot, with the padding between buckets."""
        return self.slot_ranges[-1][1]

    @cached_property
    def slot_ranges(self) -> list[tuple[int, int]]:
        """Byte range of each bucket in a slot; what lies between is padding."""
        return _aligned([bucket.bytes for bucket in self.buckets])


class Layout(_Model):
    """How the library lays the collectives of this shard on the wire."""

    source: Literal["modelled"]
    library: Literal["nccl"]
    version: Annotated[str, Field(pattern=r"^2\.\d{1,2}(\.\d+)?$")]
    protocol: Literal["ll", "ll128", "simple"]
    ring: Annotated[tuple[Count, ...], Field(min_length=2)]
    channels: Annotated[int, Field(ge=1, le=32)] = 1
    threads: Annotated[int, Field(ge=96, le=640)] | None = None
    pin_channels: bool = False
    queue_pairs: Annotated[int, Field(ge=1, le=8)] = 1
    split_queue_pairs: bool | None = None
    mtu: Literal[256, 512, 1024, 2048, 4096]
    adaptive_routing: bool = False
    link_gbps: Annotated[int, Field(ge=1, le=3200)] = 400

    @property
    def minor(self) -> int:
        """The y of version 2.y."""
        return int(self.version.split(".")[1])

    @property
    def splits(self) -> bool:
        """Whether each message is cut over all queue pairs; else each goes over one in turn (2.20's default)."""
        return self.minor <= 19 if self.split_queue_pairs is None else self.split_queue_pairs

    @property
    def big_endian_immediate(self) -> bool:
        """Whether the immediate is in network order: from 2.29 on."""
        return self.minor >= 29

    @property
    def numbered_immediate(self) -> bool:
        """Whether the immediate is the message's number; it is its bytes unless the job asked for something else."""
        return False

    @property
    def split_above(self) -> int | None:
        """The bytes above which a message is a write and an empty write with immediate; None: none is."""
        return BULK_SPLIT_BYTES if self.adaptive_routing else None

    @property
    def exact_addresses(self) -> bool:
        """Whether a split message's empty pieces are addressed by what was carried: from 2.29.7 on."""
        patch = self.version.split(".")[2:]
        return self.minor > 29 or (self.minor == 29 and (not patch or int(patch[0]) >= 7))

    @model_validator(mode="after")
    def _known(self) -> Layout:
        if not 12 <= self.minor <= 30:
            raise ValueError(f"version {self.version!r}: layouts of 2.12 to 2.30 are modelled")
        if self.minor <= 17 and not self.splits:
            raise ValueError(
                f"split_queue_pairs is false: version {self.version} splits every message, 2.18 and later may not"
            )
        if sorted(self.ring) != list(range(len(self.ring))):
            raise ValueError(f"ring {list(self.ring)} is not an order of the ranks 0 to {len(self.ring) - 1}")
        return self


class QueuePairProof(_Model):
    """The edge and channel of a connection are known from its queue pair numbers: the job's own log's, or learned ones.

    `data` are destination numbers of the data packets, one per queue pair in creation order; `credit` those of the
    credits and acknowledgements that come back.
    """

    kind: Literal["queue_pair", "learned"]
    data: Annotated[tuple[QueuePair, ...], Field(min_length=1)]
    credit: tuple[QueuePair, ...] = ()


def _aligned(sizes: list[int]) -> list[tuple[int, int]]:
    """Return the ranges of pieces laid one after another, each begun on BUCKET_ALIGNMENT."""
    ranges, end = [], 0
    for size in sizes:
        begin = -(-end // BUCKET_ALIGNMENT) * BUCKET_ALIGNMENT
        end = begin + size
        ranges.append((begin, end))
    return ranges


def _flat(pieces: list[tuple[int, int]], slot_ranges: list[tuple[int, int]]) -> list[list[int]]:
    """Return ranges of slot bytes as ranges of the pieces joined: sorted, merged, padding left out."""
    out: list[list[int]] = []
    flat = 0
    for begin, end in pieces:
        for low, high in sorted(slot_ranges):
            low, high = max(low, begin), min(high, end)
            if low >= high:
                continue
            piece = [flat + low - begin, flat + high - begin]
            if out and out[-1][1] >= piece[0]:
                out[-1][1] = max(out[-1][1], piece[1])
            else:
                out.append(piece)
        flat += end - begin
    return out


@lru_cache(maxsize=256)
def _address(text: str) -> bytes:
    """Return an IP address as 16 bytes, IPv4 mapped into IPv6 (RFC 4291 section 2.5.5.2)."""
    # Remembered: a plan names the same few over and over, and half the time of parsing one went into reading them.
    address = ipaddress.ip_address(text)
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


class Connection(_Model):
    """One direction of one channel between neighbours on the ring: edge r is from ring position r to r+1."""

    edge: Count
    channel: Count
    source: str
    destination: str
    proof: QueuePairProof | None = None
    start_psn: Annotated[int, Field(ge=0, lt=2**24)] = 0

    @model_validator(mode="after")
    def _proved(self) -> Connection:
        if self.proof is None:
            raise ValueError(
                f"nothing proves that this connection is edge {self.edge}, channel {self.channel}: give its queue pair "
                'numbers, "proof": {"kind": "queue_pair", "data": [..]}'
            )
        for text in (self.source, self.destination):
            try:
                _address(text)
            except ValueError as error:
                raise ValueError(f"{text!r} is no IP address") from error
        return self

    @property
    def source_bytes(self) -> bytes:
        """The sender's address, 16 bytes."""
        return _address(self.source)

    @property
    def destination_bytes(self) -> bytes:
        """The receiver's address, 16 bytes."""
        return _address(self.destination)


class Stream(_Model):
    """One mirrored port or capture file: which links it shows, of which host, and live, where its frames come in.

    `interface` is one of the kernel's, `port` are DPDK device arguments; a capture file needs neither.
    """

    name: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9._-]+$")]
    links: Annotated[tuple[Count, ...], Field(min_length=1)]
    host: tuple[str, ...] = ()
    direction: Literal["inbound", "outbound", "both"] = "both"
    interface: Annotated[str, Field(min_length=1, max_length=15)] | None = None
    port: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Stream:
        if self.interface and self.port:
            raise ValueError(f"both interface {self.interface!r} and port {self.port!r}: a stream has one")
        return self

    @model_validator(mode="after")
    def _host_known(self) -> Stream:
        if self.direction != "both" and not self.host:
            raise ValueError(f"direction {self.direction!r} needs the addresses of the mirrored host in 'host'")
        for text in self.host:
            try:
                _address(text)
            except ValueError as error:
                raise ValueError(f"{text!r} is no IP address") from error
        return self

    @property
    def host_bytes(self) -> list[bytes]:
        """The mirrored host's addresses, 16 bytes each."""
        return [_address(text) for text in self.host]


class ExtraState(_Model):
    """Small state that is not on the wire otherwise and travels in the step record: a tensor of fixed size."""

    name: Annotated[str, Field(min_length=1)]
    dtype: DtypeName
    shape: tuple[Count, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Audit(_Model):
    """When records carry digests: at an attempt's first three iterations and every `every`; of how many groups of tensors.

    `max_ulp`: how far a state that is not bit exact may be from a full state of the trainer without an alarm.
    """

    every: Annotated[int, Field(ge=1, lt=2**32)] = 100
    groups: Annotated[int, Field(ge=1, le=256)] = 8
    max_ulp: Annotated[int, Field(ge=0, lt=2**63)] | None = None


class StepRecord(_Model):
    """The small float32 all-reduce that ends each iteration (flowcheck/step_record.py): who fills it, with what beside."""

    contributor: Count  # rank
    extra: tuple[ExtraState, ...] = ()
    audit: Audit = Audit()


class Shard(_Model):
    """A part of the model that is reduced in a group of its own; a plain DDP job has one."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    startup: tuple[Operation, ...] = ()
    revisions: Annotated[tuple[Revision, ...], Field(min_length=1)]
    step_record: StepRecord | None = None
    layout: Annotated[Layout | LearnedLayout | UnlearnedLayout, Field(discriminator="source")]
    connections: Annotated[tuple[Connection, ...], Field(max_length=64)] = ()
    streams: Annotated[tuple[Stream, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Shard:
        firsts = [r.from_iteration for r in self.revisions]
        if firsts != sorted(set(firsts)):
            raise ValueError(f"revisions begin at iterations {firsts}: expected each later than the one before")
        ranks, layout = len(self.layout.ring), self.layout
        if self.step_record and self.step_record.contributor >= ranks:
            raise ValueError(f"step_record.contributor is rank {self.step_record.contributor} of {ranks}")
        if isinstance(layout, UnlearnedLayout):
            return self
        if not self.connections:
            raise ValueError("connections: none are listed")
        self._check_source()
        seen: dict[object, int] = {}
        for number, connection in enumerate(self.connections):
            if connection.edge >= ranks:
                raise ValueError(
                    f"connections[{number}].edge is {connection.edge}: a ring of {ranks} ranks has edges 0 to {ranks - 1}"
                )
            if isinstance(layout, Layout) and connection.channel >= layout.channels:
                raise ValueError(
                    f"connections[{number}].channel is {connection.channel}: the layout has {layout.channels} channel(s), from 0"
                )
            if len(connection.proof.data) != layout.queue_pairs:
                raise ValueError(
                    f"connections[{number}].proof.data has {len(connection.proof.data)} numbers: the layout has {layout.queue_pairs} queue pair(s)"
                )
            keys = [(connection.edge, connection.channel)]
            keys += [(connection.source, connection.destination, qp) for qp in connection.proof.data]
            keys += [(connection.destination, connection.source, qp) for qp in connection.proof.credit]
            for key in keys:
                if key in seen:
                    raise ValueError(f"connections[{number}] and connections[{seen[key]}] both claim {key}")
                seen[key] = number
        edges = {connection.edge for connection in self.connections}
        names = [stream.name for stream in self.streams]
        if len(set(names)) != len(names):
            raise ValueError(f"streams are named {names}: names must differ")
        for stream in self.streams:
            for link in stream.links:
                if link not in edges:
                    raise ValueError(
                        f"stream {stream.name!r} shows link {link}, of which no connection is listed (edges listed: {sorted(edges)})"
                    )
        return self

    def _check_source(self) -> None:
        """Operations are such as the source of the layout knows."""
        layout = self.layout
        parts = [("startup", self.startup)]
        parts += [(f"revisions[{number}].before", revision.before) for number, revision in enumerate(self.revisions)]
        if isinstance(layout, Layout):
            for where, operations in parts:
                if any(isinstance(operation, RawOperation) for operation in operations):
                    raise ValueError(f"{where}: a raw operation needs a learned layout: this one is computed")
            return
        if len(layout.anchors) != len(self.connections):
            raise ValueError(
                f"layout.anchors are of {len(layout.anchors)} connections, {len(self.connections)} are listed"
            )
        for number, connection in enumerate(self.connections):
            if connection.start_psn:
                raise ValueError(f"connections[{number}].start_psn: where a learned layout begins is in layout.anchors")
        for where, operations in parts:
            for operation in operations:
                if isinstance(operation, RawOperation):
                    if len(operation.messages) != len(self.connections):
                        raise ValueError(
                            f"{where}: a raw operation of {len(operation.messages)} connections: {len(self.connections)} are listed"
                        )
                elif operation.op != "all_reduce":
                    raise ValueError(
                        f"{where}: a learned layout shows no {operation.op}: list what it sent as a raw operation"
                    )
                else:
                    layout.check_operations(where, [(operation.dtype, operation.elements)])
        for number, revision in enumerate(self.revisions):
            layout.check_operations(
                f"revisions[{number}].buckets", [(bucket.dtype, bucket.elements) for bucket in revision.buckets]
            )

    def revision(self, iteration: int) -> Revision:
        """Return the revision in force in an iteration (from 1)."""
        return next(r for r in reversed(self.revisions) if r.from_iteration <= iteration)

    def stream(self, name: str) -> Stream:
        """Return a stream by its name; ConfigError if the plan has none of that name."""
        for stream in self.streams:
            if stream.name == name:
                return stream
        raise ConfigError(f"stream {name!r} is not in the plan, which has: {', '.join(s.name for s in self.streams)}")

    @property
    def mirrored_edges(self) -> list[int]:
        """The edges that any stream shows, ascending."""
        return sorted({link for stream in self.streams for link in stream.links})

    @property
    def mirrored_connections(self) -> list[int]:
        """The indices of the connections whose packets any stream shows, ascending."""
        return sorted({index for stream in self.streams for index in self.stream_connections(stream.name)})

    def stream_connections(self, name: str) -> list[int]:
        """Return the indices of the connections whose packets a stream shows."""
        stream = self.stream(name)
        hosts, out = set(stream.host_bytes), []
        for index, connection in enumerate(self.connections):
            inbound = connection.destination_bytes in hosts
            seen = stream.direction == "both" or inbound == (stream.direction == "inbound")
            if connection.edge in stream.links and seen:
                out.append(index)
        return out


class StateEntry(_Model):
    """One key of the model's state_dict; keys that name the same parameter are tied.

    An `extra` one changes, and has the value that the step record brings under the name of its key.
    """

    key: Annotated[str, Field(min_length=1)]
    kind: Literal["parameter", "constant", "extra"]
    dtype: DtypeName
    shape: tuple[Count, ...]
    parameter: str | None = None

    @model_validator(mode="after")
    def _parameter_named(self) -> StateEntry:
        if (self.kind == "parameter") != (self.parameter is not None):
            raise ValueError("'parameter' names the parameter of an entry of kind 'parameter', and of no other")
        return self

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class InitialState(_Model):
    """Where state 0 comes from.

    `broadcast`: the job's own, at start-up; `tensors` are the state keys in the order of the broadcasts marked
    `carries`. `file`: a torch file with "model" (and "optimizer"), `path` taken from the plan's folder.
    """

    source: Literal["broadcast", "file"]
    tensors: tuple[str, ...] = ()
    path: str | None = None

    @model_validator(mode="after")
    def _either(self) -> InitialState:
        if (self.source == "broadcast") != bool(self.tensors) or (self.source == "file") != (self.path is not None):
            raise ValueError("source 'broadcast' needs 'tensors' alone, source 'file' needs 'path' alone")
        return self


class ParamGroup(_Model):
    """One param group: its parameters in order, and its options by torch.optim's own names.

    Of those that are `varying` the step record brings the value of each step.
    """

    parameters: Annotated[tuple[str, ...], Field(min_length=1)]
    options: dict[str, bool | int | float | tuple[float, ...] | None]
    varying: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _varies(self) -> ParamGroup:
        for name in self.varying:
            value = self.options.get(name)
            if not isinstance(value, (int, float, tuple)) or isinstance(value, bool):
                raise ValueError(f"varying: {name!r} is {value!r} in options, expected a number or numbers")
        return self


class Optimizer(_Model):
    """The trainer's optimizer: a class of torch.optim, its form, its param groups."""

    class_name: Annotated[OptimizerName, Field(alias="class")]
    form: Literal["default", "foreach", "fused"] = "default"
    groups: Annotated[tuple[ParamGroup, ...], Field(min_length=1)]


class Retention(_Model):
    """What may be removed of a checkpoint directory; without a rule, nothing is.

    Any rule keeps something alone; `most_bytes` is a limit for all of them together, under which the oldest goes first. The
    newest snapshot that verifies, with the log after it, always stays, and so does what is pinned.
    """

    last_iterations: Annotated[int, Field(ge=1, lt=2**32)] | None = None
    every_snapshot: Annotated[int, Field(ge=1, lt=2**32)] | None = None
    most_bytes: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    most_waiting_bytes: Annotated[int, Field(ge=1, lt=2**63)] | None = None


class Checkpoints(_Model):
    """How the directory is kept; not part of a job's identity, so it may change between two starts.

    A snapshot is begun once any of `snapshot_iterations`, `snapshot_seconds` or `snapshot_log_bytes` has come together since
    the last one. `snapshot_log_bytes` is by default eight times the state, and at least 256 MiB. `compress`: log what compresses
    in less time than it saves the disk.
    """

    snapshot_iterations: Annotated[int, Field(ge=1, lt=2**32)] | None = None
    snapshot_seconds: Annotated[float, Field(gt=0)] | None = None
    snapshot_log_bytes: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    compress: bool = False
    retention: Retention = Retention()

    def log_between_snapshots(self, state_bytes: int) -> int:
        """Return after how many logged bytes a snapshot of a state of so many bytes is due.

        By default snapshots are an eighth of what is written, and a restore reads at most so much.
        """
        return self.snapshot_log_bytes or max(256 << 20, 8 * state_bytes)


class Arithmetic(_Model):
    """The named arithmetic that the trainer's optimizer step ran in.

    `vendor` is the processor's: the square roots of two do not have the same bits (docs/arithmetic.md).
    """

    torch: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    device: Literal["cpu", "cuda"]
    capability: str
    vendor: str | None = None


class Plan(_Model):
    """A whole job plan; made by `load` or `parse`, never changed."""

    format: Literal["flowcheck-plan"]
    version: Literal[1]
    job: Job
    shards: Annotated[tuple[Shard, ...], Field(min_length=1, max_length=1)]
    state: tuple[StateEntry, ...] = ()
    initial_state: InitialState | None = None
    optimizer: Optimizer | None = None
    arithmetic: Arithmetic | None = None
    complete: bool = True
    checkpoints: Checkpoints = Checkpoints()
    slots: Annotated[int, Field(ge=3, le=64)] = 4
    ring_bytes: Annotated[int, Field(ge=1 << 16, lt=2**44)] = 16 << 20
    silence_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 5000

    @model_validator(mode="after")
    def _adds_up(self) -> Plan:
        for name, shard in enumerate(self.shards):
            if len(shard.layout.ring) != self.job.world_size:
                raise ValueError(
                    f"shards[{name}].layout.ring has {len(shard.layout.ring)} ranks, job.world_size is {self.job.world_size}"
                )
            if shard.revisions[0].from_iteration != self.first_step:
                raise ValueError(
                    f"shards[{name}].revisions begin at iteration {shard.revisions[0].from_iteration}, expected {self.first_step}, the "
                    "job's first"
                )
        parts = {
            "state": bool(self.state),
            "initial_state": self.initial_state,
            "optimizer": self.optimizer,
            "arithmetic": self.arithmetic,
        }
        absent = [name for name, part in parts.items() if not part]
        if absent and len(absent) != len(parts):
            raise ValueError(
                f"{', '.join(absent)} missing: a plan with a model has all of {', '.join(parts)}, one without has none"
            )
        if self.state:
            self._check_model()
            self._check_extra()
        elif self.job.resumed and self.initial_bytes:
            raise ValueError(
                "a start-up broadcast carries the initial state: an attempt that goes on has none on the wire"
            )
        if self.complete and isinstance(self.shard.layout, UnlearnedLayout):
            raise ValueError("shards[0].layout is unlearned: only a plan that is not complete may say so")
        if self.record_form is not None and isinstance(self.shard.layout, LearnedLayout):
            self.shard.layout.check_operations("shards[0].step_record", [("float32", self.record_form.elements)])
        return self

    def _check_extra(self) -> None:
        record = self.shard.step_record
        travels = {extra.name: extra for extra in record.extra} if record else {}
        for entry in self.state:
            if entry.kind == "extra":
                found = travels.get(entry.key)
                if found is None or (found.dtype, found.shape) != (entry.dtype, entry.shape):
                    raise ValueError(
                        f"state: {entry.key!r} is extra, but no step_record.extra brings it as it is there"
                    )
        for number, group in enumerate(self.optimizer.groups):
            if group.varying and record is None:
                raise ValueError(f"optimizer: groups[{number}].varying needs a step_record that brings the values")

    def _check_model(self) -> None:
        parameters: dict[str, StateEntry] = {}
        keys = [entry.key for entry in self.state]
        if len(set(keys)) != len(keys):
            raise ValueError("state: two entries have the same key")
        for entry in self.state:
            if entry.kind == "parameter":
                first = parameters.setdefault(entry.parameter, entry)
                if (first.shape, first.dtype) != (entry.shape, entry.dtype):
                    raise ValueError(f"state: {entry.key!r} and {first.key!r} are tied but differ in shape or dtype")
        for shard in self.shards:
            for number, revision in enumerate(shard.revisions):
                reduced: set[str] = set()
                for bucket in revision.buckets:
                    for parameter in bucket.parameters:
                        entry = parameters.get(parameter.name)
                        where = f"shards: revisions[{number}]: parameter {parameter.name!r}"
                        if entry is None:
                            raise ValueError(f"{where} is in a bucket but not in state")
                        if entry.shape != parameter.shape:
                            raise ValueError(
                                f"{where} has shape {list(parameter.shape)} in its bucket, {list(entry.shape)} in state"
                            )
                        if parameter.name in reduced:
                            raise ValueError(f"{where} is in two places")
                        reduced.add(parameter.name)
        stepped: set[str] = set()
        for group in self.optimizer.groups:
            for name in group.parameters:
                if name not in parameters or name in stepped:
                    raise ValueError(
                        f"optimizer: parameter {name!r} is {'in two groups' if name in stepped else 'not in state'}"
                    )
                stepped.add(name)
        if self.initial_state.source == "broadcast":
            if self.job.resumed:
                raise ValueError(
                    "initial_state: an attempt that goes on has a whole state to begin from: expected source 'file'"
                )
            unknown = [key for key in self.initial_state.tensors if key not in keys]
            if unknown:
                raise ValueError(f"initial_state.tensors: {unknown[0]!r} is not a key of state")
            self._check_broadcasts()
            covered = {entry.parameter or entry.key for entry in self.state if entry.key in self.initial_state.tensors}
            absent = [e.key for e in self.state if (e.parameter or e.key) not in covered]
            if absent:
                raise ValueError(f"initial_state.tensors: nothing gives {absent[0]!r} its first value")
        elif any(op.carries for shard in self.shards for op in shard.startup):
            raise ValueError("a start-up broadcast carries the initial state, but initial_state.source is 'file'")

    def _check_broadcasts(self) -> None:
        """Each broadcast that carries the initial state carries whole tensors of one dtype."""
        entries = {entry.key: entry for entry in self.state}
        left = [entries[key] for key in self.initial_state.tensors]
        carriers = [op for op in self.shards[0].startup if op.carries]
        total, carried = sum(entry.bytes for entry in left), sum(op.bytes for op in carriers)
        if carried != total:
            raise ValueError(f"initial_state.tensors have {total} bytes, the broadcasts that carry them {carried}")
        for op in carriers:
            room = op.bytes
            while room > 0:
                entry = left.pop(0)
                room -= entry.bytes
                if room < 0 or entry.dtype != op.dtype:
                    raise ValueError(
                        f"initial_state.tensors: {entry.key!r} does not fit the {op.dtype} broadcast that carries it"
                    )

    @property
    def shard(self) -> Shard:
        """The shard of a job that has one, as every job of this version does."""
        return self.shards[0]

    @property
    def has_model(self) -> bool:
        """Whether iterations are applied to a model, or end as `whole`."""
        return bool(self.state)

    def revision(self, iteration: int) -> Revision:
        """Return the revision in force in an iteration (from 1)."""
        return self.shard.revision(iteration)

    @cached_property
    def initial_ranges(self) -> list[tuple[int, int]]:
        """Byte range in the initial-state slot of each start-up broadcast that carries it."""
        return _aligned([op.bytes for op in self.shard.startup if op.carries])

    @cached_property
    def initial_offsets(self) -> dict[str, int]:
        """Byte offset in the initial-state slot of each tensor of `initial_state.tensors`."""
        entries = {entry.key: entry for entry in self.state}
        offsets: dict[str, int] = {}
        pieces = iter(self.initial_ranges)
        at = end = 0
        for key in self.initial_state.tensors if self.initial_ranges else ():
            if at == end:
                at, end = next(pieces)
            offsets[key] = at
            at += entries[key].bytes
        return offsets

    @cached_property
    def initial_bytes(self) -> int:
        """Room that the initial state needs in its slot; 0 if it comes from a file or there is no model."""
        return self.initial_ranges[-1][1] if self.initial_ranges else 0

    @cached_property
    def record_form(self) -> RecordForm | None:
        """What the step record of each iteration looks like; None if the job has none."""
        record = self.shard.step_record
        if record is None:
            return None
        hyperparameters = [
            (number, name, len(group.options[name]) if isinstance(group.options[name], tuple) else 0)
            for number, group in enumerate(self.optimizer.groups if self.optimizer else ())
            for name in group.varying
        ]
        extra = [(extra.name, extra.bytes) for extra in record.extra]
        return RecordForm(
            self.job.run_id, self.job.attempt, self.job.world_size, hyperparameters, extra, record.audit.groups
        )

    @cached_property
    def slot_bytes(self) -> int:
        """Room that a gradient slot needs: that of the largest revision, with its step record."""
        return max(self.slot_pieces(revision)[-1][1] for revision in self.shard.revisions)

    def record_range(self, revision: Revision) -> tuple[int, int] | None:
        """Return where in a slot the step record lies, behind the buckets; None if the job has none."""
        if self.record_form is None:
            return None
        begin = -(-revision.slot_bytes // BUCKET_ALIGNMENT) * BUCKET_ALIGNMENT
        return begin, begin + 4 * self.record_form.elements

    def slot_pieces(self, revision: Revision) -> list[tuple[int, int]]:
        """Return the ranges of a slot that an iteration fills: buckets, and the step record if the job has one."""
        record = self.record_range(revision)
        return [*revision.slot_ranges, *([record] if record else [])]

    @property
    def first_step(self) -> int:
        """The first iteration of the attempt: 1, or the one after that from which it goes on."""
        return self.job.resumed.iteration + 1 if self.job.resumed else 1

    @property
    def first_iteration(self) -> int:
        """The first iteration that slots carry: 0 where the initial state comes from the wire, else the first step."""
        return 0 if self.initial_bytes else self.first_step

    def slot_ranges(self, iteration: int) -> list[tuple[int, int]]:
        """Return the byte ranges of an iteration's slot that hold data; 0 is the initial state."""
        return self.initial_ranges if iteration == 0 else self.revision(iteration).slot_ranges

    def flat_ranges(self, iteration: int, slot_ranges: list[tuple[int, int]]) -> list[list[int]]:
        """Return ranges of slot bytes of an iteration as ranges of its flat gradient, padding left out."""
        return _flat(self.slot_ranges(iteration), slot_ranges)

    def canonical(self) -> bytes:
        """Return the plan as JSON, keys sorted: equal plans give equal bytes."""
        return self._canonical()

    def _canonical(self, **options: Any) -> bytes:
        # Without defaults: a field that a later version adds leaves the identity of the plans that do not use it.
        document = self.model_dump(mode="json", by_alias=True, exclude_defaults=True, **options)
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()

    def digest(self) -> bytes:
        """Return 16 bytes that stand for this very job: the first half of the SHA-256 of the plan without `checkpoints`."""
        return hashlib.sha256(self._canonical(exclude={"checkpoints"})).digest()[:16]

    def identity(self) -> bytes:
        """Return the 128 bytes of `fc_identity` that every file made from this plan repeats."""
        record = np.zeros((), IDENTITY)
        record["run_id"] = self.job.run_id.encode()
        if self.job.model_fingerprint:
            record["fingerprint"] = np.frombuffer(bytes.fromhex(self.job.model_fingerprint), np.uint8)
        record["plan_digest"] = np.frombuffer(self.digest(), np.uint8)
        record["attempt"] = self.job.attempt
        record["world_size"] = self.job.world_size
        return record.tobytes()


#: Which of several models a field was read as stands in an error's location, between the fields' names.
_TAGS = {"modelled", "learned", "unlearned", "all_gather", "broadcast", "all_reduce", "raw"}


def _field(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        if part in _TAGS:
            continue
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text or "the document"


def parse(text: str | bytes, origin: str = "plan") -> Plan:
    """Return the plan in a JSON text; ConfigError names the field, the value found and what was expected."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != "flowcheck-plan":
        raise ConfigError(f"{origin}: not a FlowCheck plan: field 'format' must be 'flowcheck-plan'")
    if document.get("version") != 1:
        raise ConfigError(f"{origin}: field 'version' is {document.get('version')!r}; this release reads version 1")
    try:
        # From JSON, where a list may stand for a tuple; written anew, or each of two options of one name would be checked.
        return Plan.model_validate_json(json.dumps(document))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        shown = repr(first["input"])
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        reason = first["msg"].removeprefix("Value error, ")
        more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(f"{origin}: field {_field(first['loc'])}: found {shown}: {reason}{more}") from error


def load(path: str | Path, *, incomplete: bool = False) -> Plan:
    """Return the plan in a file; ConfigError if it cannot be read or used, or is incomplete where that will not do."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the plan: {error.strerror}") from error
    plan = parse(text, str(path))
    if not plan.complete and not incomplete:
        raise ConfigError(
            f"{path}: the plan is not complete: its job has not come to its second iteration; `flowcheck run` waits for that"
        )
    return plan
