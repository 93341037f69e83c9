# SPDX-License-Identifier: MIT
"""The manifest of a checkpoint directory: its attempts, which files are published, and what bytes they have.

It is written last, whenever a file has been published, and read first: a file that it does not name is not there. The
newest segments of the log are not named yet (they grow); their records carry checksums of their own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from flowcheck.errors import CheckpointError
from updater.durable import io_errors, sha256_of, write_published

__all__ = ["LOG_FOLDER", "MANIFEST_NAME", "PLAN_FOLDER", "SNAPSHOT_FOLDER", "Attempt", "Manifest"]

MANIFEST_NAME = "manifest.json"
PLAN_FOLDER = "plans"
LOG_FOLDER = "log"
SNAPSHOT_FOLDER = "snapshots"

_FORMAT = "flowcheck-manifest"
_VERSION = 2
_SEGMENT = re.compile(rf"{LOG_FOLDER}/(\d{{6}})\.fclog")
_SNAPSHOT = re.compile(rf"{SNAPSHOT_FOLDER}/(\d{{6}})-(\d{{12}})\.h5")
_PLAN = re.compile(rf"{PLAN_FOLDER}/(\d{{6}})\.json")
#: Version 1 knew one attempt, and named neither it nor its number in file names.
_PLAN_1 = "plan.json"
_SNAPSHOT_1 = re.compile(rf"{SNAPSHOT_FOLDER}/(\d{{12}})\.h5")


def _encode(document: dict) -> bytes:
    return json.dumps(document, sort_keys=True, indent=1).encode() + b"\n"


@dataclass
class Attempt:
    """One attempt of the run: its number, its plan, and what that says of it."""

    number: int
    plan: str  # name of the file
    identity: bytes  # fc_identity, 128 bytes
    bit_exact: bool
    resumed: tuple[int, int] | None = None  # attempt and iteration that it goes on from


@dataclass
class Manifest:
    """What `manifest.json` says; `files` maps a name to its length in bytes and its SHA-256.

    Attributes:
        attempts: of the run, in order; the last one is the one that is written.
        closed_to: the highest number of a segment of the log that was ever closed; behind it lie those that may still grow.
        pinned: (attempt, iteration) that retention keeps.
        numbers: which snapshot of the directory a published one was, from 1, by file name.
        audited_to, alarms: what audits had found (`Directory.audits`) when notes of them were last removed.
    """

    folder: Path
    run_id: str
    has_model: bool
    attempts: list[Attempt]
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    closed_to: int = 0
    pinned: set[tuple[int, int]] = field(default_factory=set)
    numbers: dict[str, int] = field(default_factory=dict)
    audited_to: int | None = None
    alarms: list[dict] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Return a directory's manifest; CheckpointError if it is absent, or any byte of it is not as it was written."""
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{folder}: no {MANIFEST_NAME} there: not a checkpoint directory, or nothing is in it yet", str(path)
            )
        with io_errors("read", path):
            content = path.read_bytes()
        try:
            document = json.loads(content)
            digest = document.pop("digest")
            if digest != hashlib.sha256(_encode(document)).hexdigest() or content != _encode(
                {**document, "digest": digest}
            ):
                raise ValueError("its digest is wrong")
            if document["format"] != _FORMAT or document["version"] not in (1, _VERSION):
                raise ValueError(
                    f"{document['format']} version {document['version']}; this release reads {_FORMAT} 1 to {_VERSION}"
                )
            return cls._from(folder, document if document["version"] == _VERSION else _from_1(document))
        except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError) as error:
            what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{path}: {what}; restore the file from a copy", str(path)) from error

    @classmethod
    def _from(cls, folder: Path, document: dict) -> Manifest:
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in document["files"].items()}
        known = (_SEGMENT, _SNAPSHOT, _PLAN, _SNAPSHOT_1, re.compile(re.escape(_PLAN_1)))
        if strange := [name for name in files if not any(pattern.fullmatch(name) for pattern in known)]:
            raise ValueError(f"it names {strange[0]!r}, which no checkpoint directory has")
        attempts = [
            Attempt(
                int(row["attempt"]), str(row["plan"]), bytes.fromhex(row["identity"]), bool(row["bit_exact"]),
                row["resumed"] and (int(row["resumed"][0]), int(row["resumed"][1])),
            )
            for row in document["attempts"]
        ]  # fmt: skip
        if not attempts or any(attempt.plan not in files for attempt in attempts):
            raise ValueError("an attempt has no plan")
        pinned = {(int(attempt), int(iteration)) for attempt, iteration in document["pinned"]}
        numbers = {str(name): int(number) for name, number in document["numbers"].items()}
        return cls(
            folder,
            document["run_id"],
            document["has_model"],
            attempts,
            files,
            int(document["closed_to"]),
            pinned,
            numbers,
            document["audited_to"],
            list(document["alarms"]),
        )

    def store(self) -> None:
        """Publish the manifest as it now is."""
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "run_id": self.run_id,
            "has_model": self.has_model,
            "attempts": [
                {
                    "attempt": attempt.number,
                    "plan": attempt.plan,
                    "identity": attempt.identity.hex(),
                    "bit_exact": attempt.bit_exact,
                    "resumed": attempt.resumed and list(attempt.resumed),
                }
                for attempt in self.attempts
            ],
            "closed_to": self.closed_to,
            "pinned": sorted(map(list, self.pinned)),
            "numbers": self.numbers,
            "audited_to": self.audited_to,
            "alarms": self.alarms,
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()},
        }
        document["digest"] = hashlib.sha256(_encode(document)).hexdigest()
        write_published(self.folder / MANIFEST_NAME, _encode(document))

    def add(self, name: str, found: tuple[int, str] | None = None) -> None:
        """Take a published file in, by what it holds now, unless that is given; `store` makes it count."""
        if found is None:
            with io_errors("read", self.folder / name):
                found = sha256_of(self.folder / name)
        self.files[name] = found
        if match := _SEGMENT.fullmatch(name):
            self.closed_to = max(self.closed_to, int(match[1]))
        elif _SNAPSHOT.fullmatch(name):
            self.numbers.setdefault(name, max(self.numbers.values(), default=0) + 1)

    def remove(self, name: str) -> None:
        """Take a file out; `store` makes it count, and only then may the file go."""
        del self.files[name]
        # The highest number stays, so that none is given twice.
        if self.numbers.get(name, 0) < max(self.numbers.values(), default=0):
            self.numbers.pop(name, None)

    def check(self, name: str) -> Path:
        """Return the path of a published file whose length and SHA-256 agree; CheckpointError if they do not."""
        path = self.folder / name
        if name not in self.files:
            raise CheckpointError(f"{path}: not in the manifest, so not published", str(path))
        try:
            found = sha256_of(path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error.strerror}; restore the file from a copy", str(path)
            ) from error
        expected = self.files[name]
        if found != expected:
            what = (
                f"{found[0]} bytes long, expected {expected[0]}" if found[0] != expected[0] else "its SHA-256 is wrong"
            )
            raise CheckpointError(f"{path}: {what}; restore the file from a copy", str(path))
        return path

    @property
    def latest(self) -> Attempt:
        """The attempt that is, or was last, written."""
        return self.attempts[-1]

    def attempt(self, number: int) -> Attempt | None:
        """Return an attempt by its number, None if the directory has none of it."""
        return next((attempt for attempt in self.attempts if attempt.number == number), None)

    def lineage(self, number: int) -> dict[int, float]:
        """Return an attempt and those that it goes on from, back to the first: the last iteration of each that counts, infinity: all."""
        out: dict[int, float] = {}
        attempt, limit = self.attempt(number), math.inf
        while attempt is not None:
            out[attempt.number] = limit
            if attempt.resumed is None:
                break
            number, iteration = attempt.resumed
            attempt, limit = self.attempt(number), min(limit, iteration)
        return out

    @property
    def identities(self) -> list[bytes]:
        """The identity of each attempt."""
        return [attempt.identity for attempt in self.attempts]

    @property
    def snapshots(self) -> dict[tuple[int, int], str]:
        """Published snapshots: name by (attempt, iteration), ascending."""
        found = {}
        for name in self.files:
            if match := _SNAPSHOT.fullmatch(name):
                found[int(match[1]), int(match[2])] = name
            elif match := _SNAPSHOT_1.fullmatch(name):
                found[self.attempts[0].number, int(match[1])] = name
        return dict(sorted(found.items()))

    def snapshots_of(self, attempt: int) -> list[int]:
        """Return the iterations of which an attempt has published snapshots, ascending."""
        return [iteration for number, iteration in self.snapshots if number == attempt]

    @property
    def segments(self) -> list[int]:
        """Numbers of the log's published segments, which do not change again, ascending."""
        return sorted(int(match[1]) for name in self.files if (match := _SEGMENT.fullmatch(name)))

    @staticmethod
    def snapshot_name(attempt: int, iteration: int) -> str:
        """Return the name of the snapshot of an iteration."""
        return f"{SNAPSHOT_FOLDER}/{attempt:06}-{iteration:012}.h5"

    @staticmethod
    def plan_name(attempt: int) -> str:
        """Return the name of the file of an attempt's plan."""
        return f"{PLAN_FOLDER}/{attempt:06}.json"


def _from_1(document: dict) -> dict:
    """Return a document of version 1 as version 2 has it."""
    numbers = [int(match[1]) for name in document["files"] if (match := _SEGMENT.fullmatch(name))]
    attempt = {name: document[name] for name in ("attempt", "identity", "bit_exact")}
    return {
        **document,
        "attempts": [{**attempt, "plan": _PLAN_1, "resumed": None}],
        "closed_to": max(numbers, default=0),
        "pinned": [],
        "audited_to": None,
        "alarms": [],
        "numbers": {name: n for n, name in enumerate(sorted(filter(_SNAPSHOT_1.fullmatch, document["files"])), 1)},
    }
