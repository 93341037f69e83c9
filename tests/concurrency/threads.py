# SPDX-License-Identifier: MIT
"""All stages over a recorded job, each a thread of this process, over small rings: what `sanitized` runs.

python threads.py RECORDING OUT
"""

import contextlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path

import numpy as np
from flowcheck._copy import CopyEngine

from data_extractor.extractor import Extractor
from flowcheck import plan as plans
from flowcheck.eal import Eal
from flowcheck.formats import SLOT
from flowcheck.ring import PacketRing
from flowcheck.slots import SlotFile
from flowcheck.waiting import AdaptiveWait
from packet_dump.dump import FileDump
from packet_parser.parser import Parser
from updater.listing import listing
from updater.updater import Updater

RECORDS = 64


class SeenSlots(SlotFile):
    """Slots of which a copy is made by compiled code at every look.

    ThreadSanitizer sees the copy; what the updater then reads by numpy and torch, which are compiled without it, it does not.
    """

    def __init__(self, path, memory):
        super().__init__(path, memory)
        self._engine = CopyEngine()
        self._copy = bytearray(max(self.gradient_bytes, self.initial_bytes, SLOT.itemsize))

    def slot(self, iteration):
        at = self.offset(iteration)
        self._engine.copy_bytes(self._copy, memoryview(self.memory)[at : at + SLOT.itemsize])
        return super().slot(iteration)

    def gradient(self, iteration):
        data = super().gradient(iteration)
        self._engine.copy_bytes(self._copy, data)
        return data


def drive(stage):
    """Poll a stage until it is finished; end the process if it fails, for the others would wait for it."""
    wait = AdaptiveWait()
    try:
        while True:
            if stage.poll():
                wait.busy()
            elif stage.finished:
                return
            else:
                wait.idle()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def main(recording, out):
    """Write into `out` the checkpoint directory `checkpoints`; `shared.json`, the addresses of rings and slots; and at the end
    `report.json`: what is listed, the packets, how often each ring went round, and how many slots there are.
    """
    plan = plans.load(recording / "plan.json")
    out.mkdir()
    eal = Eal.start()
    with contextlib.ExitStack() as stack:

        def opened(stage):
            return stack.enter_context(contextlib.closing(stage))

        rings = [opened(PacketRing.for_stream(out / s.name, plan, s.name, RECORDS)) for s in plan.shard.streams]
        slots = opened(SeenSlots.for_plan(out / "slots", plan))
        shared = [np.frombuffer(file.memory, np.uint8) for file in (*rings, slots)]
        (out / "shared.json").write_text(json.dumps([[m.ctypes.data, m.ctypes.data + m.size] for m in shared]))
        stages = [opened(FileDump(eal, recording / f"{ring.stream}.pcapng", ring)) for ring in rings]
        stages += [opened(Parser(ring, plan, ring.stream)) for ring in rings]
        extractor = opened(Extractor(rings, plan, slots))
        updater = opened(Updater(plan, slots, out / "checkpoints", plan_folder=recording, live=False))
        threads = [threading.Thread(target=drive, args=(stage,)) for stage in (*stages, extractor, updater)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        updater.close()
        rounds = [ring.extracted // RECORDS for ring in rings]
        report = {
            **listing(out / "checkpoints"),
            "packets": extractor.counters(),
            "rounds": rounds,
            "slots": slots.slots,
        }
        (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
