# SPDX-License-Identifier: MIT
"""How a stage waits when it has nothing to do: spin briefly, then yield, then sleep.

Busy polling starves the other stages where cores are few, so the default gives the core away soon; `busy=True` never
does, for a node with a core per stage.
"""

from __future__ import annotations

import os
import time

__all__ = ["AdaptiveWait"]


class AdaptiveWait:
    """Call `idle()` after a poll that found nothing and `busy()` after one that did; one thread each."""

    SPINS = 8
    YIELDS = 8
    SHORTEST_S = 50e-6
    LONGEST_S = 0.002

    def __init__(self, *, always_busy: bool = False) -> None:
        self._always_busy = always_busy
        self._idle_polls = 0

    def busy(self) -> None:
        """Note that there was work: the next idle poll spins again."""
        self._idle_polls = 0

    def idle(self) -> None:
        """Wait a little, longer each time in a row, up to two milliseconds."""
        self._idle_polls += 1
        if self._always_busy or self._idle_polls <= self.SPINS:
            return
        over = self._idle_polls - self.SPINS - self.YIELDS
        if over <= 0:
            os.sched_yield()
        else:
            time.sleep(min(self.LONGEST_S, self.SHORTEST_S * 2 ** min(over - 1, 10)))
