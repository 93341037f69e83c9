"""Builds the Cython extensions; every other fact about the package is in setup.cfg."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
PACKAGES = ["flowcheck", "packet_dump", "packet_parser", "data_extractor", "updater", "workload_gen"]
DPDK_MINIMUM = "22.11"


def pkg_config(*arguments: str) -> list[str]:
    return shlex.split(
        subprocess.run(["pkg-config", *arguments, "libdpdk"], check=True, capture_output=True, text=True).stdout
    )


def dpdk_flags() -> tuple[list[str], list[str]]:
    """Return libdpdk's compile and link flags, whole and in order: they carry -include and -march."""
    try:
        subprocess.run(["pkg-config", f"--atleast-version={DPDK_MINIMUM}", "libdpdk"], check=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(
            f"flowcheck: pkg-config finds no libdpdk >= {DPDK_MINIMUM}. Install it (Debian, Ubuntu: apt-get install "
            "libdpdk-dev libpcap-dev pkg-config; Fedora: dnf install dpdk-devel libpcap-devel), or point PKG_CONFIG_PATH "
            "to its libdpdk.pc, or set FLOWCHECK_WITHOUT_DPDK=1 for a training host, which needs no stage."
        )
    return pkg_config("--cflags"), pkg_config("--libs")


def extensions() -> list[Extension]:
    if os.environ.get("FLOWCHECK_WITHOUT_DPDK") == "1":
        return []
    from Cython.Build import cythonize

    cflags, libs = dpdk_flags()
    debug = os.environ.get("FLOWCHECK_DEBUG") == "1"
    optimise = ["-O1", "-g", "-fno-omit-frame-pointer"] if debug else ["-O3"]
    modules = [
        Extension(
            ".".join(path.relative_to(ROOT).with_suffix("").parts),
            [str(path.relative_to(ROOT))],
            depends=[str(p.relative_to(ROOT)) for p in ROOT.glob("*/*.h")],
            include_dirs=["."],
            extra_compile_args=[*cflags, *optimise, "-Wno-unused-function"],
            extra_link_args=libs,
        )
        for package in PACKAGES
        for path in sorted((ROOT / package).glob("*.pyx"))
    ]
    directives = {
        "language_level": 3,
        "boundscheck": debug,
        "wraparound": False,
        "cdivision": True,
        "embedsignature": True,
    }
    return cythonize(modules, build_dir="build/cython", compiler_directives=directives)


setup(ext_modules=extensions())
