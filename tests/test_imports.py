# SPDX-License-Identifier: MIT
"""Imports go one way: stages import `flowcheck`, never each other; `flowcheck` imports stages only where a command runs.

`fault_injection` stands above all: it runs the stages over what workload_gen recorded.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = {"packet_dump", "packet_parser", "data_extractor", "updater"}
PACKAGES = STAGES | {"flowcheck", "workload_gen", "fault_injection"}
#: Where `flowcheck` may import stages: its command and its supervisors, inside functions.
SUPERVISORS = {"cli.py", "replay.py", "demo.py", "demo_offline.py", "restart.py", "supervisor.py"}


def imports(path):
    """Yield (package, whether at module level) of every import of ours in a file."""
    if path.suffix == ".py":
        tree = ast.parse(path.read_text())
        top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module]
            for name in names:
                if name.split(".")[0] in PACKAGES:
                    yield name.split(".")[0], id(node) in top
    else:
        for match in re.finditer(r"^\s*(?:from|import|cimport)\s+(\w+)", path.read_text(), re.M):
            if match[1] in PACKAGES:
                yield match[1], True


FILES = [
    p
    for package in sorted(PACKAGES)
    for p in sorted((ROOT / package).rglob("*"))
    if p.suffix in (".py", ".pyx", ".pxd")
]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    for name, top in imports(path):
        if name in (package, "flowcheck") or package == "fault_injection":
            continue
        assert package == "flowcheck" and path.name in SUPERVISORS and not top, f"{path} imports {name}"


def test_the_walk_sees_files():
    assert len(FILES) > 50


BLOCKED = """
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise AssertionError("imported " + name)
sys.meta_path.insert(0, Guard())
sys.argv = {argv!r}
from {module} import {name}
{call}
"""


def guarded(module, name, argv, blocked=("torch",), call="main()"):
    code = BLOCKED.format(blocked=set(blocked), argv=argv, module=module, name=name, call=call)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_importing_flowcheck_needs_neither_torch_nor_numpy_nor_a_compiled_module():
    done = guarded(
        "flowcheck",
        "FlowCheckError",
        [],
        ("torch", "numpy", "h5py"),
        "assert not any('._' in m and m.startswith('flowcheck._') and m != 'flowcheck._version' for m in sys.modules)",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.captures
@pytest.mark.dpdk
def test_only_the_updater_loads_torch(captures, tmp_path):
    name = "ll-2ch-5000f-bothways-with-p2p-mtu1024"
    plan, capture = str(ROOT / "examples" / "captures" / f"{name}.json"), str(captures / f"{name}.pcapng")
    ring, slots, out = (str(tmp_path / part) for part in ("ring", "slots", "out"))
    for module, argv in (
        ("packet_dump.cli", ["x", plan, "--stream", "host0", "--capture", capture, "--ring", ring]),
        ("packet_parser.cli", ["x", plan, "--stream", "host0", "--ring", ring]),
        ("data_extractor.cli", ["x", plan, "--ring", ring, "--slots", slots]),
        ("flowcheck.cli", ["flowcheck", "inspect", capture]),
        # without a model nothing needs torch at all
        ("updater.cli", ["x", plan, "--slots", slots, "--out", out]),
        ("flowcheck.cli", ["flowcheck", "list", out]),
        ("flowcheck.cli", ["flowcheck", "gradient", out, "--iteration", "1", "--out", str(tmp_path / "g.npy")]),
    ):
        done = guarded(module, "main", argv)
        assert done.returncode == 0, (argv, done.stderr)


@pytest.mark.captures
@pytest.mark.dpdk
def test_listing_a_directory_with_a_model_needs_no_torch(captures, tmp_path):
    name = "ll-1ch-10000f-1iter-bothways-mtu1024"
    command = [sys.executable, "-m", "flowcheck", "replay", str(ROOT / "examples" / "captures" / f"{name}.json")]
    command += ["--stream", f"host0={captures / name}.pcapng", "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    done = guarded("flowcheck.cli", "main", ["flowcheck", "list", str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
