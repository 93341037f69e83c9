# SPDX-License-Identifier: MIT
"""`flowcheck-extract`: the extractor as a process of its own."""

from __future__ import annotations

from pathlib import Path

import click

from flowcheck.options import Command, command_settings, debug_option, json_option, print_json, version_option
from flowcheck.stage import busy_option, run, wait_for, wait_option

__all__ = ["main"]


@click.command(cls=Command, context_settings=command_settings)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--ring",
    "ring_paths",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A packet ring; once per stream of the plan.",
)
@click.option(
    "--slots",
    "slots_path",
    required=True,
    type=click.Path(path_type=Path),
    help="The slot file; gone on with if it exists.",
)
@click.option(
    "--dma", multiple=True, metavar="DEVARGS", help="Copy plain payloads with this DMA engine; several share the work."
)
@wait_option
@busy_option
@json_option
@version_option
@debug_option
def main(
    plan: Path,
    ring_paths: tuple[Path, ...],
    slots_path: Path,
    dma: tuple[str, ...],
    patience_s: float,
    busy: bool,
    as_json: bool,
) -> None:
    """Assemble gradients from the packet rings of all streams of a plan.

    \b
    Example:
      flowcheck-extract plan.json --ring /dev/shm/link-0.ring --ring /dev/shm/link-3.ring --slots /dev/shm/slots
    """
    from contextlib import ExitStack, closing

    from flowcheck._copy import CopyEngine

    from data_extractor.extractor import Extractor
    from flowcheck import privileges
    from flowcheck.errors import ConfigError
    from flowcheck.mapped import populate
    from flowcheck.plan import load
    from flowcheck.ring import PacketRing
    from flowcheck.slots import SlotFile

    job = load(plan)
    identity = job.identity()
    with ExitStack() as stack:
        engine = stack.enter_context(closing(CopyEngine(dma)))
        rings = [
            stack.enter_context(wait_for(path, lambda path=path: PacketRing.open(path, identity), patience_s))
            for path in ring_paths
        ]
        given, wanted = sorted(ring.stream for ring in rings), sorted(stream.name for stream in job.shard.streams)
        if given != wanted:
            raise ConfigError(f"rings of streams {', '.join(given)}; the plan's streams are {', '.join(wanted)}")
        slots = stack.enter_context(SlotFile.for_plan(slots_path, job))
        populate(*(ring.memory for ring in rings), slots.memory)
        extractor = stack.enter_context(closing(Extractor(rings, job, slots, engine)))
        privileges.drop()
        run(extractor, busy=busy)
        report = extractor.counters()
    if as_json:
        print_json(report)
    else:
        click.echo(", ".join(f"{name} {value}" for name, value in report.items() if isinstance(value, int) and value))
