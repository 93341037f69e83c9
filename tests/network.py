# SPDX-License-Identifier: MIT
"""Real interfaces for tests: what only root can make, taken away again."""

import contextlib
import itertools
import json
import os
import subprocess

import pytest

_numbers = itertools.count()

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes network interfaces: needs root")

#: Of root, as the tests may run, nothing is left.
bare = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--") if os.geteuid() == 0 else ()


def ip(*words):
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def cable(mtu=9000):
    """Yield the names of the two ends of a cable, both up; nobody else talks on it."""
    number = f"{os.getpid() % 100000}{next(_numbers)}"
    ends = f"fca{number}", f"fcb{number}"
    ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    try:
        for end in ends:
            ip("link", "set", end, "addrgenmode", "none")
            ip("link", "set", end, "mtu", mtu, "up")
        yield ends
    finally:
        subprocess.run(["ip", "link", "del", ends[0]], check=False, capture_output=True)


def received(interface):
    """Return the frames that came to an interface, as `ip` counts them."""
    out = subprocess.run(["ip", "-j", "-s", "link", "show", interface], check=True, capture_output=True, text=True)
    return json.loads(out.stdout)[0]["stats64"]["rx"]["packets"]
