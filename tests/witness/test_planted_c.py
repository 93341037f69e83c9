# SPDX-License-Identifier: MIT
"""A bug planted in the extractor's LL128 lines, built in a copy of the tree, makes the witness's capture fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from pathlib import Path
from tests.witness.schedule import Job
from tests.witness.test_witness import Witnessed
folder = Path(sys.argv[1])
print("right" if Witnessed(folder, Job("2.24", "ll128", 2)).right(folder) else "wrong")
"""
RIGHT = "runs[1].unit = base + 16 * (in_half - 4) + 15;"
WRONG = "runs[1].unit = base + 16 * (in_half - 4) + 14;"


@pytest.mark.slow
@pytest.mark.dpdk
@pytest.mark.timeout(900)
def test_a_wrong_ll128_word_in_the_extractor_makes_it_fail(tmp_path):
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", "*.so", "*.c")
    shutil.copytree(ROOT, tree, ignore=ignore)
    header = tree / "data_extractor" / "_ll128.h"
    text = header.read_text()
    assert text.count(RIGHT) == 1
    for content, expected in ((text, "right"), (text.replace(RIGHT, WRONG), "wrong")):
        header.write_text(content)
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, check=True, capture_output=True
        )
        folder = tmp_path / expected
        folder.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(folder)],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.strip() == expected, done.stderr
