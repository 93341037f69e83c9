# SPDX-License-Identifier: MIT
"""The parser stage: annotates the records of a stream's packet ring by the job plan.

Decodes every frame, checks its ICRC, follows the plan's data queue pairs by PSN, and writes into each record its verdict
and, for a payload whose place is proved, which iteration and which bytes of the slot it is. The ring holds all its
state: killed at any instruction and started again, it goes on with the same bits and counters.
"""

from __future__ import annotations

from flowcheck.errors import ConfigError
from flowcheck.layout import compile_programs
from flowcheck.plan import Plan
from flowcheck.ring import PacketRing
from packet_parser._parser import RingParser

__all__ = ["Parser"]


class Parser(RingParser):
    """A parser of one stream: `poll()` until `finished`, then `close()`; one thread.

    Args:
        ring: the stream's ring, open; this object alone moves its `parsed` cursor.
        plan: the job plan.
        stream: name of the stream in the plan.
        direction: `inbound`, `outbound` or `both`, as seen from the stream's host; None: as the plan says.
        check_icrc: False only to measure what the check costs: what is then annotated must never be committed.

    Raises:
        ConfigError: the stream is not in the plan, is not the ring's, or a direction is asked for without the addresses of
            the mirrored host.
    """

    def __init__(
        self, ring: PacketRing, plan: Plan, stream: str, direction: str | None = None, *, check_icrc: bool = True
    ) -> None:
        shard = plan.shard
        entry = shard.stream(stream)
        direction = direction or entry.direction
        if ring.stream != stream:
            raise ConfigError(f"{ring.path}: the ring of stream {ring.stream!r}, expected that of {stream!r}")
        if direction != "both" and not entry.host:
            raise ConfigError(
                f"stream {stream!r}: direction {direction!r} needs the addresses of the mirrored host in its 'host'"
            )
        programs = compile_programs(plan)
        hosts = {address for program in programs for address in (program.source, program.destination)}
        shown = [program for program in programs if program.edge in entry.links]
        # A quarter of the sequence, at the rate of the link: beyond it, numbers may have come round unseen.
        silence_ns = 2**22 * shard.layout.mtu * 8 // shard.layout.link_gbps
        super().__init__(
            ring, shown, sorted(hosts), shard.layout.mtu, silence_ns, direction, entry.host_bytes, check_icrc
        )
