# SPDX-License-Identifier: MIT
"""`flowcheck-parse`: the parser as a process of its own."""

from __future__ import annotations

from pathlib import Path

import click

from flowcheck.options import Command, command_settings, debug_option, json_option, print_json, version_option

__all__ = ["main"]


@click.command(cls=Command, context_settings=command_settings)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--stream", required=True, metavar="NAME", help="The plan's name of the stream.")
@click.option("--ring", "ring_path", required=True, type=click.Path(path_type=Path), help="The stream's packet ring.")
@click.option("--direction", type=click.Choice(["inbound", "outbound"]), help="Only packets to (from) the mirrored host; default: as the plan says.")
@json_option
@version_option
@debug_option
def main(plan: Path, stream: str, ring_path: Path, direction: str | None, as_json: bool) -> None:
    """Annotate the packets of a stream's ring until its dump has ended.

    \b
    Example:
      flowcheck-parse plan.json --stream link-0 --ring /dev/shm/link-0.ring
    """
    from flowcheck.plan import load
    from flowcheck.ring import PacketRing
    from flowcheck.waiting import AdaptiveWait
    from packet_parser.parser import Parser

    job, wait = load(plan), AdaptiveWait()
    with PacketRing.open(ring_path, job.identity()) as ring:
        parser = Parser(ring, job, stream, direction)
        while not parser.finished:
            wait.busy() if parser.poll() else wait.idle()
        report = {"stream": stream, **parser.counters()}
        parser.close()
    if as_json:
        print_json(report)
        return
    counts = {**report["verdicts"], **{f"malformed ({k})": v for k, v in report["malformed"].items()}}
    click.echo(f"{report['parsed']} packets: " + ", ".join(f"{n} {name}" for name, n in counts.items() if n))
