# SPDX-License-Identifier: MIT
"""The training state of a plan: parameters, constants and the trainer's optimizer, stepped from slot data.

The optimizer is the trainer's own class of torch.optim in the trainer's form; nothing is computed but what it computes, by
itself or, where that is proven to give the same bits, by `updater.blocks`. State is on the CPU.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowcheck.errors import CheckpointError, ConfigError
from flowcheck.optimizer_state import load_optimizer
from flowcheck.plan import DTYPE_BYTES, Plan, Revision
from flowcheck.step_record import Step
from updater.blocks import Blocks

if TYPE_CHECKING:
    from updater.snapshot import State

__all__ = ["ModelState", "bytes_of", "read_param_groups", "torch_dtype"]

#: Options that decide how a step is done; the plan says that once, as the optimizer's form.
_NOT_OPTIONS = {"foreach", "fused", "capturable", "differentiable"}


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a plan's dtype name."""
    return getattr(torch, name)


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Return the bytes of a contiguous CPU tensor as a flat uint8 array over the same memory."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def read_param_groups(text: str) -> list[dict[str, Any]]:
    """Return an optimizer's param groups that were written as JSON, which has no tuples; torch's only list is the parameters'."""
    groups = json.loads(text)
    for group in groups:
        group.update({k: tuple(v) for k, v in group.items() if isinstance(v, list) and k != "params"})
    return groups


def _like(old: float | tuple[float, ...], new: float | tuple[float, ...]) -> float | tuple[float, ...]:
    """Return a number, or numbers, of a record as an int where the script has one: so that nothing but its value can differ."""
    if isinstance(new, tuple):
        return tuple(map(_like, old, new))
    return int(new) if isinstance(old, int) and new.is_integer() else new


def _copies(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    return [gradient.clone() for gradient in gradients]


def _unscaled(scale: float, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return what GradScaler.unscale_ makes of gradients, which takes the reciprocal in float64."""
    inverse = torch.tensor(scale).double().reciprocal().float()
    torch._amp_foreach_non_finite_check_and_unscale_(made := _copies(gradients), torch.zeros(()), inverse)
    return made


def _multiplied(coefficient: float, gradients: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return what clip_grad_norm_ makes of gradients."""
    dtype = functools.reduce(torch.promote_types, {gradient.dtype for gradient in gradients})
    return torch._foreach_mul(gradients, torch.tensor(coefficient, dtype=dtype))


def _clamped(value: float, gradients: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return what clip_grad_value_ makes of gradients."""
    return torch._foreach_clamp_max(torch._foreach_clamp_min(gradients, -value), value)


class ModelState:
    """Model and optimizer of a plan, at first without values: `load_*` gives them, then `step` moves them on.

    One thread at a time. `model` maps every state_dict key to its tensor; tied keys share one.
    """

    def __init__(self, plan: Plan) -> None:
        """Allocate the state; ConfigError if torch.optim refuses the optimizer as the plan has it."""
        self.plan = plan
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self.model: dict[str, torch.Tensor] = {}
        for entry in plan.state:
            tensor = self._parameters.get(entry.parameter) if entry.parameter else None
            if tensor is None:
                tensor = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
            if entry.kind == "parameter" and entry.parameter not in self._parameters:
                tensor = self._parameters[entry.parameter] = torch.nn.Parameter(
                    tensor, requires_grad=tensor.is_floating_point()
                )
            self.model[entry.key] = tensor
        record = plan.shard.step_record
        #: Extra state that is no key of the model; after every step as its record brings it.
        self.extra = {
            entry.name: torch.zeros(entry.shape, dtype=torch_dtype(entry.dtype))
            for entry in (record.extra if record else ())
            if entry.name not in self.model
        }
        self.optimizer = self._make_optimizer()
        self._blocks = Blocks(self.optimizer)
        self._has_extra = True

    def part(self, names: set[str], *, first: bool) -> ModelState:
        """Return a state of some of the parameters alone, which are these very ones, and so is what the optimizer keeps of them.

        Until the next `load_*` it may be stepped beside others that have none of them. The `first` has the extra state.
        """
        part = object.__new__(ModelState)
        part.plan, part.model, part.extra = self.plan, self.model, self.extra
        part._parameters = {name: p for name, p in self._parameters.items() if name in names}
        part._has_extra = first
        part.optimizer = part._make_optimizer()
        part._blocks = Blocks(part.optimizer)
        part.optimizer.state = self.optimizer.state
        for ours, whole in zip(part.optimizer.param_groups, self.optimizer.param_groups, strict=True):
            ours.update({name: value for name, value in whole.items() if name != "params"})
        return part

    def _make_optimizer(self) -> torch.optim.Optimizer:
        chosen = self.plan.optimizer
        kind = getattr(torch.optim, chosen.class_name)
        form = {} if chosen.form == "default" else {chosen.form: True}
        groups = [
            {**g.options, "params": [self._parameters[name] for name in g.parameters if name in self._parameters]}
            for g in chosen.groups
        ]
        try:
            probe = kind([torch.nn.Parameter(torch.zeros(1))], **({"lr": 0.0} if chosen.class_name == "SGD" else {}))
            known = set(probe.defaults) - _NOT_OPTIONS
            for number, group in enumerate(chosen.groups):
                for name in sorted(set(group.options) - known):
                    raise ConfigError(
                        f"plan: optimizer.groups[{number}].options: {name!r} is no option of {chosen.class_name}; "
                        f"expected some of {', '.join(sorted(known))}"
                    )
            # The constructor checks the first group's values with its own keywords; the others are checked alike.
            for group in chosen.groups:
                kind([torch.nn.Parameter(torch.zeros(1))], **group.options)
            return kind(groups, **form)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"plan: optimizer: torch.optim.{chosen.class_name} refuses it: {error}") from error

    @property
    def audited(self) -> dict[str, torch.Tensor]:
        """The tensors that an audit digests, by the names of `flowcheck.audit.group_names`."""
        constants = {entry.key: self.model[entry.key] for entry in self.plan.state if entry.kind == "constant"}
        return {**constants, **self._parameters}

    @property
    def bytes(self) -> int:
        """Bytes of the model's tensors, tied ones once."""
        return sum(tensor.nbytes for tensor in {id(t): t for t in self.model.values()}.values())

    def load_broadcast(self, content: np.ndarray) -> None:
        """Take the model's values from the job's own broadcast, as the initial-state slot holds it."""
        for key, offset in self.plan.initial_offsets.items():
            target = bytes_of(self.model[key])
            target[:] = content[offset : offset + target.size]

    def load_model(self, model: dict[str, torch.Tensor], origin: str) -> None:
        """Take the model's values from a state_dict; CheckpointError unless keys, shapes and dtypes are the plan's."""
        if set(model) != set(self.model):
            odd = sorted(set(model) ^ set(self.model))[0]
            raise CheckpointError(
                f"{origin}: key {odd!r} is {'not in the plan' if odd in model else 'missing'}", origin
            )
        for key, target in self.model.items():
            found = model[key]
            if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (target.shape, target.dtype):
                what = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
                raise CheckpointError(
                    f"{origin}: {key!r} is {what}, expected {target.dtype} {list(target.shape)}", origin
                )
            with torch.no_grad():
                target.copy_(found)

    def load_optimizer(self, optimizer: dict, origin: str) -> None:
        """Take the optimizer's state; CheckpointError if it does not fit the plan's groups."""
        try:
            load_optimizer(self.optimizer, optimizer)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{origin}: the optimizer's state does not fit the plan: {error}", origin) from error

    def load_state(self, state: State, origin: str) -> None:
        """Take all of a training state; CheckpointError if it is not of this plan."""
        self.load_model(state.model, origin)
        self.load_optimizer(state.optimizer, origin)
        self.load_extra(state.extra, origin)

    def load_extra(self, extra: dict[str, torch.Tensor], origin: str) -> None:
        """Take extra state, what of it there is; CheckpointError if it does not fit the plan."""
        for name, found in extra.items():
            target = self.extra.get(name)
            if target is None or (found.shape, found.dtype) != (target.shape, target.dtype):
                raise CheckpointError(f"{origin}: extra state {name!r} does not fit the plan", origin)
            target.copy_(found)

    @property
    def spreads(self) -> bool:
        """Whether `step` spreads every parameter over torch's threads by itself."""
        return self._blocks.root is not None

    def step(self, slot: np.ndarray, revision: Revision, step: Step | None = None) -> None:
        """Apply one iteration's gradient.

        `slot` is the slot data, writable, uint8; it is only read. A parameter in no bucket keeps its gradient None.
        Where wire and parameter dtype agree, the optimizer reads the slot itself. `step` is what the step record says of it.
        """
        for place, gradient in self._gradients(slot, revision):
            parameter = self._parameters.get(place)
            if parameter is not None:  # else another part's
                parameter.grad = gradient.to(parameter.dtype)
        if step is None:
            self._update()
        else:
            self._step_as(step)
        for parameter in self._parameters.values():
            parameter.grad = None

    def _update(self, coefficient: float | None = None) -> None:
        """Step by the gradients that the parameters have, multiplied by a coefficient."""
        if self._blocks.step(coefficient):
            return
        if coefficient is not None:
            self._change(functools.partial(_multiplied, coefficient))
        elif self.plan.optimizer.form == "foreach" and any(g.get("nesterov") for g in self.optimizer.param_groups):
            self._change(_copies)  # torch changes these in place
        self.optimizer.step()

    def _change(self, change: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]) -> None:
        """Put what is made of the gradients in their place; they themselves are only read, since they lie in a slot."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if parameters:
            for parameter, gradient in zip(parameters, change([p.grad for p in parameters]), strict=True):
                parameter.grad = gradient

    def _gradients(self, slot: np.ndarray, revision: Revision) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each reduced parameter's name and gradient, as a view of the slot in wire dtype."""
        for bucket, begin in zip(revision.buckets, revision.bucket_offsets, strict=True):
            width = DTYPE_BYTES[bucket.dtype]
            for place in bucket.parameters:
                low = begin + place.offset * width
                gradient = torch.from_numpy(slot[low : low + place.elements * width])
                yield place.name, gradient.view(torch_dtype(bucket.dtype)).reshape(place.shape)

    def _step_as(self, step: Step) -> None:
        """Do what the trainer did between reduction and step, with torch's own operations, then step."""
        for number, values in step.hyperparameters.items():
            group = self.optimizer.param_groups[number]
            group.update({name: _like(group[name], value) for name, value in values.items()})
        fused, coefficient = self.plan.optimizer.form == "fused", step.clip_coefficient
        if step.scale is not None:
            self._change(_copies if step.unscaled_in_step else functools.partial(_unscaled, step.scale))
        if coefficient is not None and (step.clip_value is not None or fused):
            self._change(functools.partial(_multiplied, coefficient))
            coefficient = None
        if step.clip_value is not None:
            self._change(functools.partial(_clamped, step.clip_value))
        if step.scale is not None and fused:
            # A fused optimizer is told, and skips the step by itself: so it makes its state even then.
            self.optimizer.grad_scale = torch.tensor(step.scale) if step.unscaled_in_step else None
            self.optimizer.found_inf = torch.tensor(float(step.skipped))
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf
        elif not step.skipped:
            self._update(coefficient)
        for name, content in step.extra.items() if self._has_extra else ():
            bytes_of(self.model[name] if name in self.model else self.extra[name])[:] = np.frombuffer(content, np.uint8)

    def has_non_finite(self, slot: np.ndarray, revision: Revision) -> bool:
        """Whether a gradient that the optimizer would step by is not finite: what makes a GradScaler skip a step."""
        stepped = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        for place, gradient in self._gradients(slot, revision):
            parameter = self._parameters[place]
            if id(parameter) in stepped and not bool(gradient.to(parameter.dtype).isfinite().all()):
                return True
        return False
