# SPDX-License-Identifier: MIT
"""Writing a training state for the user's stack: one function per format, each published whole or not at all.

No format copies the state, only one tensor at a time where it must. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from flowcheck.errors import ConfigError
from updater import durable
from updater.published import cause, created, published, published_folder, refuse_present
from updater.safetensors_file import identity, write_safetensors, write_tensors
from updater.snapshot import State, write_state

__all__ = ["FORMATS", "check_target", "document", "export"]

#: transformers' own limit of a file of weights, in its version 4.
SHARD_BYTES = 5_000_000_000
#: What Trainer fails without as it resumes (a batch size to hold against its own; it only warns that it is another), and as
#: it then saves (a place for its flags): values that say nothing.
_TRAINER_NEEDS = {"train_batch_size": 0, "stateful_callbacks": {"TrainerControl": {"args": {}, "attributes": {}}}}


def export(state: State, form: str, path: str | Path) -> None:
    """Publish a state in one of `FORMATS`. A file of that path is replaced; for a folder the path must be free.

    Raises:
        ConfigError: the path cannot be written to.
        FlowCheckError: the disk refused, or the format cannot hold the state; what was there before still is, unless it
            was the last sync of a folder that failed, or between two safetensors files, whose pair is then refused.
    """
    check_target(form, path)
    FORMATS[form](state, Path(path))


def check_target(form: str, path: str | Path) -> None:
    """Raise ConfigError unless a format can be written to a path: before a state is restored for it."""
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: {path.parent} is no folder; make it first")
    if form in _FOLDERS:
        refuse_present(path)
    elif path.is_dir():
        raise ConfigError(f"{path}: is a folder, expected the name of a file; name one in it")


def document(state: State) -> dict[str, Any]:
    """Return a state as one dictionary: model, optimizer, extra, iteration, run_id, attempt, bit_exact, buckets."""
    plain: dict[int, torch.Tensor] = {}
    return {
        "model": {key: plain.setdefault(id(tensor), tensor.detach()) for key, tensor in state.model.items()},
        "optimizer": state.optimizer,
        "extra": state.extra,
        "iteration": state.iteration,
        "run_id": state.run_id,
        "attempt": state.attempt,
        "latest_attempt": state.latest_attempt,
        "bit_exact": state.bit_exact,
        "buckets": state.buckets,
    }


def _torch(state: State, path: Path) -> None:
    """Publish a torch file that loads with `weights_only=True`."""
    with published(path) as (file,):
        _save(document(state), file)


def _save(content: Any, file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        raise cause(error) from error


def _dcp(state: State, path: Path) -> None:
    """Publish a folder of torch.distributed.checkpoint, as one process without a group writes it."""
    # An import of a second, for this format alone.
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Files(FileSystem):
        """The files of a checkpoint, written through `durable.disk`."""

        @contextlib.contextmanager
        def create_stream(self, path: Path, mode: str) -> Iterator[BinaryIO]:
            with created(Path(path)) as file:
                yield file

        def rename(self, path: Path, new_path: Path) -> None:
            durable.disk.rename(Path(path), Path(new_path))

    with published_folder(path) as folder, warnings.catch_warnings():
        # That there is no process group is meant.
        warnings.filterwarnings("ignore", "torch.distributed is ")
        writer = dcp.FileSystemWriter(folder, sync_files=False, thread_count=1)
        writer.fs = Files()
        try:
            dcp.save(document(state), storage_writer=writer, no_dist=True)
        except CheckpointException as error:
            # It is no Exception, and hides what has happened, even an interruption.
            raise cause(next(iter(error.failures.values()))[0]) from error


def _huggingface(state: State, path: Path) -> None:
    """Publish a folder as transformers' `save_pretrained` and Trainer leave one, as far as a state says."""
    shards = _shards(_untied(state.model))
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    with published_folder(path) as folder:
        for name, shard in zip(names, shards, strict=True):
            with created(folder / name) as file:
                write_tensors(file, shard, identity(state))
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.values())},
                "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
            }
            _write_json(folder / "model.safetensors.index.json", index)
        if state.optimizer is not None:
            with created(folder / "optimizer.pt") as file:
                _save(state.optimizer, file)
        if state.extra:
            with created(folder / "extra.pt") as file:
                _save(state.extra, file)
        _write_json(folder / "trainer_state.json", {"global_step": state.iteration, **_TRAINER_NEEDS})


def _untied(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a model with each tensor under its first name alone; transformers ties the others again."""
    first: dict[tuple, str] = {}
    for key, tensor in model.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (id(tensor),)
        first.setdefault(place, key)
    return {key: model[key].detach() for key in first.values()}


def _shards(model: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Part a model, in its order, into shards of at most `SHARD_BYTES`, or of one tensor that is larger."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = SHARD_BYTES
    for key, tensor in model.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][key] = tensor
        room -= tensor.nbytes
    return shards


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with created(path) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


#: What writes a state in each format; all replace a file or refuse a folder that is there.
FORMATS = {
    "torch": _torch,
    "safetensors": write_safetensors,
    "dcp": _dcp,
    "hdf5": lambda state, path: write_state(path, state),
    "huggingface": _huggingface,
}
_FOLDERS = ("dcp", "huggingface")
