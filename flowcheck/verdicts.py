# SPDX-License-Identifier: MIT
"""The verdicts: every packet that a port received ends under exactly one of these names.

The number of a verdict is its place in `VERDICTS`; 0 in a ring record means that nobody has judged it yet. The C side
of the same numbers is `flowcheck/_formats.pxd`; a test holds the two together. The order is the order of precedence.
"""

from __future__ import annotations

__all__ = ["COUNTERS", "NO_VERDICT", "VERDICTS"]

NO_VERDICT = "undecided"

#: Index = number in ring records. From `placed` to `late`, with `dropped_ring_full`, they add up to `received`.
VERDICTS = (
    NO_VERDICT,
    "placed",  # at least one byte of the gradient that nobody had brought yet
    "duplicate",  # gradient bytes that were there already, and equal
    "partial_sum",  # a sum that is not final on this edge
    "step_record",  # the all-reduce that carries the step record
    "initial_state",  # the job's broadcast of its initial parameters
    "other_collective",  # an operation of the plan that carries nothing the shadow needs
    "control",  # acknowledgements, credits, congestion notifications, probes of the plan's connections
    "foreign",  # traffic that is not the plan's
    "malformed",  # a frame that lies about its lengths, is cut, or cannot be RoCEv2 as it claims
    "bad_icrc",  # the invariant checksum is wrong
    "unsynchronised",  # a packet of the plan's connections whose place is not proved
    "conflict",  # contradicts bytes already placed
    "late",  # of an iteration that was decided before the packet came
)

#: The keys of every `packets` document, in order (commands.md).
COUNTERS = ("received", *VERDICTS[1:], "dropped_ring_full", "missed_by_port")
