# SPDX-License-Identifier: MIT
"""How DPDK is started: a typed set of options instead of pasted strings, with one escape hatch."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from flowcheck import _eal

__all__ = ["Eal"]


@dataclass(frozen=True)
class Eal:
    """DPDK's environment of this process; `start` it once, devices come later.

    Attributes:
        memory_mb: memory for packet buffers where there are no huge pages.
        huge_pages: take huge pages (a real node) instead of plain memory.
        pci: look for PCI devices (a real node); off, no privilege is needed.
        extra: further EAL arguments, as a user wrote them.
    """

    memory_mb: int = 512
    huge_pages: bool = False
    pci: bool = False
    extra: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Return EAL's command line."""
        words = ["--no-telemetry", "--iova-mode=va", "--log-level=*:error", f"--file-prefix=flowcheck{os.getpid()}"]
        words += ["--lcores", f"0@{min(os.sched_getaffinity(0))}"]
        if self.huge_pages:
            words += ["--in-memory"]
        else:
            words += ["--no-huge", "-m", str(self.memory_mb), "--no-shconf"]
        if not self.pci:
            words += ["--no-pci"]
        return [*words, *self.extra]

    @classmethod
    def start(cls, extra: str = "", **options: bool | int) -> Eal:
        """Start DPDK if this process has not; later calls change nothing. DeviceError if it will not start."""
        eal = cls(extra=tuple(shlex.split(extra)), **options)
        _eal.start(eal.arguments())
        return eal
