# SPDX-License-Identifier: MIT
"""What a snapshot costs the updates beside it: log append with its sync, then optimizer step, with and without one.

Each round is updates alone, then a snapshot and the updates until it is written; rounds begin with either in turn, and
ratios are taken within a round, so that both meet the same machine. The copy of the state is no part of an update:
`start_ms` is what it takes. Prints one JSON document: medians; over rounds, the ratio of the medians with a 95% interval
(bootstrap); and how long a snapshot takes to be written beside nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flowcheck._copy import CopyEngine

from bench.measure import seconds
from bench.updates import model_plan
from updater import arithmetic
from updater.log import LogWriter
from updater.log_format import GRADIENT
from updater.model_state import ModelState
from updater.snapshot import State
from updater.snapshot_writer import SnapshotWriter

#: Updates alone in a round, and at least so many beside snapshots.
UPDATES = 6


def ratio(rounds: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """Return the median over rounds of the median beside to that alone, with its 95% interval, over rounds drawn again."""
    ratios = np.array([statistics.median(beside) / statistics.median(alone) for alone, beside in rounds])
    drawn = np.random.default_rng(1).integers(0, len(ratios), (10_000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], 1), [2.5, 97.5])
    return {"value": round(float(np.median(ratios)), 3), "interval": [round(float(low), 3), round(float(high), 3)]}


def measure(folder: Path, elements: int, form: str, rounds: int) -> dict[str, Any]:
    """Return the figures of one size and form."""
    plan = model_plan(form, elements)
    model = ModelState(plan)
    model.load_model({key: torch.randn(value.shape) * 0.02 for key, value in model.model.items()}, "the benchmark")
    slot = np.zeros(plan.slot_bytes, np.uint8)
    slot[: 4 * elements] = (torch.randn(elements) * 0.01).numpy().view(np.uint8)
    revision, gradient = plan.revision(1), slot[: 4 * elements]
    log = LogWriter(folder, plan.identity(), 0)
    engine, iteration = CopyEngine(), 0

    def update() -> None:
        nonlocal iteration
        iteration += 1
        log.append(GRADIENT, 1, iteration, 0, [gradient])
        log.commit()
        model.step(slot, revision)
        for full in sorted(folder.glob("*.fclog"))[:-1]:
            full.unlink()  # as retention does; nothing here reads it

    def state() -> State:
        facts = arithmetic.current().model_dump()
        return State("bench", 1, iteration, True, facts, model.model, model.optimizer.state_dict())

    path, starts, found = folder / "snapshot.h5", [], []
    with closing(SnapshotWriter()) as writer:
        for _ in range(3):
            update()
        writer.reserve(state())
        writer.start(path, state(), engine)
        writer.wait()

        def alone() -> list[float]:
            return [seconds(update) for _ in range(UPDATES)]

        def beside() -> list[float]:
            times: list[float] = []
            while len(times) < UPDATES:
                starts.append(seconds(lambda: writer.start(path, state(), engine)))
                # Counted is every update that begins while the child writes: to leave out the one in which it comes to
                # its end would leave out the slow ones.
                while writer.poll() is None and writer.busy:
                    times.append(seconds(update))
            return times

        for number in range(rounds):
            if number % 2:
                with_it = beside()
                found.append((alone(), with_it))
            else:
                without = alone()
                found.append((without, beside()))
        idle = []
        for _ in range(3):
            writer.start(path, state(), engine)
            begin = time.perf_counter()
            written = writer.wait()
            idle.append(time.perf_counter() - begin)
    log.close()
    alone_s, beside_s = ([t for pair in found for t in pair[which]] for which in (0, 1))
    return {
        "parameters": elements, "form": form, "rounds": rounds, "snapshot_bytes": written.bytes,
        "updates_alone": len(alone_s), "updates_beside": len(beside_s), "snapshots": len(starts),
        "alone_ms": round(statistics.median(alone_s) * 1e3, 2), "beside_ms": round(statistics.median(beside_s) * 1e3, 2),
        "ratio": ratio(found),
        "start_ms": round(statistics.median(starts) * 1e3, 2),
        "written_alone_s": round(statistics.median(idle), 3),
    }  # fmt: skip


def main() -> None:
    """Measure every size and form; print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=int, nargs="+", default=[1_000_000, 10_000_000, 50_000_000])
    parser.add_argument("--forms", nargs="+", default=["fused", "default"], choices=["fused", "default"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="On the file system that counts; a temporary folder if not given.")
    options = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:
        # As `flowcheck run` has it for the updater; it is read when torch is loaded.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    results = []
    for elements in options.params:
        for form in options.forms:
            print(f"{elements} parameters, {form}", file=sys.stderr)
            with tempfile.TemporaryDirectory(prefix="flowcheck-bench-", dir=options.folder) as folder:
                results.append(measure(Path(folder), elements, form, options.rounds))
            print(json.dumps(results[-1]), file=sys.stderr)
    machine = {"cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
