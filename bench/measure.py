# SPDX-License-Identifier: MIT
"""How figures come about: things are timed in turn, run by run, and each is held against its yardstick of the same runs."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["TARGETS", "Clock", "Results", "Sizes", "paired", "ratio_interval", "seconds"]

#: What each ratio is to reach; names end in the payload where it is not the usual one.
TARGETS = {
    "dump": 0.85, "dump_null": 0.85, "parse": 0.8, "parse_icrc": 0.7,
    "extract_plain": 0.9, "extract_ll": 0.85, "extract_ll128": 0.8, "extract_second": 0.7,
    "chain_1core": 0.45, "chain_2cores": 1.8, "update_fused": 0.95, "update_default": 0.45, "log": 0.9,
    "snapshot_written": 0.9, "snapshot": 0.9,
}  # fmt: skip
#: Whose ratio says what is paid, not what is reached.
COSTS = {"step_overhead"}


@dataclass(frozen=True)
class Sizes:
    """How much is measured: runs that count and runs before them, bytes of data, parameters, frames for tools, options of step_overhead.py."""

    runs: int
    warm_up: int
    data_bytes: int
    parameters: int
    tool_frames: int
    step_overhead: str

    @classmethod
    def usual(cls, cache_bytes: int) -> Sizes:
        """Return the sizes for figures: data, and the state of so many parameters, is four times the last cache."""
        data = 4 * cache_bytes
        return cls(10, 1, data, data // 16 // 8000 * 8000, 20_000, "--pairs 10 --params 1000000")

    @classmethod
    def quick(cls) -> Sizes:
        """Return sizes that only show that everything runs."""
        return cls(2, 0, 1_500_000, 200_000, 200, "--pairs 2 --params 25000 --steps 5 --batches 1")


def seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return where 95% of the ratios of medians lie that runs drawn again give (bootstrap).

    Runs are drawn in pairs: what disturbed both alike is no noise of their ratio.
    """
    drawn = np.random.default_rng(1).integers(0, len(ours), (10_000, len(ours)))
    ratios = np.median(np.array(ours)[drawn], 1) / np.median(np.array(theirs)[drawn], 1)
    return np.percentile(ratios, [2.5, 97.5]).tolist()


def paired(bare: Sequence[float], hooked: Sequence[float]) -> dict[str, Any]:
    """Return the medians of times that were taken in pairs, their ratio, and its `ratio_interval`."""
    ours, theirs = np.array(hooked), np.array(bare)
    return {
        "bare_s": float(np.median(theirs)),
        "hooked_s": float(np.median(ours)),
        "ratio": float(np.median(ours) / np.median(theirs)),
        "interval": ratio_interval(hooked, bare),
        "pair_ratios": (ours / theirs).round(4).tolist(),
    }


class Clock:
    """Times things by name, once in each of the `turns`; the first turns, which warm up, do not count."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self.times: dict[str, list[float]] = defaultdict(list)

    def turns(self) -> Iterator[int]:
        """Yield the number of each turn."""
        for number in range(self._sizes.warm_up + self._sizes.runs):
            if number == self._sizes.warm_up:
                self.times.clear()
            yield number

    def __call__(self, name: str, work: Callable[[], object]) -> None:
        """Time a call."""
        self.times[name].append(seconds(work))


class Results:
    """Collects rows: a figure and its yardstick, which were timed in turn."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(
        self, name: str, unit: str, amount: float, times: list[float], yardstick: str, their_amount: float,
        their_times: list[float], packets: int | None = None, payload: int | None = None,
    ) -> None:  # fmt: skip
        """Add a figure from the seconds that `amount`, in so many packets, took in each run, and its yardstick's in the same runs."""
        value, other = amount / statistics.median(times), their_amount / statistics.median(their_times)
        spread = (max(times) - min(times)) / statistics.median(times)
        interval = [amount / their_amount * ratio for ratio in ratio_interval(their_times, times)]
        rate = packets / statistics.median(times) if packets else None
        self.row(
            name, unit, value, yardstick, other, value / other, len(times), spread, interval, packets_per_s=rate, payload=payload
        )  # fmt: skip

    def row(
        self, name: str, unit: str, value: float, yardstick: str, other: float, ratio: float, runs: int, spread: float,
        interval: list[float], **more: Any,
    ) -> None:  # fmt: skip
        """Add a row as it is; `interval` is where 95% of the ratios lie that runs drawn again give."""
        self.rows.append(
            {
                "name": name, "value": value, "unit": unit, "yardstick": yardstick, "yardstick_value": other,
                "ratio": ratio, "runs": runs, "spread": spread, "interval": interval,
                "target": TARGETS.get(name.removesuffix("_1024")), **more,
            }
        )  # fmt: skip
