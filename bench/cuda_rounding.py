# SPDX-License-Identifier: MIT
"""Whether the CPU can give the bits that optimizers gave on a GPU, by rounding as the GPU does.

Reads what `bench/optimizer_bits.py --device cuda --save FILE` kept, steps again on the CPU from the same seeds, and
counts elements that differ: for the forms default, single and foreach torch's own classes, with some operations
replaced underneath by `CudaRounding`; for the fused form of SGD, Adam and AdamW the formulas below. Elements do not
depend on each other in these optimizers, so the beginning of the first tensor, which is what was kept, is enough.
`a + v*b` with one rounding is had from torch.add, which has it where the CPU capability is AVX2 or better.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimizer_bits import DTYPES, EPS_FLOAT16, FORMS, OPTIMIZERS, SAVED_BYTES, SEED, bits, run, values
from torch.utils._python_dispatch import TorchDispatchMode

_NARROW = (torch.bfloat16, torch.float16)


def _wide(value: Any) -> Any:
    """Return 16-bit tensors in float32, in which the GPU computes on them; anything else as it is."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _NARROW else value


def _sqrt(x: torch.Tensor) -> torch.Tensor:
    """Return IEEE's square root; torch takes MKL's on the CPU, which rounds otherwise, and not alike on every CPU."""
    return torch.from_numpy(np.sqrt(_wide(x).numpy())).to(x.dtype)


def _addcmul(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, v: float) -> torch.Tensor:
    x, y, z = _wide(x), _wide(y), _wide(z)
    return torch.addcmul(x, y, z) if v == 1 else torch.add(x, y * z, alpha=v)


def _addcdiv(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, v: float) -> torch.Tensor:
    return torch.add(_wide(x), _wide(y) / _wide(z), alpha=v)


class CudaRounding(TorchDispatchMode):
    """While entered, torch's operations on CPU tensors round as they were seen to round on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split("::")[1].split(".")[0]
        foreach, in_place = name.startswith("_foreach_"), name.endswith("_")
        plain = name.removeprefix("_foreach_").rstrip("_")
        if plain not in ("sqrt", "div", "addcmul", "addcdiv", "add", "mul") or not (foreach or args[0].dim()):
            return func(*args, **kwargs)
        targets = args[0] if foreach else [args[0]]
        others = [list(a) if foreach and isinstance(a, (list, tuple)) else [a] * len(targets) for a in args[1:]]
        results = self._replace(plain, targets, others, kwargs, isinstance(args[-1], (list, tuple)))
        if results is None:
            return func(*args, **kwargs)
        results = [result.to(target.dtype) for result, target in zip(results, targets, strict=True)]
        if not in_place:
            return results if foreach else results[0]
        for target, result in zip(targets, results, strict=True):
            target.copy_(result)
        return None if foreach else args[0]

    def _replace(
        self, plain: str, targets: list, others: list[list], kwargs: dict[str, Any], listed: bool
    ) -> list[torch.Tensor] | None:
        if plain == "sqrt":
            return [_sqrt(x) for x in targets]
        if plain in ("addcmul", "addcdiv"):
            factors = others[2] if len(others) > 2 else [kwargs.get("value", 1)] * len(targets)
            function = _addcmul if plain == "addcmul" else _addcdiv
            return [function(*each) for each in zip(targets, others[0], others[1], factors, strict=True)]
        scalar = not isinstance(others[0][0], torch.Tensor)
        if plain == "div":
            # One number for all: by its reciprocal. A list of numbers: divided.
            return (
                None if listed or not scalar else [_wide(x) * (1 / v) for x, v in zip(targets, others[0], strict=True)]
            )
        if scalar:
            pairs = zip(targets, others[0], strict=True)
            return [_wide(x) * v if plain == "mul" else _wide(x) + v for x, v in pairs]
        if plain == "add" and (alpha := kwargs.get("alpha", 1)) != 1:
            return [torch.add(_wide(x), _wide(y), alpha=alpha) for x, y in zip(targets, others[0], strict=True)]
        return None


def fused_adam(options: dict[str, Any], dtype: str, start: torch.Tensor, gradients: list) -> Iterator[dict[str, Any]]:
    """Yield parameter and state after each step of a fused Adam or AdamW; every number is in the computing type."""
    number = np.float64 if dtype == "float64" else np.float32
    eps = EPS_FLOAT16 if dtype == "float16" else 1e-8
    lr, beta1, beta2, eps, decay = map(number, (options["lr"], 0.9, 0.999, eps, options["weight_decay"]))
    kept = {"parameter": start} | {key: torch.zeros_like(start) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    for step, gradient in enumerate(gradients, 1):
        p, m, s, top = (_wide(tensor) for tensor in kept.values())
        g = _wide(gradient)
        if decay:
            p = torch.add(p, p, alpha=float(-(lr * decay)))
        m = torch.add(g * float(1 - beta1), m, alpha=float(beta1))
        s = torch.add((g * g) * float(1 - beta2), s, alpha=float(beta2))
        top = torch.maximum(top, s)
        correction1 = 1 - number(np.float64(beta1) ** step)
        correction2 = np.sqrt(1 - number(np.float64(beta2) ** step))
        denominator = _sqrt(top if options.get("amsgrad") else s) / torch.tensor(correction2) + float(eps)
        p = p - (m * float(lr / correction1)) / denominator
        kept = {key: value.to(start.dtype) for key, value in zip(kept, (p, m, s, top), strict=True)}
        yield kept


def fused_sgd(options: dict[str, Any], dtype: str, start: torch.Tensor, gradients: list) -> Iterator[dict[str, Any]]:
    """Yield parameter and momentum after each step of a fused SGD."""
    kept = {"parameter": start}
    for gradient in gradients:
        p, g = _wide(kept["parameter"]), _wide(gradient)
        g = torch.add(g, p, alpha=options.get("weight_decay", 0))
        if momentum := options.get("momentum"):
            buffer = g + _wide(kept["momentum_buffer"]) * momentum if "momentum_buffer" in kept else g
            kept["momentum_buffer"] = buffer.to(start.dtype)
            g = torch.add(g, buffer, alpha=momentum) if options.get("nesterov") else buffer
        kept["parameter"] = torch.add(p, g, alpha=-options["lr"]).to(start.dtype)
        yield dict(kept)


def again(name: str, dtype: str, form: str, start: torch.Tensor, gradients: list) -> dict[int, dict[str, torch.Tensor]]:
    """Step once more on the CPU, rounding as the GPU does."""
    kind, options = OPTIMIZERS[name]
    if form != "fused":
        with CudaRounding():
            # The default form on a GPU is foreach.
            return run(name, dtype, "foreach" if form == "default" else form, "cpu", [start], [[g] for g in gradients])
    options = {"weight_decay": 0.01 if kind == "AdamW" else 0, **options}
    steps = list((fused_sgd if kind == "SGD" else fused_adam)(options, dtype, start, gradients))
    return {1: steps[0], len(steps): steps[-1]}


def main() -> None:
    """Print a row per optimizer, form and dtype: elements that differ after the first and the last step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="what optimizer_bits.py --save wrote")
    with np.load(parser.parse_args().file) as file:
        saved = {key: file[key] for key in file.files}
    last = max(int(words[-2]) for key in saved if (words := key.split())[-2].isdigit())
    print(f"| optimizer | form | dtype | elements | 1 | {last} |\n|---|---|---|---|---|---|")
    for dtype in DTYPES:
        count = SAVED_BYTES // torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        start = next(values(dtype, 1, 0.05, SEED))[0].reshape(-1)[:count].clone()
        gradients = [drawn[0].reshape(-1)[:count].clone() for drawn in values(dtype, last, 1.0, SEED + 1)]
        for name in OPTIMIZERS:
            for form in FORMS:
                if f"{dtype} {name} {form} {last} parameter" not in saved:
                    continue
                cells = []
                for step, tensors in again(name, dtype, form, start, gradients).items():
                    differ = {k: int((bits(t).numpy() != saved[key]).sum()) for k, t in tensors.items()
                              if (key := f"{dtype} {name} {form} {step} {k}") in saved}  # fmt: skip
                    cells.append(", ".join(f"{key} {n:,}" for key, n in differ.items() if n) or "0")
                print(f"| {name} | {form} | {dtype} | {count:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
