# SPDX-License-Identifier: MIT
"""What a person sees: tables on stdout, progress bars on stderr when it is a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flowcheck.verdicts import COUNTERS

__all__ = [
    "frame_progress",
    "live_status",
    "print_demo",
    "print_difference",
    "print_faults",
    "print_flows",
    "print_iterations",
    "print_size",
    "print_status",
    "print_verification",
    "step_progress",
]


#: Texts are printed as they are: else `:100:` in an address would be drawn as an emoji, and `[a]` in a path left out.
_PLAIN = {"markup": False, "emoji": False}


def _console() -> Console:
    """Return stdout as a console; a file or a pipe has no width, and gets every column whole."""
    console = Console(**_PLAIN)
    return console if console.is_terminal else Console(width=200, **_PLAIN)


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextlib.contextmanager
def frame_progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (frames done, frames in all) that draws a bar."""
    with _bar() as bar:
        task = bar.add_task("frames", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def step_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (what, done, in all) that draws one bar per `what`."""
    with _bar() as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show


def _ranges(ranges: list[list[int]], most: int = 3) -> str:
    text = ", ".join(f"{begin}-{end}" for begin, end in ranges[:most])
    return text + (f" and {len(ranges) - most} more" if len(ranges) > most else "")


def _by_sources(row: dict[str, Any]) -> str:
    return "" if row["sources"] is None else " / ".join(map(str, row["sources"]))


def print_faults(report: dict[str, Any]) -> None:
    """Print the document of `faults`."""
    console = _console()
    table = Table(title=f"fault campaign, seed {report['seed']}, {report['seconds']} s")
    columns = ("cases", "iterations", "committed", "repaired", "waiting", "incomplete", "unseen")
    promises = ("wrong", "unrepaired", "untrue_ranges", "unlisted", "unaccounted")
    table.add_column("fault")
    for name in (*columns, *promises):
        table.add_column(name.replace("_", " "), justify="right")
    for fault in report["faults"]:
        table.add_row(fault["name"], *(str(fault[name]) for name in (*columns, *promises)))
    console.print(table)
    for point in report["loss"]:
        console.print(
            f"{point['streams']} streams, loss {point['loss']:g}: {point['unrepairable']} of {point['iterations']} iterations not "
            f"repaired, {100 * point['low']:.2f} to {100 * point['high']:.2f} %, computed {100 * point['formula']:.2f} %"
        )
    verdict = (
        "no promise was broken"
        if not any(fault[name] for fault in report["faults"] for name in promises)
        else "PROMISES BROKEN"
    )
    console.print(f"{report['iterations']} iterations: {verdict}")


def print_iterations(report: dict[str, Any]) -> None:
    """Print the document of `list` or `replay`."""
    console = _console()
    table = Table(title=f"run {report['run_id']}, attempt {report['attempt']}")
    for name in (
        "attempt",
        "iteration",
        "state",
        "bytes",
        "placed",
        "over 0 / 1 / 2 / 3+ edges",
        "missing bytes",
        "reason",
    ):
        table.add_column(name, justify="right" if name in ("iteration", "bytes", "placed") else "left")
    for row in report["iterations"]:
        cells = (
            row["attempt"],
            row["iteration"],
            row["state"],
            row["bytes"],
            row["placed_bytes"],
            _by_sources(row),
            _ranges(row["missing"]),
            row["reason"] or "",
        )
        table.add_row(*map(str, cells))
    console.print(table)
    console.print(
        f"snapshots: {', '.join(map(str, report['snapshots'])) or 'none'}; bit exact: {'yes' if report['bit_exact'] else 'no'}"
    )
    alone = report["revisions"][-1]["single_source"]
    if alone:
        edges = sorted({part["edge"] for part in alone})
        size = sum(part["range"][1] - part["range"][0] for part in alone)
        console.print(
            f"{size} bytes of a gradient are on one mirrored edge alone (edge {', '.join(map(str, edges))}): "
            "a frame of them that is lost costs its iteration"
        )
    if "packets" in report:
        counts = report["packets"]
        console.print("packets: " + ", ".join(f"{counts[name]} {name}" for name in COUNTERS if counts[name]))


def print_flows(report: dict[str, Any]) -> None:
    """Print the document of `inspect`."""
    console = _console()
    table = Table(title=str(report["capture"]))
    numbers = ("queue pair", "packets", "missing", "duplicates", "messages", "payload bytes", "mtu")
    for name in (
        "from",
        "to",
        "queue pair",
        "kind",
        "encoding",
        "packets",
        "psn",
        "missing",
        "duplicates",
        "messages",
        "payload bytes",
        "mtu",
    ):
        table.add_column(name, justify="right" if name in numbers else "left")
    for flow in report["flows"]:
        cells = (
            flow["src"], flow["dst"], flow["dest_qp"], flow["kind"], flow["encoding"], flow["packets"],
            f"{flow['psn_first']}-{flow['psn_last']}", flow["missing"], flow["duplicates"], flow["messages"],
            flow["payload_bytes"], flow["mtu"],
        )  # fmt: skip
        table.add_row(*map(str, cells))
    console.print(table)
    icrc = report["icrc"]
    console.print(
        f"{report['frames']} frames: {report['roce_frames']} RoCEv2, {report['other_frames']} other, "
        f"{report['malformed']} malformed; ICRC right on {icrc['ok']}, wrong on {icrc['bad']}"
    )
    for flow in report["flows"]:
        if "message_list" in flow:
            messages = Table(title=f"{flow['src']} to {flow['dst']}, queue pair {flow['dest_qp']}")
            for name in ("psn", "packets", "bytes", "address", "immediate", "complete"):
                messages.add_column(name, justify="right")
            for row in flow["message_list"]:
                cells = (
                    row["psn"],
                    row["packets"],
                    row["bytes"],
                    hex(row["address"]),
                    row["immediate"],
                    row["complete"],
                )
                messages.add_row(*("" if cell is None else str(cell) for cell in cells))
            console.print(messages)


def print_verification(report: dict[str, Any]) -> None:
    """Print the document of `verify`."""
    console = _console()
    for problem in report["problems"]:
        console.print(f"{problem['file']}: {problem['what']}")
    state = "everything agrees" if report["ok"] else "NOT ALL IS WELL"
    if report["offered"]:
        offered = report["offered"]
        console.print(
            f"newest state without these files: flowcheck restore DIR --iteration {offered['iteration']} --attempt {offered['attempt']}"
        )
    console.print(
        f"{state}: {report['files']} files, {report['bytes']} bytes, proved to iteration {report['proved_to']}"
    )


def print_difference(report: dict[str, Any]) -> None:
    """Print the document of `diff`."""
    console = _console()
    if report["equal"]:
        console.print(f"equal: {report['tensors']} tensors, bit for bit")
        return
    table = Table(title=f"{len(report['different'])} of {report['tensors']} tensors differ")
    for name in ("tensor", "elements", "first index", "max ULP"):
        table.add_column(name)
    for row in report["different"]:
        table.add_row(row["name"], str(row["elements"]), str(row["first_index"]), str(row["max_ulp"]))
    console.print(table)


def _status_tables(report: dict[str, Any]) -> Group:
    head = (
        f"run {report['run_id']}: committed to iteration {report['last_committed']}, lag {report['lag']}, "
        f"{report['incomplete']} incomplete"
    )
    stages = Table("stage", "pid", "rate per s", "restarts", title=head, title_justify="left", min_width=len(head))
    for row in report["stages"]:
        stages.add_row(row["name"], str(row["pid"] or "-"), f"{row['rate']:.0f}", str(row["restarts"]))
    names = ("received", "placed", "duplicate", "bad_icrc", "unsynchronised", "dropped_ring_full", "missed_by_port")
    streams = Table("stream", "state", "ring used", *(name.replace("_", " ") for name in names))
    for row in report["streams"]:
        streams.add_row(row["name"], row["state"], f"{row['ring_used']:.1%}", *(str(row[name]) for name in names))
    return Group(stages, streams, *_losses(report))


def _losses(report: dict[str, Any]) -> list[str]:
    """Return in words what was lost, what waits since, and what brings it back."""
    lines = []
    for row in report["lost"]:
        what = f"missing bytes {_ranges(row['missing'])}" if row["missing"] else "no byte is missing"
        lines.append(f"LOST: iteration {row['iteration']}, reason {row['reason']}: {what}")
    if report["incomplete"] > len(report["lost"]):
        lines.insert(0, f"{report['incomplete'] - len(report['lost'])} lost iterations before these: flowcheck list")
    if report["waiting"]:
        first, last = report["waiting"]
        lines.append(
            f"WAITING: iterations {first} to {last} are whole and logged, but the state before them is not known. A base brings "
            f"them back, a full state of iteration {first - 1} or later: flowcheck rebase DIR STATE, or the next one that the "
            "trainer saves for the shadow."
        )
    return lines


def print_status(report: dict[str, Any]) -> None:
    """Print the document of `status`."""
    _console().print(_status_tables(report))


def _status_line(report: dict[str, Any]) -> str:
    packets = report["packets"]
    lost = packets["dropped_ring_full"] + packets["missed_by_port"]
    down = [row["name"] for row in report["stages"] if row["pid"] is None]
    volatile = f"VOLATILE from {report['volatile'][0]} on, " if report["volatile"] else ""
    waiting = ""
    if report["waiting"]:
        first, last = report["waiting"]
        # Of many losses only the newest are in the report.
        cause = [row for row in report["lost"] if row["iteration"] < first][-1:]
        since = "".join(f" since {row['iteration']} was lost ({row['reason']})" for row in cause)
        waiting = f"WAITING {first} to {last} for a base{since}, "
    return (
        f"{volatile}committed {report['last_committed']}, lag {report['lag']}, incomplete {report['incomplete']}, {waiting}"
        f"received {packets['received']}, lost {lost}, streams "
        + ", ".join(f"{row['name']} {row['state']}" for row in report["streams"])
        + (f", not running: {', '.join(down)}" if down else "")
    )


@contextlib.contextmanager
def live_status(every_s: float = 5.0) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[str], None]]]:
    """Yield (show, say) for a live run: one table that is drawn anew on a terminal, else a line every `every_s` seconds."""
    console = Console(stderr=True, **_PLAIN)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield (lambda report: live.update(_status_tables(report), refresh=True)), live.console.print
        return
    last = 0.0

    def show(report: dict[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last >= every_s:
            last = time.monotonic()
            print(_status_line(report), file=sys.stderr, flush=True)

    yield show, lambda line: print(line, file=sys.stderr, flush=True)


def print_demo(report: dict[str, Any]) -> None:
    """Print the closing table of `demo`."""
    console = _console()
    table = Table(title="FlowCheck demonstration", show_header=False)
    words = {
        "transport": "transport", "ranks": "ranks", "iterations": "iterations trained", "killed_at": "training killed in iteration",
        "committed": "iterations committed", "incomplete": "iterations incomplete", "restored": "restored iteration",
        "bit_exact": "every committed state equals the trainer's, bit for bit",
        "resumed_equal": "the resumed run ends with the bits of one never stopped",
        "max_lag": "most iterations behind", "frames": "frames captured", "bytes": "bytes mirrored",
        "step_ms": "median step, ms, all stages on the same machine", "step_ms_untouched": "median step, ms, nothing beside it",
    }  # fmt: skip
    for key, text in words.items():
        if key not in report:
            continue
        value = report[key]
        table.add_row(text, ("yes" if value else "NO") if isinstance(value, bool) else str(value))
    console.print(table)
    console.print(f"files: {report['dir']}", soft_wrap=True)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} PB"


def print_size(report: dict[str, Any]) -> None:
    """Print the document of `size`."""
    console = _console()
    streams = Table(
        "stream", "frames", "bytes", "Gbit/s", "packet ring", title="mirrored in an iteration", title_justify="left"
    )
    for row in report["streams"]:
        cells = f"{row['frames']:,}", _bytes(row["bytes"]), f"{row['gbps']:.3g}", _bytes(row["ring_bytes"])
        streams.add_row(row["name"], *cells)
    console.print(streams)
    memory, disk, job = report["memory"], report["disk"], report["job"]
    table = Table(show_header=False)
    between = report["iterations_between_losses"]
    rows = {
        "nodes, ports": f"{report['nodes']}, {report['ports']} of {report['port_gbps']} Gbit/s",
        "memory": ", ".join(f"{name} {_bytes(count)}" for name, count in memory.items()),
        "log, an iteration": _bytes(disk["log_per_iteration"]),
        "snapshot": f"{_bytes(disk['snapshot'])}, every {disk['snapshot_every']} iterations",
        "disk, an hour": _bytes(disk["per_hour"]),
        f"unrepairable iteration at a loss of {job['loss']:g}": f"{report['unrepairable']:.3g}",
        "iterations from one to the next": "-" if between is None else f"{between:,.4g}",
    }
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)
    fastest = max(row["gbps"] for row in report["streams"])
    if fastest > report["port_gbps"]:
        console.print(
            f"A link cannot carry this: {fastest:.3g} of {report['port_gbps']} Gbit/s; a step takes longer than said."
        )
