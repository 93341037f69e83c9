# SPDX-License-Identifier: MIT
"""Planning: what a job needs of ports, memory and disk, and how likely an iteration is lost beyond repair.

Everything is computed from a `Plan`, by the code that lays out real jobs; `describe` makes the plan of a job that is yet
to be. Nothing here reads a capture or a directory.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np

from flowcheck import plan as plans
from flowcheck.errors import ConfigError
from flowcheck.layout import Credit, FinalMessages, final_messages, packet_count, queue_pair_pieces, sent_messages
from flowcheck.plan import DTYPE_BYTES, Bucket, OptimizerName, Plan, UnlearnedLayout
from flowcheck.ring import PacketRing
from flowcheck.slots import UNIT_BYTES, SlotFile

__all__ = ["Cluster", "describe", "size", "unrepairable"]

#: Bytes of a frame around its payload: Ethernet, IPv6, UDP, BTH and ICRC; a write's address and immediate; an acknowledgement's
#: own. Beside a frame on a wire: preamble, checksum and gap.
FRAME_BYTES, ADDRESS_BYTES, IMMEDIATE_BYTES, ACK_BYTES, GAP_BYTES = 14 + 40 + 8 + 12 + 4, 16, 4, 4, 24
#: What the log adds to a gradient at most, from a million parameters on.
LOG_OVERHEAD = 1.01

#: An LL128 line of 128 bytes holds 15 units, or 14 and one from elsewhere (prims_ll128.h).
LINE128_BYTES = 128

#: Units [first, last), of 8 bytes, of a message or of the record.
Ranges = tuple[tuple[int, int], ...]


# -- loss -----------------------------------------------------------------------------------------------------------


def unrepairable(plan: Plan, loss: float) -> float:
    """Return the probability that an iteration of the plan's last revision cannot be committed, by loss alone.

    Each frame that a stream should have brought is lost with probability `loss`, independently of all others; one edge
    that two streams show gives two frames. The result is exact under these assumptions:

    - the iteration is neither the first nor the last of the capture: flows are synchronised, and others follow. A packet of
      the Simple protocol without an address is then placed by a later one with an address, however many of them were lost;
    - a mirror loses frames, it changes none, and credits and acknowledgements carry nothing that is needed;
    - messages have the sizes that their data gives: LL's clean steps, 8 of 2^31, are left out.

    An iteration is committed when every unit of its gradient has come in some frame, and its step record has come whole,
    or else the words that the next iteration's record repeats of it have. 1.0 where a byte is on no mirrored edge.

    Raises:
        ConfigError: `loss` is no probability, or the layout is yet to be learned.
    """
    if not 0 <= loss <= 1:
        raise ConfigError(f"loss is {loss}: expected a probability, 0 to 1")
    shard = plan.shard
    if isinstance(shard.layout, UnlearnedLayout):
        raise ConfigError("the plan's layout is unlearned: what each edge carries is not known yet")
    copies = [index for stream in shard.streams for index in shard.stream_connections(stream.name)]
    shapes = Counter((bucket.dtype, bucket.elements) for bucket in shard.revisions[-1].buckets)
    arrived = 0.0  # logarithm of the probability that all of the gradient does
    for (dtype, elements), count in shapes.items():
        bucket = Bucket(dtype=dtype, elements=elements)
        messages = [final_messages(plan, index, bucket) for index in copies]
        arrived += count * _log_arrival(plan, messages, bucket.bytes, loss)
    if plan.record_form is not None:
        arrived += _log1m(_record_loss(plan, copies, loss))
    return -math.expm1(arrived)


def _log1m(probability: float) -> float:
    """Return log(1 - probability)."""
    return -math.inf if probability >= 1 else math.log1p(-probability)


def _log_arrival(plan: Plan, copies: Sequence[FinalMessages], size: int, loss: float) -> float:
    """Return the logarithm of the probability that every byte of a tensor of `size` bytes comes in some frame.

    Messages that share bytes with no other, and their equals on other edges, are cut into packets alike: each packet is lost
    only if all its equals are. Others are taken together, as the packets that they are.
    """
    rows = np.concatenate([np.stack([copy.begin, copy.bytes, copy.wire], 1) for copy in copies])
    rows, times = np.unique(rows, axis=0, return_counts=True)  # by where they begin
    if not len(rows):
        return -math.inf
    reach = np.maximum.accumulate(rows[:, 0] + rows[:, 1])
    before = np.concatenate([[0], reach[:-1]])
    if (rows[:, 0] > before).any() or reach[-1] < size:
        return -math.inf  # of some bytes there is no frame
    first = np.flatnonzero(rows[:, 0] >= before)
    alone = np.diff(np.append(first, len(rows))) == 1
    total = 0.0
    single = first[alone]
    alike = Counter(zip(rows[single, 1].tolist(), rows[single, 2].tolist(), times[single].tolist(), strict=True))
    for (counted, wire, copies_of_it), count in alike.items():
        packets = len(_packets(plan, counted, wire))
        total += count * packets * _log1m(loss**copies_of_it)
    for begin, end in zip(first[~alone], np.append(first, len(rows))[1:][~alone], strict=True):
        frames = _frames(plan, rows[begin:end], times[begin:end])
        low = int(rows[begin, 0]) // UNIT_BYTES
        total += _log1m(_uncovered(frames, (low, -(-int(reach[end - 1]) // UNIT_BYTES)), loss))
    return total


def _record_loss(plan: Plan, copies: Sequence[int], loss: float) -> float:
    """Return the probability that a step record is not whole, nor what the next one repeats of it."""
    form = plan.record_form
    messages = [final_messages(plan, index, None) for index in copies]
    rows = np.concatenate([np.stack([message.begin, message.bytes, message.wire], 1) for message in messages])
    frames = _frames(plan, *np.unique(rows, axis=0, return_counts=True))
    whole = (0, -(-4 * form.elements // UNIT_BYTES))
    repeated = (4 * form.words // UNIT_BYTES, -(-8 * form.words // UNIT_BYTES))
    return _uncovered(frames, whole, loss) * _uncovered(frames, repeated, loss)


def _units128(line: int) -> Ranges:
    """Return the units, counted in its message, that an LL128 line carries."""
    base, number = 120 * (line // 8), line % 8
    if number < 4:
        return ((base + 16 * number, base + 16 * number + 15),)
    first, alone = base + 64 + 14 * (number - 4), base + 16 * (number - 4) + 15
    return (alone, alone + 1), (first, first + 14)


def _packets(plan: Plan, counted: int, wire: int) -> list[Ranges]:
    """Return the units that each packet of a message brings, counted in the message; packets that bring none left out."""
    layout, units, out = plan.shard.layout, -(-counted // UNIT_BYTES), []
    for number in range(layout.queue_pairs):
        pieces = queue_pair_pieces(layout, number, 0, np.array([wire]))
        for begin, length in zip(pieces.offset.tolist(), pieces.length.tolist(), strict=True):
            for low in range(begin, begin + length, layout.mtu):
                high = min(low + layout.mtu, begin + length)
                if layout.protocol == "ll128":
                    lines = range(low // LINE128_BYTES, high // LINE128_BYTES)
                    brought = [part for line in lines for part in _units128(line)]
                elif layout.protocol == "ll":
                    brought = [(low // 16, high // 16)]
                else:
                    brought = [(low // UNIT_BYTES, -(-high // UNIT_BYTES))]
                brought = [(first, min(last, units)) for first, last in brought if first < units]
                if brought:
                    out.append(tuple(brought))
    return out


def _frames(plan: Plan, rows: np.ndarray, times: np.ndarray) -> Counter[Ranges]:
    """Return the frames of messages (begin, bytes, wire), by the units that they bring, and how many bring the same."""
    frames: Counter[Ranges] = Counter()
    for (begin, counted, wire), count in zip(rows.tolist(), times.tolist(), strict=True):
        at = begin // UNIT_BYTES
        for brought in _packets(plan, counted, wire):
            frames[tuple((at + first, at + last) for first, last in brought)] += count
    return frames


def _uncovered(frames: Counter[Ranges], needed: tuple[int, int], loss: float) -> float:
    """Return the probability that some unit of those `needed` comes in no frame: exact, unit by unit from the first on.

    What is known of the frames at a unit is which of those that begin before it, and end behind it, are lost.
    """
    begin_at: dict[int, list[Ranges]] = {}
    end_at: dict[int, list[Ranges]] = {}
    turns: dict[int, list[tuple[bool, Ranges]]] = {}
    for frame in frames:
        begin_at.setdefault(min(first for first, _ in frame), []).append(frame)
        end_at.setdefault(max(last for _, last in frame), []).append(frame)
        for first, last in frame:
            turns.setdefault(first, []).append((True, frame))
            turns.setdefault(last, []).append((False, frame))
    lost_together = {frozenset(): 1.0}  # sets of frames, and how likely just these of all known ones are lost
    carrying: set[Ranges] = set()
    failed = 0.0
    for unit in sorted({*turns, *needed}):
        for frame in end_at.get(unit, ()):
            merged: dict[frozenset, float] = {}
            for lost, probability in lost_together.items():
                merged[lost - {frame}] = merged.get(lost - {frame}, 0.0) + probability
            lost_together = merged
        for frame in begin_at.get(unit, ()):
            chance = loss ** frames[frame]
            lost_together = {lost: p * (1 - chance) for lost, p in lost_together.items()} | {
                lost | {frame}: p * chance for lost, p in lost_together.items()
            }
        # One range of a frame may end where its next begins.
        for begins, frame in sorted(turns.get(unit, ()), key=lambda turn: turn[0]):
            (carrying.add if begins else carrying.discard)(frame)
        if needed[0] <= unit < needed[1]:
            failed += sum(p for lost, p in lost_together.items() if carrying <= lost)
            lost_together = {lost: p for lost, p in lost_together.items() if not carrying <= lost}
    return min(failed, 1.0)


# -- a job that is yet to be -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """What is known of a job before it runs.

    Attributes:
        parameters: how many the model has, all of one dtype.
        dtype: of gradients and parameters.
        ranks: of the ring.
        streams: mirrored edges, each on a port of its own; spread evenly over the ring, the last edge among them.
        loss: probability that a mirrored frame is lost.
        protocol, version, channels, queue_pairs, mtu, link_gbps: of the layout (docs/plan.md).
        bucket_mb: of DDP's buckets, MiB.
        step_seconds: of an iteration.
        optimizer: class of torch.optim, SGD with momentum.
        record: whether the training side attaches FlowCheck's hook, which sends step records.
        snapshot_iterations: between two snapshots; None: as the log's bytes have it.
        ring_bytes, slots: as in the plan.
    """

    parameters: int
    ranks: int
    streams: int = 2
    loss: float = 1e-6
    dtype: str = "float32"
    protocol: str = "simple"
    version: str = "2.28"
    channels: int = 2
    queue_pairs: int = 1
    mtu: int = 4096
    link_gbps: int = 400
    bucket_mb: float = 25.0
    step_seconds: float = 1.0
    optimizer: str = "AdamW"
    record: bool = True
    snapshot_iterations: int | None = None
    ring_bytes: int = 16 << 20
    slots: int = 4


def describe(cluster: Cluster) -> Plan:
    """Return a plan of such a job, with no model in it; ConfigError names what cannot be.

    An estimate where the model decides: DDP's buckets are taken to be full, the last aside.
    """
    if not 1 <= cluster.streams <= cluster.ranks:
        raise ConfigError(
            f"{cluster.streams} streams of a ring of {cluster.ranks} ranks: expected 1 to {cluster.ranks} edges"
        )
    edges = [(number + 1) * cluster.ranks // cluster.streams - 1 for number in range(cluster.streams)]
    full = max(1, int(cluster.bucket_mb * 2**20) // DTYPE_BYTES[cluster.dtype])
    sizes = [full] * (cluster.parameters // full) + [cluster.parameters % full] * (cluster.parameters % full > 0)
    free = set(range(cluster.ranks)) - {(edge + 1) % cluster.ranks for edge in edges}

    def connection(edge: int, channel: int) -> dict[str, Any]:
        first = 0x1000 + 2 * cluster.queue_pairs * (edge * cluster.channels + channel)
        data = [first + 2 * number for number in range(cluster.queue_pairs)]
        ends = [f"fd00::{rank + 1:x}" for rank in (edge, (edge + 1) % cluster.ranks)]
        proof = {"kind": "queue_pair", "data": data, "credit": [number + 1 for number in data]}
        return {"edge": edge, "channel": channel, "source": ends[0], "destination": ends[1], "proof": proof}

    shard = {
        "name": "model",
        "revisions": [{"from_iteration": 1, "buckets": [{"dtype": cluster.dtype, "elements": size} for size in sizes]}],
        "layout": {
            "source": "modelled", "library": "nccl", "version": cluster.version, "protocol": cluster.protocol,
            "ring": list(range(cluster.ranks)), "channels": cluster.channels, "queue_pairs": cluster.queue_pairs,
            "mtu": cluster.mtu, "link_gbps": cluster.link_gbps,
        },
        "connections": [connection(edge, channel) for edge in edges for channel in range(cluster.channels)],
        "streams": [{"name": f"link-{edge}", "links": [edge]} for edge in edges],
    }  # fmt: skip
    if cluster.record:
        # As the hook chooses it: who receives on no mirrored edge.
        shard["step_record"] = {"contributor": max(free, default=0)}
    document = {
        "format": "flowcheck-plan", "version": 1, "job": {"run_id": "planned", "world_size": cluster.ranks},
        "shards": [shard], "ring_bytes": cluster.ring_bytes, "slots": cluster.slots,
        "checkpoints": {"snapshot_iterations": cluster.snapshot_iterations},
    }  # fmt: skip
    return plans.parse(json.dumps(document), "the job described")


def _state_bytes(cluster: Cluster) -> int:
    """Return the bytes of parameters and optimizer state, as torch keeps it for a tensor (single numbers aside)."""
    import torch

    if cluster.optimizer not in get_args(OptimizerName):
        raise ConfigError(f"optimizer {cluster.optimizer!r}: expected one of {', '.join(get_args(OptimizerName))}")
    options = {"momentum": 0.9} if cluster.optimizer == "SGD" else {}
    tensor = torch.nn.Parameter(torch.ones(64, 64, dtype=getattr(torch, cluster.dtype)))
    tensor.grad = torch.ones_like(tensor)
    optimizer = getattr(torch.optim, cluster.optimizer)([tensor], **options)
    optimizer.step()
    kept = [value for value in optimizer.state[tensor].values() if torch.is_tensor(value) and value.numel() > 1]
    size = tensor.numel() * tensor.element_size() + sum(value.numel() * value.element_size() for value in kept)
    return math.ceil(size * cluster.parameters / tensor.numel())


def _stream(plan: Plan, name: str, step_seconds: float) -> dict[str, Any]:
    """Return what an iteration is on a stream: data frames are counted, of credits and acknowledgements one a message each."""
    layout, shard = plan.shard.layout, plan.shard
    frames = size = control = 0
    for index in shard.stream_connections(name):
        for times, wire in sent_messages(plan, index, shard.revisions[-1]):
            packets = packet_count(layout, wire)
            messages = times * len(wire)
            frames += times * packets
            size += times * (int(wire.sum()) + packets * FRAME_BYTES)
            size += messages * layout.queue_pairs**layout.splits * (ADDRESS_BYTES + IMMEDIATE_BYTES)
            control += 3 * messages
            size += messages * (3 * FRAME_BYTES + ADDRESS_BYTES + Credit.of(layout).bytes + 2 * ACK_BYTES)
    on_wire = size + GAP_BYTES * (frames + control)
    return {
        "name": name,
        "edges": sorted(shard.stream(name).links),
        "data_frames": frames,
        "frames": frames + control,
        "bytes": size,
        "gbps": 8 * on_wire / step_seconds / 1e9,
        "ring_bytes": PacketRing.bytes_for(plan, name),
    }


def size(cluster: Cluster) -> dict[str, Any]:
    """Return the document of `flowcheck size`: what a job needs, per iteration and in all; sizes in bytes.

    Raises:
        ConfigError: the job cannot be.
    """
    plan = describe(cluster)
    state, gradient = _state_bytes(cluster), plan.shard.revisions[-1].gradient_bytes
    streams = [_stream(plan, stream.name, cluster.step_seconds) for stream in plan.shard.streams]
    memory = {
        "rings": sum(stream["ring_bytes"] for stream in streams),
        "slots": SlotFile.bytes_for(plan),
        "state": state,
        "snapshot": state,
    }
    log = math.ceil((gradient + (4 * plan.record_form.elements if plan.record_form else 0)) * LOG_OVERHEAD)
    every = cluster.snapshot_iterations or max(1, -(-plan.checkpoints.log_between_snapshots(state) // log))
    lost = unrepairable(plan, cluster.loss)
    return {
        "job": asdict(cluster),
        "gradient_bytes": gradient,
        "streams": streams,
        "ports": len(streams),
        "port_gbps": cluster.link_gbps,
        "nodes": 1,
        "memory": {**memory, "total": sum(memory.values())},
        "disk": {
            "log_per_iteration": log,
            "snapshot": state,
            "snapshot_every": every,
            "per_hour": math.ceil(3600 / cluster.step_seconds * (log + state / every)),
        },
        "unrepairable": lost,
        "iterations_between_losses": 1 / lost if lost else None,
    }
