# SPDX-License-Identifier: MIT
"""Folders in which full states of the trainer appear: the way on after a loss that nothing repairs."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowcheck.errors import ConfigError, FlowCheckError
from flowcheck.plan import Plan

if TYPE_CHECKING:
    from updater.base import Base

__all__ = ["Inbox"]

_log = logging.getLogger(__name__)
_NAME = re.compile(r"state-(\d{6,12})\.pt")
#: Seconds between two looks.
_LOOK_S = 0.2


class Inbox:
    """Looks now and then for files `state-NNNNNN.pt`; what is none of the job's states is refused once, and named."""

    def __init__(self, plan: Plan, folders: Sequence[Path]) -> None:
        self._plan, self._folders = plan, tuple(folders)
        self._refused: set[Path] = set()
        self._looked = 0.0

    def base(self, reached: int) -> Base | None:
        """Return the earliest full state of an iteration after the reached one; None if there is none, or none was looked for."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return None
        self._looked = now
        found = [
            (int(match[1]), path)
            for folder in self._folders
            for path in (folder.iterdir() if folder.is_dir() else ())
            if (match := _NAME.fullmatch(path.name)) and int(match[1]) > reached and path not in self._refused
        ]
        if not found:
            return None
        from updater.base import load_base  # torch is loaded only for a plan with a model

        iteration, path = min(found)
        try:
            base = load_base(path, self._plan)
            if base.iteration != iteration:
                raise ConfigError(f"{path}: holds the state of iteration {base.iteration}, its name says {iteration}")
        except FlowCheckError as error:
            self._refused.add(path)
            _log.warning("not taken as a base: %s", error)
            return None
        return base
