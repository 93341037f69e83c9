# SPDX-License-Identifier: MIT
"""What every FlowCheck command has in common: help, version, JSON output, and errors of one line.

A command raises FlowCheckError; `Command` and `Group` print it as one line on stderr and end with its exit status.
`--debug` shows the traceback instead.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from typing import Any

import click

from flowcheck._version import __version__
from flowcheck.errors import FlowCheckError

__all__ = ["Command", "Group", "command_settings", "debug_option", "json_option", "print_json", "version_option"]

command_settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else there."
)


def _remember_debug(context: click.Context, _parameter: click.Parameter, value: bool) -> bool:
    if value:
        context.find_root().meta["flowcheck.debug"] = True
    return value


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Show the traceback of an error."
)


def dpdk_version() -> str:
    """Return the version of the DPDK that this installation was built against, or why there is none."""
    try:
        from flowcheck import _eal
    except ImportError:
        return "none (built without DPDK)"
    return _eal.version()


def _print_version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(f"flowcheck {__version__}, {dpdk_version()}")
        context.exit()


version_option = click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Print the versions."
)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(document))


def _one_line(context: click.Context, invoke: Callable[[], Any]) -> Any:
    try:
        return invoke()
    except FlowCheckError as error:
        problem: Exception = error
        status = error.exit_code
    except ModuleNotFoundError as error:
        if not (error.name or "").rpartition(".")[2].startswith("_"):
            raise
        problem, status = FlowCheckError("this installation has no compiled stages: install it with DPDK"), 1
    except OSError as error:
        # A full disk, a missing file, a missing permission: the caller's affair, not a defect.
        if error.errno in (None, errno.EFAULT, errno.EBADF):
            raise
        problem, status = error, FlowCheckError.exit_code
    if context.find_root().meta.get("flowcheck.debug"):
        raise problem
    text = " ".join(str(problem).split())
    click.echo(f"{context.find_root().info_name}: {text}", err=True)
    sys.exit(status)


class Command(click.Command):
    """A command whose FlowCheckErrors end it with one line on stderr and their exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        return _one_line(ctx, lambda: super(Command, self).invoke(ctx))


class Group(click.Group):
    """A group of such commands."""

    command_class = Command
