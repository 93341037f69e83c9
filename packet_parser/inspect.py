# SPDX-License-Identifier: MIT
"""What is in a capture: every RoCEv2 flow of a pcap or pcapng file, decoded; no plan is needed.

A flow is (source, destination, destination queue pair). A message is what the transport calls one: the packets from a
FIRST to its LAST, or an ONLY. Sequence numbers count on beyond 2^24. What the words mean here:

- kind `credit`: every request is a write of one packet of 32 or 64 bytes without immediate; `management`: queue pair 1,
  or no packet of a reliable connection; `data`: any other with requests; `other`: none but acknowledgements.
- encoding: `ll` if all lines of a message carry one flag in both flag words, `ll128` if all lines of 128 bytes end in one
  flag, else `plain`; `mixed` if messages differ; `none` for credits and where there is no payload.
- mtu: payload of FIRST and MIDDLE packets; without such, the largest payload if it is an MTU, else 0 (not seen).
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any

from flowcheck.errors import CaptureError
from packet_parser._inspect import Scan

__all__ = ["inspect"]

_ENCODINGS = {0: "none", 1: "ll", 2: "ll128", 4: "plain"}
_MANAGEMENT_QUEUE_PAIR = 1  # IBTA vol. 1, 3.9.6: QP1 is the general service interface
_MTUS = (256, 512, 1024, 2048, 4096)


def _text(address: bytes) -> str:
    value = ipaddress.IPv6Address(address)
    return str(value.ipv4_mapped or value)


def _kind(row: dict[str, Any]) -> str:
    if row["queue_pair"] == _MANAGEMENT_QUEUE_PAIR or (row["requests"] and not row["reliable"]):
        return "management"
    if not row["requests"]:
        return "other"
    return "credit" if row["credits"] == row["reliable"] - row["duplicates"] else "data"


def _flow(row: dict[str, Any]) -> dict[str, Any]:
    kind = _kind(row)
    flow = {
        "src": _text(row["source"]),
        "dst": _text(row["destination"]),
        "dest_qp": row["queue_pair"],
        "packets": row["packets"],
        "request_packets": row["requests"],
        "psn_first": row["first"],
        "psn_last": row["last"],
        "missing": row["missing"],
        "duplicates": row["duplicates"],
        "kind": kind,
        "encoding": _ENCODINGS.get(row["encodings"], "mixed") if kind == "data" else "none",
        "messages": row["messages"],
        "payload_bytes": row["payload"],
        "ip_version": row["ip_version"],
        "mtu": row["mtu"] or (row["largest"] if row["largest"] in _MTUS else 0),
    }
    if "list" in row:
        names = ("psn", "packets", "bytes", "address", "immediate", "complete")
        flow["message_list"] = [dict(zip(names, entry, strict=True)) for entry in row["list"]]
    return flow


def inspect(path: str | Path, messages: bool = False) -> dict[str, Any]:
    """Return the document of `inspect --json` (commands.md) for a capture file.

    Memory is bounded by the number of flows (at most 8,192) unless `messages` asks for a list of every message.
    CaptureError if the file cannot be read to its end, or has more flows.
    """
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise CaptureError(f"{path}: cannot read the capture: {error.strerror}", str(path)) from error
    scan = Scan(os.fsencode(path), messages)
    flows = [_flow(row) for row in scan.flows()]
    return {
        "capture": str(path),
        "frames": scan.frames,
        "roce_frames": scan.roce,
        "other_frames": scan.frames - scan.roce,
        "malformed": scan.malformed,
        "icrc": {"ok": scan.icrc_right, "bad": scan.icrc_wrong},
        "flows": sorted(flows, key=lambda flow: (flow["src"], flow["dst"], flow["dest_qp"])),
    }
