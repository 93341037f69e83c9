# SPDX-License-Identifier: MIT
"""One small recorded job for all tests of the campaign."""

import pytest

from fault_injection.jobs import Job, record_job


@pytest.fixture(scope="session")
def job(tmp_path_factory):
    """Three ranks in LL128 with the hook, each byte in two streams."""
    return Job(record_job("ll128-3", tmp_path_factory.mktemp("recordings"), 8, 1))
