# SPDX-License-Identifier: MIT
"""The step record: what a trainer's hook says of each step, in the float32 all-reduce that ends the iteration.

One rank fills the record, the others add zeros, so the sum is the record. A float32 sum keeps integers below 2^24:
everything travels as words of 16 bits, one per element, numbers as their 64-bit patterns, little end first. docs/step-record.md
draws the words. After the words of this step come those of the one before, for whoever missed them, then the audit:
digests of the training state before the step, to which every rank adds its own (`split_digest`).

Pure arithmetic on numpy arrays; `checksum` and `split_digest` take torch tensors as well, so that a trainer's values may
stay on its device.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

__all__ = ["RecordError", "RecordForm", "Step", "checksum", "pattern", "split_digest"]

MAGIC = (0x4346, 0x5352)  # "FC", "RS"
VERSION = 1

#: Words of the fixed part by name: (first, count).
FIELDS = {
    "magic": (0, 2),
    "version": (2, 1),
    "flags": (3, 1),
    "run": (4, 4),
    "attempt": (8, 2),
    "iteration": (10, 2),
    "reductions": (12, 1),
    "skipped": (13, 1),
    "clip_coefficient": (14, 4),
    "clip_value": (18, 4),
    "scale": (22, 4),
    "loss": (26, 4),
}
FIXED_WORDS = 30
CHECKSUM_WORDS = 4

#: Bits of `flags`.
CLIPPED_BY_NORM, CLIPPED_BY_VALUE, UNSCALED, UNSCALED_IN_STEP, HAS_LOSS, AUDITED = (1 << bit for bit in range(6))


class RecordError(ValueError):
    """A record that is not what this iteration's must be; the message says in what."""


@dataclass(frozen=True)
class Step:
    """What one record says of its step.

    Attributes:
        hyperparameters: per param group, the values of what varies.
        skipped: the optimizer did nothing, since a gradient was not finite.
        scale: of the loss, which the gradients were divided by; None: they were not scaled. `unscaled_in_step`: by the
            fused optimizer itself.
        clip_coefficient: what the gradients were multiplied by, None: by nothing.
        clip_value: what they were clamped to, None: to nothing.
        extra: bytes of the extra state after the step, by name.
        audited: whether the record carries digests.
    """

    iteration: int
    reductions: int = 1
    hyperparameters: dict[int, dict[str, float | tuple[float, ...]]] = field(default_factory=dict)
    skipped: bool = False
    scale: float | None = None
    unscaled_in_step: bool = False
    clip_coefficient: float | None = None
    clip_value: float | None = None
    loss: float | None = None
    extra: dict[str, bytes] = field(default_factory=dict)
    audited: bool = False


def pattern(value: float) -> list[int]:
    """Return the four words of a float64's bit pattern."""
    return list(struct.unpack("<4H", struct.pack("<d", value)))


def checksum(words: Any, places: Any) -> tuple[Any, Any]:
    """Return the two 32-bit sums of int64 words: plain, and each times its place; `places` is 1, 2, .. (numpy or torch)."""
    return words.sum() & 0xFFFFFFFF, (words * places).sum() & 0xFFFFFFFF


def _split32(value: Any) -> list[Any]:
    return [value & 0xFFFF, value >> 16 & 0xFFFF]


def _int32(words: np.ndarray, name: str) -> int:
    at, _ = FIELDS[name]
    return int(words[at]) | int(words[at + 1]) << 16


def _float64(words: np.ndarray, at: int) -> float:
    """Return the number in four words; every float32 has one, so no bit is lost."""
    return struct.unpack("<d", struct.pack("<4H", *map(int, words[at : at + 4])))[0]


def split_digest(digest: Any, bits: int) -> list[Any]:
    """Return a 64-bit digest's parts of so many bits, lowest first (int, or an int64 tensor)."""
    return [digest >> at & (1 << bits) - 1 for at in range(0, 64, bits)]


class RecordForm:
    """Where everything lies in the records of one job.

    Args:
        run_id, attempt, world_size: of the job.
        hyperparameters: what varies: (param group, name, numbers in it if a tuple, else 0), in the order of the words.
        extra: (name, bytes) of extra state, in the order of the words.
        groups: of tensors in the audit.

    Attributes:
        words: of one step's part, even, the checksum with it.
        parts: of a digest; few enough bits in each for the sums over all ranks to be exact.
        elements: float32 elements of the all-reduce.
    """

    def __init__(
        self,
        run_id: str,
        attempt: int,
        world_size: int,
        hyperparameters: Sequence[tuple[int, str, int]],
        extra: Sequence[tuple[str, int]],
        groups: int,
    ) -> None:
        self.attempt, self.world_size, self.groups = attempt, world_size, groups
        self.run = list(struct.unpack("<4H", hashlib.sha256(run_id.encode()).digest()[:8]))
        self.hyperparameters, self.extra = list(hyperparameters), list(extra)
        self.extra_at = FIXED_WORDS + sum(4 * max(1, count) for _, _, count in hyperparameters)
        content = self.extra_at + sum(-(-size // 2) for _, size in extra)
        self.content = content + content % 2
        self.words = self.content + CHECKSUM_WORDS
        ranks = sum(map(self.weight, range(world_size)))
        self.bits = next((bits for bits in (16, 8, 4, 2, 1) if ((1 << bits) - 1) * ranks < 1 << 24), 0)
        if not self.bits:
            raise ValueError(f"{world_size} ranks are more than a float32 sum of digests is exact for")
        self.parts = 64 // self.bits
        self.elements = 2 * self.words + groups * 2 * self.parts

    def weight(self, rank: int) -> int:
        """Return what a rank's digests are multiplied by in the second sum; no rank has the mean of all."""
        return rank + 1 + (rank == self.world_size - 1)

    # -- the trainer's side -----------------------------------------------------------------------------------------

    def fixed(self, iteration: int, reductions: int, flags: int, **numbers: float) -> list[int]:
        """Return the words of the fixed part; what only the device knows (or is not the case) is 0."""
        words = [0] * FIXED_WORDS
        known = {
            "magic": MAGIC, "version": [VERSION], "flags": [flags], "run": self.run, "attempt": _split32(self.attempt),
            "iteration": _split32(iteration), "reductions": [reductions], **{k: pattern(v) for k, v in numbers.items()},
        }  # fmt: skip
        for name, value in known.items():
            at, count = FIELDS[name]
            words[at : at + count] = value
        return words

    def varying(self, groups: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the words of the hyper-parameters, taken from an optimizer's `param_groups`."""
        words: list[int] = []
        for number, name, count in self.hyperparameters:
            value = groups[number][name]
            for one in value if count else (value,):
                words += pattern(float(one))
        return words

    # -- the shadow's side ------------------------------------------------------------------------------------------

    def current(self, record: np.ndarray) -> np.ndarray:
        """Return the words of the step that a record (float32) ends."""
        return record[: self.words]

    def previous(self, record: np.ndarray) -> np.ndarray:
        """Return the words of the step before it."""
        return record[self.words : 2 * self.words]

    def read(self, record: np.ndarray, iteration: int) -> Step:
        """Return what a record says of the step that it ends; RecordError as `decode`.

        A record that was made of its repetition has none of its digests: it is not `audited`.
        """
        step = self.decode(self.current(record), iteration)
        return replace(step, audited=step.audited and bool(record[2 * self.words :].any()))

    def decode(self, part: np.ndarray, iteration: int) -> Step:
        """Return what `current` or `previous` words say; RecordError unless they are whole and of this job and iteration."""
        # What a wrong sum leaves may be no integer at all.
        words = np.where(np.isfinite(part) & (part >= 0) & (part < 65536), part, -1).astype(np.int64)
        if (words < 0).any() or (words != part).any():
            raise RecordError("holds what is no word of 16 bits")
        content = words[: self.content]
        sums = [int(word) for total in checksum(content, np.arange(1, len(content) + 1)) for word in _split32(total)]
        if words[self.content :].tolist() != sums:
            raise RecordError("its checksum is wrong")
        expected = self.fixed(iteration, 0, 0)
        for name in ("magic", "version", "run", "attempt", "iteration"):
            at, count = FIELDS[name]
            if content[at : at + count].tolist() != expected[at : at + count]:
                what = f"iteration {_int32(words, name)}" if name == "iteration" else f"another {name}"
                raise RecordError(f"is of {what}")
        return self._step(content, iteration)

    def _step(self, words: np.ndarray, iteration: int) -> Step:
        flags = int(words[FIELDS["flags"][0]])

        def value(name: str) -> float:
            return _float64(words, FIELDS[name][0])

        at, hyperparameters = FIXED_WORDS, {}
        for number, name, count in self.hyperparameters:
            values = tuple(_float64(words, at + 4 * i) for i in range(max(1, count)))
            hyperparameters.setdefault(number, {})[name] = values if count else values[0]
            at += 4 * len(values)
        extra = {}
        for name, size in self.extra:
            extra[name] = words[at : at + -(-size // 2)].astype("<u2").tobytes()[:size]
            at += -(-size // 2)
        return Step(
            iteration=iteration,
            reductions=int(words[FIELDS["reductions"][0]]),
            hyperparameters=hyperparameters,
            skipped=bool(words[FIELDS["skipped"][0]]),
            scale=value("scale") if flags & UNSCALED else None,
            unscaled_in_step=bool(flags & UNSCALED_IN_STEP),
            clip_coefficient=value("clip_coefficient") if flags & CLIPPED_BY_NORM else None,
            clip_value=value("clip_value") if flags & CLIPPED_BY_VALUE else None,
            loss=value("loss") if flags & HAS_LOSS else None,
            extra=extra,
            audited=bool(flags & AUDITED),
        )

    def audit(self, record: np.ndarray, ours: Sequence[int]) -> list[tuple[int, int | None]]:
        """Return where a record's digests are not those of a state: (group, the rank that differs, None: it is not one alone).

        Args:
            record: float32, one that is `audited`.
            ours: a digest per group (unsigned 64 bits), of the state before that step.
        """
        sums = record[2 * self.words :].reshape(self.groups, 2, self.parts).astype(np.int64)
        weights, out = [self.weight(rank) for rank in range(self.world_size)], []
        for group, digest in enumerate(ours):
            parts = np.array(split_digest(digest, self.bits), np.int64)
            plain, weighted = sums[group, 0] - self.world_size * parts, sums[group, 1] - sum(weights) * parts
            if plain.any() or weighted.any():
                # One rank that is off by d makes the sums off by d and its weight times d.
                odd = (rank for rank, weight in enumerate(weights) if (weighted == weight * plain).all())
                out.append((group, next(odd, None)))
        return out
