# SPDX-License-Identifier: MIT
"""The manifest of a checkpoint directory: which files are published, and what bytes they have.

It is written last, whenever a file has been published, and read first: a file that it does not name is not there. The
open segment of the log is not named yet (it grows); its records carry checksums of their own.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from flowcheck.errors import CheckpointError
from updater.durable import io_errors, sha256_of, write_published

__all__ = ["LOG_FOLDER", "MANIFEST_NAME", "PLAN_NAME", "SNAPSHOT_FOLDER", "Manifest"]

MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
LOG_FOLDER = "log"
SNAPSHOT_FOLDER = "snapshots"

_FORMAT = "flowcheck-manifest"
_VERSION = 1
_FILE_NAME = re.compile(rf"{PLAN_NAME}|{LOG_FOLDER}/\d{{6}}\.fclog|{SNAPSHOT_FOLDER}/(\d{{12}})\.h5")


def _encode(document: dict) -> bytes:
    return json.dumps(document, sort_keys=True, indent=1).encode() + b"\n"


@dataclass
class Manifest:
    """What `manifest.json` says; `files` maps a name to its length in bytes and its SHA-256."""

    folder: Path
    run_id: str
    attempt: int
    identity: bytes  # fc_identity, 128 bytes
    has_model: bool
    bit_exact: bool
    files: dict[str, tuple[int, str]] = field(default_factory=dict)

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
            if (document["format"], document["version"]) != (_FORMAT, _VERSION):
                raise ValueError(
                    f"{document['format']} version {document['version']}; this release reads {_FORMAT} {_VERSION}"
                )
            files = {
                str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in document["files"].items()
            }
            if strange := [name for name in files if not _FILE_NAME.fullmatch(name)]:
                raise ValueError(f"it names {strange[0]!r}, which no checkpoint directory has")
            return cls(
                folder,
                document["run_id"],
                document["attempt"],
                bytes.fromhex(document["identity"]),
                document["has_model"],
                document["bit_exact"],
                files,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{path}: {what}; restore the file from a copy", str(path)) from error

    def store(self) -> None:
        """Publish the manifest as it now is."""
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "run_id": self.run_id,
            "attempt": self.attempt,
            "identity": self.identity.hex(),
            "has_model": self.has_model,
            "bit_exact": self.bit_exact,
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()},
        }
        document["digest"] = hashlib.sha256(_encode(document)).hexdigest()
        write_published(self.folder / MANIFEST_NAME, _encode(document))

    def add(self, name: str) -> None:
        """Take a published file in, by what it holds now; `store` makes it count."""
        with io_errors("read", self.folder / name):
            self.files[name] = sha256_of(self.folder / name)

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
    def snapshots(self) -> list[int]:
        """Iterations of which a snapshot is published, ascending."""
        return sorted(int(match[1]) for name in self.files if (match := _FILE_NAME.fullmatch(name)) and match[1])

    @property
    def closed_segments(self) -> set[str]:
        """File names of the log's segments that will not change again."""
        return {name.removeprefix(f"{LOG_FOLDER}/") for name in self.files if name.startswith(f"{LOG_FOLDER}/")}

    @staticmethod
    def snapshot_name(iteration: int) -> str:
        """Return the name of the snapshot of an iteration."""
        return f"{SNAPSHOT_FOLDER}/{iteration:012}.h5"
