# SPDX-License-Identifier: MIT
"""Small files that are there whole or not at all, private to their owner; and torch files, of which nothing is unpickled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flowcheck.errors import CheckpointError

__all__ = ["read_torch", "write_private"]


def read_torch(path: str | Path) -> Any:
    """Return what a torch file of tensors and plain values holds.

    Raises:
        CheckpointError: it is none, or is cut short.
        OSError: it cannot be read.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises whatever its unpickler meets
        what = (str(error) or "empty").splitlines()[0]
        if what.startswith("Weights only load failed"):  # torch goes on to advise to unpickle it all the same
            what = "it is none, or has more in it than tensors and plain values"
        raise CheckpointError(f"{path}: cannot be read as a torch file: {what}", str(path)) from error


def write_private(path: Path, content: bytes) -> None:
    """Replace a file by another content; mode 0600. Not synced: for what a power cut may take."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
