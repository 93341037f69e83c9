# SPDX-License-Identifier: MIT
"""Builds and runs fuzz targets: `./build.sh fuzz [--target T] [--executions N] [--seconds S] [--jobs J] [--json]`.

What a target ran, what of its code it reached and what it found goes to build/fuzz/NAME.json; with --json to stdout as well.
Inputs that reach something new are kept in build/fuzz/NAME-corpus; `--minimise` puts the smallest set of them that reaches as
much into fuzz/corpus. A finding ends its target with exit status 1 and leaves its input beside the corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fuzz import compiled, seeds
from fuzz.interpreted import INTERPRETED, LONGEST, lines_reached

__all__ = ["CORPUS", "main", "packed"]

#: One archive per target: hundreds of files of a few bytes would be most of the repository.
CORPUS = Path(__file__).parent / "corpus"
#: What an unfinished run says last: executions, edges, and of how many.
_PULSE = re.compile(r"^#(\d+)\s.*?\bcov: (\d+)", re.M)
_EDGES = re.compile(r"\((\d+) inline 8-bit counters\)")
_SECONDS = 20


def packed(name: str) -> dict[str, bytes]:
    """Return the inputs of a target's corpus, by name; none if it has none."""
    path = CORPUS / f"{name}.zip"
    if not path.exists():
        return {}
    with zipfile.ZipFile(path) as archive:
        return {entry: archive.read(entry) for entry in archive.namelist()}


def _store(name: str, inputs: list[bytes]) -> None:
    """Put inputs into the repository, named by their SHA-256; the same inputs give the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for entry, data in sorted((hashlib.sha256(data).hexdigest()[:16], data) for data in inputs):
            archive.writestr(zipfile.ZipInfo(entry), data, zipfile.ZIP_DEFLATED)
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / f"{name}.zip").write_bytes(out.getvalue())


def _command(name: str) -> list[str]:
    if name in INTERPRETED:
        return [sys.executable, "-m", "fuzz.interpreted", name]
    compiler = compiled.clang()
    if compiler is None:
        raise SystemExit(
            "fuzz: no clang with libFuzzer here; ./build.sh fuzz installs it, docs/fuzzing.md names the packages"
        )
    return [str(compiled.build(name, compiler))]


def _environment() -> dict[str, str]:
    # Python keeps what it allocated until it ends; HDF5 and libpcap free what they take.
    path = os.pathsep.join(filter(None, (str(compiled.ROOT), os.environ.get("PYTHONPATH"))))
    # Memory given back is kept from use for a while, not for 256 MiB of it, which takes new pages all the time.
    sanitizer = "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=4:malloc_context_size=2"
    return {**os.environ, "PYTHONPATH": path, "ASAN_OPTIONS": sanitizer, "OPENBLAS_NUM_THREADS": "1"}


def _prepare(name: str) -> Path:
    folder = compiled.BUILD / f"{name}-corpus"
    folder.mkdir(parents=True, exist_ok=True)
    for entry, content in {**packed(name), **{f"seed-{i}": seed for i, seed in enumerate(seeds.of(name))}}.items():
        (folder / entry).write_bytes(content)
    return folder


def run(name: str, executions: int, seconds: int, longest: int) -> dict[str, Any]:
    """Run one target until it has so many executions or seconds (0: no such limit), and say what came of it.

    Inputs have at most `longest` bytes; 0: as many as is useful to this target.
    """
    command, folder = _command(name), _prepare(name)
    longest = longest or (LONGEST[name] if name in INTERPRETED else compiled.COMPILED[name].longest)
    log = compiled.BUILD / f"{name}.log"
    begin = time.monotonic()
    with open(log, "wb") as out:
        status = subprocess.run(
            [
                *command, f"-max_len={longest}", f"-artifact_prefix={compiled.BUILD}/{name}-found-", "-entropic=0", "-timeout=20",
                "-rss_limit_mb=4096", "-print_final_stats=1", "-reload=0",
                *([f"-runs={executions}"] if executions else []), *([f"-max_total_time={seconds}"] if seconds else []), folder,
            ],
            stdout=out, stderr=subprocess.STDOUT, env=_environment(), cwd=compiled.ROOT,
        ).returncode  # fmt: skip
    took = time.monotonic() - begin
    text = log.read_text(errors="replace")
    pulses, edges = _PULSE.findall(text), _EDGES.search(text)
    done = re.search(r"stat::number_of_executed_units: (\d+)", text)
    report = {
        "target": name,
        "executions": int(done[1] if done else pulses[-1][0] if pulses else 0),
        "longest": longest,
        "seconds": round(took, 1),
        "edges": max((int(edges) for _, edges in pulses), default=0),
        "edges_in_all": int(edges[1]) if edges else None,
        "findings": sorted(str(path) for path in compiled.BUILD.glob(f"{name}-found-*")),
        "status": status,
    }
    (compiled.BUILD / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def coverage(name: str) -> dict[str, Any]:
    """Return how much of a target's code all inputs that are kept reach: edges of compiled code, lines in Python."""
    folder = _prepare(name)
    if name in INTERPRETED:
        reached, lines, _ = lines_reached(name, [path.read_bytes() for path in folder.iterdir()])
        return {"target": name, "lines": reached, "lines_in_all": lines}
    program = compiled.build(name, compiled.clang() or "clang", sanitizers="")
    done = subprocess.run(
        [program, "-runs=0", f"-max_len={compiled.COMPILED[name].longest}", folder],
        capture_output=True, text=True, env=_environment(), cwd=compiled.ROOT, check=True,
    )  # fmt: skip
    edges, pulses = _EDGES.search(done.stderr), _PULSE.findall(done.stderr)
    return {"target": name, "edges": int(pulses[-1][1]), "edges_in_all": int(edges[1])}


def minimise(name: str) -> None:
    """Put the inputs that reach what all reach, the smallest first, into the repository."""
    folder = _prepare(name)
    if name in INTERPRETED:
        *_, enough = lines_reached(name, [path.read_bytes() for path in folder.iterdir()])
        _store(name, enough)
        return
    least = compiled.BUILD / f"{name}-least"
    if least.exists():
        shutil.rmtree(least)
    least.mkdir()
    command = [*_command(name), "-merge=1", least, folder]
    subprocess.run(list(map(str, command)), check=True, env=_environment(), cwd=compiled.ROOT, capture_output=True)
    _store(name, [path.read_bytes() for path in least.iterdir()])


def main() -> None:
    """Run the targets that the command line names."""
    names = [*compiled.COMPILED, *INTERPRETED]
    parser = argparse.ArgumentParser(prog="build.sh fuzz", description=__doc__)
    parser.add_argument("--target", action="append", choices=names, help="this one; may be given again (default: all)")
    parser.add_argument("--executions", type=int, default=0, help="end a target after so many")
    parser.add_argument(
        "--seconds", type=int, default=0, help=f"end a target after so long ({_SECONDS} if nothing else ends it)"
    )
    parser.add_argument(
        "--longest", type=int, default=0, help="inputs of at most so many bytes (default: what each target has use for)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="targets that run at once")
    parser.add_argument("--minimise", action="store_true", help="put what was reached into fuzz/corpus instead")
    parser.add_argument("--coverage", action="store_true", help="instead say how much the inputs that are kept reach")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    chosen = given.target or names
    if given.minimise:
        for name in chosen:
            minimise(name)
        return
    if given.coverage:
        for name in chosen:
            print(json.dumps(coverage(name)), flush=True)
        return
    seconds = given.seconds or (0 if given.executions else _SECONDS)
    with ThreadPoolExecutor(given.jobs) as pool:
        reports = []
        for report in pool.map(lambda name: run(name, given.executions, seconds, given.longest), chosen):
            reports.append(report)
            print(
                "{target}: {executions} executions in {seconds} s, {edges} of {edges_in_all} edges, {n} findings".format(
                    **report, n=len(report["findings"])
                ),
                file=sys.stderr,
            )
    if given.json:
        print(json.dumps({"targets": reports}))
    sys.exit(any(report["findings"] or report["status"] for report in reports))


if __name__ == "__main__":
    main()
