# SPDX-License-Identifier: MIT
"""What `flowcheck list` answers: every iteration and its state, and the snapshots. Imports neither torch nor h5py."""

from __future__ import annotations

from pathlib import Path

from updater.directory import Directory
from updater.log_reader import read_facts

__all__ = ["listing"]


def listing(path: str | Path) -> dict:
    """Return the document of `list --json`; CheckpointError if the directory is corrupt. A running updater is no hindrance."""
    directory = Directory(path)
    manifest = directory.manifest
    audited_to, alarms = directory.audits
    iterations = []
    for iteration, (entry, state) in directory.entries.items():
        if state == "incomplete":
            facts = read_facts(entry, manifest.identity)
        else:
            size = entry.header.payload_bytes
            facts = {"bytes": size, "placed_bytes": size, "missing": [], "reason": None}
        iterations.append({"iteration": iteration, "attempt": entry.header.attempt, "state": state, **facts})
    return {
        "run_id": manifest.run_id,
        "attempt": manifest.attempt,
        "audited_to": audited_to,
        "alarms": alarms,
        "distances": directory.distances,
        "bit_exact": manifest.bit_exact,
        "iterations": iterations,
        "snapshots": manifest.snapshots,
    }
