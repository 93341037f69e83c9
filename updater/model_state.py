# SPDX-License-Identifier: MIT
"""The training state of a plan: parameters, constants and the trainer's optimizer, stepped from slot data.

The optimizer is the trainer's own class of torch.optim in the trainer's form; nothing is computed here but what it
computes. State is on the CPU.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowcheck.errors import CheckpointError, ConfigError
from flowcheck.optimizer_state import load_optimizer
from flowcheck.plan import DTYPE_BYTES, Plan, Revision
from flowcheck.step_record import Step

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
        # torch's foreach forms change gradients in place (SGD with nesterov): they must not do so in a slot.
        self._copies_gradients = plan.optimizer.form == "foreach"
        self._has_extra = True

    def part(self, names: set[str], *, first: bool) -> ModelState:
        """Return a state of some of the parameters alone, which are these very ones, and so is what the optimizer keeps of them.

        Until the next `load_*` it may be stepped beside others that have none of them. The `first` has the extra state.
        """
        part = object.__new__(ModelState)
        part.plan, part.model, part.extra = self.plan, self.model, self.extra
        part._parameters = {name: p for name, p in self._parameters.items() if name in names}
        part._copies_gradients, part._has_extra = self._copies_gradients, first
        part.optimizer = part._make_optimizer()
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

    def step(self, slot: np.ndarray, revision: Revision, step: Step | None = None) -> None:
        """Apply one iteration's gradient.

        `slot` is the slot data, writable, uint8; it is only read. A parameter in no bucket keeps its gradient None.
        Where wire and parameter dtype agree, the optimizer reads the slot itself. `step` is what the step record says of it.
        """
        changes = step is not None and any(
            value is not None for value in (step.clip_coefficient, step.clip_value, step.scale)
        )
        for place, gradient in self._gradients(slot, revision):
            parameter = self._parameters.get(place)
            if parameter is None:
                continue  # another part's
            if self._copies_gradients or changes or gradient.dtype != parameter.dtype:
                gradient = gradient.to(parameter.dtype, copy=True)
            parameter.grad = gradient
        if step is None:
            self.optimizer.step()
        else:
            self._step_as(step)
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self._parameters.values():
            parameter.grad = None

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
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        fused = self.plan.optimizer.form == "fused"
        if step.scale is not None and not step.unscaled_in_step:
            # GradScaler.unscale_ takes the reciprocal in float64.
            inverse = torch.tensor(step.scale).double().reciprocal().float()
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, torch.zeros(()), inverse)
        if step.clip_coefficient is not None:
            dtype = functools.reduce(torch.promote_types, {gradient.dtype for gradient in gradients})
            torch._foreach_mul_(gradients, torch.tensor(step.clip_coefficient, dtype=dtype))
        if step.clip_value is not None:
            torch._foreach_clamp_min_(gradients, -step.clip_value)
            torch._foreach_clamp_max_(gradients, step.clip_value)
        if step.scale is not None and fused:
            # A fused optimizer is told, and skips the step by itself: so it makes its state even then.
            self.optimizer.grad_scale = torch.tensor(step.scale) if step.unscaled_in_step else None
            self.optimizer.found_inf = torch.tensor(float(step.skipped))
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf
        elif not step.skipped:
            self.optimizer.step()
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
