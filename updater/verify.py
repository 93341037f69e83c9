# SPDX-License-Identifier: MIT
"""What `flowcheck verify` answers: every checksum recomputed, the log replayed over the snapshots, and compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flowcheck.errors import CheckpointError, DifferenceError, FlowCheckError
from updater.directory import Directory
from updater.log_reader import Segment, segment_paths
from updater.manifest import LOG_FOLDER, MANIFEST_NAME

__all__ = ["Verification", "check", "verify"]


@dataclass
class Verification:
    """What was found: files and bytes looked at, problems, and up to which iteration the log is proved."""

    files: int = 0
    bytes: int = 0
    problems: list[tuple[str, FlowCheckError]] = field(default_factory=list)
    proved_to: int = 0

    def document(self) -> dict:
        """Return the document of `verify --json`."""
        problems = [{"file": file, "what": str(error)} for file, error in self.problems]
        return {
            "ok": not problems,
            "files": self.files,
            "bytes": self.bytes,
            "problems": problems,
            "proved_to": self.proved_to,
        }

    @property
    def exit_code(self) -> int:
        """0 if all is well; 5 if a file is corrupt, 6 if only log and snapshot disagree."""
        codes = {error.exit_code for _, error in self.problems}
        return next(
            (code for code in (CheckpointError.exit_code, DifferenceError.exit_code) if code in codes),
            max(codes, default=0),
        )


def verify(path: str | Path) -> dict:
    """Return the document of `verify --json` for a checkpoint directory."""
    return check(path).document()


def check(path: str | Path) -> Verification:
    """Read every published file and every record, and step the log over the first snapshot to each later one.

    `proved_to` is the last iteration whose snapshot the log leads to, bit by bit (in a plan without a model: up to which
    all records are whole). Where this process does not have the arithmetic that the snapshots were made with, it proves
    nothing beyond the first snapshot, and that is no problem of the directory.
    """
    result = Verification()
    try:
        directory = Directory(path)
    except FlowCheckError as error:
        result.problems.append((MANIFEST_NAME, error))
        return result
    result.files, result.bytes = 1, (directory.path / MANIFEST_NAME).stat().st_size
    manifest = directory.manifest
    for name in sorted(manifest.files):
        _look(result, name, lambda name=name: manifest.check(name).stat().st_size)
    open_segments = [p for p in _segments(result, directory) if p.name not in manifest.closed_segments]
    result.files += len(open_segments)
    result.bytes += sum(p.stat().st_size for p in open_segments)
    missing = [name for name in manifest.closed_segments if not (directory.path / LOG_FOLDER / name).exists()]
    if not result.problems and not missing:
        _check_log(result, directory)
    return result


def _look(result: Verification, name: str, action: object) -> None:
    try:
        result.bytes += action()
    except FlowCheckError as error:
        result.problems.append((name, error))
    result.files += 1


def _segments(result: Verification, directory: Directory) -> list[Path]:
    """Return the segments after having read every payload in them."""
    try:
        paths = segment_paths(directory.path / LOG_FOLDER)
    except FlowCheckError as error:
        result.problems.append((LOG_FOLDER, error))
        return []
    for path in paths:
        try:
            with Segment(path, directory.manifest.identity) as segment:
                for entry in segment.entries():
                    segment.payload(entry, [np.empty(entry.header.payload_bytes, np.uint8)])
        except FlowCheckError as error:
            result.problems.append((f"{LOG_FOLDER}/{path.name}", error))
    return paths


def _check_log(result: Verification, directory: Directory) -> None:
    try:
        entries = directory.entries
        plan = directory.plan
        if not directory.manifest.has_model:
            for iteration, (_, state) in entries.items():
                if state != "whole" or iteration != result.proved_to + 1:
                    break
                result.proved_to = iteration
        elif directory.manifest.snapshots:
            _replay(result, directory)
        del plan
    except FlowCheckError as error:
        result.problems.append((LOG_FOLDER, error))


def _replay(result: Verification, directory: Directory) -> None:
    from updater import arithmetic
    from updater.model_state import ModelState
    from updater.shadow import load_snapshot, replay
    from updater.state_difference import differences

    manifest, plan = directory.manifest, directory.plan
    snapshots = manifest.snapshots
    while snapshots:
        first = load_snapshot(manifest, snapshots[0])
        result.proved_to = snapshots[0]
        if first.arithmetic != arithmetic.current().model_dump():
            return
        model = ModelState(plan)
        model.load_state(first, manifest.snapshot_name(snapshots[0]))
        last = snapshots[0]
        for last in replay(plan, model, directory.entries.values(), snapshots[0]):
            if last not in snapshots:
                continue
            if not manifest.bit_exact:
                break  # a base of the trainer's own bits, from which it goes on
            name = manifest.snapshot_name(last)
            kept = load_snapshot(manifest, last)
            if kept.arithmetic != first.arithmetic:
                return
            found = differences((model.model, model.optimizer.state_dict()), (kept.model, kept.optimizer))
            if found:
                what = (
                    f"{name}: the log replayed over snapshot {snapshots[0]} gives other bits, "
                    f"first in {found[0]['name']!r}"
                )
                result.problems.append((name, DifferenceError(what)))
                return
            result.proved_to = last
        # What the log does not lead to is a base, from which it goes on.
        result.proved_to = max(result.proved_to, 0 if manifest.bit_exact else last)
        snapshots = [i for i in snapshots if i > last or (i == last != snapshots[0] and not manifest.bit_exact)]
