# SPDX-License-Identifier: MIT
"""The stages over spoilt captures, polled in an order drawn by lot; each can be dropped as a kill would, held back, made anew.

These are the stages that run as processes of their own. A stage that is dropped is never closed before the case is over:
what it had not published is gone, and what it had is all that its successor finds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

from flowcheck._copy import CopyEngine

from data_extractor.extractor import Extractor
from flowcheck import plan as plans
from flowcheck.eal import Eal
from flowcheck.errors import DiskError
from flowcheck.ring import PacketRing
from flowcheck.slots import SlotFile
from packet_dump.dump import FileDump, PortDump
from packet_parser.parser import Parser
from updater.updater import Updater

__all__ = ["Chain", "Killed", "Script"]

#: A case that is not done by then hangs: seconds of the wall clock, and of this process's own time, which a busy machine gives late.
PATIENCE_S, PATIENCE_CPU_S = 120.0, 20.0
_SLEEP_S = 0.0005
#: An updater whose disk refuses its last snapshot is started so often.
_STARTS = 5


class Killed(BaseException):
    """Ends a stage in the middle of a call, as a signal would: no handler of errors takes it."""


class Script:
    """What happens to the stages; the base lets them run.

    Attributes:
        live: ports that do not wait and a job that does not, instead of files.
    """

    live = False

    def before(self, chain: Chain, turn: int) -> None:
        """Be called before each turn."""

    def may_poll(self, chain: Chain, stage: str, turn: int) -> bool:
        """Return whether a stage is polled in a turn; names are `dump STREAM`, `parse STREAM`, `extract`, `update`."""
        return True


class Chain:
    """One case's stages, rings and slots in a scratch folder, its checkpoint directory in `out`.

    Args:
        document: the plan.
        folder: what the plan's relative paths start from.
        captures: stream name to capture file.
        scratch: an empty folder.
        rng: decides the order of polls.
        script: what happens.
        frames: stream name to the frames in its capture; needed where the ports are live.
        live: the updater goes on where the disk takes nothing.
    """

    def __init__(
        self,
        document: dict[str, Any],
        folder: Path,
        captures: dict[str, Path],
        scratch: Path,
        rng: random.Random,
        script: Script,
        frames: dict[str, int],
        live: bool = False,
    ) -> None:
        self.plan = plans.parse(json.dumps(document))
        self.out = scratch / "out"
        self.turn = 0
        self.restarts = 0
        self._folder, self._captures, self._scratch = folder, captures, scratch
        self._rng, self._script, self._frames = rng, script, frames
        self._live = live or script.live
        self._eal, self._engine = Eal.start(memory_mb=256), CopyEngine()
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._engine.close)
        self.rings: dict[str, PacketRing] = {}
        self.stages: dict[str, Any] = {}

    def __enter__(self) -> Chain:
        try:
            for stream in self.plan.shard.streams:
                path = self._scratch / f"{stream.name}.ring"
                self.rings[stream.name] = self._stack.enter_context(PacketRing.for_stream(path, self.plan, stream.name))
                self._make(f"dump {stream.name}")
                self._make(f"parse {stream.name}")
            self.slots = self._stack.enter_context(SlotFile.for_plan(self._scratch / "slots", self.plan))
            self._make("extract")
            self._make("update")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _make(self, name: str) -> None:
        """Make a stage, however often it is killed while it begins."""
        while True:
            try:
                return self._begin(name)
            except Killed:
                self.restarts += 1

    def _begin(self, name: str) -> None:
        kind, _, stream = name.partition(" ")
        if kind == "dump":
            ring = self.rings[stream]
            if self._script.live:
                devargs = f"net_pcap_fault{os.getpid()}_{time.monotonic_ns()},rx_pcap={self._captures[stream]}"
                stage = PortDump(self._eal, devargs, ring, self._engine)
            else:
                stage = FileDump(self._eal, self._captures[stream], ring, self._engine)
        elif kind == "parse":
            stage = Parser(self.rings[stream], self.plan, stream)
        elif kind == "extract":
            stage = Extractor(list(self.rings.values()), self.plan, self.slots, self._engine)
        else:
            stage = Updater(
                self.plan, self.slots, self.out, plan_folder=self._folder, engine=self._engine, live=self._live
            )
        self._stack.callback(_close, stage)
        self.stages[name] = stage

    def kill(self, name: str) -> None:
        """Drop a stage and make it anew over what it left."""
        self.drop(name)
        self._make(name)

    def drop(self, name: str) -> None:
        """Drop a stage as a kill does: the kernel takes its locks, nothing else is given back."""
        stage = self.stages[name]
        if name == "update" and stage._lock >= 0:
            os.close(stage._lock)
            stage._lock = -1  # closing it does nothing from here on
        self.restarts += 1

    def run(self) -> None:
        """Poll until every stage is finished; one that is killed in the middle of a call is made anew.

        Raises:
            TimeoutError: they are not finished in PATIENCE_S and PATIENCE_CPU_S.
        """
        ends = time.monotonic() + PATIENCE_S, time.process_time() + PATIENCE_CPU_S
        while True:
            self._script.before(self, self.turn)
            done, waiting = 0, False
            names = list(self.stages)
            self._rng.shuffle(names)
            for name in names:
                if self._rng.random() < 0.2 or not self._script.may_poll(self, name, self.turn):
                    waiting = True
                    continue
                try:
                    done += self.stages[name].poll()
                except Killed:
                    self.kill(name)
                    done += 1
            self.turn += 1
            self._stop_ports()
            if not (done or waiting) and all(stage.finished for stage in self.stages.values()):
                break
            if time.monotonic() > ends[0] and time.process_time() > ends[1]:
                raise TimeoutError(f"the stages are not finished after {PATIENCE_S:.0f} seconds: {self.state()}")
            if not done:
                time.sleep(_SLEEP_S / 5 if waiting else _SLEEP_S)
        self.packets = self.stages["extract"].counters()
        refused = 0
        while True:
            try:
                return self.stages["update"].close()
            except Killed:
                pass
            except DiskError:
                # A supervisor starts it again, and a new start tries again.
                refused += 1
                if refused == _STARTS:
                    raise
            self.kill("update")

    def _stop_ports(self) -> None:
        if self._script.live:
            for stream in self.rings:
                dump = self.stages[f"dump {stream}"]
                if not dump.finished and dump.counters()["received"] >= self._frames[stream]:
                    dump.stop()

    def state(self) -> str:
        """Return where each stage is, for whoever wants to know why it does not end."""
        unfinished = [name for name, stage in self.stages.items() if not stage.finished]
        cursors = {name: ring.written for name, ring in self.rings.items()}
        return f"{unfinished} unfinished, frames written {cursors}, settled to {self.slots.settled_next}, taken to {self.slots.consumed_next}"


def _close(stage: Any) -> None:
    """Give back what a stage holds; what the end of a case cannot close does not matter any more."""
    with contextlib.suppress(Exception, Killed):
        stage.close()
