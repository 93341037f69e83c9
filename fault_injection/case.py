# SPDX-License-Identifier: MIT
"""One case: a job's frames as its streams show them, spoilt by a kind, and what is to happen to the stages meanwhile."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fault_injection.chain import Script
from fault_injection.jobs import Job

__all__ = ["BROKEN", "CONTRADICTS", "INTACT", "LIE", "OTHER", "Case", "Shown"]

#: What a frame is that a stream shows: as it was sent; recognisably damaged; changed with an ICRC that fits, so that something
#: in it contradicts the layout; changed so that only another copy can contradict it; nobody's.
INTACT, BROKEN, CONTRADICTS, LIE, OTHER = range(5)


class Shown(NamedTuple):
    """A frame in a stream: `index` is its number on its link, -1 if it is none of the job's; `wire` its length there."""

    frame: bytes
    ns: int
    link: int
    index: int
    what: int = INTACT
    wire: int = 0

    def broken(self, frame: bytes, what: int = BROKEN) -> Shown:
        """Return it with other bytes."""
        return self._replace(frame=frame, what=what)


@functools.cache
def _unspoilt(job: Job, links: tuple[int, ...]) -> list[Shown]:
    """Return what a stream shows of a job, several links merged by their time stamps; the same list each time."""
    shown = [
        Shown(frame, ns, number, index)
        for number in links
        for index, (frame, ns) in enumerate(zip(job.links[number].frames, job.links[number].ns, strict=True))
    ]
    return sorted(shown, key=lambda one: one.ns) if len(links) > 1 else shown


@dataclass
class Case:
    """What a kind works on.

    Attributes:
        job: the recording, read only.
        rng: the only source of chance.
        streams: stream name to what it shows, in order; replaced by kinds.
        document: the plan as the stages get it.
        script: what happens to the stages.
        surroundings: context managers that are entered around the stages (a disk that fails).
        exact: which frames reached the stages is known, so that an iteration that all of them bring must be whole.
        live: the updater's disk may fail as that of a job that does not wait.
        touched: iterations that a kind spoilt, where that is not to be seen from the frames.
        lied: iterations of which something lies with an ICRC that fits, beside those of the frames that do.
        volatile: iterations may be volatile.
        refused_first: called with the capture files; they must be refused then, and taken when they are written anew.
        later: (first, by): iterations from `first` on are shown as those `by` later, and nothing is of what lies between.
        kills: the stages are processes of their own, so many of which are killed; None: this process polls them.
    """

    job: Job
    rng: random.Random
    streams: dict[str, list[Shown]] = field(default_factory=dict)
    document: dict[str, Any] = field(default_factory=dict)
    script: Script = field(default_factory=Script)
    surroundings: list[contextlib.AbstractContextManager] = field(default_factory=list)
    exact: bool = True
    live: bool = False
    touched: set[int] = field(default_factory=set)
    lied: set[int] = field(default_factory=set)
    volatile: bool = False
    refused_first: Callable[[dict[str, Path]], None] | None = None
    later: tuple[int, int] = (0, 0)
    kills: int | None = None

    @classmethod
    def of(cls, job: Job, rng: random.Random) -> Case:
        """Return an unspoilt case with rings small enough to go round several times."""
        case = cls(job, rng, document=copy.deepcopy(job.document))
        case.streams = {name: list(_unspoilt(job, tuple(links))) for name, links in job.streams.items()}
        case.document["ring_bytes"] = 1 << 20
        case.document["slots"] = rng.choice([3, 4, 8])
        return case

    # -- what kinds ask ----------------------------------------------------------------------------------------------

    def iteration(self, one: Shown) -> int:
        """Return the iteration of a frame, -1 if it is no data packet of the job."""
        return self.job.links[one.link].iteration[one.index] if one.index >= 0 else -1

    def shown_as(self, iteration: int) -> int:
        """Return the number under which an iteration of the job is shown."""
        first, by = self.later
        return iteration + by if iteration >= first else iteration

    def begin(self, name: str, iteration: int) -> int:
        """Return where in a stream the first data packet of an iteration, or of a later one, is; its length if none is."""
        shown = self.streams[name]
        return next((at for at, one in enumerate(shown) if self.iteration(one) >= iteration), len(shown))

    def span(self, longest: int) -> tuple[int, int]:
        """Return iterations [first, last) of the job, at most so many, not the first one."""
        count = self.rng.randint(1, max(1, min(longest, self.job.iterations - 3)))
        first = self.rng.randint(2, self.job.iterations - count)
        return first, first + count

    def some_streams(self) -> list[str]:
        """Return at least one of the streams, drawn by lot."""
        names = list(self.streams)
        return self.rng.sample(names, self.rng.randint(1, len(names)))

    def data(self, name: str, first: int = 1) -> list[int]:
        """Return where in a stream the data packets of iterations from `first` on are."""
        return [at for at, one in enumerate(self.streams[name]) if self.iteration(one) >= first]
