# SPDX-License-Identifier: MIT
"""A stage as a process that a supervisor starts, watches and starts again: `StageProcess`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowcheck.stage import READY_VARIABLE

__all__ = ["BACKOFF_S", "StageProcess"]

#: After a first failure a stage is started again so much later.
BACKOFF_S = 0.1
#: Nice value of an urgent stage.
_URGENT = -10
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _go_first() -> None:
    """Have this process run before others that want its core, if that is allowed."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _URGENT)
        # Where the kernel shares cores out by session first (sched(7), autogroup), the session has to go first, too.
        Path("/proc/self/autogroup").write_text(str(_URGENT))


@dataclass
class StageProcess:
    """One stage: its command, and the process that runs it now.

    An `urgent` one runs before what else wants its core. `fits` says of a pid whether it can work under that one.
    """

    name: str
    command: list[str]
    errors: Path
    environment: dict[str, str]
    urgent: bool = False
    fits: Callable[[int], bool] = lambda _: True
    process: subprocess.Popen[bytes] | None = None
    ready_pipe: int = -1
    ready: bool = False
    restarts: int = 0
    started: float = 0.0
    backoff: float = BACKOFF_S
    start_at: float = 0.0
    told: bool = False
    done: bool = False
    rate: float = 0.0
    counted: int = 0

    def start(self) -> None:
        """Start the process; it dies with this one."""
        reading, writing = os.pipe()
        os.set_blocking(reading, False)

        def begin() -> None:
            _die_with_parent()
            if self.urgent:
                _go_first()

        while True:
            with open(self.errors, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as errors:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=(writing,),
                    env={**self.environment, READY_VARIABLE: str(writing)}, preexec_fn=begin, start_new_session=True,
                )  # fmt: skip
            if self.fits(self.process.pid):
                break
            self.kill()
        os.close(writing)
        if self.ready_pipe >= 0:
            os.close(self.ready_pipe)
        self.ready_pipe, self.ready, self.told, self.started = reading, False, False, time.monotonic()

    def look(self) -> int | None:
        """Note whether the process is ready; return its exit status if it has ended."""
        if not self.ready:
            with contextlib.suppress(BlockingIOError):
                self.ready = os.read(self.ready_pipe, 1) == b"1"
        return self.process.poll()

    def last_words(self) -> str:
        """Return what the process said on stderr, in one line."""
        return " ".join(self.errors.read_text(errors="replace").split())[-500:]

    def kill(self) -> None:
        """End the process, if one runs, and wait for it."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
