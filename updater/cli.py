# SPDX-License-Identifier: MIT
"""`flowcheck-update`: the updater as a process of its own."""

from __future__ import annotations

from pathlib import Path

import click

from flowcheck.options import Command, command_settings, debug_option, json_option, print_json, version_option
from flowcheck.stage import busy_option, run, wait_for, wait_option

__all__ = ["main"]


@click.command(cls=Command, context_settings=command_settings)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--slots", "slots_path", required=True, type=click.Path(path_type=Path), help="The extractor's slot file."
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Checkpoint directory; gone on with if it is this job's.",
)
@click.option(
    "--dma",
    multiple=True,
    metavar="DEVARGS",
    help="Copy the state into a snapshot's staging buffer with this DMA engine; several share the work.",
)
@click.option(
    "--plan-folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="What a relative path of the initial state starts from; default: the plan's folder.",
)
@click.option(
    "--bases",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder in which full states of the trainer appear as state-NNNNNN.pt: the way on after a loss.",
)
@wait_option
@busy_option
@json_option
@version_option
@debug_option
def main(
    plan: Path,
    slots_path: Path,
    out: Path,
    dma: tuple[str, ...],
    plan_folder: Path | None,
    bases: tuple[Path, ...],
    patience_s: float,
    busy: bool,
    as_json: bool,
) -> None:
    """Commit decided iterations to a checkpoint directory and step the training state.

    \b
    Example:
      flowcheck-update plan.json --slots /dev/shm/slots --out checkpoints
    """
    from contextlib import closing

    from flowcheck._copy import CopyEngine

    from flowcheck import privileges
    from flowcheck.plan import load
    from flowcheck.slots import SlotFile
    from updater.updater import Updater

    job = load(plan)
    identity = job.identity()
    with (
        wait_for(slots_path, lambda: SlotFile.open(slots_path, identity), patience_s) as slots,
        closing(CopyEngine(dma)) as engine,
    ):
        updater = Updater(job, slots, out, plan_folder=plan_folder or plan.parent, engine=engine, bases=bases)
        with closing(updater):
            privileges.drop()
            run(updater, busy=busy)
        report = updater.counters()
    if as_json:
        print_json(report)
    else:
        click.echo(", ".join(f"{name} {value}" for name, value in report.items()))
