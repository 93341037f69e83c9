# SPDX-License-Identifier: MIT
"""The targets in Python: run one under atheris, `python -m fuzz.interpreted NAME [libFuzzer's options] CORPUS`.

A target is a module of `fuzz.targets` with `one(data)`, which returns where all is well and raises where it is not, and
`seeds()`. It needs no atheris to be imported and called.
"""

from __future__ import annotations

import importlib
import sys

__all__ = ["INTERPRETED", "LONGEST", "main"]

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
    atheris.Setup(sys.argv, target.one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
