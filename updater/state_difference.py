# SPDX-License-Identifier: MIT
"""Comparing two training states tensor by tensor, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["INCOMPARABLE", "differences", "flatten"]

#: `max_ulp` of tensors that cannot be compared: absent in one, or of another shape or dtype.
INCOMPARABLE = -1

_INTEGERS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_CHUNK_ELEMENTS = 1 << 20


def flatten(model: dict[str, torch.Tensor], optimizer: dict[str, Any] | None) -> dict[str, Any]:
    """Return all values of a state under one name each: state_dict keys, then `optimizer.<id>.<name>`."""
    flat: dict[str, Any] = dict(model)
    if optimizer is not None:
        for number, values in optimizer["state"].items():
            flat.update({f"optimizer.{number}.{name}": value for name, value in values.items()})
        flat.update(
            {f"optimizer.param_groups.{number}": group for number, group in enumerate(optimizer["param_groups"])}
        )
    return flat


def differences(first: tuple[dict, dict | None], second: tuple[dict, dict | None]) -> list[dict]:
    """Return what differs between two states (model, optimizer), as `diff --json` lists it."""
    a, b = flatten(*first), flatten(*second)
    out = []
    for name in [*a, *(n for n in b if n not in a)]:
        found = _difference(name, a.get(name), b.get(name))
        if found:
            out.append(found)
    return out


def _difference(name: str, a: Any, b: Any) -> dict | None:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        same = not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and _plain(a) == _plain(b)
        elements = max((t.numel() for t in (a, b) if isinstance(t, torch.Tensor)), default=1)
        return None if same else {"name": name, "elements": elements, "first_index": 0, "max_ulp": INCOMPARABLE}
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return {"name": name, "elements": max(a.numel(), b.numel()), "first_index": 0, "max_ulp": INCOMPARABLE}
    elements, first_index, max_ulp = 0, 0, 0
    for low, x, y in _chunks(a, b):
        where = np.flatnonzero(x != y)
        if where.size:
            first_index = first_index if elements else low + int(where[0])
            elements += int(where.size)
            max_ulp = max(max_ulp, _distance(x[where], y[where], a.dtype.is_floating_point))
    return {"name": name, "elements": elements, "first_index": first_index, "max_ulp": max_ulp} if elements else None


def _plain(value: Any) -> str:
    """Return a value that is no tensor as text that tells 0 from 0.0 and -0.0, whatever order its keys have."""
    return repr(sorted(value.items())) if isinstance(value, dict) else repr(value)


def _chunks(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield both tensors' bits as integers, piece by piece, with the index of the first element."""
    kind = _INTEGERS[a.element_size()]
    x, y = (t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().view(kind) for t in (a, b))
    for low in range(0, x.size, _CHUNK_ELEMENTS):
        yield low, x[low : low + _CHUNK_ELEMENTS], y[low : low + _CHUNK_ELEMENTS]


def _distance(x: np.ndarray, y: np.ndarray, floating: bool) -> int:
    """Return the largest distance of two arrays of bits: in units in the last place for floats, else of the integers.

    Floats' -0 and +0 lie on neighbouring places, so that they differ.
    """
    largest = np.iinfo(x.dtype).max
    if floating:
        # sign and magnitude to two's complement: then neighbouring floats are neighbouring integers
        x, y = (np.where(v < 0, np.bitwise_xor(v, largest), v) for v in (x, y))
    low, high = np.minimum(x, y).astype(np.int64), np.maximum(x, y).astype(np.int64)
    return int((high.view(np.uint64) - low.view(np.uint64)).max())
