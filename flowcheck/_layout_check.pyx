# SPDX-License-Identifier: MIT
"""Offsets and sizes of the C structs, for the test that holds them against numpy and the documents."""

from flowcheck._formats cimport fc_extract_state, fc_dump_state, fc_parse_counts, fc_identity, fc_record, fc_ring_header, fc_row, fc_segment, fc_slot, fc_slots_header

cdef fc_record record
cdef fc_ring_header ring
cdef fc_slots_header slots
cdef fc_slot slot
cdef fc_row row
cdef fc_segment segment
cdef fc_identity identity
cdef fc_dump_state dump
cdef fc_extract_state extract
cdef fc_parse_counts counts


def layout() -> dict:
    """Return per struct its size and the offset of chosen fields, as the C compiler lays them out."""
    return {
        "RECORD": (sizeof(fc_record), {
            "timestamp_ns": <char *> &record.timestamp_ns - <char *> &record,
            "verdict": <char *> &record.verdict - <char *> &record,
            "connection": <char *> &record.connection - <char *> &record,
            "iteration": <char *> &record.iteration - <char *> &record,
            "destination": <char *> &record.destination - <char *> &record,
            "flag": <char *> &record.flag - <char *> &record,
            "wire_offset": <char *> &record.wire_offset - <char *> &record,
            "settled_lag": <char *> &record.settled_lag - <char *> &record,
            "decision": <char *> &record.decision - <char *> &record,
        }),
        "RING_HEADER": (sizeof(fc_ring_header), {
            "records": <char *> &ring.records - <char *> &ring,
            "identity": <char *> &ring.identity - <char *> &ring,
            "stream": <char *> &ring.stream - <char *> &ring,
            "written": <char *> &ring.written - <char *> &ring,
            "parsed": <char *> &ring.parsed - <char *> &ring,
            "extracted": <char *> &ring.extracted - <char *> &ring,
            "ended": <char *> &ring.ended - <char *> &ring,
            "extract_state_bytes": <char *> &ring.extract_state_bytes - <char *> &ring,
        }),
        "SLOTS_HEADER": (sizeof(fc_slots_header), {
            "edges": <char *> &slots.edges - <char *> &slots,
            "gradient_bytes": <char *> &slots.gradient_bytes - <char *> &slots,
            "identity": <char *> &slots.identity - <char *> &slots,
            "settled_next": <char *> &slots.settled_next - <char *> &slots,
            "consumed_next": <char *> &slots.consumed_next - <char *> &slots,
            "ended": <char *> &slots.ended - <char *> &slots,
            "volatile_from": <char *> &slots.volatile_from - <char *> &slots,
        }),
        "SLOT": (sizeof(fc_slot), {
            "state": <char *> &slot.state - <char *> &slot,
            "done_units": <char *> &slot.done_units - <char *> &slot,
            "claim_offset": <char *> &slot.claim_offset - <char *> &slot,
            "data_bytes": <char *> &slot.data_bytes - <char *> &slot,
            "edges_offset": <char *> &slot.edges_offset - <char *> &slot,
            "source_bytes": <char *> &slot.source_bytes - <char *> &slot,
        }),
        "ROW": (sizeof(fc_row), {
            "message_bytes": <char *> &row.message_bytes - <char *> &row,
            "destination": <char *> &row.destination - <char *> &row,
            "iteration": <char *> &row.iteration - <char *> &row,
            "settled_lag": <char *> &row.settled_lag - <char *> &row,
        }),
        "SEGMENT": (sizeof(fc_segment), {
            "first_row": <char *> &segment.first_row - <char *> &segment,
            "period_iterations": <char *> &segment.period_iterations - <char *> &segment,
            "repeats": <char *> &segment.repeats - <char *> &segment,
        }),
        "IDENTITY": (sizeof(fc_identity), {
            "fingerprint": <char *> &identity.fingerprint - <char *> &identity,
            "attempt": <char *> &identity.attempt - <char *> &identity,
        }),
        "DUMP_STATE": (sizeof(fc_dump_state), {"engine_failed": <char *> &dump.engine_failed - <char *> &dump}),
        "PARSE_COUNTS": (sizeof(fc_parse_counts), {"reasons": <char *> &counts.reasons - <char *> &counts}),
        "EXTRACT_STATE": (sizeof(fc_extract_state), {"settled": <char *> &extract.settled - <char *> &extract}),
    }
