# SPDX-License-Identifier: MIT
"""What compressing logged gradients saves and costs: libraries and settings beside each other and beside the disk.

Gradients are real ones: the example GPT is trained, its packets are replayed, and the first and the last iteration's
reduced gradient are taken out of the log; or they are given as .npy files (`flowcheck gradient` writes them). Each is cut
into the log's blocks and packed and unpacked, every way in turn, and written and synced once in each turn. Packing is timed
in seconds of the processor, so what else runs hardly matters; writing by the clock. Values are medians over the turns.

`pays below` is the rate of a disk with which packing and writing the rest takes as long as writing all: C (1 - 1/R) for
C bytes/s packed at ratio R. `to the disk` is its ratio to what the disk took in the same turn: compressing on one core
saves time where that is above 1. Ways whose library is not there are left out: pip install 'flowcheck[bench]'.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from updater import compression
from updater.log_format import BLOCK_BYTES

LEAST_TURNS = 10


@dataclass(frozen=True)
class Way:
    """One way to pack a block of uint8 whose elements have so many bytes, and to unpack it into an array."""

    name: str
    pack: Callable[[np.ndarray, int], Any]
    unpack: Callable[[Any, int, np.ndarray], object]


def _planes(block: np.ndarray, width: int) -> np.ndarray:
    return np.ascontiguousarray(block[: block.size // width * width].reshape(-1, width).T)


def _from_planes(content: bytes, width: int, out: np.ndarray) -> None:
    elements = out[: out.size // width * width].reshape(-1, width)
    for place, plane in enumerate(np.frombuffer(content, np.uint8).reshape(width, -1)):
        elements[:, place] = plane


def product() -> list[Way]:
    """Return what the log uses; a block that it would not pack counts as it is."""

    def pack(block: np.ndarray, width: int) -> Any:
        packed = compression.compress(block, width)
        return block if packed is None else packed

    def unpack(packed: Any, width: int, out: np.ndarray) -> None:
        if isinstance(packed, np.ndarray):
            np.copyto(out, packed)
        else:
            compression.decompress(packed, out)

    return [Way("updater.compression", pack, unpack)]


def with_zstandard() -> list[Way]:
    """Return zstandard's levels, with and without planes of bytes."""
    ways = []
    zstandard = importlib.import_module("zstandard")
    reader = zstandard.ZstdDecompressor()
    for level in (-1, 1, 3):
        writer = zstandard.ZstdCompressor(level=level)
        ways += [
            Way(
                f"zstandard {level}",
                lambda block, width, writer=writer: writer.compress(block),
                lambda packed, width, out: np.copyto(out, np.frombuffer(reader.decompress(packed), np.uint8)),
            ),
            Way(
                f"zstandard {level}, bytes shuffled",
                lambda block, width, writer=writer: writer.compress(_planes(block, width)),
                lambda packed, width, out: _from_planes(reader.decompress(packed), width, out),
            ),
        ]
    return ways


def with_lz4() -> list[Way]:
    """Return lz4, with and without planes of bytes."""
    block_of = importlib.import_module("lz4.block")
    return [
        Way(
            "lz4",
            lambda block, width: block_of.compress(block),
            lambda packed, width, out: np.copyto(out, np.frombuffer(block_of.decompress(packed), np.uint8)),
        ),
        Way(
            "lz4, bytes shuffled",
            lambda block, width: block_of.compress(_planes(block, width)),
            lambda packed, width, out: _from_planes(block_of.decompress(packed), width, out),
        ),
    ]


def with_blosc2() -> list[Way]:
    """Return blosc2's LZ4 and zstd with each of its filters."""
    blosc2 = importlib.import_module("blosc2")
    filters = {"": "NOFILTER", ", bytes shuffled": "SHUFFLE", ", bits shuffled": "BITSHUFFLE"}
    return [
        Way(
            f"blosc2 {codec.lower()} {level}{words}",
            lambda block, width, codec=codec, level=level, filter_=filter_: blosc2.compress2(
                block, typesize=width, codec=blosc2.Codec[codec], clevel=level, filters=[blosc2.Filter[filter_]], nthreads=1
            ),
            lambda packed, width, out: blosc2.decompress2(packed, dst=out, nthreads=1),
        )
        for codec, level in (("LZ4", 1), ("LZ4", 5), ("ZSTD", 1))
        for words, filter_ in filters.items()
    ]  # fmt: skip


def with_numcodecs() -> list[Way]:
    """Return numcodecs' blosc with LZ4 and zstd, and each of its filters."""
    blosc = importlib.import_module("numcodecs.blosc")
    blosc.use_threads = False  # one core
    return [
        Way(
            f"numcodecs {codec} {level}{words}",
            lambda block, width, codec=codec, level=level, kind=kind: blosc.compress(
                block[: block.size // width * width].view(f"u{width}"), codec.encode(), level, kind
            ),
            lambda packed, width, out: blosc.decompress(packed, out),
        )
        for codec, level in (("lz4", 1), ("lz4", 5), ("zstd", 1))
        for words, kind in {"": 0, ", bytes shuffled": 1, ", bits shuffled": 2}.items()
    ]


def ways() -> list[Way]:
    """Return every way whose library is there."""
    found = product()
    for make in (with_zstandard, with_lz4, with_blosc2, with_numcodecs):
        try:
            found += make()
        except ImportError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return how long a call takes by a clock."""
    begin = clock()
    work()
    return clock() - begin


def blocks_of(gradient: np.ndarray) -> list[np.ndarray]:
    """Return a gradient's blocks as the log has them."""
    raw = gradient.reshape(-1).view(np.uint8)
    return [raw[at : at + BLOCK_BYTES] for at in range(0, raw.size, BLOCK_BYTES)]


class Disk:
    """A file that grows by a gradient each turn, as the log does."""

    def __init__(self, folder: Path) -> None:
        descriptor, name = tempfile.mkstemp(prefix="flowcheck-bench-", dir=folder)
        self._fd, self._path, self._end = descriptor, Path(name), 0

    def write(self, blocks: Sequence[np.ndarray]) -> None:
        """Append blocks and sync."""
        for block in blocks:
            self._end += os.pwrite(self._fd, block, self._end)
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Remove the file."""
        os.close(self._fd)
        self._path.unlink()


def measure(gradient: np.ndarray, chosen: Sequence[Way], turns: int, folder: Path) -> dict[str, Any]:
    """Return what every way made of a gradient, and what the disk took; bytes/s of the gradient, medians."""
    blocks, width = blocks_of(gradient), gradient.itemsize
    size, out = sum(block.size for block in blocks), np.empty(BLOCK_BYTES, np.uint8)
    times: dict[str, list[tuple[float, float]]] = {way.name: [] for way in chosen}
    sizes, written = {}, []
    disk = Disk(folder)
    try:
        for turn in range(turns + 1):  # the first warms up
            written.append(seconds(lambda: disk.write(blocks)))
            for place in range(len(chosen)):
                way = chosen[(place + turn) % len(chosen)]  # none is always the one after the disk
                packed: list[Any] = []
                to = seconds(
                    lambda way=way, packed=packed: packed.extend(way.pack(block, width) for block in blocks),
                    time.thread_time,
                )
                parts = list(zip(packed, blocks, strict=True))
                back = seconds(
                    lambda way=way, parts=parts: [way.unpack(one, width, out[: block.size]) for one, block in parts],
                    time.thread_time,
                )
                if not turn:
                    sizes[way.name] = sum(len(one) for one in packed)
                    for one, block in parts:
                        way.unpack(one, width, out[: block.size])
                        assert np.array_equal(out[: block.size], block), way.name
                times[way.name].append((to, back))
    finally:
        disk.close()
    rows = []
    for name, all_times in times.items():
        to, back = (np.array(column) for column in zip(*all_times[1:], strict=True))
        saved = 1 - sizes[name] / size
        rows.append(
            {
                "way": name, "ratio": size / sizes[name], "pack": size / float(np.median(to)),
                "unpack": size / float(np.median(back)), "pays_below": saved * size / float(np.median(to)),
                "to_disk": float(np.median(saved * np.array(written[1:]) / to)),
            }
        )  # fmt: skip
    return {"bytes": size, "width": width, "turns": turns, "disk": size / statistics.median(written[1:]), "rows": rows}


def shares(gradient: np.ndarray) -> list[float]:
    """Return the share that the log saves of each whole block, ascending; 0 of one that it would not pack."""
    whole = [block for block in blocks_of(gradient) if block.size == BLOCK_BYTES]
    packed = [compression.compress(block, gradient.itemsize) for block in whole]
    return sorted(0.0 if one is None else 1 - len(one) / BLOCK_BYTES for one in packed)


def train(sizes: Sequence[int], iterations: int, folder: Path) -> dict[str, np.ndarray]:
    """Train the example in float32 and bfloat16; return the first and the last reduced gradient of each."""
    from flowcheck.replay import replay  # what only a recording needs
    from updater.gradient import read_gradient
    from workload_gen.record import Recording, record

    found = {}
    for parameters in sizes:
        for dtype in ("float32", "bfloat16"):
            out = folder / f"{dtype}-{parameters}"
            record(
                Recording(
                    out=out, iterations=iterations, parameters=parameters, dtype=dtype, optimizer="adamw",
                    protocol="simple", mtu=4096,
                )
            )  # fmt: skip
            captures = {name: out / f"{name}.pcapng" for name in ("link-0", "link-1")}
            replay(out / "plan.json", captures, out / "checkpoints")
            for iteration in (1, iterations):
                name = f"{dtype}, {parameters} parameters, iteration {iteration}"
                found[name] = read_gradient(out / "checkpoints", iteration)
    return found


def show(name: str, found: dict[str, Any]) -> None:
    """Print one gradient's table."""
    title = f"{name}: {found['bytes'] / 1e6:.1f} MB; the disk took {found['disk'] / 1e9:.2f} GB/s"
    table = Table(title=title, title_justify="left")
    table.add_column("way")
    for column in ("ratio", "pack GB/s", "unpack GB/s", "pays below GB/s", "to the disk"):
        table.add_column(column, justify="right")
    for row in found["rows"]:
        rates = [f"{row[key] / 1e9:.2f}" for key in ("pack", "unpack")]
        table.add_row(
            row["way"], f"{row['ratio']:.3f}", *rates, f"{row['pays_below'] / 1e9:.3f}", f"{row['to_disk']:.2f}"
        )
    console = Console(width=120)
    console.print(table)
    if found["shares"]:
        low, high = found["shares"][0], found["shares"][-1]
        console.print(f"blocks: {len(found['shares'])}; packing saves {low:.1%} to {high:.1%} of each")


def main() -> None:
    """Measure, and print tables or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gradients", nargs="*", type=Path, help=".npy files; without any the example is trained.")
    parser.add_argument("--params", type=int, nargs="+", default=[300_000, 4_000_000], help="Of the example.")
    parser.add_argument("--iterations", type=int, default=24, help="Of the example.")
    parser.add_argument("--turns", type=int, default=LEAST_TURNS + 1)
    parser.add_argument("--disk", type=Path, default=Path("."), help="A folder on the disk that would hold the log.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.turns < LEAST_TURNS:
        parser.error(f"--turns {options.turns}: medians of fewer than {LEAST_TURNS} say too little")
    chosen = ways()
    if options.gradients:
        gradients = {path.name: np.load(path) for path in options.gradients}
    else:
        with tempfile.TemporaryDirectory(prefix="flowcheck-bench-") as folder:
            gradients = train(options.params, options.iterations, Path(folder))
    results = {}
    for name, gradient in gradients.items():
        results[name] = measure(gradient, chosen, options.turns, options.disk) | {"shares": shares(gradient)}
        if not options.json:
            show(name, results[name])
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
