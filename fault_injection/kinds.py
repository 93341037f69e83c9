# SPDX-License-Identifier: MIT
"""All kinds of faults by name; what each does is in `mirror`, `lies`, `strangers` and `machine`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fault_injection.case import Case
from fault_injection.jobs import Job

__all__ = ["KINDS", "Kind", "kind", "load", "several"]


@dataclass(frozen=True)
class Kind:
    """A fault.

    Attributes:
        spoil: changes a case.
        fits: says of which jobs it can be judged.
        jobs: names of the jobs that it is done to; none: those that all kinds have.
        share: of the cases that a kind has in a campaign, for one whose cases cost more.
    """

    name: str
    spoil: Callable[[Case], None]
    fits: Callable[[Job], bool]
    jobs: tuple[str, ...] = ()
    share: float = 1.0


KINDS: dict[str, Kind] = {}


def kind(
    name: str, fits: Callable[[Job], bool] = lambda job: True, *, jobs: Iterable[str] = (), share: float = 1.0
) -> Callable[[Callable[[Case], None]], Callable]:
    """Enter a function among the kinds."""

    def enter(spoil: Callable[[Case], None]) -> Callable[[Case], None]:
        KINDS[name] = Kind(name, spoil, fits, tuple(jobs), share)
        return spoil

    return enter


def several(job: Job) -> bool:
    """Whether a job has more than one stream: of `fits`."""
    return len(job.streams) > 1


def load() -> dict[str, Kind]:
    """Return all kinds, in the order of docs/reliability.md."""
    for module in ("mirror", "lies", "strangers", "machine"):
        importlib.import_module(f"fault_injection.{module}")
    return KINDS
