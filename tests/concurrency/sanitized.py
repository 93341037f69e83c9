# SPDX-License-Identifier: MIT
"""A copy of the packages whose compiled code on rings and slots has ThreadSanitizer in it, and runs of `threads` in it.

The interpreter and all libraries stay as they are: gcc's runtime is loaded before them. Python's lock would order all that
the threads do, so what libpython calls is left out of sight.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from typing import NamedTuple

__all__ = ["Plant", "Run", "broken", "build", "run", "unavailable"]

ROOT = Path(__file__).parents[2]
PACKAGES = ("flowcheck", "packet_dump", "packet_parser", "data_extractor", "updater")
#: What reads or writes rings and slots.
MODULES = (
    "flowcheck/_atomics.pyx",
    "flowcheck/_copy.pyx",
    "packet_dump/_dump.pyx",
    "packet_parser/_parser.pyx",
    "data_extractor/_extractor.pyx",
)
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
#: A run that a plant keeps from ending is ended.
PATIENCE_S = 300
#: Put into a module that a plant breaks.
RELAXED = '''
cdef extern from *:
    """
    #define RELAXED_LOAD(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define RELAXED_STORE(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    """
    uint64_t RELAXED_LOAD(uint64_t *p) nogil
    void RELAXED_STORE(uint64_t *p, uint64_t value) nogil
'''


class Plant(NamedTuple):
    """Texts of one source file, each of which is there as often as said, and what is put in its place."""

    path: str
    changes: tuple[tuple[str, str, int], ...]


class Run(NamedTuple):
    """What a run said: its exit status, ThreadSanitizer's reports on rings and slots, and all that went to stderr."""

    status: int
    reports: list[str]
    errors: str


def _runtime():
    path = subprocess.run(["gcc", "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    return os.path.realpath(path) if os.path.isabs(path) else None


def unavailable():
    """Return why nothing can be run here; None if it can."""
    absent = [name for name in ("gcc", "pkg-config", "setarch") if shutil.which(name) is None]
    if absent:
        return f"no {absent[0]}"
    if _runtime() is None:
        return "gcc has no libtsan"
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        return "Python is no shared library: ThreadSanitizer cannot be told to leave its lock alone"
    return None


def _pkg_config(option):
    return shlex.split(
        subprocess.run(["pkg-config", option, "libdpdk"], check=True, capture_output=True, text=True).stdout
    )


def _compile(folder, path):
    """Compile a module of a copy in its place."""
    source, translated = folder / path, (folder / path).with_suffix(".c")
    name = ".".join(Path(path).with_suffix("").parts)
    options = ("boundscheck=False", "wraparound=False", "cdivision=True")
    translate = [sys.executable, "-m", "cython", "-3", "--module-name", name, *(f"-X{option}" for option in options)]
    subprocess.run([*translate, "-I", folder, source, "-o", translated], check=True, cwd=folder)
    command = [
        "gcc", "-shared", "-fPIC", "-fsanitize=thread", "-O1", "-g1", "-w", *_pkg_config("--cflags"), f"-I{folder}",
        f"-I{source.parent}", f"-I{sysconfig.get_path('include')}", translated, "-o", source.with_suffix(SUFFIX), *_pkg_config("--libs"),
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=folder)


def build(folder):
    """Make the copy; CalledProcessError if it does not compile."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in MODULES:
        (folder / path).with_suffix(SUFFIX).unlink()
        _compile(folder, path)


def broken(right, folder, plant):
    """Make a copy of a copy in which one plant is; AssertionError if there is no place for it."""
    shutil.copytree(right, folder, copy_function=os.symlink)
    source = (right / plant.path).read_text()
    for text, instead, times in plant.changes:
        assert source.count(text) == times, f"{plant.path} has not {times} times {text!r}"
        source = source.replace(text, instead)
    (folder / plant.path).unlink()
    if plant.path.endswith(".pyx"):
        source += RELAXED
        for suffix in (".c", SUFFIX):
            (folder / plant.path).with_suffix(suffix).unlink()
    (folder / plant.path).write_text(source)
    if plant.path.endswith(".pyx"):
        _compile(folder, plant.path)


def run(folder, recording, out, *, first_only=False):
    """Run the stages of a copy over a recorded job; `first_only` ends it at the first report."""
    suppressions = folder / "suppressions"
    suppressions.write_text("called_from_lib:libpython\n")
    environment = {
        **os.environ, "PYTHONPATH": str(folder), "PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1",
        "TSAN_OPTIONS": f"suppressions={suppressions} exitcode=0",
    }  # fmt: skip
    # gcc's runtime knows few places where a process may lie: addresses are not randomised. Only Python is to have it loaded.
    command = [
        "setarch",
        "-R",
        "env",
        f"LD_PRELOAD={_runtime()}",
        sys.executable,
        Path(__file__).with_name("threads.py"),
    ]
    lines, reports, begin = [], [], 0
    with subprocess.Popen([*command, recording, out], env=environment, stderr=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(PATIENCE_S, process.kill)
        timer.start()
        for line in process.stderr:
            if line.startswith("WARNING: ThreadSanitizer:"):
                begin = len(lines)
            lines.append(line)
            if line.startswith("SUMMARY: ThreadSanitizer:") and _is_shared("".join(lines[begin:]), out):
                reports.append("".join(lines[begin:]))
                if first_only:
                    process.kill()
                    break
        timer.cancel()
    return Run(process.returncode, reports, "".join(lines))


def _is_shared(report, out):
    """Whether a report is on a ring or on slots: others are on objects of Python and its libraries, which its lock orders."""
    address = int(re.search(r" of size \d+ at 0x([0-9a-f]+)", report)[1], 16)
    return any(begin <= address < end for begin, end in json.loads((out / "shared.json").read_text()))
