# SPDX-License-Identifier: MIT
"""The names of what the decoder and the parser can find wrong, as they appear in counters and messages.

The number of a decoder's result is its place in `RESULTS`; the C side is the enum in `flowcheck/_wire.pxd`. The number
of a parser's reason is its place in `REASONS`; the C side is the enum in `packet_parser/_parser.pyx`.
"""

from __future__ import annotations

__all__ = ["REASONS", "RESULTS"]

#: What `fc_decode` returns. From "cut" on the frame is malformed.
RESULTS = (
    "ok",
    "not_roce",
    "cut",
    "ip_version",
    "ip_length",
    "ip_extensions",
    "fragment",
    "udp_length",
    "bth",
    "headers",
    "pad",
    "payload",
    "dma_length",
)

#: Why a packet of the plan's data queue pairs is `unsynchronised`.
REASONS = (
    "unproved",  # no packet of the flow has proved the flow's position since the start or the last contradiction
    "position",  # before the start or after the end of the layout
    "opcode",  # another opcode than the layout has there
    "length",  # another payload length or RETH length than the layout has there
    "immediate",  # another immediate than the layout has there
    "flag",  # the first line's flag is not that of the layout's step
    "address",  # the RETH does not lie in the slot of the layout's step
    "credit_tag",  # a credit of the connection named another rank as the sender of its data
    "earlier_attempt",  # further than the attempt can have come when its ring begins: of an earlier one's queue pair
)
