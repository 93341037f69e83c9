# SPDX-License-Identifier: MIT
"""What each stage does in a second on one core, beside a plain memory copy of the same bytes in the same run.

`./build.sh bench` prints a table and writes build/bench.json. Values are medians; spread is (largest - smallest) /
median. What a stage moves is counted in bytes of the capture files, headers and partial sums with them. The ratios of
different runs can be compared, the values cannot.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_extractor.extractor import Extractor
from flowcheck import plan as plans
from flowcheck.eal import Eal
from flowcheck.ring import PacketRing
from flowcheck.slots import SlotFile
from packet_dump.dump import FileDump
from packet_parser.parser import Parser
from updater import arithmetic
from updater.log import LogWriter
from updater.log_format import GRADIENT
from updater.model_state import ModelState
from updater.snapshot import State, write_state
from workload_gen.wire import LinkTap, connections

ELEMENTS = 8_000_000  # float32; what each link then shows is several times a last-level cache
RUNS = 5
PAIRS = 8  # of blocks of training steps; bench/step_overhead.py alone does more
MTU = 4096


class Results:
    """Collects figures; each with its yardstick, measured in turn with it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(
        self, name: str, unit: str, amount: float, times: list[float], yardstick: str, their_amount: float,
        their_times: list[float], packets: int = 0,
    ) -> None:  # fmt: skip
        """Add a figure from the seconds that `amount` took, and its yardstick's."""
        middle, theirs = statistics.median(times), statistics.median(their_times)
        value, other = amount / middle, their_amount / theirs
        self.rows.append(
            {
                "name": name, "value": value, "unit": unit, "yardstick": yardstick, "yardstick_value": other,
                "ratio": value / other, "runs": len(times), "spread": (max(times) - min(times)) / middle,
                "packets_per_s": packets / middle if packets else None,
            }
        )  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def capture(folder: Path, protocol: str) -> tuple[plans.Plan, dict[str, Path]]:
    """Write two links of a two-rank job of one iteration; return its plan and captures."""
    layout = plans.Layout(source="modelled", library="nccl", version="2.24", protocol=protocol, ring=(0, 1), mtu=MTU)
    partial, result = (torch.randn(ELEMENTS) for _ in range(2))
    files, entries = {}, []
    for link in (0, 1):
        files[f"link-{link}"] = folder / f"{protocol}-{link}.pcapng"
        tap = LinkTap(layout, connections(layout, link, 6, None, 0), files[f"link-{link}"])
        tap.all_reduce(partial, result)
        tap.close()
        entries += [
            {
                "edge": link, "channel": c.channel, "source": c.forward.source, "destination": c.forward.destination,
                "proof": {"kind": "queue_pair", "data": c.data_queue_pairs, "credit": c.credit_queue_pairs},
            }
            for c in connections(layout, link, 6, None, 0)
        ]  # fmt: skip
    shard = {
        "name": "model",
        "revisions": [{"from_iteration": 1, "buckets": [{"dtype": "float32", "elements": ELEMENTS}]}],
        "layout": layout.model_dump(mode="json", exclude_none=True),
        "connections": entries,
        "streams": [{"name": name, "links": [int(name[-1])]} for name in files],
    }
    job = {"run_id": "bench", "attempt": 1, "world_size": 2}
    document = {"format": "flowcheck-plan", "version": 1, "job": job, "shards": [shard]}
    return plans.parse(json.dumps(document)), files


def drain(stages: list[Any]) -> None:
    """Poll stages until all are finished."""
    while not all(stage.finished for stage in stages):
        for stage in stages:
            stage.poll()


class Chain:
    """The stages over one capture, with rings that hold all of it, so that each stage can be run alone."""

    def __init__(
        self, folder: Path, eal: object, plan: plans.Plan, files: dict[str, Path], records: int, check_icrc: bool = True
    ) -> None:
        self.rings = [PacketRing.for_stream(folder / f"{name}.ring", plan, name, records) for name in files]
        self.slots = SlotFile.for_plan(folder / "slots", plan)
        self.dumps = [FileDump(eal, path, ring) for path, ring in zip(files.values(), self.rings, strict=True)]
        self.parsers = [Parser(ring, plan, ring.stream, check_icrc=check_icrc) for ring in self.rings]
        self.extractor = Extractor(self.rings, plan, self.slots)
        for memory in (*(ring.memory for ring in self.rings), self.slots.memory):
            np.frombuffer(memory, np.uint8)[::4096].sum()  # every page is there before a clock runs

    def close(self) -> None:
        """Check that all went well, and give everything back."""
        assert self.slots.settled_next == 2 and int(self.slots.slot(1)["state"]) == 2, "the iteration is not whole"
        for part in (*self.dumps, *self.parsers, self.extractor):
            part.close()
        for part in (*self.rings, self.slots):
            part.close()
            part_path = getattr(part, "path", None)
            if part_path:
                Path(part_path).unlink()


def copying(amount: int) -> Callable[[], float]:
    """Return a call that measures a plain copy of so many bytes."""
    source, target = np.ones(amount, np.uint8), np.zeros(amount, np.uint8)
    return lambda: seconds(lambda: np.copyto(target, source))


def stages(results: Results, folder: Path, eal: object, protocol: str) -> None:
    """Measure dump, parse, extract and the chain over one protocol's capture."""
    plan, files = capture(folder, protocol)
    amount = sum(path.stat().st_size for path in files.values())
    records = max(1024, 1 << (amount // len(files) // 2000).bit_length())
    copy = copying(amount)
    times: dict[str, list[float]] = {name: [] for name in ("dump", "parse_icrc", "extract", "chain", "parse", "copy")}
    packets = 0
    for _ in range(RUNS):
        chain = Chain(folder, eal, plan, files, records)
        times["dump"].append(seconds(lambda chain=chain: drain(chain.dumps)))
        times["parse_icrc"].append(seconds(lambda chain=chain: drain(chain.parsers)))
        times["extract"].append(seconds(lambda chain=chain: drain([chain.extractor])))
        times["copy"].append(copy())
        packets = chain.extractor.counters()["received"]
        chain.close()
        chain = Chain(folder, eal, plan, files, records)
        times["chain"].append(seconds(lambda chain=chain: drain([*chain.dumps, *chain.parsers, chain.extractor])))
        chain.close()
        if protocol == "simple":
            chain = Chain(folder, eal, plan, files, records, check_icrc=False)
            drain(chain.dumps)
            times["parse"].append(seconds(lambda chain=chain: drain(chain.parsers)))
            drain([chain.extractor])
            chain.close()
    encoding = {"simple": "plain"}.get(protocol, protocol)

    def add(name: str, stage: str) -> None:
        results.add(name, "bytes/s", amount, times[stage], "memory copy", amount, times["copy"], packets)

    add(f"extract_{encoding}", "extract")
    if protocol == "simple":
        add("dump", "dump")
        add("parse", "parse")
        add("parse_icrc", "parse_icrc")
        add("chain_1core", "chain")
    for path in files.values():
        path.unlink()


def model_plan(form: str, elements: int) -> plans.Plan:
    """Return a plan of so many parameters, a multiple of 8000, in a few tensors, stepped by AdamW."""
    shapes = {"wide": (elements // 4000, 2000), "deep": (elements // 8000, 2000), "rest": (elements // 4,)}
    parameters, offset = [], 0
    for name, shape in shapes.items():
        parameters.append({"name": name, "shape": shape, "offset": offset})
        offset += int(np.prod(shape))
    layout = {"source": "modelled", "library": "nccl", "version": "2.24", "protocol": "ll", "ring": [0, 1], "mtu": MTU}
    connection = {
        "edge": 0,
        "channel": 0,
        "source": "::1",
        "destination": "::2",
        "proof": {"kind": "queue_pair", "data": [9]},
    }
    return plans.parse(
        json.dumps(
            {
                "format": "flowcheck-plan",
                "version": 1,
                "job": {"run_id": "bench", "attempt": 1, "world_size": 2},
                "shards": [
                    {
                        "name": "model",
                        "revisions": [
                            {
                                "from_iteration": 1,
                                "buckets": [{"dtype": "float32", "elements": offset, "parameters": parameters}],
                            }
                        ],
                        "layout": layout,
                        "connections": [connection],
                        "streams": [{"name": "s", "links": [0]}],
                    }
                ],
                "state": [
                    {"key": n, "kind": "parameter", "dtype": "float32", "shape": s, "parameter": n}
                    for n, s in shapes.items()
                ],
                "initial_state": {"source": "file", "path": "initial.pt"},
                "optimizer": {
                    "class": "AdamW",
                    "form": form,
                    "groups": [{"parameters": list(shapes), "options": {"lr": 0.001}}],
                },
                "arithmetic": arithmetic.current().model_dump(),
            }
        )
    )


def updates(results: Results, folder: Path) -> None:
    """Measure the update beside the bare optimizer step, and log and snapshot beside raw synced writing."""
    for form in ("fused", "default"):
        plan = model_plan(form, ELEMENTS)
        state = ModelState(plan)
        state.load_model({key: torch.randn(value.shape) for key, value in state.model.items()}, "the benchmark")
        slot = np.frombuffer(torch.randn(ELEMENTS + 64).numpy().tobytes(), np.uint8)[: plan.slot_bytes].copy()
        bare = [torch.nn.Parameter(value.detach().clone()) for value in state.model.values()]
        for parameter in bare:
            parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.AdamW(bare, lr=0.001, **({"fused": True} if form == "fused" else {}))
        ours, theirs = [], []
        for _ in range(RUNS + 1):
            ours.append(seconds(lambda state=state, slot=slot, plan=plan: state.step(slot, plan.revision(1))))
            theirs.append(seconds(optimizer.step))
        name = "bare AdamW step, " + form
        results.add(f"update_{form}", "parameters/s", ELEMENTS, ours[1:], name, ELEMENTS, theirs[1:])

    gradient = slot[: 4 * ELEMENTS]
    raw, logged, stored = [], [], []
    (folder / "log").mkdir()
    writer = LogWriter(folder / "log", plan.identity(), 0)
    snapshot = State("bench", 1, 1, True, arithmetic.current().model_dump(), state.model, state.optimizer.state_dict())
    size = sum(tensor.nbytes for _, tensor in snapshot.tensors())

    def write_raw() -> None:
        with open(folder / "raw", "wb") as file:
            file.write(gradient)
            file.flush()
            os.fdatasync(file.fileno())

    for iteration in range(1, RUNS + 1):
        raw.append(seconds(write_raw))
        logged.append(seconds(lambda i=iteration: (writer.append(GRADIENT, 1, i, 0, [gradient]), writer.commit())))
        stored.append(seconds(lambda: write_state(folder / "snapshot.h5", snapshot)))
    writer.close()
    results.add("log", "bytes/s", gradient.nbytes, logged, "write + fdatasync", gradient.nbytes, raw)
    results.add("snapshot", "bytes/s", size, stored, "write + fdatasync", gradient.nbytes, raw)


def step_overhead(results: Results) -> None:
    """Measure a training step with the hook beside one without; where no network can be built, say so."""
    if os.geteuid():
        print("step_overhead: not measured, it builds a network: needs root", file=sys.stderr)
        return
    script = Path(__file__).with_name("step_overhead.py")
    command = [sys.executable, str(script), "--pairs", str(PAIRS), "--params", str(ELEMENTS // 8)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    low, high = found["interval"]
    results.rows.append(
        {
            "name": "step_overhead", "value": found["hooked_s"], "unit": "s/step", "yardstick": "a step without the hook",
            "yardstick_value": found["bare_s"], "ratio": found["ratio"], "runs": found["pairs"], "spread": high - low,
            "packets_per_s": None,
        }
    )  # fmt: skip


def _shown(value: float, unit: str) -> str:
    return f"{value * 1e3:.2f} m{unit}" if unit == "s/step" else f"{value / 1e9:.2f} G{unit}"


def main() -> int:
    """Measure everything; return the exit status."""
    results = Results()
    step_overhead(results)  # on all cores
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    eal = Eal.start()
    for protocol in ("simple", "ll", "ll128"):
        with tempfile.TemporaryDirectory(prefix="flowcheck-bench-", dir=shared) as folder:
            stages(results, Path(folder), eal, protocol)
    with tempfile.TemporaryDirectory(prefix="flowcheck-bench-") as folder:
        updates(results, Path(folder))
    table = Table(title="one core, medians")
    for column in ("name", "value", "packets/s", "yardstick", "its value", "ratio", "spread"):
        table.add_column(column, justify="left" if column in ("name", "yardstick") else "right")
    for row in results.rows:
        packets = f"{row['packets_per_s'] / 1e6:.2f} M" if row["packets_per_s"] else ""
        table.add_row(
            row["name"], _shown(row["value"], row["unit"]), packets, row["yardstick"],
            _shown(row["yardstick_value"], row["unit"]), f"{row['ratio']:.3f}", f"{row['spread']:.2f}",
        )  # fmt: skip
    Console(width=140).print(table)
    out = Path("build/bench.json")
    out.parent.mkdir(exist_ok=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    out.write_text(json.dumps({"machine": machine, "results": results.rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
