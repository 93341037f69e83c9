# SPDX-License-Identifier: MIT
"""What `flowcheck verify` answers: every checksum recomputed, the log replayed over the snapshots, and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flowcheck.errors import CheckpointError, DifferenceError, FlowCheckError
from updater.directory import Directory, segments
from updater.log_reader import Segment, segment_name
from updater.manifest import LOG_FOLDER, MANIFEST_NAME

__all__ = ["Verification", "check", "verify"]


@dataclass
class Verification:
    """What was found.

    Attributes:
        files: looked at; `bytes` of them.
        problems: file and error.
        proved_to: the newest snapshot of the latest attempt that the log leads to, bit by bit, or that is a base.
        offered: where there are problems, the newest (attempt, iteration) that can be restored without the files that have
            them; None if there is none.
    """

    files: int = 0
    bytes: int = 0
    problems: list[tuple[str, FlowCheckError]] = field(default_factory=list)
    proved_to: int = 0
    offered: tuple[int, int] | None = None

    def document(self) -> dict:
        """Return the document of `verify --json`."""
        problems = [{"file": file, "what": str(error)} for file, error in self.problems]
        offered = self.offered and {"attempt": self.offered[0], "iteration": self.offered[1]}
        return {
            "ok": not problems,
            "files": self.files,
            "bytes": self.bytes,
            "problems": problems,
            "proved_to": self.proved_to,
            "offered": offered,
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
    """Read every published file and every record, and step the log over each snapshot to the next one.

    Where this process does not have the arithmetic that the snapshots were made with, it proves nothing beyond the first
    one, and that is no problem of the directory. (In a plan without a model: up to which all records are whole.)
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
    _read_segments(result, directory)
    bad = {name for name, _ in result.problems}
    if directory.manifest.has_model:
        _prove(result, directory, bad)
    elif not bad:
        for row in directory.iterations:
            if row.state != "whole" or row.number != result.proved_to + 1:
                break
            result.proved_to = row.number
    return result


def _look(result: Verification, name: str, action: Callable[[], int]) -> None:
    try:
        result.bytes += action()
    except FlowCheckError as error:
        result.problems.append((name, error))
    result.files += 1


def _read_segments(result: Verification, directory: Directory) -> None:
    """Read every payload; what has been found wrong in a file already is not said again."""
    manifest = directory.manifest
    for number in segments(manifest):
        name = f"{LOG_FOLDER}/{segment_name(number)}"
        if any(bad == name for bad, _ in result.problems):
            continue
        path = directory.path / name
        try:
            with Segment(path, manifest.identities) as segment:
                if name not in manifest.files:
                    result.files, result.bytes = result.files + 1, result.bytes + segment.file_bytes
                for entry in segment.entries():
                    segment.payload(entry, [np.empty(entry.header.payload_bytes, np.uint8)])
        except FlowCheckError as error:
            result.problems.append((name, error))
    known = {name for name, _ in result.problems}
    _ = directory.iterations
    result.problems += [(name, error) for name, error in directory.problems.items() if name not in known]


def _prove(result: Verification, directory: Directory, bad: set[str]) -> None:
    """Step each attempt's log from snapshot to snapshot; note up to where that agrees, or what does not."""
    for attempt in directory.manifest.attempts:
        if attempt.plan in bad:
            continue
        try:
            reached = _prove_attempt(result, directory, attempt.number, bad)
        except FlowCheckError as error:
            path = Path(getattr(error, "path", ""))
            name = path.relative_to(directory.path) if path.is_relative_to(directory.path) else attempt.plan
            result.problems.append((str(name), error))
            continue
        if attempt is directory.manifest.latest:
            result.proved_to = reached
    if result.problems:
        result.offered = _offer(directory, {name for name, _ in result.problems})


def _prove_attempt(result: Verification, directory: Directory, attempt: int, bad: set[str]) -> int:
    from updater import arithmetic
    from updater.model_state import ModelState
    from updater.restore import replay
    from updater.shadow import load_snapshot
    from updater.state_difference import differences

    manifest = directory.manifest
    names = {i: name for (a, i), name in manifest.snapshots.items() if a == attempt and name not in bad}
    proved = 0
    model, reached = None, -1
    for iteration, name in names.items():
        kept = load_snapshot(manifest, attempt, iteration)
        ours = kept.arithmetic == arithmetic.current().model_dump()
        ways, entries = directory.ways(attempt, iteration)
        steps = {number: entry for number, entry in entries.items() if number > reached}
        led = model is not None and reached in ways and manifest.attempt(attempt).bit_exact
        led = led and not bad & {entry.file for entry in steps.values()}
        if led and ours:
            for _ in replay(directory.plan_of(attempt), model, steps, manifest.identities, exact=True):
                pass
            found = differences((model.model, model.optimizer.state_dict()), (kept.model, kept.optimizer))
            if found:
                what = f"{name}: the log replayed over the snapshot of iteration {reached} gives other bits, first in {found[0]['name']!r}"
                result.problems.append((name, DifferenceError(what)))
                return proved
        if not ours:
            model = None
            proved = proved if led else iteration
            continue
        model = ModelState(directory.plan_of(attempt))
        model.load_state(kept, name)
        reached = proved = iteration
    return proved


def _offer(directory: Directory, bad: set[str]) -> tuple[int, int] | None:
    """Return the newest state of which no file is bad."""
    manifest = directory.manifest
    plans = {attempt.number for attempt in manifest.attempts if attempt.plan not in bad}
    for iteration, attempt in sorted(directory.restorable().items(), reverse=True):
        ways, entries = directory.ways(attempt, iteration)
        for snapshot in ways:
            needed = {manifest.snapshots[attempt, snapshot]}
            needed |= {entry.file for number, entry in entries.items() if number > snapshot}
            if attempt in plans and not needed & bad:
                return attempt, iteration
    return None
