"""A tensor of which ranks hold intervals, as torch.distributed.checkpoint saves and loads it on any number of ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class SlicedTensor(torch.Tensor):
    """A 1-D tensor of `numel` entries, of which this rank holds some.

    pieces: what it holds, by number of the first entry; they are filled in place on load.
    saved: the first entries of the pieces that it saves: ranks hold cut blocks twice, and one of them saves.
    """

    @staticmethod
    def __new__(cls, numel: int, pieces: Mapping[int, torch.Tensor], saved: Collection[int]) -> SlicedTensor:
        one = next(iter(pieces.values()))
        return torch.Tensor._make_wrapper_subclass(cls, (numel,), dtype=one.dtype, device=one.device)

    def __init__(self, numel: int, pieces: Mapping[int, torch.Tensor], saved: Collection[int]) -> None:
        self.pieces, self._saved = pieces, saved

    @classmethod
    def __torch_dispatch__(cls, operator, types, arguments=(), keywords=None):
        raise NotImplementedError(
            f"{operator} needs all entries. Only torch.distributed.checkpoint's save and load work."
        )

    # --- what torch.distributed.checkpoint asks of a tensor that is none of torch's ---

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(self.dtype), self.size()),
            )
            for chunk in self._chunks(self._saved)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks(self.pieces)

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.pieces[index.offset[0]]

    def _chunks(self, starts: Collection[int]) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([start]), self.pieces[start].size()) for start in starts]
