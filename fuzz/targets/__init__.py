# SPDX-License-Identifier: MIT
"""What is fuzzed, a file per target: compiled code in Cython, the rest in Python."""
