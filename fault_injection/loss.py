# SPDX-License-Identifier: MIT
"""How often an iteration cannot be repaired, measured, beside what `flowcheck size` computes from the same plan."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from fault_injection.case import Case

__all__ = ["POINTS", "interval", "loss_at", "row", "spoil"]

#: Streams, and the share of iterations that shall be unrepairable.
POINTS = ((2, 0.04), (2, 0.15), (3, 0.02), (3, 0.10))

Formula = Callable[[Any, float], float]


def spoil(case: Case, loss: float) -> None:
    """Lose each frame from the first iteration on with one and the same probability."""
    for name, shown in case.streams.items():
        first = case.begin(name, 1)
        case.streams[name] = [one for at, one in enumerate(shown) if at < first or case.rng.random() >= loss]


def loss_at(plan: Any, share: float, formula: Formula) -> float:
    """Return the frame loss at which the formula has a share of the iterations unrepairable, to three digits."""
    low, high = 1e-7, 0.5
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if formula(plan, middle) < share else (low, middle)
    return float(f"{low:.3g}")


def _tail(successes: int, trials: int, probability: float) -> float:
    """Return the probability of at most so many successes."""
    if probability <= 0 or successes >= trials:
        return 1.0
    if probability >= 1:
        return 0.0
    one, other = math.log(probability), math.log1p(-probability)
    whole = math.lgamma(trials + 1)
    return math.fsum(
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * one + (trials - k) * other)
        for k in range(successes + 1)
    )


def interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a share."""
    half = (1 - confidence) / 2

    def solve(wanted: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if wanted(middle) else (low, middle)
        return (low + high) / 2

    lower = solve(lambda p: 1 - _tail(successes - 1, trials, p) < half) if successes else 0.0
    upper = solve(lambda p: _tail(successes, trials, p) > half) if successes < trials else 1.0
    return lower, upper


def row(streams: int, loss: float, trials: int, lost: int, formula: float) -> dict[str, Any]:
    """Return the `loss` entry of one point."""
    low, high = interval(lost, trials)
    return {
        "streams": streams, "loss": loss, "iterations": trials, "unrepairable": lost, "rate": lost / max(1, trials),
        "low": low, "high": high, "formula": formula, "inside": low <= formula <= high,
    }  # fmt: skip


def rng(seed: int, streams: int, loss: float, number: int) -> random.Random:
    """Return the source of chance of one case."""
    return random.Random(f"{seed}/loss/{streams}/{loss}/{number}")
