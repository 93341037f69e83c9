# SPDX-License-Identifier: MIT
"""The yardsticks of yardsticks.c, compiled for this machine."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["PIECE", "Yardsticks"]

#: One frame or payload: where it begins in the source, where it goes in the target, its bytes.
PIECE = np.dtype([("source", "<u8"), ("target", "<u8"), ("length", "<u8")])


class Yardsticks:
    """The compiled loops, each called by name: `touch(pieces, source)`, `copy(pieces, source, target)` and so on.

    Source and target are mapped memory or arrays. What a loop returns is only good for seeing that it ran.
    """

    def __init__(self, folder: Path) -> None:
        """Compile them into a folder; CalledProcessError if the compiler refuses."""
        library = folder / "yardsticks.so"
        source = Path(__file__).with_name("yardsticks.c")
        compiler = os.environ.get("CC", "cc")
        command = [compiler, "-O3", "-march=native", "-Wall", "-Werror", "-shared", "-fPIC", source, "-o", library]
        subprocess.run(list(map(str, command)), check=True)
        self._library = ctypes.CDLL(str(library))

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        function.restype = ctypes.c_uint64
        function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p]

        def call(pieces: np.ndarray, source: Any, target: Any = None) -> int:
            assert pieces.dtype == PIECE and pieces.flags.c_contiguous
            return function(pieces.ctypes.data, len(pieces), _address(source), _address(target))

        return call


def _address(memory: Any) -> int | None:
    return None if memory is None else np.frombuffer(memory, np.uint8).ctypes.data
