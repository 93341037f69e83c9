# SPDX-License-Identifier: MIT
"""Beginning a checkpoint directory, going on with one, and opening a new attempt of its run in it."""

from __future__ import annotations

from pathlib import Path

from flowcheck.errors import CheckpointError, ConfigError
from flowcheck.plan import Plan
from updater import durable
from updater.durable import io_errors, make_folder, remove_temporaries, write_published
from updater.log_reader import segment_name, segment_numbers
from updater.manifest import LOG_FOLDER, MANIFEST_NAME, PLAN_FOLDER, SNAPSHOT_FOLDER, Attempt, Manifest

__all__ = ["make_folders", "open_attempt"]

_FOLDERS = (PLAN_FOLDER, LOG_FOLDER, SNAPSHOT_FOLDER)


def make_folders(folder: Path) -> None:
    """Make a directory and its folders, where they are not there; FlowCheckError if that cannot be."""
    with io_errors("make", folder):
        for name in _FOLDERS:
            make_folder(folder.absolute() / name)


def open_attempt(folder: Path, plan: Plan, *, bit_exact: bool) -> Manifest:
    """Return the manifest of a directory that the caller has locked, the plan's attempt its latest.

    Raises:
        ConfigError: the directory is another run's, or the attempt is not its latest or the next one.
        CheckpointError: the directory is corrupt.
    """
    with io_errors("clear", folder):
        for path in (folder, *(folder / name for name in _FOLDERS)):
            remove_temporaries(path)
    if not (folder / MANIFEST_NAME).exists():
        _check_empty(folder)
        manifest = Manifest(folder, plan.job.run_id, plan.has_model, [])
        _begin(manifest, plan, bit_exact)
        return manifest
    manifest = Manifest.load(folder)
    _remove_strays(manifest)
    job, latest = plan.job, manifest.latest
    if manifest.run_id != job.run_id:
        raise ConfigError(
            f"{folder}: holds run {manifest.run_id!r}, the plan is of run {job.run_id!r}; choose another directory"
        )
    if job.attempt < latest.number:
        raise ConfigError(
            f"{folder}: attempt {latest.number} of run {job.run_id!r} has begun there, the plan is of attempt {job.attempt}; "
            f"expected {latest.number}, or a later one that goes on from a checkpoint"
        )
    if job.attempt > latest.number:
        _begin(manifest, plan, bit_exact)
        return manifest
    if latest.identity != plan.identity():
        raise ConfigError(f"{folder}: was made from another plan of run {job.run_id!r}; choose another directory")
    manifest.check(latest.plan)
    if latest.bit_exact and not bit_exact:
        latest.bit_exact = False
        manifest.store()
    return manifest


def _check_empty(folder: Path) -> None:
    """Refuse to begin a directory where another one has lost its manifest.

    A crash may have left a plan, or a name in the log folder, before the first manifest: nothing was committed then.
    """
    stray = next((path for name in (LOG_FOLDER, SNAPSHOT_FOLDER) for path in sorted((folder / name).iterdir())), None)
    if stray is not None:
        raise CheckpointError(f"{folder}: no {MANIFEST_NAME}, but a log; restore the manifest from a copy", str(stray))
    if (folder / "plan.json").exists():
        raise ConfigError(
            f"{folder}: has a plan.json but no {MANIFEST_NAME}: not a checkpoint directory; choose another"
        )


def _remove_strays(manifest: Manifest) -> None:
    """Remove what a crash left of files that were not in the manifest yet, or not any more."""
    folder = manifest.folder
    strays = [
        LOG_FOLDER + "/" + segment_name(n) for n in segment_numbers(folder / LOG_FOLDER) if n <= manifest.closed_to
    ]
    strays += [f"{SNAPSHOT_FOLDER}/{path.name}" for path in (folder / SNAPSHOT_FOLDER).glob("*.h5")]
    strays += [f"{PLAN_FOLDER}/{path.name}" for path in (folder / PLAN_FOLDER).glob("*.json")]
    with io_errors("clear", folder):
        for name in strays:
            if name not in manifest.files:
                durable.disk.unlink(folder / name)


def _begin(manifest: Manifest, plan: Plan, bit_exact: bool) -> None:
    job = plan.job
    if manifest.has_model != plan.has_model:
        raise ConfigError(f"{manifest.folder}: one attempt of run {job.run_id!r} has a model, another has none")
    if job.resumed and manifest.attempt(job.resumed.attempt) is None:
        known = ", ".join(str(attempt.number) for attempt in manifest.attempts) or "none"
        raise ConfigError(
            f"{manifest.folder}: the plan goes on from attempt {job.resumed.attempt} of run {job.run_id!r}, which is not there "
            f"(there is {known}); choose the directory that has it"
        )
    resumed = job.resumed and (job.resumed.attempt, job.resumed.iteration)
    name = manifest.plan_name(job.attempt)
    write_published(manifest.folder / name, plan.canonical())
    manifest.add(name)
    manifest.attempts.append(Attempt(job.attempt, name, plan.identity(), bit_exact, resumed))
    manifest.store()
