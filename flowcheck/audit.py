# SPDX-License-Identifier: MIT
"""Digests of a training state, for the audit: integer arithmetic over bit patterns, the same on every device.

Trainer and shadow digest the same groups of tensors before the same step; the trainers' go into the step record
(`flowcheck.step_record`), the shadow compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowcheck.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["differing", "digests", "group_names", "is_audited"]

_CHUNK_WORDS = 1 << 20
#: So many iterations at the start of an attempt are audited whatever the interval.
_AT_THE_START = 3


def is_audited(iteration: int, every: int, first_step: int) -> bool:
    """Return whether the record of an iteration carries digests; `first_step` is the attempt's first iteration."""
    return iteration < first_step + _AT_THE_START or iteration % every == 0


def group_names(plan: Plan) -> list[list[str]]:
    """Return the audited groups: names of parameters and keys of constants, runs of about equal bytes."""
    sizes = {entry.parameter or entry.key: entry.bytes for entry in plan.state if entry.kind != "extra"}
    count = plan.shard.step_record.audit.groups
    groups: list[list[str]] = [[] for _ in range(count)]
    total, before = max(1, sum(sizes.values())), 0
    for name, size in sizes.items():
        groups[min(count - 1, before * count // total)].append(name)
        before += size
    return groups


def digests(
    groups: Sequence[Sequence[str]], tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> torch.Tensor:
    """Return a 64-bit digest of each group: an int64 tensor, on the tensors' device.

    Args:
        groups: names, as `group_names` gives them.
        tensors: by those names; a parameter's optimizer state is digested with it.
        optimizer: whose state it is.
    """
    import torch

    out, device = [], next(iter(tensors.values())).device
    for names in groups:
        members = []
        for name in names:
            state: Mapping[str, Any] = optimizer.state.get(tensors[name], {})
            members += [tensors[name], *(state[key] for key in sorted(state) if isinstance(state[key], torch.Tensor))]
        # Odd weights: no change of one bit can vanish in a sum of 64 bits.
        digest = torch.zeros((), dtype=torch.int64, device=device)
        for place, member in enumerate(members):
            digest = digest + _digest(member.detach()).to(device) * (2 * place + 1)
        out.append(digest)
    return torch.stack(out)


def differing(
    plan: Plan, record: np.ndarray, tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> list[tuple[list[str], int | None]]:
    """Return where a state is not that of the ranks by the digests in a record: names of a group, and whose (`RecordForm.audit`)."""
    groups = group_names(plan)
    ours = digests(groups, tensors, optimizer).tolist()
    found = plan.record_form.audit(record, [digest % 2**64 for digest in ours])
    return [(groups[group], rank) for group, rank in found]


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum, modulo 2^64, of a tensor's words, each times an odd weight of its place."""
    import torch

    flat = tensor.contiguous().reshape(-1)
    if flat.dtype == torch.bool:
        flat = flat.view(torch.uint8)
    elif flat.is_floating_point():
        flat = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, flat.numel(), _CHUNK_WORDS):
        words = flat[begin : begin + _CHUNK_WORDS].to(torch.int64)
        weights = torch.arange(2 * begin + 1, 2 * (begin + words.numel()) + 1, 2, device=flat.device)
        total = total + (words * weights).sum()
    return total
