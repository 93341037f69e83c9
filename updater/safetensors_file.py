# SPDX-License-Identifier: MIT
"""A training state as two safetensors files: the model under its state_dict keys, and beside it the rest.

The second file, `<name>.optimizer.safetensors`, holds the optimizer's tensors as `state.<id>.<name>`, by torch's
parameter ids, and extra state as `extra.<name>`; what is no tensor is JSON in its metadata. Both files say whose state
they hold, so that a pair that does not belong together is found.

Files are read by the library. They are written here, in a few lines, because the library refuses tied tensors, and
chooses a temporary name of its own that it neither syncs nor, killed, removes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from flowcheck.errors import CheckpointError, FlowCheckError
from updater.model_state import bytes_of, read_param_groups
from updater.published import published

if TYPE_CHECKING:
    from updater.snapshot import State

__all__ = ["identity", "is_safetensors", "optimizer_path", "read_safetensors", "write_safetensors", "write_tensors"]

_SUFFIX = ".safetensors"
_OPTIMIZER_SUFFIX = ".optimizer" + _SUFFIX
_IDENTITY = ("run_id", "attempt", "iteration")
#: The format's header is a multiple of 8 bytes, so that tensors lie aligned.
_ALIGNMENT_BYTES = 8
_METADATA = "__metadata__"
#: The format's names of dtypes (github.com/huggingface/safetensors, safetensors/src/tensor.rs, `Dtype`).
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def optimizer_path(path: Path) -> Path:
    """Return where what is no model lies: beside the model's file."""
    return path.with_name(path.name.removesuffix(_SUFFIX) + _OPTIMIZER_SUFFIX)


def identity(state: State) -> dict[str, str]:
    """Return whose state a file holds, as its metadata says it; "format" is what transformers asks for."""
    values = {name: str(getattr(state, name)) for name in _IDENTITY}
    return {"format": "pt", **values, "bit_exact": json.dumps(state.bit_exact)}


def write_safetensors(state: State, path: Path) -> None:
    """Publish a state as two files, the model's last; replaces files of those paths. Tied keys are written each."""
    whose = identity(state)
    metadata, tensors = dict(whose), {f"extra.{name}": tensor for name, tensor in state.extra.items()}
    if state.optimizer is not None:
        scalars: dict[int, dict[str, Any]] = {}
        for number, values in state.optimizer["state"].items():
            scalars[number] = {k: v for k, v in values.items() if not isinstance(v, torch.Tensor)}
            tensors |= {f"state.{number}.{k}": v for k, v in values.items() if isinstance(v, torch.Tensor)}
        metadata["scalars"] = json.dumps(scalars)
        metadata["param_groups"] = json.dumps(state.optimizer["param_groups"])
    with published(path, optimizer_path(path)) as (model_file, other_file):
        write_tensors(model_file, state.model, whose)
        write_tensors(other_file, tensors, metadata)


def write_tensors(file: BinaryIO, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file; no tensor is copied but one that is not contiguous, while it is written.

    Raises:
        FlowCheckError: the format cannot hold a name or a dtype.
    """
    header: dict[str, Any] = {_METADATA: metadata}
    end = 0
    # Wide elements first: then each tensor begins on a multiple of its elements' width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in names:
        tensor = tensors[name]
        if name == _METADATA or tensor.dtype not in _DTYPES:
            raise FlowCheckError(f"{name!r}, {tensor.dtype}: a safetensors file cannot hold it; use --format torch")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in names:
        file.write(bytes_of(tensors[name].contiguous()))


def is_safetensors(path: Path) -> bool:
    """Say whether a file is meant to be safetensors: by its name, or by the bracket that its header begins with."""
    if path.suffix == _SUFFIX:
        return True
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Return model and optimizer; None for an optimizer that is in no file beside the model's.

    Raises:
        CheckpointError: a file is cut or corrupt, or the two are not of one state.
    """
    model, whose = _read(path)
    beside = optimizer_path(path)
    if not beside.exists():
        return model, None
    tensors, metadata = _read(beside)
    for name in _IDENTITY:
        if name not in metadata or metadata[name] != whose.get(name):
            raise CheckpointError(
                f"{beside}: is of {name} {metadata.get(name)}, expected {whose.get(name)} as {path.name} says; "
                "restore both again, or move it away",
                str(beside),
            )
    try:
        return model, _optimizer(tensors, metadata)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{beside}: holds no optimizer as 'flowcheck restore' writes it: {error!r}; restore both again", str(beside)
        ) from error


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error) or "empty").splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read as a safetensors file: {reason}", str(path)) from error


def _optimizer(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, Any] | None:
    if "param_groups" not in metadata:
        return None
    state = {int(number): values for number, values in json.loads(metadata["scalars"]).items()}
    for name, tensor in tensors.items():
        kind, _, place = name.partition(".")
        if kind == "state":
            number, _, value = place.partition(".")
            state[int(number)][value] = tensor
    return {"state": state, "param_groups": read_param_groups(metadata["param_groups"])}
