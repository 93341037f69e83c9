# SPDX-License-Identifier: MIT
"""The numpy side of the files that join the stages; `flowcheck/_formats.pxd` is the C side of the same bytes.

docs/ring-format.md and docs/slot-format.md draw them. Little-endian, naturally aligned, no hidden padding.
"""

from __future__ import annotations

import numpy as np

__all__ = [
    "DUMP_STATE",
    "EXTRACT_STATE",
    "IDENTITY",
    "PARSE_COUNTS",
    "RECORD",
    "RING_HEADER",
    "RING_MAGIC",
    "ROW",
    "SEGMENT",
    "SLOT",
    "SLOTS_HEADER",
    "SLOTS_MAGIC",
    "SLOTS_VERSION",
    "VERSION",
]

#: Of the packet ring, and of the slot file.
VERSION = 1
SLOTS_VERSION = 2
#: After PNG's: a byte above 127 and a line feed show a transfer that changed either.
RING_MAGIC = b"\x89FCRING\n"
SLOTS_MAGIC = b"\x89FCSLOT\n"

IDENTITY = np.dtype(
    [
        ("run_id", "S64"),
        ("fingerprint", "u1", 32),
        ("plan_digest", "u1", 16),
        ("attempt", "<u4"),
        ("world_size", "<u4"),
        ("reserved", "<u8"),
    ]
)

RECORD = np.dtype(
    [
        ("frame_length", "<u4"),
        ("stored_length", "<u4"),
        ("timestamp_ns", "<u8"),
        ("sequence", "<u8"),
        ("verdict", "u1"),
        ("encoding", "u1"),
        ("connection", "<u2"),
        ("payload_offset", "<u2"),
        ("payload_length", "<u2"),
        ("iteration", "<u4"),
        ("message_bytes", "<u4"),
        ("destination", "<u8"),
        ("flag", "<u8"),
        ("wire_offset", "<u4"),
        ("settled_lag", "u1"),
        ("decision", "u1"),
        ("last_pieces", "u1"),
        ("queue_pair", "u1"),
    ]
)

RING_HEADER = np.dtype(
    [
        ("magic", "V8"),
        ("version", "<u4"),
        ("header_bytes", "<u4"),
        ("record_bytes", "<u4"),
        ("live", "<u4"),
        ("records", "<u8"),
        ("created_ns", "<u8"),
        ("dump_state_offset", "<u4"),
        ("dump_state_bytes", "<u4"),
        ("parse_state_offset", "<u4"),
        ("parse_state_bytes", "<u4"),
        ("extract_state_offset", "<u4"),
        ("extract_state_bytes", "<u4"),
        ("identity", IDENTITY),
        ("stream", "S64"),
        ("written", "<u8"),
        ("pad_written", "<u8", 7),
        ("parsed", "<u8"),
        ("pad_parsed", "<u8", 7),
        ("extracted", "<u8"),
        ("pad_extracted", "<u8", 7),
        ("ended", "<u8"),
        ("pad_ended", "<u8", 7),
    ]
)

DUMP_STATE = np.dtype(
    [
        ("written", "<u8"),
        ("dropped_ring_full", "<u8"),
        ("missed_by_port", "<u8"),
        ("engine_bytes", "<u8"),
        ("engine_failed", "<u8"),
        ("interface_base", "<u8"),
    ]
)

PARSE_COUNTS = np.dtype(
    [
        ("parsed", "<u8"),
        ("verdicts", "<u8", 16),
        ("results", "<u8", 16),
        ("reasons", "<u8", 16),
    ]
)

EXTRACT_STATE = np.dtype(
    [
        ("extracted", "<u8"),
        ("counters", "<u8", 16),
        ("engine_bytes", "<u8"),
        ("engine_failed", "<u8"),
        ("highest_iteration", "<u8"),
        ("settled", "<u4", 64),
        ("reached", "<u4", 64),
        ("reaching", "<u4", 64),
        ("reached_pieces", "u1", 64),
    ]
)

SLOTS_HEADER = np.dtype(
    [
        ("magic", "V8"),
        ("version", "<u4"),
        ("header_bytes", "<u4"),
        ("slots", "<u4"),
        ("edges", "<u4"),
        ("gradient_bytes", "<u8"),
        ("initial_bytes", "<u8"),
        ("slot_bytes", "<u8"),
        ("created_ns", "<u8"),
        ("reserved1", "<u8"),
        ("identity", IDENTITY),
        ("settled_next", "<u8"),
        ("skipped_from", "<u8"),
        ("skipped_to", "<u8"),
        ("pad_settled", "<u8", 5),
        ("consumed_next", "<u8"),
        ("pad_consumed", "<u8", 7),
        ("ended", "<u8"),
        ("pad_ended", "<u8", 7),
        ("volatile_from", "<u8"),
        ("pad_volatile", "<u8", 7),
    ]
)

SLOT = np.dtype(
    [
        ("iteration", "<u8"),
        ("state", "<u8"),
        ("reason", "<u8"),
        ("units", "<u8"),
        ("done_units", "<u8"),
        ("conflicts", "<u8"),
        ("first_ns", "<u8"),
        ("last_ns", "<u8"),
        ("claim_offset", "<u8"),
        ("done_offset", "<u8"),
        ("data_offset", "<u8"),
        ("data_bytes", "<u8"),
        ("edges_offset", "<u8"),
        ("source_bytes", "<u8", 4),
        ("reserved", "<u8", 7),
    ]
)

SEGMENT = np.dtype(
    [
        ("first_psn", "<u8"),
        ("first_step", "<u8"),
        ("period_psn", "<u8"),
        ("period_steps", "<u8"),
        ("first_row", "<u4"),
        ("rows", "<u4"),
        ("first_iteration", "<u4"),
        ("period_iterations", "<u4"),
        ("repeats", "<u8"),
        ("first_message", "<u8"),
        ("period_messages", "<u8"),
    ]
)

ROW = np.dtype(
    [
        ("psn", "<u4"),
        ("packets", "<u4"),
        ("step", "<u4"),
        ("wire_bytes", "<u4"),
        ("message_wire_offset", "<u4"),
        ("message_bytes", "<u4"),
        ("destination", "<u8"),
        ("address_offset", "<u4"),
        ("message_wire_bytes", "<u4"),
        ("message", "<u4"),
        ("iteration", "<u2"),
        ("last_pieces", "u1"),
        ("verdict", "u1"),
        ("encoding", "u1"),
        ("bulk_split", "u1"),
        ("settled_lag", "u1"),
        ("reserved", "u1", 5),
    ]
)
