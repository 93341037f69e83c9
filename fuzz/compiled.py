# SPDX-License-Identifier: MIT
"""The compiled targets: what each one covers, and how it is built with clang, libFuzzer and the sanitizers."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BUILD", "COMPILED", "ROOT", "Compiled", "build", "clang"]

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "fuzz"
#: Newest first; any from 13 on takes the flags below.
_CLANGS = ("clang", *(f"clang-{number}" for number in range(21, 12, -1)))
#: Code that Cython writes around ours, once, at start-up: not what is under test.
_GLUE = ("__Pyx_*", "__pyx_pw_*", "__pyx_pf_*", "__pyx_pymod_*", "__pyx_memoryview*", "__pyx_tp_*", "__pyx_array*")


@dataclass(frozen=True)
class Compiled:
    """One target: functions whose edges guide it and are counted (patterns), bytes of the longest input, and speed.

    `compares`: comparisons guide it as well; an input that is made of fields gets on without, at twice the speed.
    `inlines`: False where the target itself calls small functions: their edges count only while they are functions.
    """

    functions: tuple[str, ...]
    longest: int
    compares: bool = True
    inlines: bool = True


COMPILED = {
    "decode": Compiled(("*fc_*",), 512, inlines=False),
    "parser": Compiled(
        (
            "*fc_*",
            *(
                f"*RingParser__{name}"
                for name in (
                    "burst", "find", "find_proof", "judge", "place", "record", "stored", "take_credit", "between_hosts",
                    "wrong_direction",
                )
            ),
        ),
        160,
        compares=False,
    ),
    "extractor": Compiled(
        (
            "*fc_ll*",
            "*fc_plain*",
            *(f"*extractor__{name}" for name in ("cover", "cover_ll128", "mark", "held", "add", "remove")),
            *(
                f"*ExtractLoop__{name}"
                for name in (
                    "recover_slot", "slot", "open", "place", "place_in_part", "wait", "make_done", "take", "drained", "expected",
                    "is_past", "settle", "count_sources", "reach", "burst",
                )
            ),
        ),
        16 + 9 * 24,
        compares=False,
    ),
    "inspect": Compiled(
        ("*fc_*", *(f"*Scan__{name}" for name in ("frame", "find", "request", "advance", "message", "shape", "close"))),
        128,
        compares=False,
    ),
    "collect": Compiled(("*fc_*", "*Collector_*", "*gather*"), 96, compares=False),
    "capture": Compiled(("*fc_*", "*scan*", "*Frames_*"), 2048),
    "kernels": Compiled(("*fc_plain_*", "*fc_ll_*", "*fc_ll128_*"), 16 + 20 * 128, compares=False, inlines=False),
}  # fmt: skip


def clang() -> str | None:
    """Return the compiler's command; None where there is none that has libFuzzer."""
    for name in _CLANGS:
        try:
            found = subprocess.run(
                [name, "-print-file-name=libclang_rt.fuzzer-x86_64.a"], capture_output=True, text=True
            )
            path = subprocess.run([name, "-print-runtime-dir"], capture_output=True, text=True).stdout.strip()
        except OSError:
            continue
        if found.returncode == 0 and any(Path(path).glob("libclang_rt.fuzzer*.a")):
            return name
    return None


def _pkg_config(option: str) -> list[str]:
    return shlex.split(
        subprocess.run(["pkg-config", option, "libdpdk"], check=True, capture_output=True, text=True).stdout
    )


def build(name: str, compiler: str, sanitizers: str = ",address,undefined") -> Path:
    """Return a target's program, compiled anew where anything in it has changed; CalledProcessError if it does not compile.

    Without sanitizers the edges are those of the code alone: a sanitizer's own branches are never taken where all is well.
    """
    target, source = COMPILED[name], ROOT / "fuzz" / "targets" / f"{name}.pyx"
    program, translated = BUILD / (name if sanitizers else f"{name}-plain"), BUILD / f"{name}.c"
    seal = program.with_suffix(".sha256")
    BUILD.mkdir(parents=True, exist_ok=True)
    options = ("boundscheck=False", "wraparound=False", "cdivision=True")
    directives = [f"-X{option}" for option in options]
    translate = [sys.executable, "-m", "cython", "-3", *directives, "-I", ROOT, source, "-o", translated]
    subprocess.run(list(map(str, translate)), check=True, cwd=ROOT)
    allowed, ignored = BUILD / f"{name}.allow", BUILD / f"{name}.ignore"
    allowed.write_text("src:*\n" + "".join(f"fun:{pattern}\n" for pattern in target.functions))
    ignored.write_text("[undefined]\n" + "".join(f"fun:{pattern}\n" for pattern in _GLUE))
    library = sysconfig.get_config_var("LIBDIR")
    command = [
        compiler, "-O2", "-g1", "-w", f"-fsanitize=fuzzer{sanitizers}", "-fno-sanitize-recover=undefined",
        f"-fsanitize-coverage-allowlist={allowed}", f"-fsanitize-ignorelist={ignored}",
        *([] if target.compares else ["-fno-sanitize-coverage=trace-cmp"]), *([] if target.inlines else ["-fno-inline"]),
        f"-DFUZZ_MODULE={name}", f'-DFUZZ_PYTHON="{sys.executable}"',
        *_pkg_config("--cflags"), f"-I{ROOT}", f"-I{ROOT}/data_extractor", f"-I{ROOT}/fuzz/targets", f"-I{BUILD}",
        f"-I{sysconfig.get_path('include')}", translated, "-o", program,
        f"-L{library}", f"-Wl,-rpath,{library}", f"-lpython{sysconfig.get_config_var('LDVERSION')}", "-Wl,-export-dynamic",
        "-lpcap", *_pkg_config("--libs"),
    ]  # fmt: skip
    command = list(map(str, command))
    digest = hashlib.sha256("\0".join((*command, *target.functions)).encode())
    for path in (translated, *sorted(ROOT.glob("*/*.h")), *sorted(ROOT.glob("fuzz/targets/*.h"))):
        digest.update(path.read_bytes())
    if program.exists() and seal.exists() and seal.read_text() == digest.hexdigest():
        return program
    subprocess.run(command, check=True, cwd=ROOT)
    seal.write_text(digest.hexdigest())
    return program
