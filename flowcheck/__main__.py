# SPDX-License-Identifier: MIT
"""`python -m flowcheck` is `flowcheck`."""

from flowcheck.cli import main

main(prog_name="flowcheck")
