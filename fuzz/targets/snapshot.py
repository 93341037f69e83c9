# SPDX-License-Identifier: MIT
"""Input: edits of 4 bytes (where 2, how 1, with what 1) on a snapshot. The manifest refuses whatever has changed.

Then, as if the manifest had been forged with it, HDF5 opens the file all the same: a state or a CheckpointError, in bounded
memory. HDF5 itself is no code of ours, and is not instrumented: what ends the process here is a finding all the same. It goes
on for ever in a global heap where an object of no number and no bytes seems to lie (2.0.0, and no release is known that does
not), so a file whose heap has changed, where the strings of attributes are, is not opened.
"""

from __future__ import annotations

import os
import re
import tempfile
from functools import cache
from pathlib import Path

import torch

from flowcheck.errors import CheckpointError
from updater.manifest import Attempt, Manifest
from updater.snapshot import State, read_state, write_state

__all__ = ["one", "seeds"]

_NAME = "snapshots/000001-000000000001.h5"


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-snapshot-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    (folder / "snapshots").mkdir()
    return folder


@cache
def _whole() -> tuple[bytes, Manifest]:
    tied = torch.arange(6.0)
    model = {"a": tied, "b": torch.zeros(2, 3, dtype=torch.bfloat16), "tied": tied, "none": torch.empty(0, 3)}
    optimizer = {
        "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(6), "flag": True}},
        "param_groups": [{"lr": 0.1, "betas": (0.5, 0.9), "params": [0]}],
    }
    path = _folder() / _NAME
    write_state(path, State("run", 1, 1, True, {"torch": "2"}, model, optimizer, {"seen": torch.tensor(3)}))
    manifest = Manifest(_folder(), "run", True, [Attempt(1, "plans/000001.json", bytes(128), True)])
    manifest.add(_NAME)
    return path.read_bytes(), manifest


@cache
def _heaps() -> list[tuple[int, int]]:
    """Return where the global heaps lie: "GCOL", a version, three bytes, and their own size as eight (format specification, III.E)."""
    whole, _ = _whole()
    found = [match.start() for match in re.finditer(rb"GCOL", whole)]
    return [(at, at + int.from_bytes(whole[at + 8 : at + 16], "little")) for at in found]


def one(data: bytes) -> None:
    """Check, and then read, the file that an input makes."""
    whole, manifest = _whole()
    content = bytearray(whole)
    for at in range(0, len(data) - 3, 4):
        high, low, how, value = data[at : at + 4]
        place = (high << 8 | low) % len(content)
        if how % 4 == 0:
            content[place] ^= value
        elif how % 4 == 1:
            content[place] = value
        elif how % 4 == 2:
            content[place : place + 8] = (1 << (value & 63)).to_bytes(8, "little")[: len(content) - place]
        else:
            del content[max(1, place) :]
    path = _folder() / _NAME
    path.write_bytes(content)
    changed = bytes(content) != whole
    try:
        manifest.check(_NAME)
        if changed:
            raise AssertionError("a changed file was taken for what was published")
    except CheckpointError:
        if not changed:
            raise
    if any(content[begin:end] != whole[begin:end] for begin, end in _heaps()):
        return
    try:
        state = read_state(path)
    except CheckpointError as error:
        if "\n" in str(error):
            raise AssertionError("an error is one line") from error
        return
    most = sum(tensor.nbytes for _, tensor in state.tensors())
    if most > 1 << 20:
        raise AssertionError(f"{most} bytes of tensors out of a file of {len(content)}")


def seeds() -> list[bytes]:
    """Return inputs to begin from."""
    return [b"", b"\0\0\0\1", b"\0\x60\0\1", b"\4\0\2\x28", b"\2\0\3\0"]
