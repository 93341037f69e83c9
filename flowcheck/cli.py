# SPDX-License-Identifier: MIT
"""The `flowcheck` command: options in, library calls, results out. Stages are imported by the command that needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from flowcheck.errors import ConfigError, DifferenceError, FlowCheckError
from flowcheck.options import Group, command_settings, debug_option, json_option, print_json, version_option

__all__ = ["main"]


@click.group(cls=Group, context_settings=command_settings)
@version_option
@debug_option
def main() -> None:
    """Checkpoint distributed training after every iteration, from mirrored network packets."""


def _streams(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    captures: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not name or not path:
            raise click.BadParameter(f"{value!r} is not NAME=CAPTURE")
        if name in captures:
            raise click.BadParameter(f"stream {name!r} is given twice")
        captures[name] = Path(path)
    return captures


@main.command()
@click.argument("capture", type=click.Path(path_type=Path))
@click.option("--messages", is_flag=True, help="List every message of every flow.")
@json_option
@debug_option
def inspect(capture: Path, messages: bool, as_json: bool) -> None:
    """Say what is in a pcap or pcapng file: every flow, decoded; no plan is needed.

    \b
    Example:
      flowcheck inspect link-0.pcapng
    """
    from packet_parser.inspect import inspect as inspect_capture

    report = inspect_capture(capture, messages=messages)
    if as_json:
        print_json(report)
        return
    from flowcheck.tables import print_flows

    print_flows(report)


@main.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--stream",
    "captures",
    multiple=True,
    required=True,
    callback=_streams,
    metavar="NAME=CAPTURE",
    help="The capture of a stream of the plan; once per stream.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Checkpoint directory.")
@click.option("--keep-gradients", is_flag=True, help="Remove nothing, whatever the plan's rules of retention.")
@click.option(
    "--dma",
    multiple=True,
    metavar="DEVARGS",
    help="Copy with this DMA engine (DPDK device arguments); several share the work.",
)
@click.option("--require-complete", is_flag=True, help="End with status 6 if an iteration is not committed (or whole).")
@json_option
@debug_option
def replay(
    plan: Path,
    captures: dict[str, Path],
    out: Path,
    keep_gradients: bool,
    dma: tuple[str, ...],
    require_complete: bool,
    as_json: bool,
) -> None:
    """Run captures through the whole pipeline into a checkpoint directory.

    \b
    Example:
      flowcheck replay plan.json --stream link-0=link-0.pcapng --out checkpoints
    """
    from flowcheck.replay import replay as run
    from flowcheck.tables import frame_progress, print_iterations

    with frame_progress() as progress:
        report = run(plan, captures, out, keep_gradients=keep_gradients, dma=dma, progress=progress)
    if as_json:
        print_json(report)
    else:
        print_iterations(report)
    if require_complete:
        _require_complete(report)


def _require_complete(report: dict[str, Any]) -> None:
    short = [i for i in report["iterations"] if i["state"] not in ("committed", "whole", "superseded")]
    if short or not report["iterations"]:
        what = f"iteration {short[0]['iteration']} is {short[0]['state']}" if short else "no iteration was seen"
        raise DifferenceError(f"{what}; {len(short)} of {len(report['iterations'])} iterations are not complete")


@main.command("list")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--require-complete", is_flag=True, help="End with status 6 if an iteration is not committed (or whole).")
@json_option
@debug_option
def list_command(directory: Path, require_complete: bool, as_json: bool) -> None:
    """List the iterations of a checkpoint directory and their states."""
    from flowcheck.tables import print_iterations
    from updater.listing import listing

    report = listing(directory)
    if as_json:
        print_json(report)
    else:
        print_iterations(report)
    if require_complete:
        _require_complete(report)


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--iteration", required=True, type=click.IntRange(min=1), help="Which iteration.")
@click.option("--attempt", type=click.IntRange(min=1), help="Of which attempt; the latest if not given.")
@click.option("--bucket", type=click.IntRange(min=0), help="Only this bucket, from 0.")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The .npy file to write.")
@debug_option
def gradient(directory: Path, iteration: int, attempt: int | None, bucket: int | None, out: Path) -> None:
    """Write one iteration's reduced gradient, flat, in bucket order and wire dtype (bfloat16 as uint16)."""
    import io

    import numpy as np

    from updater.durable import write_published
    from updater.gradient import read_gradient

    content = io.BytesIO()
    np.save(content, read_gradient(directory, iteration, bucket, attempt), allow_pickle=False)
    write_published(out, content.getvalue())


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--iteration", type=click.IntRange(min=0), help="Which iteration; the latest committed if not given.")
@click.option("--attempt", type=click.IntRange(min=1), help="Of which attempt; the latest if not given.")
@click.option(
    "--format",
    "form",
    required=True,
    type=click.Choice(["torch", "safetensors", "dcp", "hdf5", "huggingface"]),
    help="torch: loads with weights_only=True. safetensors: the model, and the optimizer in a second file beside it. dcp: "
    "a folder of torch.distributed.checkpoint. hdf5: as snapshots are. huggingface: a folder as its Trainer leaves one.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The file to write, in place of any of that name; dcp and huggingface: the folder to make.",
)
@debug_option
def restore(directory: Path, iteration: int | None, attempt: int | None, form: str, out: Path) -> None:
    """Write a checkpoint of the latest or any other committed iteration.

    \b
    Example:
      flowcheck restore checkpoints --iteration 12 --format torch --out state.pt
    """
    from flowcheck.tables import step_progress
    from updater.export import check_target, export
    from updater.restore import restore_state

    check_target(form, out)
    with step_progress() as progress:
        state = restore_state(directory, iteration, attempt, lambda done, total: progress("iterations", done, total))
    export(state, form, out)
    click.echo(f"iteration {state.iteration} restored to {out}", err=True)


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@json_option
@debug_option
def verify(directory: Path, as_json: bool) -> None:
    """Recompute every checksum, replay the log over the snapshots, and compare.

    Ends with 5 if a file fails its checksum, with 6 if log and snapshots disagree.
    """
    from updater.verify import check

    found = check(directory)
    report = found.document()
    if as_json:
        print_json(report)
    else:
        from flowcheck.tables import print_verification

        print_verification(report)
    if not report["ok"]:
        sys.exit(found.exit_code)


@main.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@json_option
@debug_option
def diff(first: str, second: str, as_json: bool) -> None:
    """Compare two checkpoints tensor by tensor, bit by bit; A and B are DIR@N (DIR: its latest), a torch or a safetensors file.

    Optimizers are compared where both have one; that of a safetensors file lies in a second file beside it. Unequal:
    status 6.
    """
    from updater.diff import diff as compare

    report = compare(first, second)
    if as_json:
        print_json(report)
    else:
        from flowcheck.tables import print_difference

        print_difference(report)
    if not report["equal"]:
        sys.exit(DifferenceError.exit_code)


@main.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the files go; a new temporary folder if not given.",
)
@click.option(
    "--transport",
    type=click.Choice(["fabric", "in-process", "offline"]),
    help="fabric: live over a mirrored network of this machine, as root; in-process: live over local sockets; offline: "
    "recorded, then replayed. Default: the first of these that can be.",
)
@json_option
@debug_option
def demo(directory: Path | None, transport: str | None, as_json: bool) -> None:
    """Show the product in one go: train, checkpoint from packets, kill, restore, resume, compare."""
    from flowcheck import demo as live
    from flowcheck import demo_offline as offline
    from flowcheck.errors import DeviceError
    from flowcheck.tables import print_demo, step_progress

    if directory is not None and directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory}: not empty; name a new folder")
    with step_progress() as progress:
        for choice in (transport,) if transport else ("fabric", "in-process", "offline"):
            try:
                if choice == "offline":
                    report = offline.demo(directory, progress)
                else:
                    report = live.demo(directory, choice, progress)
                break
            except DeviceError as error:
                if transport or choice == "offline":
                    raise
                click.echo(f"not over {choice}: {error}", err=True)
    if as_json:
        print_json(report)
    else:
        print_demo(report)
    if not (report["bit_exact"] and report["resumed_equal"]):
        sys.exit(DifferenceError.exit_code)


@main.command()
@click.option("--quick", is_flag=True, help="Every kind of fault, under two minutes; else 200,000 iterations.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of everything that is drawn by lot.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: a core each]")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Keep recordings, page and JSON here.")
@click.option(
    "--only", multiple=True, metavar="KIND", help="Only this kind of fault (docs/reliability.md); may be repeated."
)
@click.option("--cases", type=click.IntRange(min=1), help="So many cases of each kind.")
@click.option("--case", type=click.IntRange(min=0), help="Repeat one case, by its number.")
@json_option
@debug_option
def faults(
    quick: bool,
    seed: int,
    workers: int | None,
    out: Path | None,
    only: tuple[str, ...],
    cases: int | None,
    case: int | None,
    as_json: bool,
) -> None:
    """Spoil frames, stages and disk in every way known, and hold what is committed against the trainer.

    \b
    Example:
      flowcheck faults --quick --out campaign
    """
    import os

    from fault_injection.campaign import Plan, broken, campaign
    from flowcheck.tables import print_faults, step_progress

    plan = Plan(
        seed=seed,
        quick=quick,
        workers=workers or len(os.sched_getaffinity(0)),
        out=out,
        only=only,
        cases=1 if case is not None else cases,
        first=case or 0,
    )
    with step_progress() as progress:
        report = campaign(plan, lambda done, total: progress("cases", done, total))
    if as_json:
        print_json(report)
    else:
        print_faults(report)
    for fault in report["faults"]:
        for problem in fault["problems"]:
            click.echo(problem, err=True)
    if broken(report):
        sys.exit(DifferenceError.exit_code)


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("state", type=click.Path(path_type=Path, dir_okay=False))
@debug_option
def rebase(directory: Path, state: Path) -> None:
    """Take a full state of the trainer as new base: a torch file with model, optimizer and iteration.

    After a loss that nothing repairs, later iterations wait for one: those that the log holds whole are then committed.
    A live run takes it as well.

    \b
    Example:
      flowcheck rebase checkpoints state-000120.pt
    """
    from flowcheck.supervisor import INBOX, is_live, scratch_folder
    from updater import base

    if is_live(directory):
        if not base.offer(directory, scratch_folder(directory) / INBOX, state):
            raise FlowCheckError(f"{directory}: the live run has not taken {state} in a minute; see flowcheck status")
        click.echo(f"{state}: the live run goes on from it, or is past it", err=True)
        return
    iteration, reached = base.rebase(directory, state)
    click.echo(f"base at iteration {iteration}, committed to iteration {reached}", err=True)


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--last-iterations", type=click.IntRange(min=1), help="Keep the newest so many iterations.")
@click.option("--every-snapshot", type=click.IntRange(min=1), help="Keep every n-th snapshot.")
@click.option("--most-bytes", type=click.IntRange(min=1), help="Keep so many bytes at most; the oldest go first.")
@click.option("--most-waiting-bytes", type=click.IntRange(min=1), help="Of iterations that wait for a base.")
@json_option
@debug_option
def prune(directory: Path, dry_run: bool, as_json: bool, **rules: int | None) -> None:
    """Remove what no rule keeps: the rules of the job's plan, or those given here in their place.

    The newest snapshot that verifies and what was committed after it always stay, and so does what is pinned. A live run
    does this by itself after each snapshot.

    \b
    Example:
      flowcheck prune checkpoints --last-iterations 1000 --every-snapshot 10 --dry-run
    """
    from updater.retention import prune_directory

    report = prune_directory(
        directory, {name: value for name, value in rules.items() if value is not None}, dry_run=dry_run
    )
    if as_json:
        print_json(report)
        return
    for row in report["removed"]:
        click.echo(f"{row['file']} {row['bytes']}")
    what = "would be removed" if dry_run else "removed"
    click.echo(f"{len(report['removed'])} files, {report['bytes']} bytes {what}; {report['left_bytes']} bytes stay")


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("iteration", type=click.IntRange(min=0))
@click.option("--attempt", type=click.IntRange(min=1), help="Of which attempt; the latest if not given.")
@click.option("--remove", is_flag=True, help="Keep it no longer.")
@debug_option
def pin(directory: Path, iteration: int, attempt: int | None, remove: bool) -> None:
    """Have retention keep what an iteration is restored from, whatever the rules; not while a run writes to DIR."""
    from updater.retention import pin as keep

    found = keep(directory, iteration, attempt, remove=remove)
    click.echo(f"iteration {iteration} of attempt {found} is {'not ' if remove else ''}pinned", err=True)


@main.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Checkpoint directory; gone on with if it is this job's.",
)
@click.option("--busy", is_flag=True, help="Stages never wait: for a node with a core per stage.")
@json_option
@debug_option
def run(plan: Path, out: Path, busy: bool, as_json: bool) -> None:
    """Checkpoint a live job: start all stages, restart one that dies, end cleanly on SIGINT or SIGTERM.

    Every stream of the plan names the interface or port that the switch mirrors to. A file shadow.json beside the plan
    says when capturing has begun.

    \b
    Example:
      flowcheck run plan.json --out checkpoints
    """
    from flowcheck.supervisor import Supervisor
    from flowcheck.tables import live_status

    with live_status() as (show, say):
        report = Supervisor(plan, out, busy=busy, show=show, say=say).run()
    if as_json:
        print_json(report)
        return
    click.echo(
        f"{out}: committed to iteration {report['last_committed']}, {report['incomplete']} incomplete; "
        f"{report['packets']['received']} frames received, {report['packets']['missed_by_port']} missed"
    )


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@json_option
@debug_option
def status(directory: Path, as_json: bool) -> None:
    """Say how a live run stands: what each stage does, lag, loss, the last committed iteration."""
    from flowcheck.supervisor import status as read
    from flowcheck.tables import print_status

    report = read(directory)
    if as_json:
        print_json(report)
    else:
        print_status(report)


@main.command()
@click.option("--params", "parameters", required=True, type=click.IntRange(min=1), help="Parameters of the model.")
@click.option("--ranks", required=True, type=click.IntRange(min=2), help="Ranks of the ring.")
@click.option("--streams", default=2, show_default=True, type=click.IntRange(1, 8), help="Mirrored edges, a port each.")
@click.option(
    "--loss", default=1e-6, show_default=True, type=click.FloatRange(0, 1), help="Of a mirrored frame: how likely."
)
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    help="Of parameters and gradients.",
)
@click.option("--protocol", default="simple", show_default=True, type=click.Choice(["ll", "ll128", "simple"]))
@click.option("--nccl", "version", default="2.28", show_default=True, help="Version of the library.")
@click.option("--channels", default=2, show_default=True, type=click.IntRange(1, 32))
@click.option("--qps", "queue_pairs", default=1, show_default=True, type=click.IntRange(1, 8), help="Per connection.")
@click.option("--mtu", default=4096, show_default=True, type=int)
@click.option("--link-gbps", default=400, show_default=True, type=click.IntRange(1, 3200), help="Of links and ports.")
@click.option(
    "--bucket-mb", default=25.0, show_default=True, type=click.FloatRange(min=0, min_open=True), help="DDP's."
)
@click.option(
    "--step-seconds",
    default=1.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="How long an iteration takes.",
)
@click.option("--optimizer", default="AdamW", show_default=True, help="Its class in torch.optim; SGD with momentum.")
@click.option("--record/--no-record", default=True, show_default=True, help="Whether step records are sent.")
@click.option(
    "--snapshot-iterations", type=click.IntRange(min=1), help="Between two snapshots; else by the log's bytes."
)
@click.option("--ring-bytes", default=16 << 20, show_default=True, type=click.IntRange(1 << 16), help="As in the plan.")
@click.option("--slots", default=4, show_default=True, type=click.IntRange(3, 64), help="As in the plan.")
@json_option
@debug_option
def size(as_json: bool, **job: Any) -> None:
    """Plan ahead: frames, ports, memory and disk of a job, and how likely an iteration is lost beyond repair.

    \b
    Example:
      flowcheck size --params 7000000000 --ranks 64 --streams 3 --loss 1e-6 --step-seconds 10
    """
    from flowcheck.sizing import Cluster
    from flowcheck.sizing import size as needed

    report = needed(Cluster(**job))
    if as_json:
        print_json(report)
        return
    from flowcheck.tables import print_size

    print_size(report)
