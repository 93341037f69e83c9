# SPDX-License-Identifier: MIT
"""What each stage does in a second, beside a yardstick over the same bytes in the same runs: `./build.sh bench`.

Prints a table, writes build/bench.json and build/bench.svg. docs/performance.md says what each row is. The ratios of
different runs can be compared, the values cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from bench import machine, report, stages, tools, updates
from bench.measure import Results, Sizes
from bench.yardsticks import Yardsticks
from flowcheck.eal import Eal

ROOT = Path(__file__).parents[1]
RATIOS = ROOT / "bench" / "ratios.json"
PAGE = ROOT / "docs" / "performance.md"
OUT = Path("build")
#: What the captures, rings and slots of one measurement take, in data sizes: where memory has less, they go to the disk.
_ROOM = 16


def step_overhead(results: Results, sizes: Sizes) -> None:
    """Measure a training step with the hook beside one without; where no network can be built, say so."""
    if os.geteuid():
        print("step_overhead: not measured, it builds a network: needs root", file=sys.stderr)
        return
    command = [sys.executable, "-m", "bench.step_overhead", *sizes.step_overhead.split()]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    low, high = found["interval"]
    results.row(
        "step_overhead", "s/step", found["hooked_s"], "a step without the hook", found["bare_s"], found["ratio"], found["pairs"],
        high - low, [low, high], packets_per_s=None, payload=None,
    )  # fmt: skip


def _scratch(sizes: Sizes) -> tempfile.TemporaryDirectory[str]:
    """Return a folder in memory if there is room."""
    memory = Path("/dev/shm")
    fits = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _ROOM * sizes.data_bytes
    return tempfile.TemporaryDirectory(prefix="flowcheck-bench-", dir=memory if fits else OUT)


def _groups(results: Results, sizes: Sizes, cores: list[int]) -> Iterator[tuple[list[str], Callable[[], object]]]:
    """Yield the names of rows, and what measures them."""
    eal = Eal.start()

    def with_loops(measure: Callable[..., object], *arguments: object) -> Callable[[], object]:
        def call() -> None:
            with _scratch(sizes) as name:
                folder = Path(name)
                measure(results, sizes, folder, eal, Yardsticks(folder), *arguments)

        return call

    other = cores[1] if len(cores) > 1 else None
    if other is None:
        print("chain_2cores: not measured, there is one core", file=sys.stderr)
    for payload in stages.PAYLOADS:
        suffix = stages.suffix(payload)
        yield [name + suffix for name in stages.FRAMES_TO_SLOT], with_loops(stages.frames_to_slot, payload, other)
        for protocol in ("ll", "ll128"):
            yield [f"extract_{protocol}{suffix}"], with_loops(stages.extraction, payload, protocol)
        yield [f"extract_second{suffix}"], with_loops(stages.second_copies, payload)

    def on_disk() -> None:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=OUT) as folder:
            updates.checkpoints(results, sizes, Path(folder))

    def beside_tools() -> None:
        with _scratch(sizes) as folder:
            tools.tools(results, sizes, Path(folder), eal, cores[0])

    names = ["update_fused", "update_default", "step_default", "update_memory"]
    yield names, lambda: updates.updates(results, sizes)
    yield ["log", "snapshot_written", "snapshot", *(f"snapshot_{way}" for way in updates.WAYS)], on_disk
    yield [f"parse_against_{name}" for name in tools.PARSERS] + ["dump_against_testpmd"], beside_tools


def main() -> int:
    """Measure; return the exit status."""
    parser = argparse.ArgumentParser(prog="./build.sh bench", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Measure these rows, and what is measured with them.")
    parser.add_argument("--quick", action="store_true", help="So little that the figures mean nothing: does it run?")
    parser.add_argument("--guard", action="store_true", help="Fail where a stored ratio was lost.")
    parser.add_argument(
        "--store", action="store_true", help="Store the ratios, and put the figures into the documents."
    )
    options = parser.parse_args()
    if options.store and (options.quick or options.only):
        parser.error("--store wants all figures, and good ones: neither --quick nor --only")
    facts, cores = machine.facts(), machine.cores()
    sizes = Sizes.quick() if options.quick else Sizes.usual(machine.last_cache_bytes())
    results = Results()
    groups = [(["step_overhead"], lambda: step_overhead(results, sizes)), *_groups(results, sizes, cores)]
    known = {name for names, _ in groups for name in names}
    wanted = set(options.only or known)
    if wanted - known:
        parser.error(f"--only: no row {sorted(wanted - known)[0]!r}; there are {', '.join(sorted(known))}")
    OUT.mkdir(exist_ok=True)
    for number, (names, measure) in enumerate(groups):
        if number == 1:  # the training steps had all cores
            os.sched_setaffinity(0, {cores[0]})
            torch.set_num_threads(1)
        if wanted & set(names):
            print(f"measuring {', '.join(names)}", file=sys.stderr)
            measure()

    Console(width=200).print(report.table(results.rows))
    document = {"machine": facts, "results": results.rows}
    (OUT / "bench.json").write_text(json.dumps(document, indent=1) + "\n")
    (OUT / "bench.svg").write_text(report.plot(results.rows))
    if options.store:
        report.store(document, RATIOS, PAGE)
    return _guard(document) if options.guard else 0


def _guard(document: dict) -> int:
    """Hold the rows against the stored ratios; return the exit status."""
    if not RATIOS.exists():
        print(f"--guard: nothing is stored in {RATIOS}; --store does it", file=sys.stderr)
        return 1
    stored = json.loads(RATIOS.read_text())
    for fact in ("processor", "last_cache_bytes", "torch", "dpdk"):
        if stored["machine"][fact] != document["machine"][fact]:
            print(
                f"--guard: stored with {fact} {stored['machine'][fact]}, this is {document['machine'][fact]}",
                file=sys.stderr,
            )
    lost = report.guard(document["results"], stored)
    for line in lost:
        print(line, file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
