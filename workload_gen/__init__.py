# SPDX-License-Identifier: MIT
"""the GPT launch example and the recorded network."""
