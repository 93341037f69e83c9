# SPDX-License-Identifier: MIT
"""`flowcheck-workload`: the GPT launch example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from flowcheck.errors import ConfigError
from flowcheck.options import Group, command_settings, debug_option, json_option, print_json, version_option

__all__ = ["main"]

# Named here, not taken from workload_gen.record: that one imports torch.
_OPTIMIZERS = ["sgd", "adam", "adamw", "adagrad", "rmsprop", "adamax", "nadam", "radam"]


@click.group(cls=Group, context_settings=command_settings)
@version_option
@debug_option
def main() -> None:
    """Train a small GPT, and record what its network carries."""


def _links(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(word) for word in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0,3") from None


_JOB = [
    click.option("--ranks", type=click.IntRange(2, 64), default=2, show_default=True, help="Ranks on the ring."),
    click.option(
        "--iterations", type=click.IntRange(min=1), default=10, show_default=True, help="Optimizer steps, in all."
    ),
    click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="A new folder."),
    click.option(
        "--protocol",
        type=click.Choice(["ll", "ll128", "simple"]),
        default="ll",
        show_default=True,
        help="Of the library.",
    ),
    click.option(
        "--nccl",
        type=click.Choice([f"2.{minor}" for minor in range(12, 31)]),
        default="2.19",
        show_default=True,
        help="Library version.",
    ),
    click.option(
        "--channels",
        type=click.IntRange(1, 32),
        default=1,
        show_default=True,
        help="Of the communicator; small operations use fewer.",
    ),
    click.option("--pin-channels", is_flag=True, help="Every operation uses all channels and threads."),
    click.option(
        "--qps",
        "queue_pairs",
        type=click.IntRange(1, 8),
        default=1,
        show_default=True,
        help="Queue pairs a connection.",
    ),
    click.option(
        "--split-qps/--no-split-qps",
        "split_queue_pairs",
        default=None,
        help="Cut each message over all queue pairs, or let them take turns; default: as the version does.",
    ),
    click.option(
        "--mtu",
        type=click.Choice(["256", "512", "1024", "2048", "4096"]),
        default="1024",
        show_default=True,
        help="Payload bytes of a packet.",
    ),
    click.option("--ip", type=click.Choice(["4", "6"]), default="6", show_default=True, help="IP version."),
    click.option("--vlan", type=click.IntRange(1, 4094), help="802.1Q tag of every frame."),
    click.option(
        "--adaptive-routing",
        is_flag=True,
        help="Split messages of more than 8,192 bytes as the library does then; up to 2.15 it always does.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
        default="float32",
        show_default=True,
        help="Of parameters and gradients.",
    ),
    click.option(
        "--optimizer", type=click.Choice(_OPTIMIZERS), default="sgd", show_default=True, help="From torch.optim."
    ),
    click.option("--fused/--no-fused", default=False, help="The optimizer's fused form."),
    click.option(
        "--params",
        "parameters",
        type=click.IntRange(min=1),
        default=20_000,
        show_default=True,
        help="About so many parameters.",
    ),
    click.option(
        "--bucket-mb",
        type=click.FloatRange(min=0, min_open=True),
        default=25.0,
        show_default=True,
        help="Most MiB of a rebuilt bucket.",
    ),
    click.option(
        "--start-psn",
        type=click.IntRange(0, 2**24 - 1),
        default=0,
        show_default=True,
        help="First packet sequence number.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**20), default=1, show_default=True, help="Of model and data."),
    click.option(
        "--resume",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Go on after the state in this torch file, as a new attempt of its run.",
    ),
    click.option(
        "--attempt",
        type=click.IntRange(min=2),
        help="Number of the attempt that --resume begins; default: one more than the newest that the state knows of.",
    ),
    click.option(
        "--snapshot-iterations",
        type=click.IntRange(min=1),
        metavar="N",
        help="For the plan: take a snapshot of the checkpoint directory every N iterations.",
    ),
]


def _job_options(function: Any) -> Any:
    """Give a command the options of a job."""
    for option in reversed(_JOB):
        function = option(function)
    return function


@main.command()
@_job_options
@click.option(
    "--links", callback=_links, metavar="N,N..", help="Mirrored links; default: 0 and ranks-1, both sides of rank 0."
)
@click.option("--startup/--no-startup", default=True, show_default=True, help="Record the job's start-up collectives.")
@click.option(
    "--hook/--no-hook",
    default=False,
    show_default=True,
    help="Have the training hook write the plan and send step records; else the plan is written from what was seen.",
)
@debug_option
def record(mtu: str, ip: str, **options: Any) -> None:
    """Train on several ranks of one machine; leave captures, plan and the trainer's own states.

    \b
    Example:
      flowcheck-workload record --ranks 4 --iterations 20 --out recording
      flowcheck replay recording/plan.json --stream link-0=recording/link-0.pcapng \\
          --stream link-3=recording/link-3.pcapng --out checkpoints
    """
    from flowcheck.tables import step_progress
    from workload_gen.record import Recording
    from workload_gen.record import record as run

    recording = _usable(Recording(mtu=int(mtu), ip=int(ip), **options))
    with step_progress() as progress:
        run(recording, lambda done, total: progress("iterations", done, total))


def _usable(recording: Any) -> Any:
    """Return a job that the library version can have; a usage error else."""
    try:
        recording.layout()
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
    if recording.attempt and not recording.resume:
        raise click.UsageError("--attempt goes with --resume: it numbers the attempt that goes on")
    return recording


_LIVE = {"ranks": 4, "protocol": "simple", "mtu": "4096", "ip": "4", "optimizer": "adamw", "parameters": 1_000_000}


@main.command(context_settings={"default_map": _LIVE})
@_job_options
@click.option(
    "--transport",
    type=click.Choice(["fabric", "in-process", "nccl"]),
    default="fabric",
    show_default=True,
    help="fabric: a network of this machine, which needs root; in-process: local sockets between the ranks; nccl: the "
    "cluster's network, under torchrun, one process a rank.",
)
@click.option(
    "--wire",
    type=click.Path(path_type=Path, dir_okay=False),
    help="nccl: JSON description of what is mirrored: layout, connections, streams (docs/plan.md).",
)
@click.option(
    "--network",
    "network_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON description of a network that stands; without it one is built for this job.",
)
@click.option(
    "--mirror", default="0", show_default=True, metavar="N,N..", callback=_links, help="Ranks whose ports are mirrored."
)
@click.option(
    "--shadow",
    "shadow_s",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds to wait for `flowcheck run` before training starts; 0: train at once.",
)
@click.option(
    "--hook/--no-hook",
    default=True,
    show_default=True,
    help="Train with the hook; without it nobody can shadow the job.",
)
@click.option(
    "--learn", is_flag=True, help="Say nothing of the library in the plan: the shadow learns the layout from the wire."
)
@click.option(
    "--permute",
    type=click.IntRange(min=0),
    metavar="SEED",
    help="Cut messages as no library does, drawn by lot: only a learned layout can follow that.",
)
@click.option(
    "--truth",
    type=click.Choice(["states", "digests", "none"]),
    default="digests",
    show_default=True,
    help="What is kept of every iteration to hold checkpoints against.",
)
@click.option(
    "--full-state-every",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Save the whole state after every so many iterations, for the shadow to go on from after a loss; 0: never.",
)
@debug_option
def train(
    mtu: str, ip: str, transport: str, wire: Path | None, network_path: Path | None, mirror: tuple[int, ...], shadow_s: float,
    **options: Any,
) -> None:  # fmt: skip
    """Train live, over a mirrored network of this machine or a cluster's own; the plan for `flowcheck run` is written first.

    \b
    Examples:
      flowcheck-workload train --out job &
      flowcheck run job/plan.json --out checkpoints
      torchrun --nproc-per-node 1 --nnodes 4 .. --no-python flowcheck-workload train --transport nccl --wire wire.json --out /shared/job
    """
    import contextlib
    from dataclasses import replace

    from flowcheck.tables import step_progress
    from workload_gen.fabric import Fabric, Network
    from workload_gen.record import Recording
    from workload_gen.record import record as run

    recording = _usable(Recording(mtu=int(mtu), ip=int(ip), steps=True, shadow_s=shadow_s, **options))
    if (transport == "nccl") != (wire is not None):
        raise click.UsageError("--wire goes with --transport nccl, and that needs it")
    if transport == "nccl":
        from workload_gen import launched

        with step_progress() as progress:
            launched.train(recording, wire, lambda done: progress("iterations", done, recording.iterations))
        return
    if recording.permute is not None and recording.hook and not recording.learn:
        raise click.UsageError("--permute needs --learn: no layout that is computed has such messages")
    if any(not 0 <= rank < recording.ranks for rank in mirror):
        raise click.UsageError(f"--mirror {mirror}: there are ranks 0 to {recording.ranks - 1}")
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(step_progress())
        if network_path is not None:
            network = Network.load(network_path)
        elif transport == "in-process":
            from workload_gen.switch import Switch

            network = stack.enter_context(Switch(recording.ranks, mirror)).network
        else:
            network = stack.enter_context(Fabric(recording.ranks, mirror)).network
        click.echo(f"transport: {network.transport}", err=True)
        if recording.hook and shadow_s:
            click.echo(f"plan: {recording.out / 'plan.json'}; to shadow: flowcheck run PLAN --out DIR", err=True)
        run(replace(recording, network=network), lambda done, total: progress("iterations", done, total))


@main.command()
@click.argument("capture", type=click.Path(path_type=Path))
@click.option("--interface", required=True, metavar="IF", help="Where the frames leave.")
@click.option(
    "--gbps",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="At most so many Gbit/s of frames.",
)
@json_option
@debug_option
def send(capture: Path, interface: str, gbps: float, as_json: bool) -> None:
    """Play a capture file onto an interface, as a mirror port would.

    \b
    Example:
      flowcheck-workload send link-0.pcapng --interface veth0
    """
    from dataclasses import asdict

    from workload_gen.send import send as run

    sent = run(capture, interface, gbps)
    if as_json:
        print_json(asdict(sent))
    else:
        click.echo(f"{sent.frames} frames, {sent.bytes} bytes sent through {interface} in {sent.seconds:.2f} s")
