# SPDX-License-Identifier: MIT
"""Privileges end where the devices are open."""

from __future__ import annotations

__all__ = ["drop"]


def drop() -> None:
    """Give up every capability of every thread of this process, for good; FlowCheckError if one keeps some.

    A process without any is left as it is. What was opened stays open.
    """
    from flowcheck import _privileges

    _privileges.drop()
