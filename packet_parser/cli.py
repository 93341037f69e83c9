# SPDX-License-Identifier: MIT
"""`flowcheck-parse`: the parser as a process of its own."""

from __future__ import annotations

from pathlib import Path

import click

from flowcheck.options import Command, command_settings, debug_option, json_option, print_json, version_option
from flowcheck.stage import busy_option, run, wait_for, wait_option

__all__ = ["main"]


@click.command(cls=Command, context_settings=command_settings)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--stream", required=True, metavar="NAME", help="The plan's name of the stream.")
@click.option("--ring", "ring_path", required=True, type=click.Path(path_type=Path), help="The stream's packet ring.")
@click.option(
    "--direction",
    type=click.Choice(["inbound", "outbound"]),
    help="Only packets to (from) the mirrored host; default: as the plan says.",
)
@wait_option
@busy_option
@json_option
@version_option
@debug_option
def main(
    plan: Path, stream: str, ring_path: Path, direction: str | None, patience_s: float, busy: bool, as_json: bool
) -> None:
    """Annotate the packets of a stream's ring until its dump has ended.

    \b
    Example:
      flowcheck-parse plan.json --stream link-0 --ring /dev/shm/link-0.ring
    """
    from contextlib import closing

    from flowcheck import privileges
    from flowcheck.mapped import populate
    from flowcheck.plan import load
    from flowcheck.ring import PacketRing
    from packet_parser.parser import Parser

    job = load(plan)
    identity = job.identity()
    with wait_for(ring_path, lambda: PacketRing.open(ring_path, identity), patience_s) as ring:
        populate(ring.memory)
        with closing(Parser(ring, job, stream, direction)) as parser:
            privileges.drop()
            run(parser, busy=busy)
            report = {"stream": stream, **parser.counters()}
    if as_json:
        print_json(report)
        return
    counts = {**report["verdicts"], **{f"malformed ({k})": v for k, v in report["malformed"].items()}}
    click.echo(f"{report['parsed']} packets: " + ", ".join(f"{n} {name}" for name, n in counts.items() if n))
