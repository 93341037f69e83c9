# SPDX-License-Identifier: MIT
"""The trainer's own word on its state, to hold checkpoints against: a digest after every iteration."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

__all__ = ["digest"]


def digest(state: dict[str, Any]) -> str:
    """Return the SHA-256 of a state's tensors in hexadecimal: model by key, then optimizer by parameter and name.

    `state` has "model" and "optimizer" as their `state_dict` gives them.
    """
    tensors = [(f"model {key}", value) for key, value in sorted(state["model"].items())]
    for number, values in sorted(state["optimizer"]["state"].items()):
        tensors += [(f"optimizer {number} {name}", value) for name, value in sorted(values.items())]
    result = hashlib.sha256()
    for name, tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            result.update(f"{name} {tensor!r}\n".encode())
            continue
        result.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        result.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return result.hexdigest()
