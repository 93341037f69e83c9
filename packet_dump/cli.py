# SPDX-License-Identifier: MIT
"""`flowcheck-dump`: the dump as a process of its own."""

from __future__ import annotations

from pathlib import Path

import click

from flowcheck.options import Command, command_settings, debug_option, json_option, print_json, version_option
from flowcheck.ring import ITERATIONS_HELD
from flowcheck.stage import busy_option, run

__all__ = ["main"]


@click.command(cls=Command, context_settings=command_settings)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--stream", required=True, metavar="NAME", help="The plan's name of the stream.")
@click.option("--capture", type=click.Path(path_type=Path), help="Dump this pcap or pcapng file.")
@click.option("--interface", metavar="IF", help="Dump this interface of the kernel, by DPDK's af_packet driver.")
@click.option("--port", metavar="DEVARGS", help="Dump this DPDK port, e.g. 0000:81:00.0.")
@click.option(
    "--ring",
    "ring_path",
    required=True,
    type=click.Path(path_type=Path),
    help="The packet ring; gone on with if it exists.",
)
@click.option(
    "--records",
    type=click.IntRange(min=2),
    help="Records of a new ring, a power of two; default: two iterations, at least 16 MiB.",
)
@click.option("--dma", multiple=True, metavar="DEVARGS", help="Copy with this DMA engine; several share the work.")
@click.option("--eal", default="", metavar="ARGUMENTS", help="Further arguments for DPDK's EAL.")
@busy_option
@json_option
@version_option
@debug_option
def main(
    plan: Path, stream: str, capture: Path | None, interface: str | None, port: str | None, ring_path: Path, records: int | None,
    dma: tuple[str, ...], eal: str, busy: bool, as_json: bool,
) -> None:  # fmt: skip
    """Put the frames of a capture file, an interface or a DPDK port into a packet ring.

    Without --capture, --interface and --port it dumps what the plan names for the stream.

    \b
    Examples:
      flowcheck-dump plan.json --stream link-0 --capture link-0.pcapng --ring /dev/shm/link-0.ring
      flowcheck-dump plan.json --stream link-0 --interface mon0 --ring /dev/shm/link-0.ring
    """
    if sum(source is not None for source in (capture, interface, port)) > 1:
        raise click.UsageError("give one of --capture, --interface and --port")
    from contextlib import closing

    from flowcheck._copy import CopyEngine

    from flowcheck import interfaces, privileges
    from flowcheck.capture import validate
    from flowcheck.eal import Eal
    from flowcheck.errors import ConfigError
    from flowcheck.layout import frames_per_iteration
    from flowcheck.mapped import populate
    from flowcheck.plan import load
    from flowcheck.ring import PacketRing
    from packet_dump.dump import FileDump, InterfaceDump, PortDump

    job = load(plan, incomplete=True)
    entry = job.shard.stream(stream)
    if capture is None and interface is None and port is None:
        interface, port = entry.interface, entry.port
        if interface is None and port is None:
            raise ConfigError(
                f"{plan}: stream {stream!r} names neither interface nor port; give --capture, --interface or --port"
            )
    if capture is not None:
        validate(capture)  # before anything is made
    elif interface is not None:
        interfaces.check(interface)
    environment = Eal.start(eal)
    with PacketRing.for_stream(ring_path, job, stream, records) as ring, closing(CopyEngine(dma)) as engine:
        populate(ring.memory)
        if capture is not None:
            dump = FileDump(environment, capture, ring, engine)
        elif interface is not None:
            frames = ITERATIONS_HELD * frames_per_iteration(job, stream)
            dump = InterfaceDump(environment, interface, ring, engine, frames=frames)
        else:
            dump = PortDump(environment, port, ring, engine)
        with closing(dump):
            privileges.drop()
            run(dump, busy=busy, on_signal=None if capture else dump.stop)
            report = {"stream": stream, **dump.counters()}
    if as_json:
        print_json(report)
    else:
        click.echo(", ".join(f"{name} {value}" for name, value in report.items()))
