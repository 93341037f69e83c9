# SPDX-License-Identifier: MIT
"""What `flowcheck list` answers: every iteration and its state, and the snapshots. Imports neither torch nor h5py."""

from __future__ import annotations

from pathlib import Path

from flowcheck.layout import single_sources
from flowcheck.plan import Plan
from updater.directory import Directory

__all__ = ["listing"]


def _revisions(plan: Plan) -> list[dict]:
    """Return for each revision of a plan what only one mirrored edge carries fully reduced: ranges, and which edge."""
    return [
        {
            "from_iteration": revision.from_iteration,
            "single_source": [
                {"range": [begin, end], "edge": edge} for begin, end, edge in single_sources(plan, revision)
            ],
        }
        for revision in plan.shard.revisions
    ]


def listing(path: str | Path) -> dict:
    """Return the document of `list --json`; CheckpointError if the directory is corrupt. A running updater is no hindrance."""
    directory = Directory(path)
    directory.require_whole()
    manifest = directory.manifest
    audited_to, alarms = directory.audits
    iterations = [
        {
            "iteration": row.number,
            "attempt": row.attempt,
            "state": row.state,
            **directory.facts(row),
            "sources": directory.sources(row),
        }
        for row in directory.iterations
    ]
    return {
        "run_id": manifest.run_id,
        "attempt": manifest.latest.number,
        "attempts": [
            {
                "attempt": attempt.number,
                "resumed": attempt.resumed and {"attempt": attempt.resumed[0], "iteration": attempt.resumed[1]},
                "snapshots": manifest.snapshots_of(attempt.number),
            }
            for attempt in manifest.attempts
        ],
        "audited_to": audited_to,
        "alarms": alarms,
        "distances": directory.distances,
        "bit_exact": manifest.latest.bit_exact,
        "iterations": iterations,
        "revisions": _revisions(directory.plan),
        "snapshots": sorted({iteration for _, iteration in manifest.snapshots}),
        "pinned": [{"attempt": attempt, "iteration": iteration} for attempt, iteration in sorted(manifest.pinned)],
    }
