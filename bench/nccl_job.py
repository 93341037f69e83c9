# SPDX-License-Identifier: MIT
"""The example GPT where ranks are on GPUs, for the benchmarks and checks of the hook there: a process per rank, spawned.

Where there are fewer GPUs than ranks they share one, each as if on a host of its own, and NCCL goes over TCP. Needs no
compiled module, and with `--device cpu --backend gloo` no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.nn.parallel import DistributedDataParallel

import flowcheck
from flowcheck.training import Attached
from workload_gen import gpt

__all__ = ["KINDS", "Job", "Kind", "Records", "Waits", "about", "arguments", "on_ranks", "wire"]

#: A collective that takes longer has failed.
_PATIENCE = timedelta(seconds=60)
#: Batches that a job has on its device; it goes through them again and again.
_BATCHES = 16


@dataclass(frozen=True)
class Kind:
    """In which arithmetic a job trains: `autocast` to a narrow type, with a GradScaler, with the fused optimizer."""

    autocast: torch.dtype | None = None
    scaled: bool = False
    fused: bool = False


KINDS = {
    "float32": Kind(),
    "bfloat16": Kind(torch.bfloat16),
    "float16": Kind(torch.float16, scaled=True),
    "float16-fused": Kind(torch.float16, scaled=True, fused=True),
}


class Job:
    """One rank's job: AdamW on the GPT, on a group of its own. An iteration is `backward`, then `step`.

    Args:
        kind: its arithmetic; parameters are float32 in each.
        parameters: about so many.
        device: of this rank.
        bucket_mb: most MiB of a rebuilt bucket.
        batches: of the example job's, of 4 short sequences, a step.
        growth_interval: of the GradScaler.
    """

    def __init__(
        self,
        kind: Kind,
        parameters: int,
        device: torch.device,
        bucket_mb: float = 25.0,
        batches: int = 1,
        growth_interval: int = 2000,
    ) -> None:
        self.kind, self.device = kind, device
        self.model = gpt.build(parameters, 1).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.001, fused=kind.fused or None)
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=bucket_mb, process_group=flowcheck.group())
        # So large that the first steps are skipped.
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=2.0**20, growth_interval=growth_interval, enabled=kind.scaled
        )
        self._batches = []
        for number in range(_BATCHES):
            parts = [gpt.batch(1, dist.get_rank(), batches * number + part) for part in range(batches)]
            self._batches.append([torch.cat(some).to(device) for some in zip(*parts, strict=True)])

    def backward(self, iteration: int) -> torch.Tensor:
        """Do a forward and a backward pass; return the loss. Nothing here waits for the device."""
        inputs, targets = self._batches[iteration % _BATCHES]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.kind.autocast) if self.kind.autocast else nullcontext():
            loss = torch.nn.functional.cross_entropy(self.ddp(inputs).flatten(0, 1), targets.flatten())
        self.scaler.scale(loss).backward()
        return loss

    def step(self) -> None:
        """Do the optimizer's step."""
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def attach(self, folder: Path, **options: Any) -> Attached:
        """Have the job followed, though nobody does."""
        network, scaler = wire(dist.get_world_size()), self.scaler
        return flowcheck.attach(
            self.ddp, self.optimizer, plan_url=folder, wire=network, scaler=scaler, wait_s=0, **options
        )


def wire(ranks: int) -> dict[str, Any]:
    """Return a network that a plan may have; nobody listens on it."""
    connections = [
        {
            "edge": edge,
            "channel": 0,
            "source": f"10.0.0.{edge + 1}",
            "destination": f"10.0.0.{(edge + 1) % ranks + 1}",
            "proof": {"kind": "queue_pair", "data": [100 + edge], "credit": [200 + edge]},
        }
        for edge in range(ranks)
    ]
    layout = {"source": "modelled", "library": "nccl", "version": "2.28", "protocol": "simple", "mtu": 4096}
    streams = [{"name": "host0", "links": [0, ranks - 1]}]
    return {"layout": {**layout, "ring": list(range(ranks))}, "connections": connections, "streams": streams}


class Records:
    """Copies of the step records that the hook has reduced, made on the device without waiting for it; a context."""

    def __enter__(self) -> Records:
        self.copies: list[torch.Tensor] = []
        self._last: torch.Tensor | None = None
        self._all_reduce, dist.all_reduce = dist.all_reduce, self._reduce
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._all_reduce
        self._copy()

    def _reduce(self, tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        self._copy()
        self._last = tensor
        return self._all_reduce(tensor, *arguments, **named)

    def _copy(self) -> None:
        if self._last is not None:  # the hook has waited for it, before it reduces the next and when it is detached
            self.copies.append(self._last.clone())


class Waits:
    """Notes where in FlowCheck's code something waits for the device, as far as torch knows; a context."""

    def __enter__(self) -> Waits:
        self._caught = warnings.catch_warnings(record=True)
        self._seen = self._caught.__enter__()
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(None, None, None)
        own = str(Path(flowcheck.__file__).parent)
        self.places = {f"{Path(w.filename).name}:{w.lineno}" for w in self._seen if w.filename.startswith(own)}


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every command on these jobs has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backend", choices=["nccl", "gloo"], default="nccl")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="A new one, where plans, states and logs stay.")
    parser.add_argument("--json", type=Path, help="File for the results.")
    return parser


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the results were had on."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "backend": options.backend}
    if options.device == "cuda":
        found |= {"GPU": torch.cuda.get_device_name(), "GPUs": torch.cuda.device_count()}
        found |= {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return found | {"device": options.device, "ranks": options.ranks, "cpus": os.cpu_count()}


def _rank(rank: int, function: Callable[..., Any], names: list[str], folder: Path, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device(options.device)
    if device.type == "cuda":
        if torch.cuda.device_count() < options.ranks:
            # The library refuses two ranks of one host on one GPU.
            os.environ["NCCL_HOSTID"] = f"host{rank}"
            for name, value in (("NET", "Socket"), ("SOCKET_IFNAME", "lo"), ("P2P_DISABLE", "1"), ("SHM_DISABLE", "1")):
                os.environ.setdefault(f"NCCL_{name}", value)
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # The kernel that is left repeats itself.
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ["NCCL_DEBUG_FILE"] = str(folder / f"nccl-{rank}.log")
    store = dist.FileStore(str(folder / "store"), options.ranks)
    dist.init_process_group(options.backend, store=store, rank=rank, world_size=options.ranks, timeout=_PATIENCE)
    results = {}
    for name in names:
        try:
            found = function(name, folder, options, device)
        except Exception:
            found = {"error": traceback.format_exc()}
            print(f"rank {rank}, {name}: {found['error']}", file=sys.stderr, flush=True)
        results[name] = [None] * options.ranks
        dist.all_gather_object(results[name], found)
        if rank == 0:
            (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def on_ranks(
    function: Callable[[str, Path, argparse.Namespace, torch.device], dict[str, Any]], names: Iterable[str],
    options: argparse.Namespace,
) -> tuple[dict[str, list[dict[str, Any]]], Any]:  # fmt: skip
    """Call `function(name, folder, options, device)` on every rank, for one name after another, in processes of their own.

    Returns what each rank returned for each name, as far as it came, {"error": ..} where it raised; and the logs that the
    library wrote, by rank, if NCCL_DEBUG is set.
    """
    with tempfile.TemporaryDirectory(prefix="flowcheck-nccl-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=not options.folder)
        try:
            processes.spawn(_rank, (function, list(names), folder, options), options.ranks)
        except Exception as error:  # whatever became of a rank, what came before it counts
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        path = folder / "results.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        logs = [path.read_text(errors="replace") for path in sorted(folder.glob("nccl-*.log"))]
    failed = [{"error": "the ranks ended before it"}] * options.ranks
    return {name: results.get(name, failed) for name in names}, logs
