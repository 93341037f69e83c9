# SPDX-License-Identifier: MIT
"""payload bytes into gradient slots."""
