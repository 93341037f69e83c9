# SPDX-License-Identifier: MIT
"""What a job does to the plan file that a shadow follows: it completes the plan, or another attempt of the run replaces it.

A plan file appears whole or not at all, so a new one is another file under the same name. Two attempts may write the same
bytes (the same queue pairs, the same numbers): then the acknowledgement tells them apart, which a job takes away when
it begins (`RunFolder.begin`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowcheck import plan as plans
from flowcheck.errors import ConfigError

__all__ = ["Change", "PlanWatch", "check_sources"]


@dataclass(frozen=True)
class Change:
    """A plan that has taken the place of the one that is followed.

    Attributes:
        plan: it.
        completes: it is the same attempt's, and complete now; else an attempt begins with it.
    """

    plan: plans.Plan
    completes: bool


def check_sources(plan: plans.Plan, path: Path) -> None:
    """Raise ConfigError if a stream of a plan names nothing that could be captured live."""
    for stream in plan.shard.streams:
        if not (stream.interface or stream.port):
            raise ConfigError(f"{path}: stream {stream.name!r} names neither interface nor port")


class PlanWatch:
    """Looks whether a plan file was written anew; `load` it once, then `look` now and then.

    Args:
        path: the plan file.
        refuse: called once with a line for each new file that cannot be followed; what was followed still is.
    """

    def __init__(self, path: Path, refuse: Callable[[str], None]) -> None:
        self._path, self._refuse = path, refuse
        self._seen: tuple[int, int, int] | None = None

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None  # taken away: what it said still holds
        return found.st_ino, found.st_mtime_ns, found.st_size

    def load(self) -> plans.Plan:
        """Return the plan that is there, complete or not; ConfigError if it cannot be followed live."""
        self._seen = self._signature()
        plan = plans.load(self._path, incomplete=True)
        check_sources(plan, self._path)
        return plan

    def look(self, current: plans.Plan, *, begun_anew: bool) -> Change | None:
        """Return what has become of the plan that is followed; None if nothing has, or what cannot be followed.

        Args:
            current: the plan that is followed.
            begun_anew: the acknowledgement of it has been taken away, which is what a job does that begins.
        """
        signature = self._signature()
        if signature is None or signature == self._seen:
            return None
        try:
            found = self.load()
            return self._change(current, found, begun_anew)
        except ConfigError as error:
            self._refuse(f"still following attempt {current.job.attempt} of run {current.job.run_id!r}: {error}")
            return None

    def _change(self, current: plans.Plan, found: plans.Plan, begun_anew: bool) -> Change | None:
        job, followed = found.job, current.job
        if job.run_id != followed.run_id:
            raise ConfigError(
                f"{self._path}: is of run {job.run_id!r} now, expected {followed.run_id!r}; give that run a folder, a `flowcheck run` "
                "and a checkpoint directory of its own"
            )
        if job.attempt < followed.attempt:
            raise ConfigError(
                f"{self._path}: is of attempt {job.attempt} now, expected {followed.attempt} or a later one"
            )
        if job.attempt > followed.attempt:
            return Change(found, completes=False)
        if found.digest() == current.digest():
            return Change(found, completes=False) if begun_anew else None
        if current.complete:
            raise ConfigError(
                f"{self._path}: is another plan of attempt {job.attempt} now, of which there are checkpoints; have the job go on from "
                "one (flowcheck.resume), it is the next attempt then"
            )
        same = (job, found.shard.streams) == (followed, current.shard.streams)
        return Change(found, completes=found.complete and same and not begun_anew)
