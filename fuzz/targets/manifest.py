# SPDX-License-Identifier: MIT
"""Input: a manifest as it lies in a directory, or edits on one under a mended digest. A manifest, or a CheckpointError."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from flowcheck.errors import CheckpointError
from fuzz.documents import Document, value
from updater.manifest import Manifest

__all__ = ["one", "seeds"]


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-manifest-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def _encoded(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, indent=1).encode() + b"\n"


def _document() -> dict[str, Any]:
    attempt = {"attempt": 1, "plan": "plans/000001.json", "identity": "00" * 128, "bit_exact": True, "resumed": None}
    later = attempt | {"attempt": 2, "plan": "plans/000002.json", "resumed": [1, 4]}
    names = ("plans/000001.json", "plans/000002.json", "log/000001.fclog", "snapshots/000001-000000000000.h5")
    return {
        "format": "flowcheck-manifest", "version": 2, "run_id": "run", "has_model": True, "attempts": [attempt, later],
        "closed_to": 1, "pinned": [[1, 3]], "numbers": {names[3]: 1}, "audited_to": 3, "alarms": [{"group": 1}],
        "files": {name: {"bytes": 9, "sha256": "00" * 32} for name in names},
    }  # fmt: skip


def _first_version() -> dict[str, Any]:
    files = {
        name: {"bytes": 9, "sha256": ""} for name in ("plan.json", "log/000001.fclog", "snapshots/000000000000.h5")
    }
    return {
        "format": "flowcheck-manifest", "version": 1, "run_id": "run", "has_model": True, "attempt": 1,
        "identity": "00" * 128, "bit_exact": True, "files": files,
    }  # fmt: skip


@cache
def _documents() -> tuple[Document, Document]:
    return Document(_document()), Document(_first_version())


def _sealed(document: dict[str, Any]) -> bytes:
    return _encoded({**document, "digest": hashlib.sha256(_encoded(document)).hexdigest()})


def one(data: bytes) -> None:
    """Load the manifest that an input is."""
    if not data:
        return
    forged = data[:1] != b"{"
    if forged:
        made = _documents()[data[0] & 1]
        document = made.fresh()
        for at in range(1, len(data) - 2, 3):
            place = made.place(document, data[at])
            if place is None:
                continue
            container, key = place
            if data[at + 1] % 4 == 0:
                del container[key]
            else:
                container[key] = value(data[at + 2])
        data = _sealed(document)
    (_folder() / "manifest.json").write_bytes(data)
    try:
        found = Manifest.load(_folder())
    except CheckpointError as error:
        if "\n" in str(error):
            raise AssertionError("an error is one line") from error
        return
    if _encoded(json.loads(data)) != data:
        raise AssertionError("bytes that were not written were taken")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in found.files):
        raise AssertionError("a file outside of the directory")
    if any(attempt.plan not in found.files for attempt in found.attempts):
        raise AssertionError("an attempt without its plan")
    for attempt in found.attempts:
        found.lineage(attempt.number)
    if found.segments != sorted(found.segments):
        raise AssertionError("segments are in order")
    found.snapshots_of(1)


def seeds() -> list[bytes]:
    """Return inputs to begin from."""
    return [_sealed(_document()), _sealed(_first_version()), b"\0", b"\1", b"\0\5\1\6"]
