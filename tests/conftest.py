# SPDX-License-Identifier: MIT
"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def captures() -> Path:
    """The folder of real captures; absent, the test is skipped, or fails where they are required (CI)."""
    folder = Path(os.environ.get("FLOWCHECK_CAPTURES", ROOT.parent / "shared" / "captures"))
    if not list(folder.glob("*.pcapng")):
        message = f"no real captures in {folder} (set FLOWCHECK_CAPTURES)"
        if os.environ.get("FLOWCHECK_REQUIRE_CAPTURES"):
            pytest.fail(message)
        pytest.skip(message)
    return folder
