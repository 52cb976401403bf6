"""Training text as sequences of token ids, with held-out documents for validation, and the order of the batches."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler, Subset

from ds_memopt.engines.losses import IGNORED_LABEL

HELD_OUT_FRACTION = 0.05
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Items of both data sets are int64 tensors [seq_length] of token ids below vocab_size."""

    train: Dataset
    validation: Dataset
    vocab_size: int


class ByteSequences(Dataset):
    """Cuts a uint8 array into sequences of seq_length bytes; a shorter tail is dropped."""

    def __init__(self, data: np.ndarray, seq_length: int) -> None:
        self._data, self._seq_length = data, seq_length

    def __len__(self) -> int:
        return len(self._data) // self._seq_length

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self._seq_length
        return torch.from_numpy(self._data[start : start + self._seq_length].astype(np.int64))


class SyntheticSequences(Dataset):
    """`length` sequences of random ids, a function of (seed, index)."""

    def __init__(self, length: int, seq_length: int, vocab_size: int, seed: int) -> None:
        self._length, self._seq_length, self._vocab_size, self._seed = length, seq_length, vocab_size, seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = np.random.default_rng([self._seed, index])
        return torch.from_numpy(generator.integers(0, self._vocab_size, self._seq_length))


class TokenRows(Dataset):
    """A `datasets.Dataset` of fixed-length rows, memory-mapped from its cache."""

    def __init__(self, rows: Sized) -> None:
        self._rows = rows.with_format("torch")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._rows[index]["input_ids"]


def load_corpus(data: str, tokenizer: str | None, seq_length: int, vocab_size: int) -> Corpus:
    """The corpus that `--data` names.

    data: "stdlib" (source text of this Python's standard library, token = byte), "synthetic" (random ids), or a .txt,
    .jsonl or .json file or a folder of such files, cut into tokens by the tokenizer in the local folder `tokenizer`.
    vocab_size: the model's; ids must lie below it.
    ValueError for a missing file or tokenizer, an empty corpus, or ids that the model cannot embed.
    """
    if data in ("stdlib", "synthetic") and tokenizer is not None:
        raise ValueError(
            f"--tokenizer {tokenizer} has no meaning with --data {data}, whose tokens are fixed; leave it out"
        )
    if data == "synthetic":
        corpus = Corpus(
            SyntheticSequences(2**20, seq_length, vocab_size, seed=0),
            SyntheticSequences(2**12, seq_length, vocab_size, seed=1),
            vocab_size,
        )
    elif data == "stdlib":
        corpus = _load_stdlib(seq_length)
    else:
        corpus = _load_text(data, tokenizer, seq_length)
    if corpus.vocab_size > vocab_size:
        raise ValueError(
            f"the tokens of --data {data} need {corpus.vocab_size} ids but the model embeds {vocab_size}: "
            "choose the tokenizer that belongs to the model"
        )
    return corpus


def stdlib_files(root: Path) -> list[str]:
    """Names relative to `root` of the library's own .py files, sorted: no installed packages, no test suites."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - SKIPPED_FOLDERS  # not walked through: the packages are most of what is there
        names += [Path(folder, file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    return sorted(names)


def is_held_out(name: str) -> bool:
    """Whether a file belongs to validation: a fixed function of its name, true for about 5 %."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) < HELD_OUT_FRACTION * 2**64


def _load_stdlib(seq_length: int) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name in stdlib_files(root):
        parts[is_held_out(name)] += [(root / name).read_bytes(), b"\0"]
    train, validation = (np.frombuffer(b"".join(parts[held_out]), np.uint8) for held_out in (False, True))
    if len(train) < seq_length or len(validation) < seq_length:
        raise ValueError(
            f"the standard library at {root} has {len(train)} bytes of .py files for training, {len(validation)} for "
            f"validation, less than one sequence of {seq_length}: this Python ships no source text, use --data FILE"
        )
    return Corpus(ByteSequences(train, seq_length), ByteSequences(validation, seq_length), 256)


def _load_text(data: str, tokenizer: str | None, seq_length: int) -> Corpus:
    import datasets
    import transformers

    path = Path(data)
    if not path.exists():
        raise ValueError(f"--data {data}: no such file or folder (and not one of stdlib, synthetic)")
    files = sorted(str(p) for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())
    texts, jsons = ([f for f in files if f.endswith(ends)] for ends in ((".txt", ".md", ".py"), (".jsonl", ".json")))
    if bool(texts) == bool(jsons):
        found = "both text and JSON files" if texts else "no .txt, .md, .py, .jsonl or .json file"
        raise ValueError(f"--data {data}: {found}; give a file, or a folder of files of one kind")
    if tokenizer is None or not Path(tokenizer).is_dir():
        raise ValueError(f"--data {data} needs --tokenizer FOLDER with a local Hugging Face tokenizer, got {tokenizer}")
    encoder = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    if encoder.eos_token_id is None:
        raise ValueError(f"--tokenizer {tokenizer} has no end-of-sequence token, which must separate documents")

    if jsons:
        documents = datasets.load_dataset("json", data_files=jsons, split="train")
        if "text" not in documents.column_names:
            raise ValueError(f"--data {data}: rows need a field 'text', they have {', '.join(documents.column_names)}")
    else:  # a document is a file, or a paragraph if there is one file only
        by = "document" if len(texts) > 1 else "paragraph"
        documents = datasets.load_dataset("text", data_files=texts, sample_by=by, split="train")
    if len(documents) < 2:
        raise ValueError(f"--data {data} holds {len(documents)} documents; 2 are needed, one of them for validation")

    def tokens(batch: dict) -> dict:
        ids = [i for one in encoder(batch["text"])["input_ids"] for i in [*one, encoder.eos_token_id]]
        cut = len(ids) - len(ids) % seq_length
        return {"input_ids": [ids[start : start + seq_length] for start in range(0, cut, seq_length)]}

    halves = documents.train_test_split(test_size=HELD_OUT_FRACTION, seed=0)
    rows = halves.map(tokens, batched=True, remove_columns=documents.column_names)
    for half, part in rows.items():
        if not len(part):
            raise ValueError(f"--data {data}: the {half} documents give no sequence of {seq_length} tokens; add text")
    return Corpus(TokenRows(rows["train"]), TokenRows(rows["test"]), len(encoder))


class StepBatches(Sampler[list[int]]):
    """Indices of each micro-batch of one rank, for steps start_step + 1, ..., steps.

    Step s consumes positions [(s-1) G, s G) of a permutation that depends on seed and epoch alone, G = global batch:
    the same sequences whatever the number of ranks, and no state to save. An epoch has len(dataset) // G steps.
    """

    def __init__(
        self, dataset: Sized, micro_batch: int, accumulation: int, rank: int, world_size: int, seed: int, steps: range
    ) -> None:
        global_batch = micro_batch * accumulation * world_size
        self._steps_per_epoch = len(dataset) // global_batch
        if not self._steps_per_epoch:
            raise ValueError(
                f"the training data has {len(dataset)} sequences, less than one global batch of {global_batch} "
                f"({micro_batch} x {accumulation} accumulated x {world_size} ranks): lower the batch or give more data"
            )
        # Cut to whole global batches, or DistributedSampler would cut to whole multiples of the world size.
        whole = Subset(dataset, range(self._steps_per_epoch * global_batch))
        self._sampler = DistributedSampler(whole, world_size, rank, shuffle=True, seed=seed)
        self._batches = BatchSampler(self._sampler, micro_batch, drop_last=True)
        self._accumulation, self._steps = accumulation, steps

    def __len__(self) -> int:
        return len(self._steps) * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        epoch, batches = None, iter(())
        for step in self._steps:
            if step // self._steps_per_epoch != epoch:
                epoch, passed = divmod(step, self._steps_per_epoch)
                self._sampler.set_epoch(epoch)
                batches = islice(self._batches, passed * self._accumulation, None)
            yield from islice(batches, self._accumulation)


def train_loader(dataset: Dataset, batches: StepBatches) -> DataLoader:
    """Micro-batches of token ids [micro_batch, seq_length], int64."""
    return DataLoader(dataset, batch_sampler=batches)


def validation_batches(
    dataset: Dataset, sequences: int, micro_batch: int, rank: int, world_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's (input_ids, labels) over `sequences` evenly spaced items, both [micro_batch, seq_length].

    Every rank gets the same number of batches, which ZeRO-3 needs; rows that only fill up have ignored labels.
    """
    sequences = min(sequences, len(dataset))
    rounds = -(-sequences // (micro_batch * world_size))
    batches = []
    for index in range(rounds):
        first = (index * world_size + rank) * micro_batch
        items = [min(i, sequences - 1) * len(dataset) // sequences for i in range(first, first + micro_batch)]
        inputs = torch.stack([dataset[item] for item in items])
        labels = inputs.clone()
        labels[max(0, sequences - first) :] = IGNORED_LABEL
        batches.append((inputs, labels))
    return batches
