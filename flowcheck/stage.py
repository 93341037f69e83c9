# SPDX-License-Identifier: MIT
"""How a stage runs as a process of its own: waits for its files, polls, waits when idle, ends cleanly on a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

import click

from flowcheck.errors import ConfigError
from flowcheck.waiting import AdaptiveWait

__all__ = ["READY_VARIABLE", "Stage", "busy_option", "run", "tell_ready", "wait_for", "wait_option"]

T = TypeVar("T")

#: Names the file descriptor that a supervisor wants a byte in when the stage has opened everything.
READY_VARIABLE = "FLOWCHECK_READY_FD"

busy_option = click.option("--busy", is_flag=True, help="Never wait: for a node with a core per stage.")
wait_option = click.option(
    "--wait", "patience_s", type=click.FloatRange(min=0), default=60.0, show_default=True,
    help="Seconds to wait for a file that an earlier stage makes.",
)  # fmt: skip


class Stage(Protocol):
    """What every stage offers."""

    def poll(self) -> int:
        """Do one burst; return how much was done."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left and nothing will come."""


def wait_for(path: Path, opening: Callable[[], T], patience_s: float) -> T:
    """Return what `opening` gives once the file exists; ConfigError after `patience_s` seconds without it."""
    end = time.monotonic() + patience_s
    while True:
        try:
            return opening()
        except FileNotFoundError:
            if time.monotonic() >= end:
                raise ConfigError(
                    f"{path}: no such file after {patience_s:g} seconds; start the stage that makes it"
                ) from None
            time.sleep(0.02)


def tell_ready() -> None:
    """Tell a supervisor, if there is one, that this stage works from now on."""
    if descriptor := os.environ.pop(READY_VARIABLE, None):
        with contextlib.suppress(OSError):  # the supervisor is gone
            os.write(int(descriptor), b"1")
            os.close(int(descriptor))


def run(stage: Stage, *, busy: bool = False, on_signal: Callable[[], Any] | None = None) -> bool:
    """Poll a stage until it is finished; True if so, False if SIGINT or SIGTERM came before.

    Args:
        stage: what to poll.
        busy: never give the core away.
        on_signal: called once when a signal comes; the stage then goes on until it is finished, or stops at once if None.
    """
    signalled = False

    def remember(_number: int, _frame: FrameType | None) -> None:
        nonlocal signalled
        signalled = True

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    wait = AdaptiveWait(always_busy=busy)
    told = False
    tell_ready()
    try:
        while True:
            done = stage.poll()
            if signalled and not told:
                if on_signal is None:
                    return False
                on_signal()
                told = True
            if done:
                wait.busy()
            elif stage.finished:
                return True
            else:
                wait.idle()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
