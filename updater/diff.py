# SPDX-License-Identifier: MIT
"""What `flowcheck diff` answers: two checkpoints, wherever they lie, compared tensor by tensor, bit by bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from flowcheck.errors import CheckpointError, ConfigError
from flowcheck.files import read_torch
from updater.restore import restore_state
from updater.safetensors_file import is_safetensors, read_safetensors
from updater.state_difference import differences, flatten

__all__ = ["diff"]

_IN_DIRECTORY = re.compile(r"(.+)@(\d+)")


def diff(a: str, b: str) -> dict:
    """Return the document of `diff --json`.

    Args:
        a: `DIR@N`, a checkpoint directory (its latest state), a safetensors file (with the optimizer's beside it, if it
            is there), or a torch file: a dictionary with "model", or a plain state_dict.
        b: likewise. Optimizers are compared where both have one.

    Raises:
        ConfigError: there is no such file or directory.
        CheckpointError: it cannot be read.
        RestoreError: the directory cannot restore that iteration.
    """
    first, second = _load(a), _load(b)
    if first[1] is None or second[1] is None:
        first, second = (first[0], None), (second[0], None)
    found = differences(first, second)
    tensors = {n for side in (first, second) for n, value in flatten(*side).items() if isinstance(value, torch.Tensor)}
    return {"equal": not found, "tensors": len(tensors), "different": found}


def _load(name: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    path = Path(name)
    if path.is_dir():
        state = restore_state(path)
        return state.model, state.optimizer
    if not path.exists() and (match := _IN_DIRECTORY.fullmatch(name)) and Path(match[1]).is_dir():
        state = restore_state(match[1], int(match[2]))
        return state.model, state.optimizer
    if not path.is_file():
        raise ConfigError(f"{name}: no such checkpoint; expected DIR@N, a torch or a safetensors file")
    if is_safetensors(path):
        return read_safetensors(path)
    try:
        found = read_torch(path)
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read: {error.strerror or error}", name) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{name}: holds a {type(found).__name__}, expected a dictionary of tensors", name)
    model = found.get("model", found)
    if not isinstance(model, dict) or not all(isinstance(value, torch.Tensor) for value in model.values()):
        raise CheckpointError(f"{name}: holds no dictionary of tensors, under 'model' or by itself", name)
    return model, found.get("optimizer") if "model" in found else None
