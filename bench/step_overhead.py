# SPDX-License-Identifier: MIT
"""What the training hook costs: step time with and without `flowcheck.attach`, in turn, in one job over the fabric.

The stages are off. Every pair is a block of steps without the hook and one with it, attached and detached between them, so
that both meet the same machine. Prints the ratio of the medians with a 95% interval (bootstrap over pairs). Needs root.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

import flowcheck
from bench import fabric_job
from bench.fabric_job import Rank
from bench.measure import paired
from workload_gen.fabric import Fabric
from workload_gen.record import Recording

#: Steps at the start of a block that do not count.
WARM_UP = 3


def _rank(
    rank: int, recording: Recording, hosts: tuple[str, ...], pairs: int, steps: int, batches: int
) -> list[tuple[list[float], list[float]]]:
    """Return the seconds of every step of each pair of blocks, without the hook and with it."""
    job = Rank(recording, rank, hosts[rank], batches)
    wire = job.wire([{"name": f"link-{link}", "links": [link]} for link in (0, recording.ranks - 1)])
    iteration = 0

    def block() -> list[float]:
        nonlocal iteration
        times = []
        for _ in range(steps):
            iteration += 1
            begin = time.perf_counter()
            job.step(iteration)
            times.append(time.perf_counter() - begin)
        return times[WARM_UP:]

    block()
    results = []
    for pair in range(pairs):
        found = {}
        for hooked in (False, True) if pair % 2 else (True, False):
            dist.barrier()
            if hooked:
                # Audits of a new run come at its first three iterations, then every hundred.
                with flowcheck.attach(job.ddp, job.optimizer, plan_url=recording.out / "plan", wire=wire, wait_s=0):
                    found[hooked] = block()
            else:
                found[hooked] = block()
        results.append((found[False], found[True]))
    job.close()
    return results


def measure(
    pairs: int, steps: int, parameters: int, ranks: int, batches: int, protocol: str
) -> dict[str, Any]:  # fmt: skip
    """Return the medians in seconds, their ratio, and its 95% interval."""
    with tempfile.TemporaryDirectory(prefix="flowcheck-bench-") as folder, Fabric(ranks, ()) as fabric:
        recording = Recording(
            out=Path(folder), ranks=ranks, protocol=protocol, mtu=4096, ip=4, parameters=parameters, bucket_mb=1.0
        )
        with fabric_job.ranks(ranks, _rank, recording, fabric.hosts, pairs, steps, batches) as answer:
            results = answer()
    medians = [[statistics.median(times) for times in pair] for pair in results]
    return {
        "pairs": pairs,
        "steps": steps,
        "parameters": parameters,
        "ranks": ranks,
        "batches": batches,
        "protocol": protocol,
        **paired(*zip(*medians, strict=True)),
    }


def main() -> None:
    """Print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=15, help="Of a block.")
    parser.add_argument("--params", type=int, default=4_000_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--batches", type=int, default=8, help="Of the example job's, of 4 short sequences, a step.")
    parser.add_argument("--protocol", choices=["ll", "ll128", "simple"], default="ll128")
    options = parser.parse_args()
    print(
        json.dumps(
            measure(options.pairs, options.steps, options.params, options.ranks, options.batches, options.protocol),
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
