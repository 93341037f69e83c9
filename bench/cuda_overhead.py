# SPDX-License-Identifier: MIT
"""What the training hook costs where the ranks are on GPUs: step time and device memory, with and without it in turn.

Every pair is a block of steps without the hook and one with it, attached and detached between them. The device is waited
for before and after the steps that count, never between two of them: what waits there is the job, or the hook. Figures
are of rank 0, which fills the step record; the interval (95%) is a bootstrap over pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.measure import paired
from bench.nccl_job import KINDS, Job, about, arguments, on_ranks
from flowcheck import audit

#: Steps of a block that do not count; the first three with the hook are audited.
WARM_UP = 4


class Blocks:
    """Blocks of steps of a job, and the most device memory at once in those without and with the hook."""

    def __init__(self, job: Job, steps: int) -> None:
        self.job, self.steps, self.peaks, self._iteration = job, steps, {False: 0, True: 0}, 0

    def wait(self) -> None:
        """Wait for the device."""
        if self.job.device.type == "cuda":
            torch.cuda.synchronize()

    def held(self) -> int:
        """Return the bytes of device memory in use."""
        return torch.cuda.memory_allocated() if self.job.device.type == "cuda" else 0

    def __call__(self, hooked: bool) -> float:
        """Return the seconds of a step."""
        if cuda := self.job.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for number in range(WARM_UP + self.steps):
            if number == WARM_UP:
                self.wait()
                dist.barrier()
                self.wait()
                begin = time.perf_counter()
            self._iteration += 1
            self.job.backward(self._iteration)
            self.job.step()
        self.wait()
        seconds = (time.perf_counter() - begin) / self.steps
        if cuda:
            self.peaks[hooked] = max(self.peaks[hooked], torch.cuda.max_memory_allocated())
        return seconds


def cost(name: str, folder: Path, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return what the hook costs a job, named by its kind and its parameters."""
    kind, parameters = name.split(":")
    job = Job(KINDS[kind], int(float(parameters)), device, batches=options.batches)
    block = Blocks(job, options.steps)
    block(False)
    block.peaks[False] = 0
    pairs: list[tuple[float, float]] = []
    held, end = 0, time.monotonic() + options.seconds
    more = True
    while more:
        found = {}
        for hooked in (False, True) if len(pairs) % 2 else (True, False):
            before = block.held()
            with job.attach(folder / "plan") if hooked else nullcontext() as hook:
                if hook:
                    held, groups = max(held, block.held() - before), audit.group_names(hook.plan)
                found[hooked] = block(hooked)
        pairs.append((found[False], found[True]))
        box = [len(pairs) < options.pairs and time.monotonic() < end]
        dist.broadcast_object_list(box)
        more = box[0]
    audits, own = [], dict(job.model.named_parameters())
    for _ in range(5):
        block.wait()
        begin = time.perf_counter()
        audit.digests(groups, own, job.optimizer)
        block.wait()
        audits.append(time.perf_counter() - begin)
    return {
        "parameters": sum(parameter.numel() for parameter in own.values()), "pairs": len(pairs), "steps": options.steps,
        "times": pairs, **paired(*zip(*pairs, strict=True)), "audit_s": statistics.median(audits), "attached_bytes": held,
        "peak_bytes": {"bare": block.peaks[False], "hooked": block.peaks[True]},
    }  # fmt: skip


def main() -> None:
    """Measure, and print a table."""
    parser = arguments(__doc__.splitlines()[0])
    jobs = ["float32:1e6", "float16:1e6", "float32:1e8", "bfloat16:1e8"]
    parser.add_argument(
        "--jobs", nargs="+", default=jobs, metavar="KIND:PARAMETERS", help=f"Kinds: {', '.join(KINDS)}."
    )
    parser.add_argument("--pairs", type=int, default=20, help="At most.")
    parser.add_argument("--seconds", type=float, default=40.0, help="A job begins no further pair after so many.")
    parser.add_argument("--steps", type=int, default=10, help="Of a block, that count.")
    parser.add_argument("--batches", type=int, default=8, help="Of the example job's, of 4 short sequences, a step.")
    options = parser.parse_args()
    if wrong := [name for name in options.jobs if name.split(":")[0] not in KINDS or ":" not in name]:
        parser.error(f"{wrong[0]}: expected KIND:PARAMETERS")
    results = {name: ranks[0] for name, ranks in on_ranks(cost, options.jobs, options)[0].items()}
    if options.json:
        options.json.write_text(json.dumps({"about": about(options), "results": results}, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in about(options).items()) + "\n")
    print(
        "| job | pairs | a step without | with the hook | ratio | an audit | memory held | at most, in a step |\n"
        + "|---" * 8
        + "|"
    )
    for name, row in results.items():
        if "error" in row:
            print(f"| {name} | {row['error'].splitlines()[-1]} | | | | | | |")
            continue
        low, high = row["interval"]
        peak = row["peak_bytes"]["hooked"] - row["peak_bytes"]["bare"]
        print(
            f"| {name} ({row['parameters']:,}) | {row['pairs']} | {row['bare_s'] * 1e3:.3f} ms | {row['hooked_s'] * 1e3:.3f} ms "
            f"| {row['ratio']:.3f} ({low:.3f} to {high:.3f}) | {row['audit_s'] * 1e3:.2f} ms | {row['attached_bytes']:,} | {peak:+,} |"
        )
    sys.exit(any("error" in row for row in results.values()))


if __name__ == "__main__":
    main()
