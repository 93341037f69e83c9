# SPDX-License-Identifier: MIT
"""A whole training state as an HDF5 file: what such a file holds of it, and how it comes back, exactly.

The file is made for people too: `model/<key>` holds the tensors under the state_dict's own names (tied keys are hard
links to one dataset), `optimizer/state/<id>/<name>` the optimizer's, by torch's parameter ids. bfloat16, which HDF5 has
not, is stored as uint16; every dataset's attribute `dtype` names torch's dtype. Nothing is pickled. How the file comes
onto the disk is `snapshot_file`'s.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch

from flowcheck.errors import CheckpointError, FlowCheckError
from flowcheck.formats import IDENTITY
from updater.durable import TEMPORARY_SUFFIX, io_errors, publish
from updater.model_state import bytes_of, read_param_groups, torch_dtype
from updater.snapshot_file import Request, Written, pieces, write_file

if TYPE_CHECKING:
    from flowcheck._copy import CopyEngine

    from flowcheck.plan import Revision

__all__ = ["State", "layout_of", "read_state", "request_of", "stage", "write_now", "write_state"]

_FORMAT = "flowcheck-state"
_VERSION = 2
#: Version 1 had nothing of the plan.
_READABLE = (1, _VERSION)


@dataclass
class State:
    """A full training state: that after step `iteration`, with whose it is and whether its bits are the trainer's."""

    run_id: str
    attempt: int
    iteration: int
    bit_exact: bool
    arithmetic: dict[str, str]  # that it was computed with
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any] | None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)  # declared by the trainer, no keys of the model
    buckets: list[list[str]] | None = None  # of the next iteration, by parameter names; not kept in snapshots
    identity: bytes | None = None  # of the plan, 128 bytes; None in a file of version 1
    layout: list[dict[str, Any]] | None = None  # `layout_of` the revision in force
    latest_attempt: int | None = None  # of the directory that it was restored from

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor by its path in the file, model first; tied ones under each of their names."""
        for key, tensor in self.model.items():
            yield f"model/{_escape(key)}", tensor
        for name, tensor in self.extra.items():
            yield f"extra/{_escape(name)}", tensor
        for number, values in ((self.optimizer or {}).get("state") or {}).items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    yield f"optimizer/state/{number}/{_escape(name)}", value


def _escape(name: str) -> str:
    """Return a name as HDF5 takes it: there '/' parts groups and '.' alone is the group itself."""
    name = name.replace("%", "%25").replace("/", "%2F")
    return "%2E" if name == "." else name


def _unescape(name: str) -> str:
    return name.replace("%2E", ".").replace("%2F", "/").replace("%25", "%")


def request_of(state: State) -> tuple[Request, dict[str, np.ndarray]]:
    """Return what a state's file is to hold, and the bytes of its datasets by path: views of the tensors, no copies.

    Raises:
        FlowCheckError: an option of the optimizer is nothing that JSON has.
    """
    facts = {name: getattr(state, name) for name in ("run_id", "attempt", "iteration", "bit_exact")}
    facts |= {"format": _FORMAT, "version": _VERSION, "arithmetic": json.dumps(state.arithmetic)}
    request = Request({"": facts, "model": {}})
    contents: dict[str, np.ndarray] = {}
    written: dict[int, str] = {}
    for path, tensor in state.tensors():
        if id(tensor) in written:
            request.links[path] = written[id(tensor)]
            continue
        written[id(tensor)] = path
        contents[path] = bytes_of(tensor.contiguous())
        request.add(path, str(tensor.dtype).removeprefix("torch."), tensor.shape, tensor.nbytes)
    if state.optimizer is not None:
        try:
            request.attributes["optimizer"] = {"param_groups": json.dumps(state.optimizer["param_groups"])}
            for number, values in state.optimizer["state"].items():
                scalars = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
                request.attributes[f"optimizer/state/{number}"] = {"scalars": json.dumps(scalars)}
        except TypeError as error:
            raise FlowCheckError(
                f"iteration {state.iteration}: an option of the optimizer cannot be written: {error}; expected numbers, "
                "flags and text"
            ) from error
    documents: dict[str, bytes] = {}
    if state.identity is not None:
        facts["plan_digest"] = _plan_digest(state.identity)
        documents["identity"] = state.identity
    if state.layout is not None:
        documents["layout"] = json.dumps(state.layout).encode()
    for path, document in documents.items():
        contents[path] = np.frombuffer(document, np.uint8)
        request.add(path, "uint8", [len(document)], len(document))
    return request, contents


def layout_of(revision: Revision) -> list[dict[str, Any]]:
    """Return where each parameter's gradient lies in a revision's buckets, as a snapshot keeps it."""
    return [
        {"dtype": bucket.dtype, "parameters": [[p.name, list(p.shape), p.offset] for p in bucket.parameters]}
        for bucket in revision.buckets
    ]


def _plan_digest(identity: bytes) -> str:
    return np.frombuffer(identity, IDENTITY, 1)["plan_digest"][0].tobytes().hex()


def stage(request: Request, contents: dict[str, np.ndarray], memory: memoryview, engine: CopyEngine) -> None:
    """Copy the bytes of every dataset to where the request has them in staging memory; they may change afterwards."""
    for dataset in request.datasets:
        engine.copy_bytes(memory[dataset.offset : dataset.offset + dataset.bytes], contents[dataset.path])


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def write_now(path: Path, state: State) -> Written:
    """Write a state's file, straight from the tensors, in this thread; it is synced, and has its temporary name yet.

    Publishing it under `path` is the caller's. A process of its own does the same: `snapshot_writer.SnapshotWriter`.

    Raises:
        FlowCheckError: the disk refused, or what was read back differs; nothing of the file is there then.
    """
    request, contents = request_of(state)
    with io_errors("write", path):
        return write_file(_temporary(path), request, lambda dataset: pieces(memoryview(contents[dataset.path])))


def write_state(path: Path, state: State, engine: CopyEngine | None = None) -> None:
    """Publish a state as an HDF5 file of that path; with an engine it is first copied together by it.

    Raises:
        FlowCheckError: the disk refused, or what was read back differs; no file of that path is there then.
    """
    if engine is None:
        written = write_now(path, state)
    else:
        request, contents = request_of(state)
        memory = memoryview(mmap.mmap(-1, max(request.room_bytes, 1)))
        stage(request, contents, memory, engine)
        with io_errors("write", path):
            written = write_file(_temporary(path), request, lambda d: pieces(memory[d.offset : d.offset + d.bytes]))
    with io_errors("write", path):
        publish(written.path, path)


def read_state(path: Path) -> State:
    """Return the state in an HDF5 file whose checksum has agreed; tied keys share one tensor.

    Raises:
        CheckpointError: the file is none that `write_state` wrote.
    """
    try:
        with h5py.File(path, "r") as file:
            if file.attrs["format"] != _FORMAT or file.attrs["version"] not in _READABLE:
                raise ValueError(
                    f"{file.attrs['format']} version {file.attrs['version']}; this release reads {_FORMAT} "
                    f"{' and '.join(map(str, _READABLE))}"
                )
            model, seen = {}, {}
            for name, dataset in file["model"].items():
                address = h5py.h5o.get_info(dataset.id).addr
                if address not in seen:
                    seen[address] = _read_tensor(dataset)
                model[_unescape(name)] = seen[address]
            optimizer = _read_optimizer(file["optimizer"]) if "optimizer" in file else None
            attributes = file.attrs
            return State(
                str(attributes["run_id"]),
                int(attributes["attempt"]),
                int(attributes["iteration"]),
                bool(attributes["bit_exact"]),
                json.loads(attributes["arithmetic"]),
                model,
                optimizer,
                {_unescape(name): _read_tensor(dataset) for name, dataset in file.get("extra", {}).items()},
                identity=_read_identity(file),
                layout=json.loads(file["layout"][()].tobytes()) if "layout" in file else None,
            )
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a training state: {str(error).splitlines()[0]}", str(path)
        ) from error


def _read_identity(file: h5py.File) -> bytes | None:
    if "identity" not in file:
        return None
    identity = file["identity"][()].tobytes()
    if _plan_digest(identity) != file.attrs["plan_digest"]:
        raise ValueError(f"its identity is of plan {_plan_digest(identity)}, not {file.attrs['plan_digest']}")
    return identity


def _read_tensor(dataset: h5py.Dataset) -> torch.Tensor:
    tensor = torch.empty(dataset.shape, dtype=torch_dtype(dataset.attrs["dtype"]))
    if tensor.element_size() != dataset.dtype.itemsize:
        raise ValueError(f"{dataset.name} is {dataset.dtype}, its attribute says {dataset.attrs['dtype']}")
    if tensor.numel():
        dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, bytes_of(tensor).view(dataset.dtype).reshape(dataset.shape))
    return tensor


def _read_optimizer(group: h5py.Group) -> dict[str, Any]:
    param_groups = read_param_groups(group.attrs["param_groups"])
    state: dict[int, dict[str, Any]] = {}
    numbers = sorted(group["state"], key=int) if "state" in group else []
    for number in numbers:
        values = group["state"][number]
        state[int(number)] = {
            **{_unescape(name): _read_tensor(dataset) for name, dataset in values.items()},
            **json.loads(values.attrs["scalars"]),
        }
    return {"state": state, "param_groups": param_groups}
