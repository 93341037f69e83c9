# SPDX-License-Identifier: MIT
"""The whole pipeline over capture files, in one thread of one process.

The stages are the very ones that run as processes of their own: here they are polled in turn, each doing one burst.
Rings and slots live in a temporary folder that goes away with the call; what stays is the checkpoint directory.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flowcheck import plan as plans
from flowcheck.errors import ConfigError, FlowCheckError
from flowcheck.layout import compile_programs
from flowcheck.ring import PacketRing
from flowcheck.waiting import AdaptiveWait

__all__ = ["replay"]

Progress = Callable[[int, int], None]


def _check_streams(plan: plans.Plan, captures: dict[str, Path]) -> None:
    wanted = [stream.name for stream in plan.shard.streams]
    for name in captures:
        plan.shard.stream(name)
    absent = [name for name in wanted if name not in captures]
    if absent:
        raise ConfigError(f"stream {absent[0]!r} of the plan has no capture: give --stream {absent[0]}=CAPTURE")


def _keys(plan: plans.Plan, stream: str) -> list[tuple[bytes, bytes, int]]:
    """Return (source, destination, queue pair) of every data flow that a stream of the plan can show."""
    programs = compile_programs(plan)
    shown = plan.shard.stream_connections(stream)
    return [(programs[i].source, programs[i].destination, qp) for i in shown for qp in programs[i].data_queue_pairs]


def replay(
    plan_path: str | Path,
    captures: dict[str, str | Path],
    out: str | Path,
    *,
    keep_gradients: bool = False,
    dma: Iterable[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run captures through dump, parser, extractor and updater into checkpoint directory `out`.

    Args:
        plan_path: the job plan.
        captures: stream name to capture file; every stream of the plan needs one.
        out: the checkpoint directory, made if absent, gone on with if it is this job's.
        keep_gradients: remove nothing, whatever the plan's retention.
        dma: device arguments of DMA engines for all copies; none: the CPU copies.
        progress: called with (frames done, frames in all) now and then.

    Returns:
        The document of `replay --json` (commands.md).

    Raises:
        ConfigError: the plan, or a capture that carries nothing of it.
        CaptureError: a capture that cannot be read to its end; nothing has been written then.
    """
    plan = plans.load(plan_path)
    if keep_gradients:
        checkpoints = plan.checkpoints.model_copy(update={"retention": plans.Retention()})
        plan = plan.model_copy(update={"checkpoints": checkpoints})
    paths = {name: Path(path) for name, path in captures.items()}
    _check_streams(plan, paths)

    from data_extractor.extractor import Extractor
    from flowcheck._copy import CopyEngine
    from flowcheck.capture import validate
    from flowcheck.eal import Eal
    from flowcheck.slots import SlotFile
    from packet_dump.dump import FileDump
    from packet_parser.parser import Parser
    from updater.updater import Updater

    total = 0
    for name, path in paths.items():
        found = validate(path, _keys(plan, name))
        if found.frames and not found.matched:
            raise ConfigError(
                f"stream {name!r}: none of the {found.frames} frames of {path} belongs to a connection of its link(s) "
                f"{list(plan.shard.stream(name).links)}; compare `flowcheck inspect {path}` with the plan"
            )
        total += found.frames

    with contextlib.ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="flowcheck-replay-"))
        stack.callback(shutil.rmtree, scratch, True)
        eal = Eal.start()
        engine = stack.enter_context(contextlib.closing(CopyEngine(dma)))
        rings, dumps, parsers = [], [], []
        for stream in plan.shard.streams:
            ring = stack.enter_context(PacketRing.for_stream(scratch / f"{stream.name}.ring", plan, stream.name))
            rings.append(ring)
            dumps.append(stack.enter_context(contextlib.closing(FileDump(eal, paths[stream.name], ring, engine))))
            parsers.append(stack.enter_context(contextlib.closing(Parser(ring, plan, stream.name))))
        slots = stack.enter_context(SlotFile.for_plan(scratch / "slots", plan))
        extractor = stack.enter_context(contextlib.closing(Extractor(rings, plan, slots, engine)))
        updater = stack.enter_context(
            contextlib.closing(
                Updater(plan, slots, Path(out), plan_folder=Path(plan_path).parent, engine=engine, live=False)
            )
        )
        _run([*dumps, *parsers, extractor, updater], lambda: sum(ring.written for ring in rings), total, progress)
        packets = extractor.counters()
        _check_accounts(packets)
        updater.close()
    from updater.listing import listing

    return {**listing(out), "packets": packets}


def _run(stages: list[Any], written: Callable[[], int], total: int, progress: Progress | None) -> None:
    """Poll all stages in turn until each is finished."""
    wait = AdaptiveWait()
    shown = -1
    while True:
        done = sum(stage.poll() for stage in stages)
        if progress is not None and written() != shown:
            shown = written()
            progress(shown, total)
        if done:
            wait.busy()
        elif all(stage.finished for stage in stages):
            return
        else:
            wait.idle()


def _check_accounts(packets: dict[str, Any]) -> None:
    """Raise if the verdicts do not add up to what was received: a defect of ours, never to pass silently."""
    from flowcheck.verdicts import COUNTERS

    judged = sum(packets[name] for name in COUNTERS if name not in ("received", "missed_by_port"))
    if judged != packets["received"]:
        raise FlowCheckError(
            f"{packets['received']} frames were received, but {judged} are accounted for; please report this"
        )
