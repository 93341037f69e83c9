# SPDX-License-Identifier: MIT
"""Holds a directory and its report against what must have come of a case."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fault_injection.case import Case
from fault_injection.expected import Expected, expect, must_be_whole, ranges_of
from flowcheck.verdicts import COUNTERS
from updater.base import rebase
from updater.directory import Directory, bucket_views
from updater.listing import listing
from updater.restore import states_after
from workload_gen.truth import digest

__all__ = ["Verdict", "judge"]

_WHOLE = ("committed", "waiting")


@dataclass
class Verdict:
    """What came of one case.

    Attributes:
        iterations: that the jobs had.
        committed, waiting, volatile, incomplete, unseen: by state; unseen: no usable frame came of them or of a later one.
        repaired: committed though they were hit.
        wrong: whole with bits that are not the trainer's.
        unrepaired: not whole though every byte had a usable copy.
        untrue_ranges: with missing ranges, or placed bytes, that are not true.
        unlisted: not in the list though they must be.
        unaccounted: frames without a verdict, or with two.
        lost: numbers of the incomplete and the unseen ones.
        refused: cases in which the stages refused plan or capture.
        problems: each in a line.
    """

    iterations: int = 0
    committed: int = 0
    waiting: int = 0
    volatile: int = 0
    incomplete: int = 0
    unseen: int = 0
    repaired: int = 0
    wrong: int = 0
    unrepaired: int = 0
    untrue_ranges: int = 0
    unlisted: int = 0
    unaccounted: int = 0
    lost: list[int] = field(default_factory=list)
    refused: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def bad(self) -> int:
        """How many promises were broken."""
        return self.wrong + self.unrepaired + self.untrue_ranges + self.unlisted + self.unaccounted

    def note(self, name: str, what: str, count: int = 1) -> None:
        """Count a broken promise."""
        setattr(self, name, getattr(self, name) + count)
        self.problems.append(f"{name}: {what}")

    def name_case(self, where: str) -> None:
        """Say of every problem noted so far in which case it is."""
        self.problems = [f"{where}: {problem}" for problem in self.problems]


def _within(inner: list[tuple[int, int]], outer: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Return a range of `inner` that `outer` does not hold, None if it holds all; both ascending and joined."""
    for begin, end in inner:
        if not any(low <= begin and end <= high for low, high in outer):
            return begin, end
    return None


def _apart(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Return where two lists of ranges meet; None if they do not."""
    for begin, end in some:
        for low, high in others:
            if begin < high and low < end:
                return max(begin, low), min(end, high)
    return None


def judge(case: Case, out: Path, packets: dict[str, Any], *, base: bool = False) -> Verdict:
    """Return what came of a case.

    Args:
        case: as the kind left it.
        out: the checkpoint directory, closed.
        packets: the counters of the run.
        base: where iterations wait, give the trainer's state after the lost one; what is committed then is judged with the rest.
    """
    verdict = Verdict(iterations=case.job.iterations)
    expected = expect(case)
    _judge_packets(case, packets, verdict)
    report = listing(out)
    rows = {row["iteration"]: row for row in report["iterations"] if row["iteration"] > 0}
    if sorted(rows) != list(range(1, len(rows) + 1)):
        verdict.note("unlisted", f"the list has iterations {sorted(rows)}")
    last = case.shown_as(case.job.iterations)
    if len(rows) > last and len(rows) not in expected.lied:
        verdict.note("untrue_ranges", f"the list has {len(rows)} iterations, the job {last}")
    rows = _of_the_job(case, rows, verdict)
    _judge_rows(case, expected, rows, verdict)
    waits = [row["iteration"] for row in rows.values() if row["state"] == "waiting"]
    if base and waits and min(waits) > 1 and verdict.bad == 0:
        rows = _based(case, out, min(waits) - 1, verdict)
    _judge_bits(case, out, rows, verdict)
    return verdict


def _of_the_job(case: Case, rows: dict[int, dict], verdict: Verdict) -> dict[int, dict]:
    """Return the rows of the job's own iterations by their number there; of what lies between all must be missing."""
    own = {case.shown_as(number): number for number in range(1, case.job.iterations + 1)}
    for number, row in rows.items():
        if (
            number not in own
            and number <= max(own)
            and (row["state"], row["missing"]) != ("incomplete", [[0, row["bytes"]]])
        ):
            verdict.note(
                "untrue_ranges",
                f"iteration {number}, {row['state']}: nobody showed any of it, missing {row['missing']}",
            )
    return {own[number]: row for number, row in rows.items() if number in own}


def _judge_packets(case: Case, packets: dict[str, Any], verdict: Verdict) -> None:
    for name, shown in case.streams.items():
        row = packets["per_stream"][name]
        judged = sum(row[one] for one in COUNTERS if one not in ("received", "missed_by_port"))
        away = abs(row["received"] - judged) + abs(len(shown) - row["received"] - row["missed_by_port"])
        if away:
            what = f"stream {name}: {len(shown)} frames, {row['received']} received, {judged} judged, {row['missed_by_port']} missed"
            verdict.note("unaccounted", what, away)


def _judge_rows(case: Case, expected: Expected, rows: dict[int, dict], verdict: Verdict) -> None:
    job = case.job
    unbroken = not len(expected.usable[0]) or bool(expected.usable[0].all())
    for number in range(1, job.iterations + 1):
        row, required = rows.get(number), must_be_whole(case, expected, number)
        unbroken = unbroken and number != case.later[0]
        if row is None:
            verdict.unseen += 1
            verdict.lost.append(number)
            if case.exact and number <= expected.highest:
                verdict.note("unlisted", f"iteration {number} is not listed, one of {expected.highest} was shown")
            continue
        state = row["state"]
        if state in _WHOLE:
            setattr(verdict, state, getattr(verdict, state) + 1)
            verdict.repaired += number in expected.hit and state == "committed"
            missing: list[tuple[int, int]] = []
        elif state == "volatile":
            verdict.volatile += 1
            missing = []
            if not case.volatile:
                verdict.note("unrepaired", f"iteration {number} is volatile")
        else:
            verdict.incomplete += 1
            verdict.lost.append(number)
            missing = [(begin, end) for begin, end in row["missing"]]
        if required and unbroken and state == "waiting":
            verdict.note("unrepaired", f"iteration {number} waits, but all before it were shown")
        unbroken = unbroken and required
        if required and state == "incomplete":
            verdict.note(
                "unrepaired", f"iteration {number} is incomplete, {row['reason']}, {missing}, but all of it was shown"
            )
        _judge_ranges(case, expected, number, row, missing, verdict)


def _judge_ranges(
    case: Case, expected: Expected, number: int, row: dict, missing: list[tuple[int, int]], verdict: Verdict
) -> None:
    if number not in expected.lied:
        absent = ranges_of(case, number, ~expected.delivered[number])
        if (found := _within(absent, missing)) is not None:
            verdict.note(
                "untrue_ranges", f"iteration {number}, {row['state']}: nobody showed bytes {found}, missing {missing}"
            )
            return
        if case.exact:
            shown = ranges_of(case, number, expected.usable[number])
            if (found := _apart(missing, shown)) is not None:
                verdict.note(
                    "untrue_ranges", f"iteration {number}: bytes {found} were shown, {row['reason']}, missing {missing}"
                )
                return
    if (
        row["state"] == "incomplete"
        and row["placed_bytes"] + sum(end - begin for begin, end in missing) != row["bytes"]
    ):
        verdict.note(
            "untrue_ranges",
            f"iteration {number}: {row['placed_bytes']} of {row['bytes']} bytes placed, missing {missing}",
        )


def _judge_bits(case: Case, out: Path, rows: dict[int, dict], verdict: Verdict) -> None:
    directory, job = Directory(out), case.job
    own = {row["iteration"]: number for number, row in rows.items()}
    wrong: dict[int, str] = {}
    for number, row in rows.items():
        if row["state"] in _WHOLE:
            slot, _, revision = directory.slot(row["iteration"])
            found = [hashlib.sha256(np.ascontiguousarray(view)).digest() for view in bucket_views(slot, revision)]
            if found != job.gradient_digests[number]:
                wrong[number] = "gradient"
    committed = {row["iteration"] for row in rows.values() if row["state"] == "committed"}
    if committed:
        stepped = set()
        for listed, state in states_after(out):
            stepped.add(listed)
            number = own.get(listed, listed)
            if number in job.state_digests and digest(state) != job.state_digests[number]:
                wrong.setdefault(number, "state")
        if not committed <= stepped | set(directory.manifest.snapshots_of(directory.manifest.latest.number)):
            verdict.note("unrepaired", f"iterations {sorted(committed - stepped)} are committed and cannot be restored")
    for number, what in sorted(wrong.items()):
        verdict.note("wrong", f"iteration {number}: its {what} is not the trainer's")


def _based(case: Case, out: Path, lost: int, verdict: Verdict) -> dict[int, dict]:
    """Go on from the trainer's state after a lost iteration; return the rows of the job's iterations then."""
    number = next(n for n in range(1, case.job.iterations + 1) if case.shown_as(n) == lost + 1)
    state = torch.load(case.job.folder / "truth" / f"iteration-{number - 1:06}.pt", weights_only=True)
    torch.save({**state, "iteration": lost}, out.parent / "base.pt")
    rebase(out, out.parent / "base.pt")
    rows = {row["iteration"]: row for row in listing(out)["iterations"] if row["iteration"] > 0}
    if rows[lost + 1]["state"] != "committed":
        verdict.note("unrepaired", f"iteration {lost + 1} is {rows[lost + 1]['state']} after a base at {lost}")
    return _of_the_job(case, rows, verdict)
