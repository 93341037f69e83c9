# SPDX-License-Identifier: MIT
"""Whether the hook is right where the ranks are on GPUs: it changes nothing, and what it says is what was done.

The example GPT is trained in four kinds of arithmetic, gradients clipped by norm, by value, and not at all in turn: twice
without the hook, with it, with it where nothing waits for the device, and from one of its full states. Compared is every
bit: states, step records, digests, and the library's own log of its collectives with the plan. Prints a table; exits with
1 if anything does not hold. `--device cpu --backend gloo` runs without a GPU, and without that log.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

import flowcheck
from bench.nccl_job import KINDS, Job, Records, Waits, about, arguments, on_ranks
from flowcheck import audit
from flowcheck import plan as plans
from flowcheck.files import read_torch
from flowcheck.step_record import Step
from flowcheck.training import Attached
from workload_gen.truth import digest

#: Iterations; a full state after each EVERY-th, and the one that is gone on from.
STEPS, EVERY, RESUMED = 12, 4, 8
#: Every so many are audited, beside the first three.
AUDITED = 5
CLIP_NORM, CLIP_VALUE = 0.5, 0.01
#: NCCL's numbers of its data types (nccl.h), and the line that it logs of a collective.
_TYPES = {"2": "int32", "4": "int64", "6": "float16", "7": "float32", "8": "float64", "9": "bfloat16"}
_LOGGED = re.compile(r"(AllReduce|AllGather|Broadcast): opCount .* count (\d+) datatype (\d+) .* comm (0x[0-9a-f]+)")
_OPERATIONS = {"AllReduce": "all_reduce", "AllGather": "all_gather", "Broadcast": "broadcast"}


def state_digest(job: Job) -> str:
    """Return a digest of the whole state."""
    return digest({"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict()})


def audited_on_cpu(job: Job, groups: list[list[str]]) -> list[int]:
    """Return the audit's digests of the state, computed on the CPU from a copy of it."""
    copies, state = {}, {}
    for name, parameter in job.model.named_parameters():
        copies[name] = parameter.detach().cpu()
        state[copies[name]] = {key: value.cpu() for key, value in job.optimizer.state[parameter].items()}
    return [value % 2**64 for value in audit.digests(groups, copies, SimpleNamespace(state=state)).tolist()]


def clip(job: Job, iteration: int, hook: Attached | None) -> torch.Tensor | None:
    """Clip in this iteration's way, by the hook or by torch; return the norm where it is by norm."""
    way, parameters = iteration % 3, list(job.model.parameters())
    if way and job.kind.scaled:
        job.scaler.unscale_(job.optimizer)
    if way == 1:
        return hook.clip_grad_norm_(CLIP_NORM) if hook else torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
    if way == 2 and hook:
        hook.clip_grad_value_(CLIP_VALUE)
    elif way == 2:
        torch.nn.utils.clip_grad_value_(parameters, CLIP_VALUE)
    return None


def bare(job: Job) -> str:
    """Train without the hook; return the digest of the last state."""
    for iteration in range(1, STEPS + 1):
        job.backward(iteration)
        clip(job, iteration, None)
        job.step()
    return state_digest(job)


def noted_step(job: Job, iteration: int, hook: Attached, first: int) -> tuple[Step, list[int] | None]:
    """Do an iteration; return what its record must say, and the digests where it is audited."""
    loss = job.backward(iteration)
    hook.note_loss(loss)
    norm, scale = clip(job, iteration, hook), job.scaler.get_scale()
    said = [loss.item()]
    dist.broadcast_object_list(said)  # rank 0 fills the record
    audited = audit.is_audited(iteration, AUDITED, first)
    digests = audited_on_cpu(job, audit.group_names(hook.plan)) if audited else None
    group = job.optimizer.param_groups[0]
    varying = {0: {name: group[name] for name in hook.plan.optimizer.groups[0].varying}}
    job.step()
    step = Step(iteration, 1, varying, job.scaler.get_scale() < scale, loss=said[0], audited=audited)
    if job.kind.scaled:
        step = replace(step, scale=scale, unscaled_in_step=job.kind.fused and iteration % 3 == 0)
    if norm is not None:
        step = replace(step, clip_coefficient=torch.clamp(CLIP_NORM / (norm + 1e-6), max=1.0).item())
    return replace(step, clip_value=CLIP_VALUE) if iteration % 3 == 2 else step, digests


def followed(job: Job, folder: Path, noted: bool) -> tuple[dict[str, bool], dict[int, str], dict[str, Any]]:
    """Train on with the hook; return what holds, digests of the states, and the scaler's state after RESUMED.

    Unless it is `noted`, nothing but the job itself waits for the device, and only the last state is digested.
    """
    begun, said, states, scaler, waited = state_digest(job), [], {}, {}, set()
    with Records() as records, job.attach(folder, audit_every=AUDITED, full_state_every=EVERY) as hook:
        first = hook.iteration + 1
        for iteration in range(first, STEPS + 1):
            if noted:
                said.append(noted_step(job, iteration, hook, first))
                states[iteration] = state_digest(job)
            else:
                with Waits() as waits:
                    job.backward(iteration)
                    clip(job, iteration, hook)
                    job.step()
                if iteration % EVERY and not audit.is_audited(iteration, AUDITED, first):
                    waited |= waits.places
            if iteration == RESUMED:
                scaler = job.scaler.state_dict()
    states[STEPS], form = state_digest(job), hook.plan.record_form
    found = [copy.cpu().numpy() for copy in records.copies]
    read = [form.read(record, iteration) for iteration, record in enumerate(found, first)]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, [hashlib.sha256(record).hexdigest() for record in found])
    holds = {
        "each step has a whole record, the same on all ranks": len(read) == STEPS + 1 - first
        and every == every[:1] * len(every)
    }
    if not noted and job.device.type == "cuda":
        holds["in a step, the hook does not wait for the device"] = not waited
        print(*sorted(f"{folder}: waits at {place}\n" for place in waited), sep="", end="", file=sys.stderr)
    if noted:
        wrong = [(a, b) for a, (b, _) in zip(read, said, strict=True) if repr(a) != repr(b)]  # a NaN is not itself
        for record, done in wrong[:1] if dist.get_rank() == 0 else ():
            print(f"{folder}, the first wrong record:\n  says {record}\n  not  {done}", file=sys.stderr)
        holds["records say what was done"] = not wrong
        holds["digests in them are those of the state on the CPU"] = all(
            not form.audit(record, digests) for record, (_, digests) in zip(found, said, strict=True) if digests
        )
        holds |= folder_holds(folder, begun, states, first, job.device) if dist.get_rank() == 0 else {}
        if job.kind.scaled and first == 1:
            holds["some steps are skipped, not all"] = 0 < sum(step.skipped for step, _ in said) < STEPS
    return holds, states, scaler


def folder_holds(folder: Path, begun: str, states: dict[int, str], first: int, device: torch.device) -> dict[str, bool]:
    """Return whether the plan says where it was, and the saved states are those that were."""
    plan = plans.load(folder / "plan.json")
    paths = {n: folder / "states" / f"state-{n:06}.pt" for n in range(first, STEPS + 1) if n % EVERY == 0}
    return {
        "the plan is complete and names the device": plan.complete and plan.arithmetic.device == device.type,
        "initial and full states are the job's": digest(read_torch(folder / "initial.pt")) == begun
        and all(digest(read_torch(path)) == states[number] for number, path in paths.items()),
    }


def check(name: str, folder: Path, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return what holds of a kind; rank 0 adds the collectives that its plans say."""
    kind, folder = KINDS[name], folder / name

    def job() -> Job:
        return Job(kind, options.parameters, device, bucket_mb=4 * options.parameters / 2**20 / 3, growth_interval=2)

    end = bare(job())
    holds = {"the job repeats itself": bare(job()) == end}
    found, states, scaler = followed(job(), folder, True)
    holds |= found | {"with the hook, the state has the bits of without": states[STEPS] == end}
    found, last, _ = followed(job(), folder / "free", False)
    waits = "in a step, the hook does not wait for the device"
    holds |= {waits: found.pop(waits)} if waits in found else {}
    holds["the same where nothing waits for the device"] = all(found.values()) and last[STEPS] == end
    again, path = job(), folder / "states" / f"state-{RESUMED:06}.pt"
    dist.barrier()
    at = flowcheck.resume(again.ddp, again.optimizer, path, lambda: again.backward(1))
    again.scaler.load_state_dict(scaler)
    found, resumed, _ = followed(again, folder / "resumed", True)
    same = resumed == {number: state for number, state in states.items() if number > RESUMED}
    holds["resumed from a full state, the same"] = at == RESUMED and same and all(found.values())
    places = [folder, folder / "free", folder / "resumed"] if dist.get_rank() == 0 else []
    return {"holds": holds, "collectives": [collectives(plans.load(place / "plan.json")) for place in places]}


def collectives(plan: plans.Plan) -> list[list[Any]]:
    """Return what a plan says that is done on DDP's group, up to the last iteration."""
    out = list(plan.shard.startup)
    for iteration in range(plan.first_step, STEPS + 1):
        revision = plan.revision(iteration)
        out += revision.before if revision.from_iteration == iteration else ()
        out += [SimpleNamespace(op="all_reduce", dtype=b.dtype, elements=b.elements) for b in revision.buckets]
        out.append(SimpleNamespace(op="all_reduce", dtype="float32", elements=plan.record_form.elements))
    return [[operation.op, operation.dtype, operation.elements] for operation in out]


def logged(log: str) -> list[list[list[Any]]]:
    """Return the collectives in a log of the library's, per communicator."""
    out = defaultdict(list)
    for operation, count, dtype, communicator in _LOGGED.findall(log):
        out[communicator].append([_OPERATIONS[operation], _TYPES.get(dtype, dtype), int(count)])
    return list(out.values())


def judged(found: dict[str, list[dict[str, Any]]], done: list[list[list[Any]]] | None) -> dict[str, dict[str, bool]]:
    """Return what holds of each kind on all ranks; `done` are the collectives that the library has logged, if it has."""
    results = {}
    for name, ranks in found.items():
        holds = [rank.get("holds", {}) for rank in ranks]
        results[name] = {key: all(rank[key] for rank in holds if key in rank) for key in holds[0]}
        results[name]["all ranks come to the end"] = not any("error" in rank for rank in ranks)
        if done is not None:
            planned = ranks[0].get("collectives", [])
            results[name]["the library did the plans' collectives"] = bool(planned) and all(p in done for p in planned)
    return results


def main() -> None:
    """Check, and print what holds."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=50_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,COLL"}
    found, logs = on_ranks(check, options.kinds, options)
    done = logged(logs[0]) if logs else None
    results = judged(found, done)
    if options.json:
        document = {"about": about(options), "results": results, "ranks": found, "logged": done}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in about(options).items()) + "\n")
    print(f"| | {' | '.join(results)} |\n|---|{'---|' * len(results)}")
    words = {True: "yes", False: "NO", None: ""}
    for key in {key: None for result in results.values() for key in result}:
        print(f"| {key} | {' | '.join(words[result.get(key)] for result in results.values())} |")
    sys.exit(not all(all(result.values()) for result in results.values()))


if __name__ == "__main__":
    main()
