# SPDX-License-Identifier: MIT
"""sdist and wheel, installed into an environment of their own, run every console script from another directory."""

import configparser
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def scripts():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options.entry_points"]["console_scripts"].split("\n")
    return [line.split("=")[0].strip() for line in lines if line.strip()]


def run(*command, cwd, **environment):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def environment(folder):
    """Return the Python of a new environment that finds the dependencies of this one, but not this checkout."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # sys.path alone, no .pth of the other environment: an editable install there must not be found.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def sources(folder):
    """Return a copy of what git tracks, so that the build finds nothing left lying about."""
    tree = folder / "tree"
    tree.mkdir()
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, names):
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return tree


GO_ON = """
import sys, torch, flowcheck
from workload_gen import gpt
model = gpt.build(2000, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
assert flowcheck.load(model, optimizer, sys.argv[1]) == 3
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": 3}, sys.argv[2])
"""


JOB = ("--params", "2000", "--iterations", "4", "--bucket-mb", "0.01")


def shadowed(recording, out):
    """Replay a recording into a checkpoint directory, every iteration."""
    streams = [word for n in (0, 1) for word in ("--stream", f"link-{n}={recording / f'link-{n}.pcapng'}")]
    replay = (sys.executable, "-m", "flowcheck", "replay", recording / "plan.json", *streams, "--require-complete")
    run(*replay, "--out", out, cwd=ROOT)


@pytest.mark.dpdk
def test_a_pure_wheel_for_training_hosts_needs_no_compiler(tmp_path):
    tree = sources(tmp_path)
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree,
        cwd=tmp_path, FLOWCHECK_WITHOUT_DPDK="1", CC="/bin/false", PKG_CONFIG_LIBDIR="/nowhere",
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    python = environment(tmp_path / "env")
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    where = run(python, "-c", "import flowcheck; print(flowcheck.__file__)", cwd=tmp_path)
    assert str(tmp_path / "env") in where
    example = ROOT / "examples" / "captures" / "ll-2ch-adaptive-routing-mtu1024.json"
    run(python, "-c", f"import flowcheck.plan, flowcheck.layout; flowcheck.plan.load({str(example)!r})", cwd=tmp_path)
    commands = tmp_path / "env" / "bin"
    assert "without DPDK" in run(commands / "flowcheck", "--version", cwd=tmp_path)

    recording, out = tmp_path / "recording", tmp_path / "checkpoints"
    workload = commands / "flowcheck-workload"
    run(workload, "record", *JOB, "--out", recording, cwd=tmp_path)
    shadowed(recording, out)
    hooked = tmp_path / "hooked"
    run(workload, "record", *JOB, "--hook", "--out", hooked, cwd=tmp_path)
    shadowed(hooked, tmp_path / "of-the-hook")
    last = (tmp_path / "of-the-hook@4", hooked / "truth" / "iteration-000004.pt")
    assert "equal" in run(sys.executable, "-m", "flowcheck", "diff", *last, cwd=ROOT)

    run(python, "-c", GO_ON, f"{out}@3", tmp_path / "loaded.pt", cwd=tmp_path)
    same = ("diff", recording / "truth" / "iteration-000003.pt", tmp_path / "loaded.pt")
    assert "equal" in run(commands / "flowcheck", *same, cwd=tmp_path)
    run(workload, "record", *JOB, "--resume", tmp_path / "loaded.pt", "--out", tmp_path / "resumed", cwd=tmp_path)
    last = [folder / "truth" / "iteration-000004.pt" for folder in (recording, tmp_path / "resumed")]
    assert "equal" in run(commands / "flowcheck", "diff", *last, cwd=tmp_path)

    inspect = [commands / "flowcheck", "inspect", recording / "link-0.pcapng"]
    done = subprocess.run(inspect, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "no compiled stages" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_sdist_and_wheel_run_every_console_script(tmp_path):
    tree = sources(tmp_path)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        sdist,
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("*.whl")
    python = environment(tmp_path / "env")
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    names = scripts()
    assert len(names) == 6
    for name in names:
        script = tmp_path / "env" / "bin" / name
        assert "Usage" in run(script, "--help", cwd=elsewhere)
        assert "DPDK 2" in run(script, "--version", cwd=elsewhere)
    run(tmp_path / "env" / "bin" / "flowcheck", "demo", "--dir", elsewhere / "demo", cwd=elsewhere)
