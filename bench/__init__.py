# SPDX-License-Identifier: MIT
"""Measurements: `bench.bench` holds every stage against a yardstick, the other modules answer one question each."""
