# SPDX-License-Identifier: MIT
"""The folder that trainer and shadow share: the plan and full states from the one, the acknowledgement from the other.

    plan.json         what the shadow must know; written again, complete, once DDP's final buckets are known
    initial.pt        the state that training begins from
    shadow.json       the shadow's: which plan it follows, and that every frame from now on is captured
    passes.json       the index patterns that were reduced, where a layout is to be learned
    learned.json      the shadow's: the layout that they have shown, or why they have not
    states/           full states, state-NNNNNN.pt, the way on after a loss

Everything appears whole or not at all, mode 0600. Any file system that both hosts see will do.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from flowcheck.errors import ConfigError
from flowcheck.plan import Job, Plan

__all__ = ["ACKNOWLEDGEMENT", "FULL_STATES", "INITIAL_STATE", "LEARNED", "PASSES", "PLAN", "RunFolder", "state_name"]

PLAN, INITIAL_STATE, ACKNOWLEDGEMENT, FULL_STATES = "plan.json", "initial.pt", "shadow.json", "states"
PASSES, LEARNED = "passes.json", "learned.json"
_KEPT = 3
_LOOK_S = 0.05


def state_name(iteration: int) -> str:
    """Return the file name of the full state after an iteration."""
    return f"state-{iteration:06}.pt"


class RunFolder:
    """The folder of a run, from the trainer's side.

    Args:
        url: a path, or `file:///path`; made if it is not there.

    Raises:
        ConfigError: another kind of address, or the folder cannot be made.
    """

    def __init__(self, url: str | Path) -> None:
        parts = urlsplit(str(url))
        if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
            raise ConfigError(f"plan_url {str(url)!r}: expected a path or file:///path that both hosts see")
        self.path = Path(unquote(parts.path) if parts.scheme else str(url))
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"plan_url {str(url)!r}: cannot make the folder: {error.strerror}") from error

    def save(self, name: str, write: Callable[[Path], None]) -> None:
        """Have `write` make a file, and give it its name when it is whole."""
        final = self.path / name
        final.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = final.with_name(f".{final.name}")
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        write(temporary)
        os.replace(temporary, final)

    def begin(self, iteration: int) -> None:
        """Put aside what an earlier attempt or job has left that a shadow could take for this one's.

        Full states of iterations after `iteration`, after which this attempt begins, are renamed: they are the run's no more.
        The acknowledgement goes too, so that a shadow sees that a job begins, also one with the very plan of the one before.
        """
        for name in (PASSES, LEARNED, ACKNOWLEDGEMENT):
            (self.path / name).unlink(missing_ok=True)
        for path in (self.path / FULL_STATES).glob("state-*.pt"):
            number = path.stem.removeprefix("state-")
            if number.isdecimal() and int(number) > iteration:
                path.rename(path.with_name(f"superseded-{number}.pt"))

    def save_plan(self, document: dict[str, Any]) -> None:
        """Write the plan."""
        self._save_json(PLAN, document)

    def _save_json(self, name: str, document: Any) -> None:
        self.save(name, lambda path: path.write_text(json.dumps(document, indent=1) + "\n"))

    def learned(self, job: Job, passes: list[dict[str, Any]], patience_s: float) -> dict[str, Any] | None:
        """Tell the shadow what was reduced so far; return what it says of it, None if it says nothing in so many seconds."""
        self._save_json(PASSES, {"run_id": job.run_id, "attempt": job.attempt, "passes": passes})
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                answer = json.loads((self.path / LEARNED).read_text())
                if (answer["run_id"], answer["attempt"], answer["passes"]) == (job.run_id, job.attempt, len(passes)):
                    return answer
            time.sleep(_LOOK_S)
        return None

    def save_state(self, state: dict[str, Any]) -> None:
        """Write a full state, which names its iteration, as a torch file; all but the newest few are removed."""
        import torch

        self.save(f"{FULL_STATES}/{state_name(state['iteration'])}", lambda path: torch.save(state, path))
        for old in sorted((self.path / FULL_STATES).glob("state-*.pt"))[:-_KEPT]:
            old.unlink()

    def followed(self, plan: Plan) -> bool:
        """Return whether a shadow says that it follows this very plan."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return json.loads((self.path / ACKNOWLEDGEMENT).read_text())["plan"] == plan.digest().hex()
        return False

    def wait_for_shadow(self, plan: Plan, patience_s: float) -> bool:
        """Wait until a shadow follows this plan; False if none does in so many seconds."""
        end = time.monotonic() + patience_s
        while not self.followed(plan):
            if time.monotonic() >= end:
                return False
            time.sleep(_LOOK_S)
        return True
