# SPDX-License-Identifier: MIT
"""Where torch's optimizers on one device and on the CPU differ in bits, given the same parameters and gradients.

Needs torch and numpy alone, nothing of FlowCheck. Every optimizer steps from the same seeded parameters over the same
seeded gradients on `--device` and on the CPU, in each form that it has; compared is every bit of parameters and
optimizer state after one step and after the last. Beside them: single operations, and what else a trainer does to
gradients (unscaling, clipping, casts). With `--device cpu` the CPU's forms are compared with its default form.
A distance in ULPs is that of the sign-magnitude bit patterns; two NaN count as equal. Digests in the JSON, and with
`--save` the first bytes of the device's results, serve to compare runs of different versions and machines.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHAPES = [(1000, 777), (257, 513), (65537,), (64, 3, 7, 7), (8191,), (3, 3), (13,), (1,)]
DTYPES = ["float32", "float64", "bfloat16", "float16"]
FORMS = {"default": {}, "single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD weight_decay": ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
    "SGD momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "SGD nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adam": ("Adam", {"lr": 0.001}),
    "AdamW": ("AdamW", {"lr": 0.001}),
    "AdamW amsgrad": ("AdamW", {"lr": 0.001, "amsgrad": True}),
    "Adagrad": ("Adagrad", {"lr": 0.01}),
    "RMSprop": ("RMSprop", {"lr": 0.01}),
    "Adamax": ("Adamax", {"lr": 0.002}),
    "NAdam": ("NAdam", {"lr": 0.002}),
    "RAdam": ("RAdam", {"lr": 0.001}),
}
SEED = 20
#: The default eps (1e-8, 1e-10) is zero in float16, and the first small gradient makes a NaN.
EPS_FLOAT16 = 1e-4
SAVED_BYTES = 65536
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}

Tensors = dict[str, torch.Tensor]
Saved = dict[str, np.ndarray]


# Comparing


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bit patterns as flat integers of its width, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])


def ordered(tensor: torch.Tensor) -> np.ndarray:
    """Return int64 whose differences are distances in representable values; both zeros are 0."""
    wide = bits(tensor).to(torch.int64)
    magnitude = wide & ((1 << (8 * tensor.element_size() - 1)) - 1)
    return torch.where(wide < 0, -magnitude, magnitude).numpy()


def compare(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, Any]:
    """Count the elements that differ in a bit, and say how far apart those are at the 99th percentile and at most."""
    found: dict[str, Any] = {"elements": ours.numel(), "differ": 0, "ulps_99": 0, "ulps_max": 0, "absolute_max": 0.0}
    if torch.equal(a := bits(ours), b := bits(theirs)):
        return found
    ours, theirs = ours.detach().cpu().reshape(-1), theirs.detach().cpu().reshape(-1)
    where = a != b
    if ours.is_floating_point():
        where &= ~(ours.isnan() & theirs.isnan())
    if not (count := int(where.sum())):
        return found
    ours, theirs = ours[where], theirs[where]
    x, y = ordered(ours), ordered(theirs)
    # As unsigned numbers: between two float64 lie up to 2^64.
    distance = np.maximum(x, y).view(np.uint64) - np.minimum(x, y).view(np.uint64)
    near = float((ours.double() - theirs.double()).abs().nan_to_num(torch.inf, torch.inf).max())
    return found | {
        "differ": count,
        "ulps_99": int(np.percentile(distance, 99, method="lower")),
        "ulps_max": int(distance.max()),
        "absolute_max": near if np.isfinite(near) else "non-finite",
    }


def digests(results: dict[int, Tensors]) -> dict[int, dict[str, str]]:
    """Return the beginning of each tensor's SHA-256."""
    return {s: {k: hashlib.sha256(bits(t).numpy()).hexdigest()[:16] for k, t in r.items()} for s, r in results.items()}


def same(ours: Any, theirs: Any) -> bool:
    """Return whether two nested results agree in every bit (of NaN too)."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(bits(ours), bits(theirs))
    keys = ours.keys() if isinstance(ours, dict) else range(len(ours))
    return all(same(ours[key], theirs[key]) for key in keys)


# Optimizers


def values(dtype: str, count: int, scale: float, seed: int) -> Iterator[list[torch.Tensor]]:
    """Yield `count` lists of seeded tensors: normal, times a power of two drawn for each element from 1/64 to 2."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.float64 if dtype == "float64" else torch.float32
    for _ in range(count):
        drawn = []
        for shape in SHAPES:
            normal = torch.randn(shape, generator=generator, dtype=made)
            power = torch.randint(-6, 2, shape, generator=generator).to(made)
            drawn.append((normal * torch.exp2(power) * scale).to(getattr(torch, dtype)))
        yield drawn


def make(name: str, dtype: str, form: str, parameters: list[torch.Tensor]) -> torch.optim.Optimizer | None:
    """Return the optimizer, or None where its class does not have the form."""
    class_name, options = OPTIMIZERS[name]
    kind = getattr(torch.optim, class_name)
    if form == "fused" and "fused" not in inspect.signature(kind).parameters:
        return None
    if dtype == "float16" and "eps" in inspect.signature(kind).parameters:
        options = {**options, "eps": EPS_FLOAT16}
    return kind(parameters, **options, **FORMS[form])


def run(
    name: str, dtype: str, form: str, device: str, start: list[torch.Tensor], gradients: list[list[torch.Tensor]],
    grad_scale: float | None = None, skip_last: bool = False,
) -> dict[int, Tensors] | str:  # fmt: skip
    """Step over the gradients; return parameters and state after the first and the last step, or why not.

    `grad_scale` is for the fused form to divide by; with `skip_last` it is told of infinite gradients in the last step.
    """
    parameters = [torch.nn.Parameter(value.clone().to(device)) for value in start]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    found: dict[int, Tensors] = {}
    try:
        if (optimizer := make(name, dtype, form, parameters)) is None:
            return "none"
        if grad_scale is not None:
            optimizer.grad_scale = torch.tensor(grad_scale, device=device)
            optimizer.found_inf = torch.tensor(0.0, device=device)
        for number, step in enumerate(gradients, 1):
            if skip_last and number == len(gradients):
                optimizer.found_inf = torch.tensor(1.0, device=device)
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad.copy_(gradient)  # some forms write into it
            optimizer.step()
            if number in (1, len(gradients)):
                found[number] = {"parameter": torch.cat([p.detach().reshape(-1) for p in parameters]).cpu()}
                if grad_scale is not None:
                    found[number]["gradient"] = torch.cat([p.grad.reshape(-1) for p in parameters]).cpu()
                states = [optimizer.state[p] for p in parameters]
                for key in states[0] if states[0] else ():
                    if isinstance(states[0][key], torch.Tensor):
                        found[number][key] = torch.cat([s[key].reshape(-1) for s in states]).cpu()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return found


def runs(name: str, dtype: str, device: str, material: tuple, seen: dict[str, Any]) -> dict[str, dict[int, Tensors]]:
    """Run every form twice; note in `seen` what was refused, repeats itself, and has another form's bits.

    A form that has another's bits is not among the results.
    """
    found: dict[str, dict[int, Tensors]] = {}
    for form in FORMS:
        result = run(name, dtype, form, device, *material)
        if isinstance(result, str):
            seen[form] = {"refused": result}
            continue
        again = run(name, dtype, form, device, *material)
        seen[form] = {"repeats": same(result, again)}
        if alias := next((other for other in found if same(found[other], result)), None):
            seen[form]["same_as"] = alias
            continue
        seen[form]["digests"] = digests(result)
        found[form] = result
    return found


def measure_optimizer(name: str, dtype: str, device: str, ours: tuple, theirs: tuple, saved: Saved) -> dict[str, Any]:
    """Compare every form on the device with every form on the CPU."""
    row: dict[str, Any] = {"optimizer": name, "options": OPTIMIZERS[name][1], "dtype": dtype, "device": {}, "cpu": {}}
    there = runs(name, dtype, "cpu", theirs, row["cpu"])
    here = runs(name, dtype, device, ours, row["device"])
    row["pairs"] = [
        {
            "device": form,
            "cpu": other,
            "after": {s: {k: compare(t, b[s][k]) for k, t in r.items() if k in b[s]} for s, r in a.items()},
        }
        for form, a in here.items()
        for other, b in there.items()
    ]
    row["non_finite"] = int(sum((~t.isfinite()).sum() for r in there.values() for s in r.values() for t in s.values()))
    for form, result in here.items():
        for step, tensors in result.items():
            for key, tensor in tensors.items():
                saved[f"{dtype} {name} {form} {step} {key}"] = bits(tensor)[
                    : SAVED_BYTES // tensor.element_size()
                ].numpy()
    return row


# Single operations, float32: the optimizers are made of these


def _f(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32)


def _fma(a: Any, b: Any, c: Any) -> np.ndarray:
    """Multiply and add with one rounding (long double holds the product exactly)."""
    return _f(np.multiply(a, b, dtype=np.longdouble) + np.asarray(c, np.longdouble))


#: Each: the operation on tensors x, y, z (z > 0), and ways to round it; v is a float32 scalar.
V = np.float32(0.001)
OPERATIONS: dict[str, tuple[Callable, dict[str, Callable]]] = {
    "mul(x, v)": (lambda x, y, z: x.mul(0.001), {"IEEE": lambda x, y, z: x * V}),
    "div(x, v)": (lambda x, y, z: x.div(0.001), {
        "IEEE": lambda x, y, z: x / V, "x*(1/v)": lambda x, y, z: x * (np.float32(1) / V),
        "x*(1/v), 1/v from float64": lambda x, y, z: x * np.float32(1 / 0.001)}),
    "div(x, z)": (lambda x, y, z: x.div(z), {"IEEE": lambda x, y, z: x / z}),
    "reciprocal(z)": (lambda x, y, z: z.reciprocal(), {"IEEE": lambda x, y, z: np.float32(1) / z}),
    "sqrt(z)": (lambda x, y, z: z.sqrt(), {"IEEE": lambda x, y, z: np.sqrt(z)}),
    "add(x, y, v)": (lambda x, y, z: x.add(y, alpha=0.001), {
        "x+v*y": lambda x, y, z: x + V * y, "fma(v,y,x)": lambda x, y, z: _fma(V, y, x)}),
    "lerp(x, y, v)": (lambda x, y, z: x.lerp(y, 0.001), {
        "x+v*(y-x)": lambda x, y, z: x + V * (y - x), "fma(v,y-x,x)": lambda x, y, z: _fma(V, y - x, x)}),
    "addcmul(x, y, z, v)": (lambda x, y, z: x.addcmul(y, z, value=0.001), {
        "x+(v*y)*z": lambda x, y, z: x + (V * y) * z, "x+v*(y*z)": lambda x, y, z: x + V * (y * z),
        "fma(v*y,z,x)": lambda x, y, z: _fma(V * y, z, x), "fma(v,y*z,x)": lambda x, y, z: _fma(V, y * z, x)}),
    "addcdiv(x, y, z, v)": (lambda x, y, z: x.addcdiv(y, z, value=0.001), {
        "x+(v*y)/z": lambda x, y, z: x + (V * y) / z, "x+v*(y/z)": lambda x, y, z: x + V * (y / z),
        "fma(v,y/z,x)": lambda x, y, z: _fma(V, y / z, x)}),
}  # fmt: skip
FOREACH: dict[str, Callable] = {
    "mul(x, v)": lambda x, y, z: torch._foreach_mul([x], 0.001)[0],
    "div(x, v)": lambda x, y, z: torch._foreach_div([x], 0.001)[0],
    "div(x, z)": lambda x, y, z: torch._foreach_div([x], [z])[0],
    "reciprocal(z)": lambda x, y, z: torch._foreach_reciprocal([z])[0],
    "sqrt(z)": lambda x, y, z: torch._foreach_sqrt([z])[0],
    "add(x, y, v)": lambda x, y, z: torch._foreach_add([x], [y], alpha=0.001)[0],
    "lerp(x, y, v)": lambda x, y, z: torch._foreach_lerp([x], [y], 0.001)[0],
    "addcmul(x, y, z, v)": lambda x, y, z: torch._foreach_addcmul([x], [y], [z], value=0.001)[0],
    "addcdiv(x, y, z, v)": lambda x, y, z: torch._foreach_addcdiv([x], [y], [z], value=0.001)[0],
}


def measure_operations(device: str, saved: Saved) -> list[dict[str, Any]]:
    """Compare single operations; in float32 also say which way of rounding a result has in how many elements."""
    rows = []
    for name, (plain, ways) in OPERATIONS.items():
        for form, operation in (("plain", plain), ("foreach", FOREACH[name])):
            row: dict[str, Any] = {"operation": name, "form": form, "differ": {}, "device": {}, "cpu": {}}
            rows.append(row)
            for dtype in DTYPES:
                x, y, z = (_flat(drawn) for drawn in values(dtype, 3, 1.0, SEED + 2))
                z = z.abs() + 2**-14  # a normal number in float16 too
                theirs = operation(x, y, z)
                ours = operation(*(t.to(device) for t in (x, y, z))).cpu()
                row["differ"][dtype] = compare(ours, theirs)
                saved[f"{dtype} {name} {form}"] = bits(ours)[: SAVED_BYTES // ours.element_size()].numpy()
                for way, formula in ways.items() if dtype == "float32" else ():
                    expected = torch.from_numpy(formula(x.numpy(), y.numpy(), z.numpy()))
                    row["device"][way] = compare(ours, expected)["differ"]
                    row["cpu"][way] = compare(theirs, expected)["differ"]
    return rows


# What else happens to gradients


def _unscale(gradients: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
    device = gradients[0].device
    inverse = torch.tensor(scale, device=device).double().reciprocal().float()
    found_inf = torch.zeros((), device=device)
    gradients = [g.clone() for g in gradients]
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, inverse)
    return [*gradients, found_inf]


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _clip(gradients: list[torch.Tensor], coefficient: torch.Tensor) -> list[torch.Tensor]:
    gradients = [g.clone() for g in gradients]
    torch._foreach_mul_(gradients, coefficient.to(gradients[0].device))
    return gradients


def _clip_usual(gradients: list[torch.Tensor], coefficient: torch.Tensor) -> list[torch.Tensor]:
    """Multiply as clip_grad_norm_ does if not told: by foreach on a GPU, one by one on the CPU."""
    if gradients[0].is_cuda:
        return _clip(gradients, coefficient)
    return [g.clone().mul_(coefficient) for g in gradients]


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return the wrapping sum over i of (2i + 1) * word i."""
    words = tensor.reshape(-1).view(torch.int32).to(torch.int64)
    return ((2 * torch.arange(words.numel(), device=words.device) + 1) * words).sum().reshape(1)


def gradient_checks() -> Iterator[tuple[str, str, Callable[..., torch.Tensor], list[torch.Tensor]]]:
    """Yield name, dtype, function of a list of tensors on some device, and that list on the CPU."""
    for dtype in DTYPES:
        gradients = next(values(dtype, 1, 1.0, SEED + 3))
        broken = [g.clone() for g in gradients]
        broken[0].view(-1)[5], broken[2][-1] = torch.inf, torch.nan
        coefficient = torch.tensor(0.7310586)
        if dtype != "float64":  # GradScaler serves no float64, and the CPU's operation refuses it
            for scale in (65536.0, 1234.5):
                yield f"unscale, scale {scale:g}", dtype, lambda g, s=scale: _flat(_unscale(g, s)), gradients
            yield "unscale, inf and NaN inside", dtype, lambda g: _flat(_unscale(g, 65536.0)), broken
            yield "found_inf of those", dtype, lambda g: _unscale(g, 65536.0)[-1].reshape(1), broken
        own = coefficient.to(getattr(torch, dtype))
        for factor in (coefficient,) if dtype == "float32" else (coefficient, own):
            by = str(factor.dtype).removeprefix("torch.")
            yield f"foreach_mul_ by {by}", dtype, lambda g, c=factor: _flat(_clip(g, c)), gradients
            yield f"clip_grad_norm_'s way, by {by}", dtype, lambda g, c=factor: _flat(_clip_usual(g, c)), gradients
    patterns = np.random.default_rng(SEED).integers(-(2**31), 2**31, 1 << 20).astype(np.int32)
    words = torch.from_numpy(patterns).view(torch.float32)
    usual = _flat(next(values("float32", 1, 1.0, SEED + 4)))
    for narrow in ("bfloat16", "float16"):
        to = getattr(torch, narrow)
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(to)
        yield f"float32 to {narrow}, random bit patterns", narrow, lambda g, d=to: g[0].to(d), [words]
        yield f"{narrow} to float32, all bit patterns", "float32", lambda g: g[0].float(), [every]
        for ranks in (2, 3, 6, 8):
            yield f"hook: to {narrow}, div_({ranks})", narrow, lambda g, d=to, n=ranks: g[0].to(d).div_(n), [usual]
    for ranks in (2, 3, 6, 8):
        yield f"no hook: div_({ranks})", "float32", lambda g, n=ranks: g[0].clone().div_(n), [usual]
    yield "int64 digest, usual values", "int64", lambda g: _digest(g[0]), [usual]
    yield "int64 digest, random bit patterns", "int64", lambda g: _digest(g[0]), [words]


def measure_checks(device: str) -> list[dict[str, Any]]:
    """Compare each of the above between the device and the CPU, and each device with itself."""
    rows = []
    for name, dtype, function, tensors in gradient_checks():
        row: dict[str, Any] = {"check": name, "dtype": dtype}
        try:
            theirs, theirs_again = function(tensors), function(tensors)
            there = [t.to(device) for t in tensors]
            ours, ours_again = function(there).cpu(), function(there).cpu()
        except (RuntimeError, NotImplementedError) as error:
            rows.append(row | {"refused": str(error).splitlines()[0]})
            continue
        rows.append(row | compare(ours, theirs) | {"nan_bits_equal": same(ours, theirs),
                    "device_repeats": same(ours, ours_again), "cpu_repeats": same(theirs, theirs_again)})  # fmt: skip
    return rows


def measure_fused(name: str, dtype: str, device: str, ours: tuple, theirs: tuple, scale: float) -> dict[str, Any]:
    """Compare the fused form's own unscaling: gradients as it leaves them, parameters, state; and a step to skip."""
    row: dict[str, Any] = {"optimizer": name, "dtype": dtype, "scale": scale}
    here = [run(name, dtype, "fused", device, *ours, grad_scale=scale) for _ in range(2)]
    there = [run(name, dtype, "fused", "cpu", *theirs, grad_scale=scale) for _ in range(2)]
    if isinstance(here[0], str) or isinstance(there[0], str):
        return row | {"refused": next(r for r in (here[0], there[0]) if isinstance(r, str))}
    row["after"] = {s: {k: compare(v, there[0][s][k]) for k, v in here[0][s].items()} for s in here[0]}
    for side, where, (start, gradients) in (("device", device, ours), ("cpu", "cpu", theirs)):
        skipped = run(name, dtype, "fused", where, start, gradients[:2], grad_scale=scale, skip_last=True)
        row[f"{side}_skip"] = {k: compare(v, skipped[1][k])["differ"] for k, v in skipped[2].items() if k != "gradient"}
    return row | {"device_repeats": same(*here), "cpu_repeats": same(*there)}


# Report


def cell(found: list[dict[str, Any]]) -> str:
    """Return "0", or what of several tensors is most: elements that differ, (99th percentile; largest distance)."""
    count, near, far = (max(f[key] for f in found) for key in ("differ", "ulps_99", "ulps_max"))
    return f"{count:,} ({near:,}; {far:,})" if count else "0"


def _pair_cells(after: dict[int, dict[str, Any]]) -> list[str]:
    cells = [cell([tensors["parameter"]]) for tensors in after.values()]
    for tensors in after.values():
        rest = [found for key, found in tensors.items() if key not in ("parameter", "gradient")]
        cells.append(cell(rest) if rest else "-")
    return cells


def _resolve(seen: dict[str, Any], form: str) -> str | None:
    """Return the form under which a form's results are kept; None if it was refused."""
    return seen[form].get("same_as", form) if "refused" not in seen[form] else None


def optimizer_table(rows: list[dict[str, Any]], dtype: str, last: int, against_default: bool) -> Iterator[str]:
    """Yield a table of one dtype, a row per optimizer and form; forms with the same bits on both sides share one."""
    yield f"\n### {dtype}\n"
    yield f"| optimizer | form | parameters, 1 | parameters, {last} | state, 1 | state, {last} | repeats |"
    yield "|---|---|---|---|---|---|---|"
    for row in (r for r in rows if r["dtype"] == dtype):
        groups: dict[tuple[str | None, str | None], list[str]] = {}
        for form, seen in row["device"].items():
            if seen.get("refused") != "none":
                other = "default" if against_default else form
                groups.setdefault((_resolve(row["device"], form), _resolve(row["cpu"], other)), []).append(form)
        for (ours, theirs), names in groups.items():
            begin = f"| {row['optimizer']} | {', '.join(names)} |"
            if ours is None or theirs is None:
                yield f"{begin} refused on {'the device' if ours is None else 'the CPU'} | | | | |"
                continue
            pair = next(p for p in row["pairs"] if (p["device"], p["cpu"]) == (ours, theirs))
            repeats = [row[side][form]["repeats"] for side, form in (("device", ours), ("cpu", theirs))]
            words = "yes" if all(repeats) else "device no" if not repeats[0] else "CPU no"
            yield f"{begin} {' | '.join(_pair_cells(pair['after']))} | {words} |"


def report(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables in Markdown."""
    last, about = results["steps"], results["about"]
    yield ", ".join(f"{key} {value}" for key, value in about.items())
    against = "default form" if about["device"] == "cpu" else "same form"
    yield f"\n{results['elements']:,} elements in {len(SHAPES)} tensors, each form against the CPU's {against}."
    yield "Cells: elements that differ (99th percentile of their distances in ULPs; largest)."
    for dtype in dict.fromkeys(row["dtype"] for row in results["optimizers"]):
        yield from optimizer_table(results["optimizers"], dtype, last, about["device"] == "cpu")
    yield "\n### Single operations, v = 0.001\n"
    yield f"| operation | form | device, float32 | CPU, float32 | {' | '.join(DTYPES)} |\n|---|---|---|---|---|---|---|---|"
    for row in results["operations"]:
        ways = [
            ", ".join(f"`{w}`" for w, n in row[side].items() if n == 0)
            or "near " + min((n, f"`{w}` ({n:,})") for w, n in row[side].items())[1]
            for side in ("device", "cpu")
        ]
        cells = [cell([row["differ"][dtype]]) for dtype in DTYPES]
        yield f"| `{row['operation']}` | {row['form']} | {' | '.join(ways + cells)} |"
    yield "\n### Gradients before the step\n"
    yield "| what | result | elements | differ | device repeats | CPU repeats |\n|---|---|---|---|---|---|"
    for row in results["checks"]:
        if "refused" in row:
            yield f"| {row['check']} | {row['dtype']} | refused: {row['refused']} | | | |"
            continue
        differ = cell([row]) + ("" if row["nan_bits_equal"] or row["differ"] else ", bits of NaN differ")
        words = ["yes" if row[f"{side}_repeats"] else "no" for side in ("device", "cpu")]
        yield f"| {row['check']} | {row['dtype']} | {row['elements']:,} | {differ} | {words[0]} | {words[1]} |"
    yield "\n### Fused optimizers that unscale (`grad_scale`), and what a skipped step changes\n"
    yield (
        f"| optimizer | dtype | scale | gradient, 1 | parameters, 1 | parameters, {last} | state, 1 | state, {last} "
        "| device changes | CPU changes | repeats |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in results["fused"]:
        begin = f"| {row['optimizer']} | {row['dtype']} | {row['scale']:g} |"
        if "refused" in row:
            yield f"{begin} refused: {row['refused']} | | | | | | | |"
            continue
        skips = [", ".join(k for k, n in row[f"{side}_skip"].items() if n) or "nothing" for side in ("device", "cpu")]
        repeats = ("yes" if row["device_repeats"] else "no") + ("" if row["cpu_repeats"] else ", CPU no")
        yield f"{begin} {cell([row['after'][1]['gradient']])} | {' | '.join(_pair_cells(row['after']) + skips)} | {repeats} |"


def measure(options: argparse.Namespace, saved: Saved) -> Iterator[dict[str, Any]]:
    """Measure all, yielding the results so far after each part; `saved` gets the beginnings of the device's results."""
    begin, device = time.monotonic(), options.device
    about = {"device": device, "torch": torch.__version__, "CPU capability": torch.backends.cpu.get_cpu_capability(),
             "threads": torch.get_num_threads()}  # fmt: skip
    if device.startswith("cuda"):
        about |= {"GPU": torch.cuda.get_device_name(), "CUDA": torch.version.cuda}
    results: dict[str, Any] = {
        "about": about, "steps": options.steps, "shapes": SHAPES, "elements": int(sum(np.prod(s) for s in SHAPES)),
        "inputs": {}, "optimizers": [], "fused": [],
    }  # fmt: skip
    results["operations"], results["checks"] = measure_operations(device, saved), measure_checks(device)
    yield results
    for dtype in options.dtypes:
        start = next(values(dtype, 1, 0.05, SEED))
        gradients = list(values(dtype, options.steps, 1.0, SEED + 1))
        theirs = (start, gradients)
        results["inputs"][dtype] = digests({0: {"start": _flat(start)}, options.steps: {"last": _flat(gradients[-1])}})
        ours = (start, [[t.to(device) for t in step] for step in gradients])
        for name in options.optimizers:
            if time.monotonic() - begin > options.limit_seconds:
                results["stopped"] = f"{options.limit_seconds} s were over before {name}, {dtype}"
                yield results
                return
            results["optimizers"].append(measure_optimizer(name, dtype, device, ours, theirs, saved))
            if "fused" in inspect.signature(getattr(torch.optim, OPTIMIZERS[name][0])).parameters:
                for scale in (1024.0, 1234.5):
                    results["fused"].append(measure_fused(name, dtype, device, ours, theirs, scale))
        results["seconds"] = round(time.monotonic() - begin, 1)
        yield results


def main() -> None:
    """Read the options, measure, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="device to hold against the CPU (default: cuda)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--limit-seconds", type=float, default=3600, help="begin no further optimizer after this")
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--save", type=Path, help="file (npz) for the beginning of each result of the device")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2")
    results: dict[str, Any] = {}
    saved: Saved = {}
    for results in measure(options, saved):
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.save:
        np.savez_compressed(options.save, **saved)
    print("\n".join(report(results)))
    if "stopped" in results:
        print(f"\nNot all was measured: {results['stopped']}.")


if __name__ == "__main__":
    main()
