# SPDX-License-Identifier: MIT
"""The slot file: a few iterations' gradients, each with its coverage, between extractor and updater.

The slot of the initial state comes first (it may be empty), then `slots` gradient slots; iteration i lies in number
(i - 1) mod `slots`. Coverage is two bitmaps, one bit per unit of 8 bytes: claimed, and done; and where several edges are
mirrored, one per edge of what it brought. docs/slot-format.md draws the file.
The extractor opens and settles slots; the updater gives them back by advancing `consumed_next`.
"""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import numpy as np

from flowcheck import _atomics, mapped
from flowcheck.errors import ConfigError, SlotFormatError
from flowcheck.formats import SLOT, SLOTS_HEADER, SLOTS_MAGIC, SLOTS_VERSION
from flowcheck.mapped import PAGE
from flowcheck.plan import Plan

__all__ = ["EMPTY", "FILLING", "INCOMPLETE", "REASONS", "UNIT_BYTES", "WHOLE", "SlotFile"]

UNIT_BYTES = 8
#: Edges of a plan: no more than it has connections.
MOST_EDGES = 64
EMPTY, FILLING, WHOLE, INCOMPLETE = range(4)
#: Names of fc_slot.reason.
REASONS = (None, "missing", "conflict", "end_of_stream")


def _slot_offsets(data_bytes: int, edges: int = 1) -> tuple[int, int, int, int, int]:
    """Return (claim, done, edges, data offset, whole size) of a slot with room for so many bytes from so many edges.

    What one edge alone brings is what is done.
    """
    units = -(-data_bytes // UNIT_BYTES)
    bitmap = -(-units // 512) * 64
    claim = PAGE
    done = claim + bitmap
    each, end = (done + bitmap, done + bitmap * (1 + edges)) if edges > 1 else (done, done + bitmap)
    data = -(-end // PAGE) * PAGE
    return claim, done, each, data, -(-(data + data_bytes) // PAGE) * PAGE


class SlotFile:
    """A mapped slot file; `create` or `open`, then `close` (or use it in a `with`).

    Attributes:
        path: the file.
        memory: the whole file, mapped for reading and writing.
        slots: gradient slots.
        gradient_bytes: room of one.
        initial_bytes: room of the initial-state slot; 0 if the plan has none on the wire.
        edges: mirrored ones.
        identity: the job's identity, 128 bytes.
    """

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        header = np.frombuffer(memory, SLOTS_HEADER, 1)[0].copy()
        self.path, self.memory = path, memory
        self.slots, self.gradient_bytes = int(header["slots"]), int(header["gradient_bytes"])
        self.initial_bytes, self._slot_bytes = int(header["initial_bytes"]), int(header["slot_bytes"])
        self.edges, self._first = int(header["edges"]), int(header["header_bytes"])
        self._gradients = self._first + (_slot_offsets(self.initial_bytes)[-1] if self.initial_bytes else 0)
        self.identity = header["identity"].tobytes()

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        slots: int,
        gradient_bytes: int,
        initial_bytes: int,
        identity: bytes,
        first_step: int = 1,
        edges: int = 1,
    ) -> SlotFile:
        """Make a slot file; `path` must not exist. Mode 0600; it appears under its name only when it is whole.

        `first_step` is the first iteration that has a gradient; the initial state, where it has a slot, comes before it.
        """
        path = Path(path)
        header = np.zeros((), SLOTS_HEADER)
        header["magic"], header["version"], header["header_bytes"] = np.void(SLOTS_MAGIC), SLOTS_VERSION, PAGE
        header["slots"], header["gradient_bytes"], header["initial_bytes"] = slots, gradient_bytes, initial_bytes
        header["edges"], header["slot_bytes"] = edges, _slot_offsets(gradient_bytes, edges)[-1]
        header["created_ns"] = time.time_ns()
        header["identity"] = np.frombuffer(identity, SLOTS_HEADER["identity"])[0]
        header["settled_next"] = header["consumed_next"] = 0 if initial_bytes else first_step
        initial_size = _slot_offsets(initial_bytes)[-1] if initial_bytes else 0
        size = PAGE + initial_size + slots * int(header["slot_bytes"])
        pieces = {0: header.tobytes()}
        for number in range(-1 if initial_bytes else 0, slots):
            room = initial_bytes if number < 0 else gradient_bytes
            slot = np.zeros((), SLOT)
            slot["iteration"] = np.uint64(2**64 - 1)  # of nobody yet
            offsets = _slot_offsets(room, 1 if number < 0 else edges)
            slot["claim_offset"], slot["done_offset"], slot["edges_offset"], slot["data_offset"], _ = offsets
            slot["data_bytes"] = room
            begin = PAGE if number < 0 else PAGE + initial_size + number * int(header["slot_bytes"])
            pieces[begin] = slot.tobytes()
        mapped.create(path, size, pieces)
        return cls.open(path, identity)

    @classmethod
    def open(cls, path: str | Path, identity: bytes | None = None) -> SlotFile:
        """Map an existing slot file; SlotFormatError if it is none, ConfigError if it is another job's."""
        path = Path(path)
        memory = mapped.map_file(path, "slot file", SlotFormatError)
        header = np.frombuffer(memory, SLOTS_HEADER, 1)[0].copy()
        problem = cls._problem(memory, header, len(memory))
        if problem is not None:
            raise SlotFormatError(f"{path}: {problem}; remove the file and start the extractor again", str(path))
        if identity is not None and header["identity"].tobytes() != identity:
            found = header["identity"]["run_id"].decode(errors="replace")
            raise ConfigError(f"{path}: slots of another job or plan (run {found!r}); remove it or name another file")
        return cls(path, memory)

    @classmethod
    def for_plan(cls, path: str | Path, plan: Plan) -> SlotFile:
        """Open a plan's slot file, or make it; SlotFormatError or ConfigError if the file is something else."""
        path, identity = Path(path), plan.identity()
        if path.exists():
            return cls.open(path, identity)
        rooms = {
            "gradient_bytes": plan.slot_bytes,
            "initial_bytes": plan.initial_bytes,
            "edges": len(plan.shard.mirrored_edges),
        }
        return cls.create(path, slots=plan.slots, identity=identity, first_step=plan.first_step, **rooms)

    @staticmethod
    def bytes_for(plan: Plan) -> int:
        """Return the bytes of a plan's slot file."""
        initial = _slot_offsets(plan.initial_bytes)[-1] if plan.initial_bytes else 0
        return PAGE + initial + plan.slots * _slot_offsets(plan.slot_bytes, len(plan.shard.mirrored_edges))[-1]

    @staticmethod
    def _problem(memory: mmap.mmap, header: np.void, size: int) -> str | None:
        if header["magic"].tobytes() != SLOTS_MAGIC:
            return "no slot file (its magic is missing)"
        if header["version"] != SLOTS_VERSION or header["header_bytes"] != PAGE:
            return f"version {int(header['version'])}, expected {SLOTS_VERSION}"
        slots, gradient, initial = (int(header[name]) for name in ("slots", "gradient_bytes", "initial_bytes"))
        edges = int(header["edges"])
        if not (1 <= slots <= 4096 and 0 < gradient < 2**44 and initial < 2**44 and 1 <= edges <= MOST_EDGES):
            return f"{slots} slots of {gradient} bytes from {edges} edges cannot be"
        if header["slot_bytes"] != _slot_offsets(gradient, edges)[-1]:
            return f"slot_bytes is {int(header['slot_bytes'])}, expected {_slot_offsets(gradient, edges)[-1]}"
        begin = PAGE
        rooms = ([(initial, 1)] if initial else []) + [(gradient, edges)] * slots
        promised = begin + sum(_slot_offsets(*room)[-1] for room in rooms)
        if promised != size:
            return f"its size is {size}, its header promises {promised}"
        for room, of in rooms:
            slot = np.frombuffer(memory, SLOT, 1, begin)[0]
            names = ("claim_offset", "done_offset", "edges_offset", "data_offset", "data_bytes")
            found = tuple(int(slot[name]) for name in names)
            if found != (*_slot_offsets(room, of)[:4], room) or int(slot["units"]) * UNIT_BYTES > room + UNIT_BYTES - 1:
                return f"a slot header contradicts the file's ({found})"
            begin += _slot_offsets(room, of)[-1]
        return None

    def offset(self, iteration: int) -> int:
        """Return where in the file the slot of an iteration begins."""
        if iteration == 0:
            if not self.initial_bytes:
                raise IndexError("the plan takes no initial state from the wire")
            return self._first
        return self._gradients + (iteration - 1) % self.slots * self._slot_bytes

    def slot(self, iteration: int) -> np.void:
        """Return the header of an iteration's slot, a record of dtype SLOT, as a view."""
        return np.frombuffer(self.memory, SLOT, 1, self.offset(iteration))[0]

    def gradient(self, iteration: int) -> np.ndarray:
        """Return the data of an iteration's slot, uint8, as a view: buckets at their slot offsets."""
        slot = self.slot(iteration)
        return np.frombuffer(
            self.memory, np.uint8, int(slot["data_bytes"]), self.offset(iteration) + int(slot["data_offset"])
        )

    def missing(self, iteration: int) -> list[tuple[int, int]]:
        """Return the byte ranges of an iteration's slot that are not done; units are counted whole."""
        slot = self.slot(iteration)
        units = int(slot["units"])
        bitmap = np.frombuffer(self.memory, np.uint8, -(-units // 8), self.offset(iteration) + int(slot["done_offset"]))
        undone = 1 - np.unpackbits(bitmap, bitorder="little")[:units].astype(np.int8)
        edges = np.flatnonzero(np.diff(np.concatenate(([0], undone, [0]))))
        return [(int(a) * UNIT_BYTES, int(b) * UNIT_BYTES) for a, b in edges.reshape(-1, 2)]

    @property
    def settled_next(self) -> int:
        """Every iteration below it is decided."""
        return _atomics.load(self.memory, SLOTS_HEADER.fields["settled_next"][1])

    @property
    def skipped(self) -> tuple[int, int]:
        """The newest iterations that were settled together since nothing of them has come: first, and the one after the last.

        They have no slot. (0, 0) if there were none. To be read after `settled_next`.
        """
        names = ("skipped_from", "skipped_to")
        first, end = (_atomics.load(self.memory, SLOTS_HEADER.fields[name][1]) for name in names)
        return first, end

    @property
    def consumed_next(self) -> int:
        """Every iteration below it may be overwritten."""
        return _atomics.load(self.memory, SLOTS_HEADER.fields["consumed_next"][1])

    @consumed_next.setter
    def consumed_next(self, value: int) -> None:
        _atomics.store(self.memory, SLOTS_HEADER.fields["consumed_next"][1], value)

    @property
    def ended(self) -> bool:
        """Whether no iteration follows `settled_next`."""
        return bool(_atomics.load(self.memory, SLOTS_HEADER.fields["ended"][1]))

    @property
    def volatile_from(self) -> int:
        """The first iteration that was given back and is not durable; 0 while everything is."""
        return _atomics.load(self.memory, SLOTS_HEADER.fields["volatile_from"][1])

    @volatile_from.setter
    def volatile_from(self, value: int) -> None:
        _atomics.store(self.memory, SLOTS_HEADER.fields["volatile_from"][1], value)

    def close(self) -> None:
        """Give the mapping up; views handed out keep it until they go."""
        mapped.unmap(self.memory)

    def __enter__(self) -> SlotFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
