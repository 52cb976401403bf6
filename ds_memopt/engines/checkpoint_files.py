"""The files of a checkpoint: written so that no rank waits for one that failed, loaded without running what they say.

A file of torch.save is a pickle, which may call any function that it names. Here it may name what torch allows under
weights_only, and ALLOWED.

Private names used here are in private_names.py.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

ALLOWED = [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler]
"""What DeepSpeed's own files name beside tensors."""

METADATA = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"), ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),  # Python 3.13
}  # fmt: skip


def load(path: Any, map_location: Any = None) -> Any:
    """torch.load that runs nothing. UnpicklingError if the file names what is not allowed."""
    with torch.serialization.safe_globals(ALLOWED):
        return torch.load(path, map_location=map_location, weights_only=True)


def load_only_data(engine: Any) -> None:
    """Make a DeepSpeed engine load its checkpoints by `load`."""
    engine.checkpoint_engine.load = load


def refuse_code(file: Path) -> None:
    """UnpicklingError that tells what is not allowed, if the file names such a thing. Other files than those of
    torch.save and torch.distributed.checkpoint, which run nothing, pass."""
    try:
        if file.name == ".metadata":
            _read_metadata(file)
        elif file.suffix == ".distcp":
            for entry in _objects(file):
                load(entry, "meta")
        elif file.suffix == ".pt":
            load(file, "meta")
    except pickle.UnpicklingError as error:  # of torch's, long ones
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise pickle.UnpicklingError(f"it names {named[1]}" if named else str(error).splitlines()[0]) from error


def _read_metadata(file: Path) -> Metadata:
    with file.open("rb") as stream:
        return _MetadataReader(stream).load()


class _MetadataReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _objects(file: Path) -> Iterator[io.BytesIO]:
    """Those entries of a .distcp file that are no tensors; tensors torch loads with weights_only itself."""
    metadata = _read_metadata(file.with_name(".metadata"))
    with file.open("rb") as stream:
        for index, place in metadata.storage_data.items():
            described = metadata.state_dict_metadata[index.fqn]
            if place.relative_path == file.name and isinstance(described, BytesStorageMetadata):
                stream.seek(place.offset)
                yield io.BytesIO(stream.read(place.length))


@contextlib.contextmanager
def errors_after_all_ranks(engine: Any) -> Iterator[None]:
    """Around an engine's save_checkpoint: an error in writing a file of DeepSpeed's is raised when it has returned.

    Raised at once, it would leave the other ranks waiting in the barrier that follows.
    """
    errors: list[Exception] = []

    def kept(write: Callable) -> Callable:
        def quietly(*arguments: Any, **keywords: Any) -> None:
            try:
                write(*arguments, **keywords)
            except Exception as error:
                errors.append(error)

        return quietly

    with contextlib.ExitStack() as stack:
        for holder, name in ((getattr(engine, "checkpoint_engine", None), "save"), (engine, "_copy_recovery_script")):
            if hasattr(holder, name):
                stack.enter_context(mock.patch.object(holder, name, kept(getattr(holder, name))))
        yield
    if errors:
        raise errors[0]
