# SPDX-License-Identifier: MIT
"""A whole training state in an HDF5 file: written streamed, synced, verified, then published; read back exactly.

The file is made for people too: `model/<key>` holds the tensors under the state_dict's own names (tied keys are hard
links to one dataset), `optimizer/state/<id>/<name>` the optimizer's, by torch's parameter ids. bfloat16, which HDF5 has
not, is stored as uint16; every dataset's attribute `dtype` names torch's dtype. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch

from flowcheck.errors import CheckpointError
from updater.durable import TEMPORARY_SUFFIX, io_errors, publish
from updater.model_state import bytes_of, torch_dtype

if TYPE_CHECKING:
    from flowcheck._copy import CopyEngine

__all__ = ["State", "read_state", "write_state"]

_FORMAT = "flowcheck-state"
_VERSION = 1
_NUMPY = {"bfloat16": "uint16"}
_COMPARE_CHUNK_BYTES = 4 << 20


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


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def write_state(path: Path, state: State, engine: CopyEngine | None = None) -> None:
    """Publish a state as an HDF5 file of that path; the engine copies it into the staging buffer, the CPU if None.

    The state may be stepped on as soon as this has returned, not before.

    Raises:
        FlowCheckError: the disk refused, or what was read back differs; no file of that path is there then.
    """
    # A training host reads states and writes none: it has no compiled module.
    from flowcheck._copy import CopyEngine

    from updater._staging import Staging

    pieces = {id(tensor): tensor for _, tensor in state.tensors()}
    staging = Staging(sum(Staging.room(tensor.nbytes) for tensor in pieces.values()), engine or CopyEngine())
    staged = {key: staging.copy(bytes_of(tensor.contiguous())) for key, tensor in pieces.items()}
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with io_errors("write", path):
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
            try:
                _write_file(temporary, state, staged)
            except RuntimeError as error:
                # h5py's way to say that closing failed
                raise OSError(str(error).splitlines()[0]) from error
            fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                _verify_file(temporary, fd, state, staged)
            finally:
                os.close(fd)
            publish(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _write_file(path: Path, state: State, staged: dict[int, memoryview]) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["format"], file.attrs["version"] = _FORMAT, _VERSION
        for name in ("run_id", "attempt", "iteration", "bit_exact"):
            file.attrs[name] = getattr(state, name)
        file.attrs["arithmetic"] = json.dumps(state.arithmetic)
        file.create_group("model")
        written: dict[int, h5py.Dataset] = {}
        for name, tensor in state.tensors():
            if id(tensor) in written:
                file[name] = written[id(tensor)]
                continue
            dtype = _dtype_name(tensor)
            content = np.frombuffer(staged[id(tensor)], _NUMPY.get(dtype, dtype)).reshape(tuple(tensor.shape))
            dataset = file.create_dataset(name, data=content)
            dataset.attrs["dtype"] = dtype
            written[id(tensor)] = dataset
        if state.optimizer is not None:
            group = file.require_group("optimizer")
            group.attrs["param_groups"] = json.dumps(state.optimizer["param_groups"])
            for number, values in state.optimizer["state"].items():
                scalars = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
                file.require_group(f"optimizer/state/{number}").attrs["scalars"] = json.dumps(scalars)
        file.flush()


def _verify_file(path: Path, fd: int, state: State, staged: dict[int, memoryview]) -> None:
    """Hold every dataset of a file just written against the staging buffer, byte for byte as they lie on disk."""
    with h5py.File(path, "r") as file:
        for name, tensor in state.tensors():
            expected = staged[id(tensor)]
            at = file[name].id.get_offset()
            for low in range(0, len(expected), _COMPARE_CHUNK_BYTES):
                chunk = expected[low : low + _COMPARE_CHUNK_BYTES]
                if os.pread(fd, len(chunk), at + low) != chunk:
                    raise OSError(f"reading {name} back gives other bytes")


def read_state(path: Path) -> State:
    """Return the state in an HDF5 file whose checksum has agreed; tied keys share one tensor.

    Raises:
        CheckpointError: the file is none that `write_state` wrote.
    """
    try:
        with h5py.File(path, "r") as file:
            if (file.attrs["format"], file.attrs["version"]) != (_FORMAT, _VERSION):
                raise ValueError(
                    f"{file.attrs['format']} version {file.attrs['version']}, expected {_FORMAT} {_VERSION}"
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
            )
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a training state: {str(error).splitlines()[0]}", str(path)
        ) from error


def _read_tensor(dataset: h5py.Dataset) -> torch.Tensor:
    content = np.asarray(dataset[()])
    flat = (
        torch.from_numpy(np.frombuffer(bytearray(content.tobytes()), np.uint8))
        if content.size
        else torch.empty(0, dtype=torch.uint8)
    )
    return flat.view(torch_dtype(dataset.attrs["dtype"])).reshape(content.shape)


def _read_optimizer(group: h5py.Group) -> dict[str, Any]:
    param_groups = json.loads(group.attrs["param_groups"])
    for options in param_groups:
        # JSON has no tuples; torch's only list is that of the parameters
        options.update({k: tuple(v) for k, v in options.items() if isinstance(v, list) and k != "params"})
    state: dict[int, dict[str, Any]] = {}
    numbers = sorted(group["state"], key=int) if "state" in group else []
    for number in numbers:
        values = group["state"][number]
        state[int(number)] = {
            **{_unescape(name): _read_tensor(dataset) for name, dataset in values.items()},
            **json.loads(values.attrs["scalars"]),
        }
    return {"state": state, "param_groups": param_groups}
