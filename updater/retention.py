# SPDX-License-Identifier: MIT
"""What of a checkpoint directory may be removed, and removing it.

A directory is a row of epochs: a snapshot, and the segments of the log that lead from it towards the next one. What a
rule keeps of an epoch is both, or the snapshot alone. The epoch of the newest snapshot that verifies, and what follows it,
always stays: so there is never less than one state and all that was committed after it.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from flowcheck.errors import CheckpointError, RestoreError
from flowcheck.plan import Retention
from updater import durable
from updater.directory import Directory, Iteration, nearest
from updater.durable import io_errors, lock_directory
from updater.manifest import LOG_FOLDER, Manifest

__all__ = ["pin", "prune", "prune_directory", "removable"]


@dataclass
class _Epoch:
    """A snapshot (None: before the first), and the published segments that have records after it."""

    snapshot: tuple[int, int] | None
    name: str | None
    rows: list[Iteration] = field(default_factory=list)
    segments: set[str] = field(default_factory=set)
    keeps_snapshot: bool = False
    keeps_log: bool = False
    pinned: bool = False  # by a user, or because it is the newest: no limit of bytes removes it


def _epochs(directory: Directory) -> list[_Epoch]:
    """Return the epochs of a directory, attempt by attempt, oldest first."""
    manifest, epochs = directory.manifest, []
    for attempt in manifest.attempts:
        published = {i: name for (a, i), name in manifest.snapshots.items() if a == attempt.number}
        snapshots, own = list(published), [_Epoch(None, None)]
        own += [_Epoch((attempt.number, i), name) for i, name in published.items()]
        for row in directory.iterations:
            if row.attempt != attempt.number:
                continue
            epoch = own[bisect.bisect_left(snapshots, row.number)]  # that of the last snapshot before it
            epoch.rows.append(row)
            if row.entry is not None:
                epoch.segments.add(row.entry.file)
        epochs += own
    return epochs


def removable(directory: Directory, rules: Retention, verified: tuple[int, int] | None = None) -> list[str]:
    """Return the names of the published files that no rule keeps; none if there is no rule.

    `verified` is a snapshot that has just been read and found right.

    Raises:
        CheckpointError: a file that the answer depends on is corrupt, so nothing may go.
    """
    if rules == Retention():
        return []
    directory.require_whole()
    manifest, epochs = directory.manifest, _epochs(directory)
    if not manifest.has_model:
        return _of_gradients(directory, rules)
    last = _newest_that_verifies(manifest, epochs, verified)
    if last is None:
        return []
    for epoch in epochs[last:]:
        epoch.keeps_snapshot = epoch.keeps_log = True
    restorable = directory.restorable()
    head = max(restorable, default=0)
    windows = rules.last_iterations is not None or rules.every_snapshot is not None
    for epoch in epochs:
        if epoch.snapshot in manifest.pinned:
            epoch.keeps_snapshot = True
        if any((row.attempt, row.number) in manifest.pinned for row in epoch.rows):
            epoch.keeps_snapshot = epoch.keeps_log = True
        epoch.pinned = epoch.keeps_snapshot or epoch.keeps_log
        if not windows:
            epoch.keeps_snapshot = epoch.keeps_log = True
        current = epoch.snapshot is not None and restorable.get(epoch.snapshot[1]) == epoch.snapshot[0]
        if rules.last_iterations is not None and (current or any(row.state != "superseded" for row in epoch.rows)):
            first = head - rules.last_iterations + 1
            newest = max([row.number for row in epoch.rows if row.own == "committed"], default=-1)
            if newest >= first or (epoch.snapshot is not None and epoch.snapshot[1] >= first and current):
                epoch.keeps_snapshot = epoch.keeps_log = True
        if rules.every_snapshot is not None and epoch.name is not None:
            if manifest.numbers.get(epoch.name, 1) % rules.every_snapshot == 1 % rules.every_snapshot:
                epoch.keeps_snapshot = True
    removed = _not_kept(manifest, epochs)
    if rules.most_bytes is not None:
        size = sum(length for length, _ in manifest.files.values())
        for epoch in epochs[:last]:
            if size - sum(manifest.files[name][0] for name in removed) <= rules.most_bytes:
                break
            if not epoch.pinned:
                epoch.keeps_snapshot = epoch.keeps_log = False
                removed = _not_kept(manifest, epochs)
    if rules.most_waiting_bytes is not None:
        removed |= _waiting_beyond(manifest, directory, rules.most_waiting_bytes)
    return sorted(removed)


def _newest_that_verifies(manifest: Manifest, epochs: list[_Epoch], verified: tuple[int, int] | None) -> int | None:
    """Return the index of the epoch of the latest attempt's newest snapshot that is as it was written.

    While the latest attempt has none, that of the attempts before it.
    """
    from updater.shadow import load_snapshot

    lineage = manifest.lineage(manifest.latest.number)
    for number in range(len(epochs) - 1, -1, -1):
        key = epochs[number].snapshot
        if key is None or key[1] > lineage.get(key[0], -1):
            continue
        with contextlib.suppress(CheckpointError):
            if key != verified:
                load_snapshot(manifest, *key)
            return number
    return None


def _not_kept(manifest: Manifest, epochs: list[_Epoch]) -> set[str]:
    kept = {epoch.name for epoch in epochs if epoch.keeps_snapshot}
    kept |= {name for epoch in epochs if epoch.keeps_log for name in epoch.segments}
    kept |= {attempt.plan for attempt in manifest.attempts}
    # A segment without an iteration has notes only: it goes with what is older.
    known = {name for epoch in epochs for name in epoch.segments}
    oldest = min((name for name in kept if name and name.startswith(LOG_FOLDER)), default=None)
    bare = {n for n in manifest.files if n.startswith(LOG_FOLDER) and n not in known and (oldest is None or n > oldest)}
    return set(manifest.files) - kept - bare


def _waiting_beyond(manifest: Manifest, directory: Directory, most: int) -> set[str]:
    """Return the oldest segments of nothing but waiting iterations, so that at most so many bytes of them stay."""
    rows: dict[str, list[Iteration]] = {}
    for row in directory.iterations:
        if row.entry is not None:
            rows.setdefault(row.entry.file, []).append(row)
    waiting = [
        name for name, found in sorted(rows.items()) if {row.state for row in found} <= {"waiting", "incomplete"}
        and any(row.state == "waiting" for row in found) and name in manifest.files
    ]  # fmt: skip
    size, removed = sum(manifest.files[name][0] for name in waiting), set()
    for name in waiting:
        if size <= most:
            break
        size -= manifest.files[name][0]
        removed.add(name)
    return removed


def _of_gradients(directory: Directory, rules: Retention) -> list[str]:
    """Return what may go of a directory without states: whole segments of the log, the oldest first."""
    manifest = directory.manifest
    newest = max((row.number for row in directory.iterations), default=0)
    last_of: dict[str, int] = {}
    for row in directory.iterations:
        last_of[row.entry.file] = row.number
    old = sorted(name for name in last_of if name in manifest.files)
    removed: list[str] = []
    if rules.last_iterations is not None:
        removed = [name for name in old if last_of[name] <= newest - rules.last_iterations]
    if rules.most_bytes is not None:
        size = sum(length for length, _ in manifest.files.values())
        for name in old:
            if size - sum(manifest.files[n][0] for n in removed) > rules.most_bytes and name not in removed:
                removed.append(name)
    return sorted(removed)


def prune(
    manifest: Manifest,
    rules: Retention,
    *,
    verified: tuple[int, int] | None = None,
    dry_run: bool = False,
) -> list[dict]:
    """Remove what no rule keeps of a manifest's directory; return `file` and `bytes` of each.

    The caller holds the directory's lock, unless `dry_run`. `verified` as for `removable`.

    Raises:
        CheckpointError: something there is corrupt: nothing is removed then.
        DiskError: the disk refused; what was not removed yet is at the next call.
    """
    if rules == Retention():
        return []
    folder = manifest.folder
    directory = Directory(folder)
    names = removable(directory, rules, verified)
    rows = [{"file": name, "bytes": manifest.files[name][0]} for name in names]
    if rows and not dry_run:
        before = dict(manifest.files), dict(manifest.numbers)
        # Notes of audits go with their segments; what they say stays.
        manifest.audited_to, manifest.alarms = directory.audits
        for name in names:
            manifest.remove(name)
        try:
            manifest.store()
        except BaseException:
            manifest.files, manifest.numbers = before
            raise
        with io_errors("remove", folder):
            for name in names:
                durable.disk.unlink(folder / name)
    return rows


def prune_directory(folder: Path, rules: dict[str, int], *, dry_run: bool) -> dict:
    """Return the document of `prune --json` after removing what no rule keeps from a directory that nobody writes.

    Args:
        folder: the checkpoint directory.
        rules: fields of the plan's `retention` to be used in place of the plan's own; none: those.
        dry_run: only say what would go; a running updater is then no hindrance.

    Raises:
        ConfigError: another process writes to it.
        CheckpointError: something there is corrupt: nothing is removed then.
    """
    directory = Directory(folder)
    chosen = Retention(**rules) if rules else directory.plan.checkpoints.retention
    lock = None if dry_run else lock_directory(folder)
    try:
        manifest = Manifest.load(folder)
        rows = prune(manifest, chosen, dry_run=dry_run)
        left = sum(length for name, (length, _) in manifest.files.items() if name not in {row["file"] for row in rows})
        return {
            "dry_run": dry_run,
            "rules": chosen.model_dump(exclude_none=True),
            "removed": rows,
            "bytes": sum(row["bytes"] for row in rows),
            "left_bytes": left,
        }
    finally:
        if lock is not None:
            os.close(lock)


def pin(folder: Path, iteration: int, attempt: int | None = None, *, remove: bool = False) -> int:
    """Have retention keep what an iteration is restored from, or no longer; return its attempt.

    Raises:
        ConfigError: another process writes to the directory.
        RestoreError: the iteration cannot be restored, or was not pinned.
    """
    Manifest.load(folder)  # before a folder that is none is locked
    lock = lock_directory(folder)
    try:
        directory = Directory(folder)
        manifest, possible = directory.manifest, directory.restorable(attempt)
        pinned = {i: a for a, i in manifest.pinned if attempt in (None, a)} if remove else possible
        if iteration not in pinned:
            if remove:
                there = ", ".join(map(str, sorted(pinned))) or "none"
                raise RestoreError(f"{folder}: iteration {iteration} is not pinned; pinned are: {there}")
            raise RestoreError(f"{folder}: iteration {iteration} cannot be restored; {nearest(pinned, iteration)}")
        key = pinned[iteration], iteration
        (manifest.pinned.discard if remove else manifest.pinned.add)(key)
        manifest.store()
        return key[0]
    finally:
        os.close(lock)
