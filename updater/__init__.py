# SPDX-License-Identifier: MIT
"""optimizer steps, gradient log, snapshots, restore."""
