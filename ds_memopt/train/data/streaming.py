"""Parquet files that are cut into tokens while the run goes on, for what is larger than the disk.

A global batch has as many lanes as sequences. Each lane reads row groups of its own, one after another, in an order
that seed and epoch determine; its s-th sequence is the one of step s. So the data of a step depend on seed and global
batch alone, the ranks share the work of the lanes, and nothing is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ds_memopt.train.data.documents import Piece, column_of, open_parquet, read_documents
from ds_memopt.train.data.order import shares
from ds_memopt.train.data.sources import Source, find_files
from ds_memopt.train.data.tokenised import Reading

SAMPLED_GROUPS, SAMPLED_DOCUMENTS = 8, 256
READ_AT_ONCE = 32
"""Documents."""


class RowGroup(NamedTuple):
    """sequences: how many it gives in an epoch, by the bytes of its text and the tokens per byte of a sample."""

    piece: Piece
    sequences: int


class StreamedSource:
    """The row groups of a source's Parquet files, some of them held out for validation.

    encoder: a tokenizer with an end-of-sequence token. ValueError for files of another kind.
    """

    def __init__(self, source: Source, encoder: Any, seq_length: int, reading: Reading) -> None:
        self.source, self._encoder, self._seq_length, self._reading = source, encoder, seq_length, reading
        files = find_files(source)
        if files.kind != "parquet":
            raise ValueError(
                f"--streaming reads row groups by their number, which Parquet files alone have: --data {source.path} "
                f"is {files.kind}; leave --streaming out, or convert it"
            )
        found = [group for path in files.paths for group in self._row_groups(path)]
        rate = self._tokens_per_byte(found)
        self._groups = [RowGroup(piece, max(1, round(size * rate / seq_length))) for piece, size, _ in found]
        self._order = np.random.default_rng(0).permutation(len(self._groups))
        self._held_out = 0
        self.sequences = sum(group.sequences for group in self._groups)
        self.description = f"{source.name}: {len(self._groups)} row groups, {sum(size for _, size, _ in found)} bytes"

    def _row_groups(self, path: str) -> Iterator[tuple[Piece, int, int]]:
        """Each row group, with the bytes of its text and its rows."""
        file = open_parquet(path)
        field = column_of(file.schema_arrow.names, self._reading.text_field, path)
        columns = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            if group.num_rows:
                size = group.column(columns.index(field)).total_uncompressed_size
                yield Piece(path, "parquet", index, index + 1), size, group.num_rows

    def _tokens_per_byte(self, groups: list[tuple[Piece, int, int]]) -> float:
        if not groups:
            raise ValueError(f"--data {self.source.path} holds no rows")
        tokens = bytes_read = 0.0
        for piece, size, rows in groups[:: -(-len(groups) // SAMPLED_GROUPS)]:
            tokens += sum(map(len, islice(self._documents(piece), SAMPLED_DOCUMENTS)))
            bytes_read += size * min(1, SAMPLED_DOCUMENTS / rows)
        return tokens / bytes_read

    def hold_out(self, sequences: int) -> list[RowGroup]:
        """Row groups, always the same, that give at least so many sequences; no lane reads them."""
        chosen: list[RowGroup] = []
        while sum(group.sequences for group in chosen) < sequences and len(chosen) < len(self._groups):
            chosen.append(self._groups[self._order[len(chosen)]])
        self._held_out = len(chosen)
        return chosen

    def lane(self, lane: int, lanes: int, start: int, seed: int) -> Iterator[torch.Tensor]:
        """The sequences of a lane from its start-th on, without end: int64 [seq_length]."""
        training = self._order[self._held_out :]
        epoch = 0
        while True:
            order = np.random.default_rng([seed, epoch]).permutation(training)
            for index in order[lane::lanes]:
                group = self._groups[index]
                if start < group.sequences:
                    yield from islice(self.read(group), start, None)
                start = max(0, start - group.sequences)
            epoch += 1

    def check_lanes(self, lanes: int) -> None:
        """ValueError if there are less row groups than lanes."""
        left = len(self._groups) - self._held_out
        if left < lanes:
            raise ValueError(
                f"--streaming: --data {self.source.name} has {left} row groups beside {self._held_out} for validation, "
                f"but a global batch reads {lanes} of them at a time: leave --streaming out, or lower the global batch"
            )

    def read(self, group: RowGroup) -> Iterator[torch.Tensor]:
        """The sequences of a row group. Documents that come short of their number are read again, from the first on;
        what is beyond is not read."""
        ids: list[int] = []
        left = group.sequences
        while True:
            before = len(ids), left
            for document in self._documents(group.piece):
                ids += document
                while len(ids) >= self._seq_length:
                    yield torch.tensor(ids[: self._seq_length])
                    del ids[: self._seq_length]
                    left -= 1
                    if not left:
                        return
            assert (len(ids), left) != before, "a row group has a row, and each good one has a token"

    def _documents(self, piece: Piece) -> Iterator[list[int]]:
        end, allowed, bad, rows = self._encoder.eos_token_id, self._reading.bad_rows, 0, 0
        documents = read_documents(piece, self._reading.text_field)
        while some := list(islice(documents, READ_AT_ONCE)):
            faults = [document.fault for document in some if document.fault]
            rows, bad = rows + len(some), bad + len(faults)
            if faults and (not allowed or 1 <= allowed < bad):
                raise ValueError(f"{faults[0]}; --bad_rows allows for {allowed:g} in a row group, which are left out")
            texts = [document.text for document in some if document.text is not None]
            for ids in self._encoder(texts, verbose=False)["input_ids"] if texts else []:
                yield ids if ids[-1:] == [end] else [*ids, end]
        if bad == rows or (allowed < 1 and bad > allowed * rows):
            raise ValueError(
                f"{piece.path}, row group {piece.start}: {bad} of {rows} rows are bad, and --bad_rows {allowed:g} "
                "allows for less"
            )


class Streams:
    """Sources that are read together, each by lanes of its own."""

    def __init__(self, sources: Sequence[StreamedSource]) -> None:
        self._sources = sources

    def loader(
        self, micro_batch: int, accumulation: int, rank: int, world_size: int, seed: int, steps: range, workers: int,
        pin_memory: bool,
    ) -> DataLoader:  # fmt: skip
        """Micro-batches of one rank, int64 [micro_batch, seq_length]. workers: 0, or 1 for a process that reads ahead.

        ValueError for another number, for less row groups than lanes, or for weights that lanes cannot have.
        """
        if workers > 1:
            raise ValueError(
                f"--workers {workers} with --streaming: one process reads the lanes of a rank, and the tokenizer has "
                "threads: give 1, or 0"
            )
        whole = micro_batch * accumulation * world_size
        lanes = [(source, lane, count) for source, count in self._counts(whole) for lane in range(count)]
        mine = np.arange(whole).reshape(accumulation, micro_batch, world_size)[:, :, rank]
        batches = _StreamedBatches(lanes, mine.tolist(), seed, steps)
        return DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=pin_memory)

    def _counts(self, whole: int) -> list[tuple[StreamedSource, int]]:
        weights = [source.source.weight or source.sequences for source in self._sources]
        counts = shares(weights, whole)
        for source, weight, count in zip(self._sources, weights, counts, strict=True):
            share = weight / sum(weights)
            if not count or (source.source.weight and abs(count / whole - share) > 0.01):
                raise ValueError(
                    f"--streaming: {source.source.name} has {share:.3g} of the data, but {count} of the {whole} "
                    "sequences of a global batch: raise the global batch, or choose weights that divide it"
                )
            source.check_lanes(count)
        return list(zip(self._sources, counts, strict=True))


class _StreamedBatches(IterableDataset):
    def __init__(
        self, lanes: list[tuple[StreamedSource, int, int]], mine: list[list[int]], seed: int, steps: range
    ) -> None:
        self._lanes, self._mine, self._seed, self._steps = lanes, mine, seed, steps

    def __iter__(self) -> Iterator[torch.Tensor]:
        streams = {}
        for number in sum(self._mine, []):
            source, lane, lanes = self._lanes[number]
            streams[number] = source.lane(lane, lanes, self._steps.start, self._seed)
        for _ in self._steps:
            for micro_batch in self._mine:
                yield torch.stack([next(streams[number]) for number in micro_batch])


class HeldOutSequences(Dataset):
    """The sequences of row groups, which are read in the order of their numbers."""

    def __init__(self, source: StreamedSource, groups: list[RowGroup]) -> None:
        self._source, self._groups = source, groups
        self._ends = np.cumsum([group.sequences for group in groups])
        self._next, self._rest = 0, self._read_from(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> torch.Tensor:
        if index < self._next:
            self._next, self._rest = 0, self._read_from(0)
        item = next(islice(self._rest, index - self._next, None))
        self._next = index + 1
        return item

    def _read_from(self, first: int) -> Iterator[torch.Tensor]:
        for group in self._groups[first:]:
            yield from self._source.read(group)
