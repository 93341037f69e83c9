# SPDX-License-Identifier: MIT
"""Input: the float32 elements that a step record is summed to, or words with their checksum mended. A step, or RecordError."""

from __future__ import annotations

import math
import struct

import numpy as np

from flowcheck.step_record import RecordError, RecordForm, Step

__all__ = ["one", "seeds"]

_FORM = RecordForm("run", 3, 4, [(0, "lr", 0), (1, "betas", 2)], [("seen", 3), ("place", 8)], 2)
_ITERATION = 70_000


def _mended(words: np.ndarray) -> np.ndarray:
    """Return words with the sums that make them whole: the plain one, and each times its place, of 32 bits."""
    content = [int(word) for word in words[: _FORM.content]]
    plain, placed = sum(content), sum(number * word for number, word in enumerate(content, 1))
    sums = [total >> at & 0xFFFF for total in (plain, placed) for at in (0, 16)]
    return np.array(content + sums, np.float32)


def one(data: bytes) -> None:
    """Decode the record that an input is."""
    if not data:
        return
    kind, data = data[0], data[1:]
    if kind & 1:
        record = np.zeros(_FORM.elements, np.float32)
        whole = np.frombuffer(data[: len(data) // 4 * 4], "<f4")[: _FORM.elements]
        record[: len(whole)] = whole
        part = _FORM.previous(record) if kind & 2 else _FORM.current(record)
    else:
        base = np.array([*_FORM.fixed(_ITERATION, 1, kind >> 2), *[0] * (_FORM.words - 30)], np.int64)
        for at in range(0, len(data) - 2, 3):
            base[data[at] % _FORM.content] = data[at + 1] << 8 | data[at + 2]
        part = _mended(base)
        record = np.concatenate([part, part, np.zeros(_FORM.elements - 2 * _FORM.words, np.float32)])
    try:
        step = _FORM.decode(part, _ITERATION)
    except RecordError:
        return
    _check(step)
    for group, rank in _FORM.audit(record, [0, 1 << 63]):
        if group not in (0, 1) or rank not in (None, 0, 1, 2, 3):
            raise AssertionError(f"audit names group {group} and rank {rank}")


def _check(step: Step) -> None:
    if step.iteration != _ITERATION or set(step.hyperparameters) != {0, 1} or {"seen", "place"} != set(step.extra):
        raise AssertionError("a step of another form")
    if (len(step.extra["seen"]), len(step.extra["place"])) != (3, 8):
        raise AssertionError("extra state of another size")
    for value in (step.hyperparameters[0]["lr"], *step.hyperparameters[1]["betas"]):
        if not isinstance(value, float) or (math.isnan(value) and struct.pack("<d", value)[6:] == b"\0\0"):
            raise AssertionError("a number of other bits")


def seeds() -> list[bytes]:
    """Return inputs to begin from."""
    whole = _mended(np.array([*_FORM.fixed(_ITERATION, 1, 63), *[7] * (_FORM.words - 30)]))
    return [b"\0", b"\xfc", b"\1" + whole.astype("<f4").tobytes(), b"\3" + 2 * whole.astype("<f4").tobytes()]
