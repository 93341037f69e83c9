# SPDX-License-Identifier: MIT
"""The named arithmetic of this process, and where its steps are known to give the trainer's bits.

Bits are promised only for what tests/updater/test_optimizer.py holds against plain torch; everything else is stepped
alike, and says `bit_exact: false`.
"""

from __future__ import annotations

from flowcheck import describe
from flowcheck.plan import Arithmetic, Plan

__all__ = ["bit_exact", "current"]

_ADAM = {"lr", "betas", "eps", "weight_decay", "maximize"}
#: Options by class that the tests cover, each in every form that the class has.
_COVERED_OPTIONS = {
    "SGD": {"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"},
    "Adam": _ADAM | {"amsgrad", "decoupled_weight_decay"},
    "AdamW": _ADAM | {"amsgrad"},
    "Adagrad": {"lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps", "maximize"},
    "RMSprop": {"lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize"},
    "Adamax": _ADAM,
    "NAdam": _ADAM | {"momentum_decay", "decoupled_weight_decay"},
    "RAdam": _ADAM | {"decoupled_weight_decay"},
}
_COVERED_DTYPES = {"float32", "float64", "bfloat16", "float16"}
#: Classes that, unless fused, take square roots from a library that does so otherwise on each vendor's processors
#: (docs/arithmetic.md).
_BY_VENDOR = {"Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam"}


def current() -> Arithmetic:
    """Return what this process computes with."""
    return Arithmetic(**describe.arithmetic("cpu"))


def bit_exact(plan: Plan) -> bool:
    """Return whether steps done here are known to have the bits of the trainer's; True for a plan without a model."""
    if not plan.has_model:
        return True
    ours, theirs = current(), plan.arithmetic
    if plan.optimizer.class_name not in _BY_VENDOR or plan.optimizer.form == "fused":
        ours, theirs = (named.model_copy(update={"vendor": None}) for named in (ours, theirs))
    elif theirs.vendor is None:
        return False
    return ours == theirs and _covered(plan)


def _covered(plan: Plan) -> bool:
    options = {name for group in plan.optimizer.groups for name in group.options}
    if not options <= _COVERED_OPTIONS.get(plan.optimizer.class_name, set()):
        return False
    # In 16-bit types SGD's bits depend on the number of threads, and fused, with momentum, on nothing known
    # (docs/arithmetic.md).
    narrow = any(entry.dtype in ("bfloat16", "float16") for entry in plan.state)
    if plan.optimizer.class_name == "SGD" and narrow:
        return False
    dtypes = {entry.parameter: entry.dtype for entry in plan.state if entry.kind == "parameter"}
    if not set(dtypes.values()) <= _COVERED_DTYPES:
        return False
    pairs = {(dtypes[p.name], b.dtype) for r in plan.shard.revisions for b in r.buckets for p in b.parameters}
    # DDP's compression hooks put 16 bits on the wire; widening them is exact.
    return all(ours == wire or (ours == "float32" and wire in ("bfloat16", "float16")) for ours, wire in pairs)
