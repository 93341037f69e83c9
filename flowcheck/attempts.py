# SPDX-License-Identifier: MIT
"""Which attempt of a run a job is: noted of an optimizer when it is loaded, asked for when its job is attached.

`flowcheck.load` and `flowcheck.resume` call `remember`; `flowcheck.attach` asks for the `job_entry`, which must be `agreed`
between the ranks, and when it has succeeded calls `forget`. Which attempts there are in a checkpoint directory the loaded
state says itself: nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from flowcheck.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle

__all__ = ["Loaded", "agreed", "forget", "job_entry", "loaded", "remember"]


@dataclass
class Loaded:
    """What an optimizer was loaded with: the state after `iteration` of an attempt of a run.

    Attributes:
        run_id: None where the checkpoint names no run.
        latest_attempt: the newest of the run that the checkpoint knew of; the next one is later.
        thrown_away: names in the buckets that `flowcheck.resume` has had reduced once for nothing; none: it has not.
        stepped: the optimizer has gone on since.
    """

    run_id: str | None
    attempt: int
    latest_attempt: int
    iteration: int
    thrown_away: list[list[str]]
    stepped: bool = False


_loaded: WeakKeyDictionary[Any, tuple[Loaded, RemovableHandle]] = WeakKeyDictionary()


def remember(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], thrown_away: list[list[str]]) -> None:
    """Note what an optimizer has just been loaded with: `state` has "iteration" and, as far as known, whose it is."""
    forget(optimizer)
    attempt = state.get("attempt", 1)
    noted = Loaded(
        state.get("run_id"), attempt, state.get("latest_attempt", attempt), int(state["iteration"]), thrown_away
    )

    def note(*_: object) -> None:
        noted.stepped = True

    _loaded[optimizer] = noted, optimizer.register_step_post_hook(note)


def loaded(optimizer: torch.optim.Optimizer) -> Loaded | None:
    """Return what an optimizer was loaded with; None if it was not, or its job was attached since."""
    found = _loaded.get(optimizer)
    return found and found[0]


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Forget what an optimizer was loaded with: what is attached from now on is another run."""
    found = _loaded.pop(optimizer, None)
    if found is not None:
        found[1].remove()


def job_entry(optimizer: torch.optim.Optimizer, run_id: str | None) -> dict[str, Any] | None:
    """Return run id, attempt and origin, as the plan's `job` has them, of a job that goes on in a run; None: it is a new run.

    Args:
        optimizer: the job's, loaded or not.
        run_id: what the script calls the run; another name than the checkpoint's makes a new run.

    Raises:
        ConfigError: the optimizer is not any more what it was loaded with.
    """
    found = loaded(optimizer)
    if found is None or found.run_id is None or run_id not in (None, found.run_id):
        return None
    if found.stepped:
        raise ConfigError(
            f"the optimizer has stepped since it was loaded with iteration {found.iteration} of run {found.run_id!r}: attach "
            "before the first step, or name a new run (run_id=)"
        )
    return {
        "run_id": found.run_id,
        "attempt": found.latest_attempt + 1,
        "resumed": {"attempt": found.attempt, "iteration": found.iteration},
    }


def agreed(goes_on: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the `job_entry` of this rank; ConfigError on every rank if theirs differ. Over the world group."""
    import torch.distributed as dist

    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, goes_on)
    for rank, other in enumerate(said):
        if other != said[0]:
            raise ConfigError(
                f"rank {rank} {_origin(other)}, rank 0 {_origin(said[0])}: load the same checkpoint on every rank, and give "
                "every rank the same run_id"
            )
    return goes_on


def _origin(goes_on: dict[str, Any] | None) -> str:
    if goes_on is None:
        return "begins a new run"
    resumed = goes_on["resumed"]
    return (
        f"goes on from iteration {resumed['iteration']} of attempt {resumed['attempt']} of run {goes_on['run_id']!r} as attempt "
        f"{goes_on['attempt']}"
    )
