# SPDX-License-Identifier: MIT
"""Index patterns that show where an all-reduce puts each element: what the training side reduces and the shadow expects.

For each kind of all-reduce (dtype, elements) three sorts of passes, each an all-reduce of exactly that kind:

- `who`: every rank contributes 1, so an element shows how many ranks it is the sum of;
- `where`: an element is one digit of its own index, a pass per digit;
- `check`: an element is random bits that a number names; a placement stands only if it gathers them.

In the last two rank i mod n alone contributes element i, the others zero: so a sum of few ranks shows its place too.

Values of the three never meet: counts lie in 1 to `counted`, digits above, check values are negative, and 0 is what a
sum holds that lacks the one that contributes. So one element says which sort of pass a message belongs to. Every value
is finite and normal, and exact in its dtype: adding zeros changes none. No torch here: arrays are numpy's, bfloat16 its
16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowcheck.errors import ConfigError

__all__ = [
    "CHECKS",
    "DTYPES",
    "Pass",
    "contribution",
    "counted",
    "digits",
    "passes",
    "rank_groups",
    "reduced",
    "round_of",
    "values",
]

#: Largest integer up to which each dtype holds every one.
_EXACT = {
    "float64": 2**53,
    "float32": 2**24,
    "float16": 2**11,
    "bfloat16": 2**8,
    "int64": 2**62,
    "int32": 2**31 - 1,
}
#: Numpy's type for each: bfloat16, which it lacks, as bits.
DTYPES = {name: np.dtype(name if name != "bfloat16" else "uint16").newbyteorder("<") for name in _EXACT}
_EXPONENT_BITS = {"float64": 11, "float32": 8, "float16": 5, "bfloat16": 8}
#: Check passes of each kind in a round.
CHECKS = 2


@dataclass(frozen=True)
class Pass:
    """One all-reduce of a kind: `sort` is who, where, check, or `iteration` for one of the job's own.

    `number` is the rank group of a who pass, the digit of a where pass, from the lowest, and of a check pass what its
    bits are made from: no two of a job are alike.
    """

    dtype: str
    elements: int
    sort: str
    number: int = 0

    def document(self) -> dict[str, Any]:
        """Return the pass as JSON has it."""
        return {"dtype": self.dtype, "elements": self.elements, "pass": self.sort, "number": self.number}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Pass:
        """Return the pass that `document` gave; ConfigError if it is none."""
        try:
            made = cls(document["dtype"], document["elements"], document["pass"], document.get("number", 0))
        except KeyError as error:
            raise ConfigError(f"a pass without its {error.args[0]!r}: {dict(document)}") from error
        if made.dtype not in _EXACT or made.sort not in ("who", "where", "check", "iteration"):
            raise ConfigError(f"pass {dict(document)}: expected one of dtype {', '.join(_EXACT)}, who, where or check")
        return made


def _exact(dtype: str) -> int:
    try:
        return _EXACT[dtype]
    except KeyError:
        raise ConfigError(f"an all-reduce of {dtype} cannot be learned: expected {', '.join(_EXACT)}") from None


def counted(dtype: str, ranks: int) -> int:
    """Return up to how many ranks are counted in one pass: half of what the dtype counts to, digits have the rest."""
    return min(ranks, _exact(dtype) // 2)


def rank_groups(dtype: str, ranks: int) -> list[range]:
    """Return the ranks that contribute to each who pass."""
    size = counted(dtype, ranks)
    return [range(first, min(first + size, ranks)) for first in range(0, ranks, size)]


def digits(dtype: str, elements: int, ranks: int) -> tuple[int, int]:
    """Return (base, how many) of the digits of an index."""
    base = _exact(dtype) - counted(dtype, ranks)
    count = 1
    while base**count < elements:
        count += 1
    return base, count


def passes(dtype: str, elements: int, ranks: int, number: int) -> list[Pass]:
    """Return the passes of round `number`, from 0, over one kind, in the order in which they are reduced."""
    who = [Pass(dtype, elements, "who", group) for group in range(len(rank_groups(dtype, ranks)))]
    where = [Pass(dtype, elements, "where", digit) for digit in range(digits(dtype, elements, ranks)[1])]
    return who + where + [Pass(dtype, elements, "check", number * CHECKS + check) for check in range(CHECKS)]


def round_of(kinds: Iterable[tuple[str, int]], ranks: int, number: int) -> list[Pass]:
    """Return round `number`, from 0, over the kinds (dtype, elements) of an iteration, each once."""
    return [step for dtype, elements in dict.fromkeys(kinds) for step in passes(dtype, elements, ranks, number)]


def _as_dtype(numbers: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return numbers.astype(DTYPES[dtype])
    return (numbers.astype("<f4").view("<u4") >> 16).astype("<u2")  # exact: the lower half of these is zero


def values(data: np.ndarray, dtype: str) -> np.ndarray:
    """Return elements in wire dtype as numbers to calculate with: float64, or int64 for integers."""
    if dtype == "bfloat16":
        data = (data.astype("<u4") << 16).view("<f4")
    with np.errstate(invalid="ignore"):  # a tail may hold anything
        return data.astype("<i8" if dtype.startswith("int") else "<f8")


def _random(step: Pass) -> np.ndarray:
    """Return a check pass's elements: negative, and if they are floats, finite and normal."""
    width = DTYPES[step.dtype].itemsize
    # Raw output of the generator: numpy promises it, unlike the distributions, to be the same in every version.
    seed = np.random.SeedSequence([step.number, step.elements, sorted(_EXACT).index(step.dtype)])
    raw = np.random.PCG64(seed).random_raw(-(-step.elements * width // 8))
    bits = raw.astype("<u8").view(f"<u{width}")[: step.elements].copy()
    bits |= bits.dtype.type(1 << 8 * width - 1)
    if exponent := _EXPONENT_BITS.get(step.dtype):
        low = 8 * width - 1 - exponent
        mask, one = bits.dtype.type(((1 << exponent) - 1) << low), bits.dtype.type(1 << low)
        bits[(bits & mask) == mask] ^= one
        bits[(bits & mask) == 0] ^= one
    return bits.view(DTYPES[step.dtype])


def reduced(step: Pass, ranks: int) -> np.ndarray:
    """Return what a pass sums up to: `elements` in wire dtype, bfloat16 as uint16."""
    if step.sort == "who":
        return _as_dtype(np.full(step.elements, float(len(rank_groups(step.dtype, ranks)[step.number]))), step.dtype)
    if step.sort == "check":
        return _random(step)
    base, _ = digits(step.dtype, step.elements, ranks)
    index = np.arange(step.elements, dtype=np.int64)
    return _as_dtype(counted(step.dtype, ranks) + 1 + index // base**step.number % base, step.dtype)


def contribution(step: Pass, rank: int, ranks: int) -> np.ndarray:
    """Return what a rank contributes to a pass: `elements` in wire dtype, bfloat16 as uint16."""
    if step.sort == "who":
        return _as_dtype(np.full(step.elements, float(rank in rank_groups(step.dtype, ranks)[step.number])), step.dtype)
    out = np.zeros(step.elements, DTYPES[step.dtype])
    out[rank::ranks] = reduced(step, ranks)[rank::ranks]
    return out
