# SPDX-License-Identifier: MIT
"""DPDK port to packet ring."""
