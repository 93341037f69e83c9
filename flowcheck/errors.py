# SPDX-License-Identifier: MIT
"""Every error that FlowCheck raises on purpose, and the exit status that each one ends a command with.

    FlowCheckError             1  something failed while running
    ├── ConfigError            3  a plan or an option cannot be used
    ├── DeviceError            4  DPDK, a port or a DMA engine refused
    ├── FormatError            5  a file is corrupt, cut, or not what it should be
    │   ├── CaptureError       5    ... a pcap or pcapng file
    │   ├── RingFormatError    5    ... a packet ring
    │   ├── SlotFormatError    5    ... a slot file
    │   └── CheckpointError    5    ... a log, snapshot or manifest of a checkpoint directory
    ├── DiskError              1  the operating system refused to write, sync or read a file of a checkpoint directory
    ├── LearningError          1  what was seen does not show the layout of every all-reduce
    ├── RestoreError           1  the iteration asked for cannot be restored
    └── DifferenceError        6  a comparison found a difference

A message is one line: what failed, on what, the value found, the value expected, what to do next.
"""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "DifferenceError",
    "DiskError",
    "FlowCheckError",
    "FormatError",
    "LearningError",
    "RestoreError",
    "RingFormatError",
    "SlotFormatError",
]


class FlowCheckError(Exception):
    """Something failed while running; the base of all errors raised on purpose."""

    exit_code = 1


class ConfigError(FlowCheckError):
    """A plan, or an option, cannot be used as it stands."""

    exit_code = 3


class DeviceError(FlowCheckError):
    """DPDK, a port or a DMA engine refused; `code` is the positive errno, 0 if there is none."""

    exit_code = 4

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class FormatError(FlowCheckError):
    """A file is corrupt, cut, or of another kind; `path` names it."""

    exit_code = 5

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class CaptureError(FormatError):
    """A capture file cannot be read to its end."""


class RingFormatError(FormatError):
    """A file is no packet ring of this version and job."""


class SlotFormatError(FormatError):
    """A file is no slot file of this version and job."""


class CheckpointError(FormatError):
    """A file of a checkpoint directory fails its checksum or cannot be understood."""


class DiskError(FlowCheckError):
    """The operating system refused a file operation: the disk is full, or broken, or may not be written."""


class LearningError(FlowCheckError):
    """The frames seen do not show where every element of every all-reduce lies; another round of passes may."""


class RestoreError(FlowCheckError):
    """The iteration asked for cannot be restored; the message names the nearest that can."""


class DifferenceError(FlowCheckError):
    """A comparison found a difference."""

    exit_code = 6
