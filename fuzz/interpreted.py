# SPDX-License-Identifier: MIT
"""The targets in Python: run one under atheris, `python -m fuzz.interpreted NAME [libFuzzer's options] CORPUS`.

A target is a module of `fuzz.targets` with `one(data)`, which returns where all is well and raises where it is not, and
`seeds()`. It needs no atheris to be imported and called.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import sys
from pathlib import Path
from types import CodeType, FrameType

__all__ = ["INTERPRETED", "LONGEST", "lines_reached", "main"]

#: The modules of ours whose lines guide a target.
INTERPRETED = {
    "plan": ("flowcheck.plan", "flowcheck.learned"),
    "step_record": ("flowcheck.step_record",),
    "manifest": ("updater.manifest",),
    "log": ("updater.log_format", "updater.log_reader", "updater.log", "updater.compression"),
    "snapshot": ("updater.snapshot", "updater.manifest"),
    "mapped": ("flowcheck.ring", "flowcheck.slots", "flowcheck.mapped"),
}
#: Bytes of the longest input: some edits, or a whole document.
LONGEST = {"plan": 3072, "step_record": 512, "manifest": 2048, "log": 48, "snapshot": 64, "mapped": 64}


def _lines_of(code: CodeType) -> set[int]:
    """Return the lines of a module's functions that can be run; what runs when it is imported does not count."""
    out: set[int] = set()
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            out |= _lines_of(inner)
            if inner.co_flags & inspect.CO_NEWLOCALS and inner.co_flags & inspect.CO_OPTIMIZED:
                out |= {line for _, _, line in inner.co_lines() if line and line != inner.co_firstlineno}
    return out


def lines_reached(name: str, inputs: list[bytes]) -> tuple[int, int, list[bytes]]:
    """Return how many lines of its modules' functions a target's inputs reach, of how many, and which inputs suffice for it."""
    files = {}
    for module in INTERPRETED[name]:
        path = importlib.import_module(module).__file__ or ""
        files[path] = _lines_of(compile(Path(path).read_text(), path, "exec"))
    target = importlib.import_module(f"fuzz.targets.{name}")
    seen: set[tuple[str, int]] = set()
    enough = []

    def trace(frame: FrameType, event: str, _: object) -> object:
        lines = files.get(frame.f_code.co_filename)
        if lines is None:
            return None
        if event == "line" and frame.f_lineno in lines:
            seen.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    for data in sorted(inputs, key=lambda data: (len(data), data)):
        before = len(seen)
        sys.settrace(trace)
        try:
            target.one(data)
        finally:
            sys.settrace(None)
        if len(seen) > before:
            enough.append(data)
    return len(seen), sum(map(len, files.values())), enough


def main() -> None:
    """Run the target that the first argument names."""
    import atheris

    name = sys.argv.pop(1)
    if name not in INTERPRETED:
        raise SystemExit(f"no target {name!r}: expected one of {', '.join(INTERPRETED)}")
    # Which modules are instrumented must be known before the first of them is imported.
    with atheris.instrument_imports(include=list(INTERPRETED[name]), enable_loader_override=False):
        for module in INTERPRETED[name]:
            importlib.import_module(module)
    target = importlib.import_module(f"fuzz.targets.{name}")
    gc.freeze()  # what there is by now stays: not to be gone through by each collection
    atheris.Setup(sys.argv, target.one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
