# SPDX-License-Identifier: MIT
"""The machine that is measured on: its last cache, its cores, and what a reader must know to compare figures."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from flowcheck import _eal

__all__ = ["cores", "facts", "last_cache_bytes"]

_CPU = Path("/sys/devices/system/cpu")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_cache_bytes() -> int:
    """Return the size of the largest cache that the first core we may run on has; 32 MiB where the kernel does not say."""
    sizes = []
    for path in (_CPU / f"cpu{min(os.sched_getaffinity(0))}" / "cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text))
    return max(sizes, default=32 << 20)


def cores() -> list[int]:
    """Return the processors we may run on, one of each core, last first: interrupts tend to go to the first ones."""
    found: dict[Any, int] = {}
    for number in sorted(os.sched_getaffinity(0)):
        siblings = _CPU / f"cpu{number}" / "topology" / "thread_siblings_list"
        found.setdefault(siblings.read_text() if siblings.exists() else number, number)
    return sorted(found.values(), reverse=True)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def facts() -> dict[str, Any]:
    """Return the facts of `machine` in bench.json. `load` is what else ran when the benchmark began."""
    return {
        "processor": _processor(), "cores": len(cores()), "last_cache_bytes": last_cache_bytes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "kernel": platform.release(),
        "load": os.getloadavg()[0], "torch": torch.__version__, "dpdk": _eal.version(), "commit": _commit(),
    }  # fmt: skip
