# SPDX-License-Identifier: MIT
"""The training side: `flowcheck.group` and `flowcheck.attach`, all that a training script adds.

The hook writes the plan of the job before its first step, and ends every iteration with a small all-reduce, the step
record (`flowcheck.step_record`): what of this step the gradients do not show. It waits for nothing in a step: the record
is reduced while the next forward pass runs. Nothing here needs DPDK or a compiled module.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.amp.grad_scaler import OptState
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flowcheck import attempts, audit, describe, learning, refusals, step_record
from flowcheck import plan as plans
from flowcheck.errors import ConfigError, FlowCheckError
from flowcheck.run_folder import INITIAL_STATE, RunFolder
from flowcheck.step_record import FIELDS, RecordForm

__all__ = ["Attached", "attach", "group"]

_log = logging.getLogger(__name__)
#: Groups made here: nothing else is reduced on them.
_groups: list[dist.ProcessGroup] = []
#: Extra state travels in every record; what is larger belongs into full states, or follows from the iteration's number.
_MOST_EXTRA_BYTES = 1 << 20
#: Rounds of patterns at least and at most, and seconds to wait for what the shadow says of them.
_LEAST_ROUNDS, _MOST_ROUNDS, _LEARNING_S = 2, 4, 120.0


def group(backend: str | None = None, **options: Any) -> dist.ProcessGroup:
    """Return a process group of all ranks for DDP alone; every rank must call it.

    Args:
        backend: as for `torch.distributed.new_group`; the world's if None.
        options: more of `torch.distributed.new_group`.
    """
    made = dist.new_group(backend=backend, **options)
    _groups.append(made)
    return made


def attach(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    *,
    plan_url: str | Path,
    wire: Mapping[str, Any] | str | Path,
    run_id: str | None = None,
    scaler: torch.amp.GradScaler | None = None,
    buffers: Iterable[str] = (),
    extra_state: Mapping[str, Callable[[], torch.Tensor]] | None = None,
    varying: Iterable[str] | None = None,
    reductions: int = 1,
    audit_every: int = 100,
    full_state_every: int = 0,
    checkpoints: Mapping[str, Any] | None = None,
    wait_s: float = 60.0,
    required: bool = False,
) -> Attached:
    """Have a job shadowed from its next step on; every rank must call it, before the first step.

    A new run's iterations count from here: the first step after `attach` is iteration 1. If model and optimizer come from
    `flowcheck.load` or `flowcheck.resume`, the job goes on in the checkpoint's run: it is the run's next attempt, and its first
    step is the iteration after the checkpoint's.

    Args:
        model: wrapped in DistributedDataParallel, with `process_group=flowcheck.group()`.
        optimizer: of torch.optim, of this model's parameters; the only one that steps them.
        plan_url: the folder where plan and full states reach the shadow: a path or file:///path that both hosts see.
        wire: the parts of the plan that describe the network: `layout`, `connections`, `streams`; or a JSON file of them.
            With a layout of source `unlearned` there are no connections: the job reduces index patterns before its first
            and its second iteration, from which the shadow learns both.
        run_id: names the run; if None it is the run that was loaded, or one is made up. Another name than that of the run
            that was loaded makes a new run.
        scaler: the GradScaler that steps the optimizer, if one does.
        buffers: state_dict keys of buffers that change in training (BatchNorm statistics); their values on one rank, the
            record's contributor, travel in the record.
        extra_state: small tensors of fixed size to keep with every iteration (generator states, position in the data), by
            name; each is asked for after every step, on the contributor.
        varying: optimizer options whose value may change from step to step; None: all that are numbers. A change of any
            other raises.
        reductions: how often gradients are reduced per step: more than once only where they are accumulated without
            `no_sync`.
        audit_every: iterations between two audits of the whole state.
        full_state_every: rank 0 saves the whole state after every so many iterations, as a way on after a loss; 0: never.
        checkpoints: how the shadow keeps its directory, as the plan's `checkpoints` has it; None: as by default.
        wait_s: so long the job waits for the shadow, before the first step and, if it came, once more before the second.
        required: raise if no shadow comes in that time; else the job trains on, and a shadow that comes later begins
            from a full state.

    Raises:
        ConfigError: this training cannot be followed; the message names what of it. Or the ranks were loaded with
            different checkpoints.
        FlowCheckError: no shadow came, and one is required.
    """
    buffers, extra_state = list(buffers), dict(extra_state or {})
    refusals.check_model(model, _groups, buffers)
    on_wire = refusals.wire_dtype(model)
    refusals.check_optimizer(optimizer, model)
    if reductions < 1:
        raise ConfigError(f"reductions is {reductions}: expected at least 1")
    extra: dict[str, Callable[[], torch.Tensor]] = {
        key: lambda key=key: model.module.state_dict(keep_vars=True)[key] for key in buffers
    }
    if taken := sorted(set(extra_state) & set(model.module.state_dict())):
        raise ConfigError(f"extra_state: {taken[0]!r} is a key of the model's state_dict; name it in buffers")
    extra |= extra_state
    size = sum(read().nbytes for read in extra.values())
    if size > _MOST_EXTRA_BYTES:
        raise ConfigError(
            f"extra state has {size} bytes, more than the {_MOST_EXTRA_BYTES} that every record may carry: derive it from "
            "the iteration's number, or leave it to full states"
        )
    network = dict(wire) if isinstance(wire, Mapping) else _read_wire(Path(wire))
    goes_on = attempts.agreed(attempts.job_entry(optimizer, run_id))
    document = _document(
        model, optimizer, network, goes_on or {"run_id": run_id or f"run-{uuid.uuid4().hex[:12]}"}, on_wire=on_wire, extra=extra,
        buffers=buffers, varying=varying, reductions=reductions, audit_every=audit_every,
    )  # fmt: skip
    document = _from_rank_0(document | ({"checkpoints": dict(checkpoints)} if checkpoints else {}))
    folder = RunFolder(plan_url) if dist.get_rank() == 0 else None
    hook = Attached(
        model, optimizer, document, folder, scaler=scaler, extra=extra, reductions=reductions, on_wire=on_wire,
        full_state_every=full_state_every, wait_s=wait_s, required=required,
    )  # fmt: skip
    attempts.forget(optimizer)
    if folder is not None:
        folder.begin(hook.iteration)
        state = hook._state(hook.iteration)
        folder.save(INITIAL_STATE, lambda path: torch.save(state, path))
    hook._begin_run()
    return hook


def _read_wire(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the description of the network: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected an object with 'layout', 'connections' and 'streams'")
    return found


def _from_rank_0(value: Any) -> Any:
    """Return rank 0's value on every rank, over the world group."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _document(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, network: dict[str, Any], job: dict[str, Any], *,
    on_wire: str | None, extra: Mapping[str, Callable[[], torch.Tensor]], buffers: list[str], varying: Iterable[str] | None,
    reductions: int, audit_every: int,
) -> dict[str, Any]:  # fmt: skip
    """Return the plan as it is known before the first step: complete only if DDP's buckets will not change any more."""
    module = model.module
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parameters = dict(module.named_parameters())
    shapes = [(name, list(p.shape), describe.dtype_name(p.dtype)) for name, p in parameters.items()]
    buckets = describe.rebuilt_buckets(model)
    startup = network.pop("startup", None)
    loaded = attempts.loaded(optimizer)
    first_buckets = loaded.thrown_away if loaded else []
    thrown_away = describe.thrown_away_operations(model, first_buckets, on_wire) if first_buckets else []
    first = [describe.bucket(parameters, bucket, on_wire) for bucket in buckets or describe.first_buckets(model)]
    slots = {name: network.pop(name) for name in ("slots", "ring_bytes", "silence_ms") if name in network}
    unknown = set(network) - {"layout", "connections", "streams"}
    if unknown or "layout" not in network:
        what = f"{sorted(unknown)[0]!r} is not known" if unknown else "'layout' is missing"
        raise ConfigError(f"wire: {what}; expected 'layout', 'connections' and 'streams' as docs/plan.md has them")
    ring = network["layout"].get("ring") or list(range(dist.get_world_size()))
    if network["layout"].get("source") == "unlearned":
        startup = thrown_away = []  # that is on the wire, too
    first_step = job["resumed"]["iteration"] + 1 if "resumed" in job else 1
    receivers = {ring[(link + 1) % len(ring)] for stream in network.get("streams", ()) for link in stream["links"]}
    return {
        "format": "flowcheck-plan",
        "version": 1,
        "complete": buckets is not None and network["layout"].get("source") != "unlearned",
        "job": {
            **job,
            "world_size": dist.get_world_size(),
            "model_fingerprint": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
        },
        "shards": [
            {
                "name": "model",
                "startup": [*(describe.startup_operations(model) if startup is None else startup), *thrown_away],
                "revisions": [{"from_iteration": first_step, "reductions": reductions, "buckets": first}],
                "step_record": {
                    # Who receives on no mirrored edge: then each of those shows the whole record.
                    "contributor": max(set(ring) - receivers, default=0),
                    "extra": [
                        {"name": name, "dtype": describe.dtype_name(value.dtype), "shape": list(value.shape)}
                        for name, read in extra.items()
                        for value in (read(),)
                    ],
                    "audit": {"every": audit_every},
                },
                **network,
            }
        ],
        "state": describe.state_entries(module, buffers),
        "initial_state": {"source": "file", "path": INITIAL_STATE},
        "optimizer": describe.optimizer_entry(optimizer, names, varying),
        "arithmetic": describe.arithmetic(next(module.parameters()).device.type),
        **slots,
    }


class Attached:
    """A job that is shadowed; made by `attach`. `detach` ends it; `clip_grad_norm_` and `clip_grad_value_` stand for torch's.

    Attributes:
        iteration: the last one that was stepped.
        plan: the job plan, as far as it is known.
    """

    def __init__(
        self, model: DistributedDataParallel, optimizer: torch.optim.Optimizer, document: dict[str, Any],
        folder: RunFolder | None, *, scaler: torch.amp.GradScaler | None, extra: Mapping[str, Callable[[], torch.Tensor]],
        reductions: int, on_wire: str | None, full_state_every: int, wait_s: float, required: bool,
    ) -> None:  # fmt: skip
        """Set the hooks; `attach` is the way to make one."""
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._document, self._folder, self._extra = document, folder, extra
        self._reductions, self._on_wire = reductions, on_wire
        self._full_state_every, self._wait_s, self._required = full_state_every, wait_s, required
        self._parse()
        self._began = self.iteration = self.plan.first_step - 1
        self._form: RecordForm = self.plan.record_form
        record = self.plan.shard.step_record
        self._contributes = dist.get_rank() == record.contributor
        self._every, self._groups = record.audit.every, audit.group_names(self.plan)
        constants = {entry.key for entry in self.plan.state if entry.kind == "constant"}
        self._audited = {k: v for k, v in model.module.state_dict(keep_vars=True).items() if k in constants}
        self._audited |= dict(model.module.named_parameters())
        self._device = next(model.module.parameters()).device
        self._constant = self._constants()
        self._previous = torch.zeros(self._form.words, dtype=torch.int64, device=self._device)
        self._places = torch.arange(1, self._form.content + 1, device=self._device)
        self._buffers = [torch.zeros(self._form.elements, device=self._device) for _ in range(2)]
        self._pending: dist.Work | None = None
        self._reduced = 0
        self._synchronised = False
        self._rebuilt = len(self.plan.shard.revisions) > 1 or describe.rebuilt_buckets(model) is not None
        self._passes: list[learning.Pass] = []
        self._rounds = 0
        self._restart()
        self._handles = [
            model.register_forward_pre_hook(self._on_forward),
            model.module.register_forward_pre_hook(self._on_module_forward),
            next(p for p in model.module.parameters() if p.requires_grad).register_post_accumulate_grad_hook(
                self._on_gradient
            ),
        ]
        if scaler is not None and scaler.is_enabled():
            self._scaler_step, scaler.step = scaler.step, self._step_by_scaler
        else:
            self._scaler = None
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._after_step()))
        self._handles.append(register_optimizer_step_pre_hook(self._on_any_optimizer))

    def _parse(self) -> None:
        self.plan = plans.parse(json.dumps(self._document), "the plan of this job")

    def _begin_run(self) -> None:
        """Give the shadow what is known before the first step."""
        followed = self._publish()
        if self._document["shards"][0]["layout"]["source"] != "unlearned":
            return
        # A shadow that is not there learns nothing; the job then trains on, and none can follow it.
        if followed and (learned := self._learn()) and self._rebuilt:
            self._take(learned)

    def _publish(self) -> bool:
        """Give the plan to the shadow, and wait for it once; return whether it follows."""
        self._parse()
        followed = True
        if self._folder is not None:
            self._folder.save_plan(self._document)
            followed = self._folder.wait_for_shadow(self.plan, self._wait_s) if self._wait_s else False
        followed = _from_rank_0(followed)
        if not followed and self._wait_s:
            waited, self._wait_s = self._wait_s, 0.0  # a job waits in vain once
            self._complain(f"no shadow follows this job after {waited:g} seconds: flowcheck run PLAN --out DIR")
        return followed

    def _complain(self, what: str) -> None:
        if self._required:
            raise FlowCheckError(what)
        _log.warning("%s; training goes on", what)

    def _kinds(self) -> list[tuple[str, int]]:
        """Return the all-reduces of an iteration as it is now."""
        buckets = self._document["shards"][0]["revisions"][-1]["buckets"]
        return [*((bucket["dtype"], bucket["elements"]) for bucket in buckets), ("float32", self._form.elements)]

    def _learn(self) -> dict[str, Any] | None:
        """Reduce index patterns of this iteration's all-reduces until the shadow has learned from them; None if it has not."""
        ranks, rank = dist.get_world_size(), dist.get_rank(self._model.process_group)
        answer: dict[str, Any] | None = None
        for done in range(1, _MOST_ROUNDS + 1):
            steps = learning.round_of(self._kinds(), ranks, self._rounds)
            self._rounds += 1
            for step in steps:
                own = torch.from_numpy(learning.contribution(step, rank, ranks))
                own = own.view(torch.bfloat16) if step.dtype == "bfloat16" else own
                dist.all_reduce(own.to(self._device), group=self._model.process_group)
            self._passes += steps
            if done < _LEAST_ROUNDS:
                continue
            if self._folder is not None:
                passes = [step.document() for step in self._passes]
                answer = self._folder.learned(self.plan.job, passes, _LEARNING_S)
            answer = _from_rank_0(answer)
            if answer is None or "learned" in answer:
                break
        if answer and "learned" in answer:
            return answer["learned"]
        self._passes = []
        self._complain(f"the layout was not learned: {answer['error'] if answer else 'the shadow does not answer'}")
        return None

    def _take(self, learned: dict[str, Any]) -> None:
        """Complete the plan by what the shadow has learned."""
        shard = self._document["shards"][0]
        shard |= {name: learned[name] for name in ("layout", "connections", "startup")}
        if learned["before"]:
            first = 0 if len(shard["revisions"]) == 1 or self.iteration == self._began else 1
            known = [operation for operation in shard["revisions"][first]["before"] if operation["op"] == "all_reduce"]
            shard["revisions"][first]["before"] = known + learned["before"]
        self._document["complete"] = True
        self._publish()

    # -- what DDP does ----------------------------------------------------------------------------------------------

    def _on_forward(self, *_: object) -> None:
        self._synchronised = torch.is_grad_enabled() and self._model.require_backward_grad_sync

    def _on_gradient(self, _parameter: torch.Tensor) -> None:
        self._reduced += self._synchronised

    def _on_module_forward(self, *_: object) -> None:
        """In the forward pass in which DDP has rebuilt its buckets, before anything is reduced in them: complete the plan."""
        untouched = not self._reduced and self.iteration == self._began
        if self._rebuilt or not torch.is_grad_enabled() or untouched:
            return
        names = describe.rebuilt_buckets(self._model)
        if names is None:
            return
        self._rebuilt = True
        parameters = dict(self._model.module.named_parameters())
        buckets = [describe.bucket(parameters, bucket, self._on_wire) for bucket in names]
        revisions, rebuild = self._document["shards"][0]["revisions"], describe.rebuild_operations(names)
        reduced = [(bucket["dtype"], bucket["elements"]) for bucket in revisions[0]["buckets"]]
        if self.iteration == self._began:
            if self._reductions == 1:
                raise self._miscounted(2, 1)
            # Gradients are accumulated without no_sync: the first reduction of all was in the first buckets.
            before = [{"op": "all_reduce", "dtype": dtype, "elements": elements} for dtype, elements in reduced]
            revisions[0] |= {"before": before + rebuild, "reductions": self._reductions - 1, "buckets": buckets}
            later = {"from_iteration": self._began + 2, "reductions": self._reductions}
            revisions.append({**later, "buckets": buckets})
            self._reduced = 0
        else:
            first = {"from_iteration": self.iteration + 1, "reductions": self._reductions}
            revisions.append({**first, "before": rebuild, "buckets": buckets})
            iterations = self.iteration - self._began
            reduced = [*reduced * self._reductions, ("float32", self._form.elements)] * iterations
        if self._document["shards"][0]["layout"]["source"] != "unlearned":
            self._document["complete"] = True
            self._publish()
        elif self._passes:
            self._passes += [learning.Pass(*kind, "iteration") for kind in reduced]
            if learned := self._learn():
                self._take(learned)

    def _on_any_optimizer(self, other: torch.optim.Optimizer, *_: object) -> None:
        if other is self._optimizer:
            return
        ours = {id(parameter) for parameter in self._model.module.parameters()}
        if any(id(parameter) in ours for group in other.param_groups for parameter in group["params"]):
            raise FlowCheckError("another optimizer steps parameters of the attached model: only one can be followed")

    # -- the step ---------------------------------------------------------------------------------------------------

    def _constants(self) -> list[dict[str, Any]]:
        """Return what of the optimizer's options may not change."""
        groups = zip(self._optimizer.param_groups, self.plan.optimizer.groups, strict=True)
        return [
            {name: group[name] for name in planned.options if name not in planned.varying} for group, planned in groups
        ]

    def _before_step(
        self, _optimizer: torch.optim.Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        if len(arguments) > 1 or named.get("closure") is not None:  # the first is the optimizer
            raise FlowCheckError("the optimizer is stepped with a closure: such a step cannot be followed")
        self._begin()

    def _begin(self) -> None:
        """Note what this step is done with, before it is done."""
        iteration = self.iteration + 1
        expected = self.plan.revision(iteration).reductions
        if self._reduced != expected:
            raise self._miscounted(self._reduced, expected)
        if len(self._optimizer.param_groups) != len(self._constant) or (changed := self._changed()):
            what = changed if len(self._optimizer.param_groups) == len(self._constant) else "the number of param groups"
            raise FlowCheckError(
                f"iteration {iteration}: {what} has changed, which was not declared: attach(varying=[..]), or attach anew"
            )
        self._hyperparameters = self._form.varying(self._optimizer.param_groups) if self._contributes else []
        self._digests = None
        if audit.is_audited(iteration, self._every, self._began + 1):
            self._digests = audit.digests(self._groups, self._audited, self._optimizer)

    def _miscounted(self, found: int, expected: int) -> FlowCheckError:
        return FlowCheckError(
            f"iteration {self.iteration + 1}: gradients were reduced {found} times since the last step, expected {expected}: "
            "say so to attach (reductions=), or step once per backward pass"
        )

    def _changed(self) -> str | None:
        for number, (group, constant) in enumerate(zip(self._optimizer.param_groups, self._constant, strict=True)):
            for name, value in constant.items():
                if group[name] != value or type(group[name]) is not type(value):
                    return f"{name} of param group {number} ({value!r}, now {group[name]!r})"
        return None

    def _step_by_scaler(self, optimizer: torch.optim.Optimizer, *arguments: Any, **named: Any) -> Any:
        """Stand for `GradScaler.step`: no hook of the optimizer runs where the scaler skips the step."""
        if optimizer is not self._optimizer:
            return self._scaler_step(optimizer, *arguments, **named)
        state = self._scaler._per_optimizer_states[id(optimizer)]
        in_step = state["stage"] is OptState.READY and getattr(optimizer, "_step_supports_amp_scaling", False)
        self._begin()
        self._flags |= step_record.UNSCALED | (step_record.UNSCALED_IN_STEP if in_step else 0)
        self._late["scale"] = self._scaler.scale(torch.ones((), device=self._device))
        result = self._scaler_step(optimizer, *arguments, **named)
        found = [value.to(self._device) for value in state["found_inf_per_device"].values()]
        self._skipped = sum(found) != 0
        self._after_step()
        return result

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Clip the gradients of all of the optimizer's parameters by their total norm, as torch does; return that norm.

        With a GradScaler, unscale the gradients first (`scaler.unscale_`).
        """
        gradients = self._clipped("clip_grad_norm_")
        norm = torch.nn.utils.get_total_norm(gradients, norm_type, error_if_nonfinite)
        coefficient = torch.clamp(float(max_norm) / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, coefficient)
        self._flags |= step_record.CLIPPED_BY_NORM
        self._late["clip_coefficient"] = coefficient
        return norm

    def clip_grad_value_(self, clip_value: float) -> None:
        """Clamp the gradients of all of the optimizer's parameters, as torch does."""
        gradients = self._clipped("clip_grad_value_")
        torch._foreach_clamp_min_(gradients, -float(clip_value))
        torch._foreach_clamp_max_(gradients, float(clip_value))
        self._flags |= step_record.CLIPPED_BY_VALUE
        self._late["clip_value"] = torch.tensor(float(clip_value), dtype=torch.float64)

    def _clipped(self, what: str) -> list[torch.Tensor]:
        if self._flags & (step_record.CLIPPED_BY_NORM | step_record.CLIPPED_BY_VALUE):
            raise FlowCheckError(
                f"{what}: the gradients of this step are clipped already; only one clipping can be followed"
            )
        if self._scaler is not None:
            stage = self._scaler._per_optimizer_states[id(self._optimizer)]["stage"]
            if stage is not OptState.UNSCALED:
                raise FlowCheckError(f"{what}: the gradients are still scaled: call scaler.unscale_(optimizer) first")
        return [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]

    def note_loss(self, loss: torch.Tensor) -> None:
        """Have the next record carry this rank's loss, if this rank fills the record."""
        self._flags |= step_record.HAS_LOSS
        self._late["loss"] = loss.detach()

    def _restart(self) -> None:
        """Forget what was noted of a step."""
        self._flags = 0
        self._late: dict[str, torch.Tensor] = {}
        self._skipped: torch.Tensor | None = None

    @torch.no_grad()
    def _after_step(self) -> None:
        """Send this step's record; it is reduced beside whatever comes next."""
        self.iteration += 1
        if self._pending is not None:
            self._pending.wait()  # it was issued before the gradients that have just been reduced
        record = self._buffers[self.iteration % 2].zero_()
        form = self._form
        if self._contributes:
            words = self._words()
            record[: form.words] = words
            record[form.words : 2 * form.words] = self._previous
            self._previous = words
        if self._digests is not None:
            digits = torch.stack(step_record.split_digest(self._digests, form.bits), -1)
            weighted = digits * form.weight(dist.get_rank(self._model.process_group))
            record[2 * form.words :] = torch.stack([digits, weighted], 1).flatten()
        self._pending = dist.all_reduce(record, group=self._model.process_group, async_op=True)
        self._reduced = 0
        self._restart()
        if self._folder is not None and self._full_state_every and self.iteration % self._full_state_every == 0:
            self._folder.save_state(self._state(self.iteration))

    def _words(self) -> torch.Tensor:
        """Return the words of this step, int64; what only the device knows stays there."""
        form = self._form
        flags = self._flags | (step_record.AUDITED if self._digests is not None else 0)
        known = form.fixed(self.iteration, self._reduced, flags) + self._hyperparameters
        content = torch.zeros(form.content, dtype=torch.int64, device=self._device)
        content[: len(known)] = self._sent(torch.tensor(known))
        for name, value in self._late.items():
            bits = self._sent(value).double().reshape(1).view(torch.int64)
            at, count = FIELDS[name]
            content[at : at + count] = torch.cat([bits >> shift & 0xFFFF for shift in range(0, 64, 16)])
        if self._skipped is not None:
            content[FIELDS["skipped"][0]] = self._skipped
        at = form.extra_at
        for (_, size), read in zip(form.extra, self._extra.values(), strict=True):
            data = self._sent(read().detach().contiguous().reshape(-1).view(torch.uint8)).to(torch.int64)
            data = torch.nn.functional.pad(data, (0, size % 2)).reshape(-1, 2)
            content[at : at + len(data)] = data[:, 0] + 256 * data[:, 1]
            at += len(data)
        sums = [total >> shift & 0xFFFF for total in step_record.checksum(content, self._places) for shift in (0, 16)]
        return torch.cat([content, torch.stack(sums)])

    def _sent(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the model's device; the host does not wait until it is there.

        From pageable memory a copy would wait for all that the device has yet to do: the step, and the passes before it.
        """
        if self._device.type == "cuda" and value.device.type == "cpu":
            return value.pin_memory().to(self._device, non_blocking=True)  # torch keeps it until the copy is done
        return value.to(self._device)

    def _state(self, iteration: int) -> dict[str, Any]:
        """Return the whole state as it is now, that after an iteration: it can be resumed from."""
        in_model, job = set(self._model.module.state_dict()), self.plan.job
        from_before = job.resumed is not None and iteration == self._began
        return {
            "model": self._model.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "extra": {name: read().detach().clone() for name, read in self._extra.items() if name not in in_model},
            "iteration": iteration,
            "run_id": job.run_id,
            "attempt": job.resumed.attempt if from_before else job.attempt,
            "latest_attempt": job.attempt,
        }

    def detach(self) -> None:
        """Wait until the last record has left, and take the hooks away; may be called again."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._scaler is not None:
            self._scaler.step = self._scaler_step
            self._scaler = None

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()
