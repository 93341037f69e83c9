# SPDX-License-Identifier: MIT
"""Other people's tools on the same frames, where they are installed: tshark, scapy and dpkt parse, dpdk-testpmd receives."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.measure import Clock, Results, Sizes
from bench.stages import PAYLOADS, Rig, capture, drain, plan_of, poll_for

__all__ = ["PARSERS", "tools"]

#: Of the frames, what scapy and dpkt are given: they are slow, and have no start-up that would count.
_SHARE = 10
_TESTPMD_S = 0.5


def _tshark() -> Callable[[Path, int], int] | None:
    if shutil.which("tshark") is None:
        return None
    fields = ["-e", "infiniband.bth.destqp", "-e", "infiniband.bth.psn", "-e", "infiniband.invariant.crc"]

    def parse(path: Path, count: int) -> int:
        done = subprocess.run(["tshark", "-n", "-r", path, "-T", "fields", *fields], check=True, capture_output=True)
        return done.stdout.count(b"\n")

    return parse


def _scapy() -> Callable[[Path, int], int] | None:
    try:
        roce, utils = importlib.import_module("scapy.contrib.roce"), importlib.import_module("scapy.utils")
        importlib.import_module("scapy.layers.all")
    except ImportError:
        return None

    def parse(path: Path, count: int) -> int:
        with utils.PcapNgReader(str(path)) as frames:
            return sum(frame[roce.BTH].psn >= 0 for frame in itertools.islice(frames, count // _SHARE))

    return parse


def _dpkt() -> Callable[[Path, int], int] | None:
    try:
        dpkt = importlib.import_module("dpkt")
    except ImportError:
        return None

    def parse(path: Path, count: int) -> int:
        with open(path, "rb") as file:
            frames = itertools.islice(dpkt.pcapng.Reader(file), count // _SHARE)
            # It knows no BTH: the queue pair and the PSN are its second and third word.
            return sum(len(dpkt.ethernet.Ethernet(frame).data.data.data[4:12]) == 8 for _, frame in frames)

    return parse


#: By the end of the row's name.
PARSERS = {"tshark": _tshark, "scapy": _scapy, "dpkt": _dpkt}


def _receiving(frame_bytes: int, core: int) -> float | None:
    """Return how many frames of the null driver testpmd receives in a second, None if it is not installed."""
    if shutil.which("dpdk-testpmd") is None or shutil.which("stdbuf") is None:
        return None
    # Of its two threads the first only waits.
    command = [
        "stdbuf", "-oL", "dpdk-testpmd", "--no-huge", "-m", "256", "--no-shconf", "--no-pci", "--no-telemetry",
        "--file-prefix", f"flowcheck-bench{os.getpid()}", "--lcores", f"0@{core},1@{core}",
        "--vdev", f"net_null0,size={frame_bytes}",
        "--", "--forward-mode=rxonly", "--total-num-mbufs=2048", "--mbuf-size=9728",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pmd:
        for line in pmd.stdout:
            if "Press enter" in line:
                break
        begin = time.perf_counter()
        time.sleep(_TESTPMD_S)
        pmd.stdin.write("\n")
        pmd.stdin.flush()
        taken = time.perf_counter() - begin
        received = [int(number) for number in re.findall(r"RX-packets: (\d+)", pmd.stdout.read())]
    if not received:
        raise RuntimeError(f"testpmd received nothing: {' '.join(command)}")
    return max(received) / taken


def tools(results: Results, sizes: Sizes, folder: Path, eal: object, core: int) -> None:
    """Measure file to annotated ring beside each tool that parses, and the dump from the null driver beside testpmd."""
    path = folder / "capture"
    data_bytes = sizes.tool_frames // 2 * PAYLOADS[0]
    plan = plan_of(capture(path, "simple", PAYLOADS[0], data_bytes), data_bytes, ["a"])
    parsers = {name: find() for name, find in PARSERS.items()}
    absent = [name for name, parse in parsers.items() if parse is None]
    parsers = {name: parse for name, parse in parsers.items() if parse is not None}
    clock, rates = Clock(sizes), []
    with Rig(folder, eal, path, plan) as rig:
        counts: dict[str, int] = {}
        rig.fill()
        largest = rig.largest_frame()
        for turn in clock.turns():
            rig.restart()
            with rig.dump() as dump:
                stages = (dump, rig.parser())
                clock("parse", lambda stages=stages: drain(*stages))
            for name, parse in parsers.items():

                def call(name: str = name, parse: Any = parse) -> None:
                    counts[name] = parse(path, rig.frames)
                    assert counts[name] in (rig.frames, rig.frames // _SHARE), f"{name} found {counts[name]} packets"

                clock(name, call)
            rig.restart()
            with rig.null_dump(largest) as dump:
                clock("null", lambda dump=dump: poll_for(dump, rig.rings[0].records))
            rate = _receiving(largest, core)
            if rate is None:
                absent += ["dpdk-testpmd"] if not turn else []
            elif turn >= sizes.warm_up:
                rates.append(1 / rate)
    path.unlink()
    if absent:
        print(f"not installed, so not measured: {', '.join(absent)}", file=sys.stderr)
    for name in parsers:
        results.add(
            f"parse_against_{name}", "frames/s", rig.frames, clock.times["parse"], name, counts[name], clock.times[name], packets=rig.frames
        )  # fmt: skip
    if rates:
        records = rig.rings[0].records
        results.add(
            "dump_against_testpmd",
            "frames/s",
            records,
            clock.times["null"],
            "dpdk-testpmd, rxonly",
            1,
            rates,
            packets=records,
        )
