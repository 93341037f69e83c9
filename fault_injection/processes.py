# SPDX-License-Identifier: MIT
"""The stages as processes of their own over spoilt captures, some of which are killed and started again: `Processes`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from flowcheck.counters import packet_counters
from flowcheck.errors import FlowCheckError
from flowcheck.ring import PacketRing
from flowcheck.slots import SlotFile
from flowcheck.stage_process import StageProcess

__all__ = ["Processes"]

#: A case that is not done by then hangs; on a crowded machine a process takes long to begin.
PATIENCE_S = 900.0
_LOOK_S = 0.003


class Processes:
    """One case's stages, as `Chain` has them, each started by its command; `kills` of them are killed by SIGKILL.

    Start-up takes most of so short a run: a kill comes when an iteration drawn by lot is settled, so that data flows, and the
    slots let no stage get far without the killed one.
    """

    def __init__(
        self,
        document: dict[str, Any],
        folder: Path,
        captures: dict[str, Path],
        scratch: Path,
        rng: random.Random,
        iterations: int,
        kills: int,
    ) -> None:
        self.out, self._scratch, self._rng = scratch / "out", scratch, rng
        #: After which settled iteration a stage is killed.
        self._kills = sorted(rng.randrange(iterations) for _ in range(kills))
        plan = scratch / "plan.json"
        plan.write_text(json.dumps(document))
        self._rings = {name: scratch / f"{name}.ring" for name in captures}
        self._stages: dict[str, StageProcess] = {}
        for name, ring in self._rings.items():
            self._add(
                f"dump {name}", "packet_dump", plan, "--stream", name, "--capture", captures[name], "--ring", ring
            )
            self._add(f"parse {name}", "packet_parser", plan, "--stream", name, "--ring", ring)
        rings = [word for ring in self._rings.values() for word in ("--ring", ring)]
        self._add("extract", "data_extractor", plan, *rings, "--slots", self._slots)
        self._add("update", "updater", plan, "--slots", self._slots, "--out", self.out, "--plan-folder", folder)

    @property
    def _slots(self) -> Path:
        return self._scratch / "slots"

    def _add(self, name: str, package: str, *words: object) -> None:
        command = [sys.executable, "-c", f"from {package}.cli import main; main()", *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._stages[name] = StageProcess(name, command, self._scratch / f"{name}.stderr", environment)

    def __enter__(self) -> Processes:
        for stage in self._stages.values():
            stage.start()
        return self

    def __exit__(self, *_: object) -> None:
        for stage in self._stages.values():
            stage.kill()

    def run(self) -> None:
        """Let the stages run, kill some of them, and wait for all to end.

        Raises:
            FlowCheckError: one ended with an error.
            TimeoutError: they are not done in PATIENCE_S.
        """
        end = time.monotonic() + PATIENCE_S
        kills = list(self._kills)
        while kills or self._running():
            if kills and (self._settled() > kills[0] or not self._running()):
                kills.pop(0)
                stage = self._rng.choice(list(self._stages.values()))
                stage.kill()
                stage.start()
            if time.monotonic() > end:
                raise TimeoutError(f"the stages are not finished after {PATIENCE_S:.0f} seconds: {self._running()} run")
            time.sleep(_LOOK_S)
        with contextlib.ExitStack() as stack:
            self.packets = packet_counters(
                [stack.enter_context(PacketRing.open(ring)) for ring in self._rings.values()]
            )

    def _running(self) -> list[str]:
        """Return which stages run; FlowCheckError if one has ended with an error."""
        out = []
        for stage in self._stages.values():
            status = stage.look()
            if status:
                raise FlowCheckError(f"{stage.name} ended with {status}: {stage.last_words()}")
            if status is None:
                out.append(stage.name)
        return out

    def _settled(self) -> int:
        """Return the next iteration that is to be settled, 0 as long as there are no slots."""
        with contextlib.suppress(FlowCheckError, OSError), SlotFile.open(self._slots) as slots:
            return slots.settled_next
        return 0
