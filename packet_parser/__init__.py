# SPDX-License-Identifier: MIT
"""RoCEv2 decoding, queue pairs, proof of place."""
