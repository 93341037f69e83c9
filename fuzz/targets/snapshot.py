# SPDX-License-Identifier: MIT
"""Input: edits of 4 bytes (where 2, how 1, with what 1) on a snapshot. The manifest refuses whatever has changed.

Where only content has changed (numbers, texts of attributes: `how` from 128 on), HDF5 opens the file all the same, as if the
manifest had been forged with it: a state or a CheckpointError, in bounded memory. HDF5's own structures are not opened once
they have changed: the library ends the process, or never ends, on some that are forged. The digest is there to keep them from it.
"""

from __future__ import annotations

import os
import re
import tempfile
from functools import cache
from pathlib import Path

import h5py
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
def _content() -> list[int]:
    """Return where in the file bytes lie that mean nothing to HDF5: data, and texts of attributes."""
    whole, _ = _whole()
    found: set[int] = set()
    texts: set[bytes] = set()

    def visit(_: str, node: h5py.Group | h5py.Dataset) -> None:
        texts.update(text.encode() for text in node.attrs.values() if isinstance(text, str) and len(text) > 3)
        if isinstance(node, h5py.Dataset) and node.nbytes:
            found.update(range(node.id.get_offset(), node.id.get_offset() + node.nbytes))

    path = _folder() / _NAME
    path.write_bytes(whole)
    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
    for text in texts:
        for match in re.finditer(re.escape(text), whole):
            found.update(range(*match.span()))
    return sorted(found)


def _edited(data: bytes) -> tuple[bytes, bool]:
    """Return the file with an input's edits, and whether they have changed but content."""
    content, only_content = bytearray(_whole()[0]), True
    for at in range(0, len(data) - 3, 4):
        high, low, how, value = data[at : at + 4]
        place = high << 8 | low
        if how & 128:
            content[_content()[place % len(_content())]] = value
            continue
        only_content = False
        place %= len(content)
        if how % 4 == 0:
            content[place] ^= value
        elif how % 4 == 1:
            content[place] = value
        elif how % 4 == 2:
            content[place : place + 8] = (1 << (value & 63)).to_bytes(8, "little")[: len(content) - place]
        else:
            del content[max(1, place) :]
            break
    return bytes(content), only_content


def one(data: bytes) -> None:
    """Check, and then read, the file that an input makes."""
    whole, manifest = _whole()
    content, only_content = _edited(data)
    path = _folder() / _NAME
    path.write_bytes(content)
    try:
        manifest.check(_NAME)
        if content != whole:
            raise AssertionError("a changed file was taken for what was published")
    except CheckpointError:
        if content == whole:
            raise
    if not only_content:
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
    contents = [bytes([at >> 8, at & 255, 128, 57]) for at in range(0, len(_content()), 16)]
    return [b"", b"\0\0\0\1", b"\0\x60\0\1", b"\4\0\2\x28", b"\2\0\3\0", *contents]
