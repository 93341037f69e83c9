# SPDX-License-Identifier: MIT
"""The learner as a process of its own, beside the dumps of a job whose layout is yet to be learned.

`flowcheck run` starts it. It reads the rings and moves none of their cursors: what it has seen is parsed later.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flowcheck.options import Command, command_settings, debug_option
from flowcheck.stage import tell_ready, wait_for, wait_option

if TYPE_CHECKING:
    from flowcheck.plan import Job

__all__ = ["main"]

_LOOK_S = 0.02
#: A pass is over when nothing has come for so long: the trainers wait for the answer.
_QUIET_S = 0.3


@click.command(cls=Command, context_settings=command_settings)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--ring", "ring_paths", required=True, multiple=True, type=click.Path(path_type=Path), help="Of each stream."
)
@wait_option
@debug_option
def main(plan: Path, ring_paths: tuple[Path, ...], patience_s: float) -> None:
    """Learn a job's layout from the frames of the patterns that passes.json, beside the plan, lists; answer in learned.json."""
    from contextlib import ExitStack, closing

    from flowcheck import privileges
    from flowcheck.errors import LearningError
    from flowcheck.files import write_private
    from flowcheck.learning import Pass
    from flowcheck.plan import load
    from flowcheck.ring import PacketRing
    from flowcheck.run_folder import LEARNED, PASSES
    from packet_parser.learn import Learner

    job = load(plan, incomplete=True)
    layout, identity = job.shard.layout, job.identity()
    links = {link for stream in job.shard.streams for link in stream.links}
    with ExitStack() as stack:
        rings = [
            stack.enter_context(wait_for(path, lambda path=path: PacketRing.open(path, identity), patience_s))
            for path in ring_paths
        ]
        learner = stack.enter_context(closing(Learner(layout.ring, layout.mtu, links, layout.link_gbps)))
        privileges.drop()
        tell_ready()
        taken, answered, heard = [0] * len(rings), 0, time.monotonic()
        while True:
            ends = [learner.add_ring(ring, begin) for ring, begin in zip(rings, taken, strict=True)]
            if ends != taken:
                taken, heard = ends, time.monotonic()
            asked = _asked(plan.parent / PASSES, job.job)
            if len(asked) > answered and time.monotonic() - heard > _QUIET_S:
                whose = {"run_id": job.job.run_id, "attempt": job.job.attempt}
                answer: dict[str, Any] = {**whose, "passes": len(asked)}
                try:
                    answer["learned"] = asdict(learner.learn([Pass.of(document) for document in asked]))
                except LearningError as error:
                    full = [ring.stream for ring in rings if ring.written - ring.extracted >= ring.records]
                    answer["error"] = f"the ring of stream {full[0]} is full; {error}" if full else str(error)
                write_private(plan.parent / LEARNED, json.dumps(answer).encode())
                answered = len(asked)
            time.sleep(_LOOK_S)


def _asked(path: Path, job: Job) -> list[dict[str, Any]]:
    """Return the passes that the trainers of this very attempt have reduced so far."""
    try:
        found = json.loads(path.read_text())
        return found["passes"] if (found["run_id"], found["attempt"]) == (job.run_id, job.attempt) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
