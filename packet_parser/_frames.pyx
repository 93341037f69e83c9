# SPDX-License-Identifier: MIT
"""Decodes one frame for people and tests: the same decoder as the stages', with its fields as Python values.

Knows nothing about flows or plans.
"""

from flowcheck._wire cimport (
    FC_HAS_AETH, FC_HAS_ATOMIC, FC_HAS_ATOMIC_ACK, FC_HAS_IMMEDIATE, FC_HAS_INVALIDATE, FC_HAS_RETH, FC_WIRE_NOT_ROCE,
    FC_WIRE_OK, fc_crc32, fc_decode, fc_icrc_right, fc_icrc_select, fc_wire)

from packet_parser.reasons import RESULTS

__all__ = ["crc32", "decode", "select_kernel"]


def decode(const unsigned char[::1] frame not None):
    """decode(frame) -> dict: the fields of a RoCEv2 frame, `{"result": "ok", ...}`.

    A frame that is not RoCEv2 gives only `{"result": "not_roce"}`, a malformed one only its result's name.
    `immediate` is the number in network byte order; headers that the opcode does not have are None.
    """
    cdef fc_wire wire
    cdef int result
    if frame.shape[0] == 0:
        return {"result": "cut"}
    result = fc_decode(&frame[0], <unsigned int> frame.shape[0], &wire)
    if result != FC_WIRE_OK:
        return {"result": RESULTS[result]}
    has = wire.has
    remote = has & (FC_HAS_RETH | FC_HAS_ATOMIC)
    return {
        "result": "ok",
        "source": bytes(wire.source[:16]),
        "destination": bytes(wire.destination[:16]),
        "ip_version": wire.ip_version,
        "source_port": wire.source_port,
        "opcode": wire.opcode,
        "dest_qp": wire.dest_qp,
        "psn": wire.psn,
        "ack_request": bool(wire.ack_request),
        "pad": wire.pad,
        "va": wire.va if remote else None,
        "rkey": wire.rkey if remote or has & FC_HAS_INVALIDATE else None,
        "dma_length": wire.dma_length if has & FC_HAS_RETH else None,
        "immediate": wire.immediate if has & FC_HAS_IMMEDIATE else None,
        "aeth": wire.aeth if has & FC_HAS_AETH else None,
        "atomic_data": wire.atomic_data if has & (FC_HAS_ATOMIC | FC_HAS_ATOMIC_ACK) else None,
        "atomic_compare": wire.atomic_compare if has & FC_HAS_ATOMIC else None,
        "payload": bytes(frame[wire.payload_offset:wire.payload_offset + wire.payload_length]),
        "length": wire.length,
        "icrc_right": bool(fc_icrc_right(&frame[0], &wire)),
    }


def crc32(const unsigned char[::1] data not None):
    """crc32(data) -> int: the CRC-32 of `data`, by the kernel in use."""
    return ~fc_crc32(0xFFFFFFFF, &data[0] if data.shape[0] else NULL, data.shape[0]) & 0xFFFFFFFF


def select_kernel(name):
    """select_kernel(name) -> bool: use a kernel ("tables", "folding", "wide", or "best") in this module; False where the CPU lacks it."""
    return bool(fc_icrc_select(("best", "tables", "folding", "wide").index(name) - 1))
