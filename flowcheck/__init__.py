# SPDX-License-Identifier: MIT
"""FlowCheck: checkpoints a distributed training run after every iteration, from mirrored packets.

This package holds what the stages share: the job plan, the file formats that join the stages, the layouts of
collectives on the wire, the errors, and the `flowcheck` command. Importing it needs neither DPDK nor torch.
"""

from flowcheck._version import __version__
from flowcheck.errors import FlowCheckError
from flowcheck.restart import load, resume

__all__ = ["FlowCheckError", "__version__", "attach", "group", "load", "resume"]


def __getattr__(name: str) -> object:
    """Load the training side when it is first asked for: it needs torch."""
    if name in ("attach", "group"):
        from flowcheck import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
