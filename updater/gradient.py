# SPDX-License-Identifier: MIT
"""What `flowcheck gradient` answers: one iteration's reduced gradient out of the log. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowcheck.errors import ConfigError
from updater.directory import Directory, bucket_views

__all__ = ["read_gradient"]

#: numpy has no bfloat16: its bits are given as uint16.
_NUMPY = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4", "float64": "<f8"}


def read_gradient(
    path: str | Path, iteration: int, bucket: int | None = None, attempt: int | None = None
) -> np.ndarray:
    """Return an iteration's gradient, flat, in wire dtype and bucket order (bfloat16 as uint16).

    Args:
        path: the checkpoint directory.
        iteration: from 1.
        bucket: only this bucket, from 0; all of them if None.
        attempt: whose iteration it is; the latest, and what that goes on from, if None.

    Raises:
        ConfigError: there is no such bucket, or the buckets differ in dtype and none was chosen.
        RestoreError: the log has no gradient of that iteration.
        CheckpointError: a checksum is wrong.
    """
    directory = Directory(path)
    slot, _, revision = directory.slot(iteration, attempt)
    count = len(revision.buckets)
    if bucket is not None and not 0 <= bucket < count:
        raise ConfigError(f"bucket {bucket} of iteration {iteration}: expected one of 0 to {count - 1}")
    chosen = range(count) if bucket is None else [bucket]
    dtypes = sorted({revision.buckets[number].dtype for number in chosen})
    if len(dtypes) > 1:
        raise ConfigError(
            f"the buckets of iteration {iteration} have dtypes {', '.join(dtypes)}: choose one with --bucket"
        )
    views = bucket_views(slot, revision)
    flat = np.concatenate([views[number] for number in chosen])
    return flat.view(_NUMPY.get(dtypes[0], dtypes[0]))
