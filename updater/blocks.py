# SPDX-License-Identifier: MIT
"""The steps of torch's unfused Adam, AdamW and SGD on float32, all operations of a step on one tile after the other.

torch does one operation on a whole parameter, then the next one: memory is read and written a dozen times a step instead of
once. `_tiles` does the same operations with the same roundings while a tile is in the cache. Which those are depends on
torch's build and on the processor, so nothing is believed: before a kind of step is done here, small parameters are
stepped in both ways, and unless every bit agrees the optimizer's own `step` does it (docs/decisions/0016).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

try:
    from updater import _tiles
except ImportError:  # no compiler was there (docs/install.md)
    _tiles = None

__all__ = ["Blocks"]

#: Fewer elements are stepped in less time than it takes to wake threads; torch's own border.
_LEAST_SHARED = 32768
#: From here on adding 1 to a float32 changes nothing.
_MOST_STEPS = float(1 << 24)
_CLASSES = {kind.__name__: kind for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)}
_NUMBERS = ("lr", "weight_decay", "eps", "momentum", "dampening")

Row = dict[str, Any]
#: A step's class, and the switches that choose its operations.
Kind = tuple[str, tuple[tuple[str, bool], ...]]


class Blocks:
    """Steps an optimizer in its place, where that gives the same bits. One thread at a time."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Take an optimizer; its groups and its state are read at each step."""
        self._optimizer = optimizer

    @property
    def root(self) -> int | None:
        """What steps by the options as they are now take roots with to have torch's bits, as `_tiles.step` has it; None: they have not."""
        kinds = {_kind(self._optimizer, group) for group in self._optimizer.param_groups}
        roots = {None if kind is None else _root(kind) for kind in kinds}
        return roots.pop() if len(roots) == 1 else None

    def step(self, scale: float | None = None) -> bool:
        """Do a step by the gradients that the parameters have, which are only read, each first multiplied by `scale`.

        False: nothing was done, it is the optimizer's turn.
        """
        root = self.root
        return root is not None and _step(self._optimizer, scale, root)


def _kind(optimizer: torch.optim.Optimizer, group: Row) -> Kind | None:
    """Return the kind of a group's step, None if there are no tiles of it."""
    name = type(optimizer).__name__
    numbers = [*(group[name] for name in _NUMBERS if name in group), *group.get("betas", ())]
    if (
        _tiles is None
        or _CLASSES.get(name) is not type(optimizer)
        or any(type(number) not in (int, float) for number in numbers)
        or any(group.get(name) for name in ("fused", "capturable", "differentiable", "amsgrad"))
    ):
        return None
    switches = {name: bool(group[name]) for name in ("foreach", "maximize", "weight_decay")}
    if name == "SGD":
        switches.update(momentum=group["momentum"] != 0, nesterov=group["nesterov"])
    else:
        # torch.lerp computes in another way from a weight of 0.5 on; at 1 the sign of zeros depends on an element's place.
        beta1 = group["betas"][0]
        if beta1 < 1e-6:
            return None
        switches.update(near=1 - beta1 < 0.5, decoupled_weight_decay=group["decoupled_weight_decay"])
    return name, tuple(switches.items())


# -- a step ---------------------------------------------------------------------------------------------------------


def _step(optimizer: torch.optim.Optimizer, scale: float | None, root: int) -> bool:
    rows_of = _sgd_rows if isinstance(optimizer, torch.optim.SGD) else _adam_rows
    rows: list[Row] = []
    after: list[Callable[[], object]] = []
    for group in optimizer.param_groups:
        found = rows_of(optimizer, group, after)
        if found is None:
            return False
        rows += found
    for row in rows:
        row["scale"] = scale
    shared = sum(row["count"] for row in rows) >= _LEAST_SHARED
    try:
        _tiles.step(rows, root, _mkl("MKL_Set_Num_Threads_Local"), torch.get_num_threads() if shared else 1)
    except OverflowError:
        return False  # torch says what is wrong
    for done in after:
        done()
    return True


def _row(
    parameter: torch.Tensor, gradient: torch.Tensor, first: torch.Tensor | None, second: torch.Tensor | None
) -> Row | None:
    for tensor in (parameter, gradient, first, second):
        if tensor is not None and not (tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()):
            return None
    return {
        "parameter": parameter.data_ptr(),
        "gradient": gradient.data_ptr(),
        "first": 0 if first is None else first.data_ptr(),
        "second": 0 if second is None else second.data_ptr(),
        "count": parameter.numel(),
    }


def _adam_rows(optimizer: torch.optim.Optimizer, group: Row, after: list[Callable[[], object]]) -> list[Row] | None:
    parameters, gradients, averages, squares, _, counts = lists = [[] for _ in range(6)]
    optimizer._init_group(group, *lists)
    (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
    decoupled = decay != 0 and group["decoupled_weight_decay"]

    @functools.cache
    def numbers(done: float) -> Row:
        """Return what the step after so many is done with, computed in the order that torch computes it in."""
        count = done + 1
        return {
            "negated": group["maximize"],
            "coupled": 0.0 if decoupled else decay,
            "decay": 1 - lr * decay if decoupled else 1.0,
            "weight": 1 - beta1,
            "kept": beta2,
            "added": 1 - beta2,
            "size": -(lr / (1 - beta1**count)),
            "correction": (1 - beta2**count) ** 0.5,
            "epsilon": group["eps"],
        }

    rows = []
    for *tensors, count in zip(parameters, gradients, averages, squares, counts, strict=True):
        row, done = _row(*tensors), count.item()
        if row is None or count.dtype is not torch.float32 or not 0 <= done < _MOST_STEPS:
            return None
        rows.append(row | numbers(done))
    if counts:
        after.append(lambda: torch._foreach_add_(counts, 1))
    return rows


def _sgd_rows(optimizer: torch.optim.Optimizer, group: Row, after: list[Callable[[], object]]) -> list[Row] | None:
    parameters, gradients, buffers = lists = [[], [], []]
    optimizer._init_group(group, *lists)
    numbers = {
        "negated": group["maximize"],
        "coupled": group["weight_decay"],
        "size": -group["lr"],
        "nesterov": group["nesterov"],
        "momentum": group["momentum"],
        "damped": 1 - group["dampening"],
    }
    rows = []
    for parameter, gradient, buffer in itertools.zip_longest(parameters, gradients, buffers):
        begins = buffer is None and group["momentum"] != 0
        if begins:
            buffer = torch.empty_like(gradient)
            after.append(functools.partial(optimizer.state[parameter].__setitem__, "momentum_buffer", buffer))
        row = _row(parameter, gradient, buffer, None)
        if row is None:
            return None
        rows.append(row | numbers | {"begins": begins})
    return rows


# -- the proof ------------------------------------------------------------------------------------------------------


@functools.cache
def _mkl(name: str) -> int:
    """Return the address of a function of the MKL that torch was built with; 0 if it was built without, or has not got it."""
    try:
        return ctypes.cast(getattr(ctypes.CDLL(torch._C.__file__), name), ctypes.c_void_p).value or 0
    except (AttributeError, OSError):
        return 0


@functools.cache
def _root(kind: Kind) -> int | None:
    """Return what a kind of step takes roots with to have the bits of torch's own; None if it has them with nothing."""
    return next((root for root in dict.fromkeys((_mkl("vmsSqrt"), 0)) if _agrees(kind, root)), None)


def _agrees(kind: Kind, root: int) -> bool:
    """Step small parameters of all lengths that a vector loop could tell apart, and of some tiles, in both ways."""
    name, switches = kind
    options = _options(name, dict(switches))
    generator = torch.Generator().manual_seed(1)
    # None so large that torch would wake threads for it, which takes long where cores are busy.
    sizes = [*range(140), *[2047] * 10]
    states = []
    start = torch.randn(sum(sizes), generator=generator)
    for _ in range(2):
        parameters = [torch.nn.Parameter(part) for part in start.clone().split(sizes)]
        states.append((parameters, _CLASSES[name](parameters, **options)))
    (ours, our_optimizer), (theirs, their_optimizer) = states
    for number in range(4):
        # Of very unlike sizes; then zeros, numbers below float32's normal ones, infinities and NaNs with payloads.
        gradient = torch.randn(sum(sizes), generator=generator)
        gradient *= 10 ** torch.empty_like(gradient).uniform_(-12, 3, generator=generator)
        gradient[::17], gradient[5::19], gradient[7::23] = 0.0, -0.0, 1e-42
        gradient[3::37], gradient[11::101] = float("inf"), -float("inf")
        bits = gradient.view(torch.int32)[13::41]
        bits.random_(0x7FC00001, 0x7FFFFFFF, generator=generator)
        bits[::2] |= -(1 << 31)
        for parameter, part in zip(ours, gradient.split(sizes), strict=True):
            parameter.grad = part
        scale = 0.3 if number % 2 else None
        scaled = gradient.clone() if scale is None else gradient * torch.tensor(scale)
        for parameter, part in zip(theirs, scaled.split(sizes), strict=True):
            parameter.grad = part
        their_optimizer.step()
        if not _step(our_optimizer, scale, root):
            return False
        for mine, torchs in zip(ours, theirs, strict=True):
            kept, torchs_kept = our_optimizer.state[mine], their_optimizer.state[torchs]
            if set(kept) != set(torchs_kept):
                return False
            pairs = [(mine.detach(), torchs.detach()), *((kept[key], torchs_kept[key]) for key in kept)]
            if not all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs):
                return False
    return True


def _options(name: str, switches: dict[str, bool]) -> Row:
    """Return options that have these switches."""
    options: Row = {"lr": 0.01, "maximize": switches["maximize"], "foreach": switches["foreach"] or None}
    options["weight_decay"] = 0.1 if switches["weight_decay"] else 0
    if name == "SGD":
        momentum = {"momentum": 0.9, "nesterov": switches["nesterov"]} if switches["momentum"] else {}
        return options | momentum | {"dampening": 0.0 if switches["nesterov"] else 0.2}
    if name == "Adam":
        options["decoupled_weight_decay"] = switches["decoupled_weight_decay"]
    return options | {"betas": (0.9 if switches["near"] else 0.3, 0.99)}
