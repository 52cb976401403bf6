"""What a pre-training run reads: sequences of token ids to train on and to validate on."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

from ds_memopt.engines.losses import IGNORED_LABEL
from ds_memopt.train.data.order import Mixture, shares
from ds_memopt.train.data.sequences import (
    HELD_OUT_FRACTION,
    Sequences,
    SyntheticSequences,
    Tokens,
    all_of,
    hold_out,
)
from ds_memopt.train.data.sources import BUILT_IN, Files, Source, find_files, parse_sources
from ds_memopt.train.data.streaming import HeldOutSequences, StreamedSource, Streams
from ds_memopt.train.data.token_files import open_token_files, training_and_validation
from ds_memopt.train.data.tokenised import Reading, find_tokenizer, saved_tokens, tokenise

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Items of both data sets are int64 tensors [seq_length] of token ids below vocab_size.

    vocab_size: of the tokenizer; None where none made the tokens here. end_of_text: the id that ends a document, None
    where nothing tells. description: what was read, the same when it is the same. sizes: sequences of each source of
    `train`; weights: their shares, None for one that is as large as its source.
    """

    train: Dataset | Streams
    validation: Dataset
    vocab_size: int | None
    end_of_text: int | None
    description: str
    sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] | None = None

    def ends_of_documents(self) -> int:
        """The id that ends a document. ValueError where nothing tells."""
        if self.end_of_text is None:
            raise ValueError(
                f"--document_borders: nothing tells where the documents of {self.description} end; give "
                "--end_of_text ID or a --tokenizer"
            )
        return self.end_of_text

    def mixture(self, seed: int) -> Mixture | None:
        """The order that gives the sources their weights; None where there are none."""
        return self.weights and Mixture(self.sizes, self.weights, seed)


def load_corpus(
    data: str | Sequence[str],
    tokenizer: str | None,
    seq_length: int,
    vocab_size: int,
    *,
    validation_data: Sequence[str] = (),
    end_of_text: int | None = None,
    reading: Reading = Reading(),  # noqa: B008
) -> Corpus:
    """The corpus that `--data` names.

    data: "stdlib" (source text of this Python's standard library, token = byte), "synthetic" (random ids), or sources,
    see `parse_sources`, whose text the tokenizer in the local folder `tokenizer` cuts into tokens.
    vocab_size: the model's; ids must lie below it. validation_data: sources of what to validate on; without any it is
    5 % of the documents of each source. end_of_text: the id that ends a document in token files; None: the tokenizer's.
    ValueError for a missing file or tokenizer, an empty corpus, or ids that the model cannot embed.
    """
    words = [data] if isinstance(data, str) else list(data)
    sources = parse_sources(words)
    if (built_in := sources[0].path) in BUILT_IN:
        if reading != Reading() or end_of_text is not None:
            raise ValueError(
                "--text_field, --num_proc, --bad_rows and --end_of_text have no meaning with --data "
                f"{built_in}, whose tokens are fixed; leave them out"
            )
        corpus = _built_in(built_in, tokenizer, seq_length, vocab_size, validation_data)
    else:
        corpus = _of_sources(sources, tokenizer, seq_length, vocab_size, validation_data, end_of_text, reading)
    if corpus.vocab_size is not None:
        _check_vocabulary(" ".join(words), corpus.vocab_size, vocab_size)
    return corpus


def _built_in(
    data: str, tokenizer: str | None, seq_length: int, vocab_size: int, validation_data: Sequence[str]
) -> Corpus:
    for option, given in (("--tokenizer", tokenizer), ("--validation_data", " ".join(validation_data))):
        if given:
            raise ValueError(
                f"{option} {given} has no meaning with --data {data}, whose tokens are fixed; leave it out"
            )
    if data == "stdlib":
        return _load_stdlib(seq_length)
    return Corpus(
        SyntheticSequences(2**20, seq_length, vocab_size, seed=0),
        SyntheticSequences(2**12, seq_length, vocab_size, seed=1),
        vocab_size,
        None,
        data,
    )


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
    halves = [Tokens("stdlib", [np.frombuffer(b"".join(parts[half]), np.uint8)], None) for half in (False, True)]
    if min(map(len, halves)) < seq_length:
        raise ValueError(
            f"the standard library at {root} has {len(halves[0])} bytes of .py files for training, {len(halves[1])} "
            f"for validation, less than one sequence of {seq_length}: this Python ships no source text, use --data FILE"
        )
    train, validation = (Sequences(half, all_of(half), seq_length, 256) for half in halves)
    return Corpus(train, validation, 256, 0, "stdlib")


def _of_sources(
    sources: list[Source],
    tokenizer: str | None,
    seq_length: int,
    vocab_size: int,
    validation_data: Sequence[str],
    end_of_text: int | None,
    reading: Reading,
) -> Corpus:
    load = _Loader(sources[0].name, tokenizer, seq_length, vocab_size, end_of_text, reading)
    halves = [load.train_and_validation(source, split=not validation_data) for source in sources]
    train = [half[0] for half in halves]
    if validation_data:
        validation = [load.validation(source) for source in _validation_sources(validation_data)]
    else:
        validation = [half[1] for half in halves]
    weights = tuple(source.weight for source in sources) if len(sources) > 1 and sources[0].weight else None
    if weights and not validation_data:
        validation = _in_shares(validation, weights)
    return Corpus(
        ConcatDataset(train),
        ConcatDataset(validation),
        load.vocab_size,
        load.end_of_text,
        "; ".join(load.told),
        tuple(map(len, train)),
        weights,
    )


def stream_corpus(
    data: str | Sequence[str],
    tokenizer: str | None,
    seq_length: int,
    vocab_size: int,
    *,
    validation_data: Sequence[str] = (),
    end_of_text: int | None = None,
    validation_sequences: int = 0,
    reading: Reading = Reading(),  # noqa: B008
) -> Corpus:
    """The corpus of --streaming, whose `train` is a `Streams`.

    validation_sequences: how many to hold out, in whole row groups, without validation_data. ValueError as
    `load_corpus`, and for sources that are not Parquet files.
    """
    sources = parse_sources([data] if isinstance(data, str) else data)
    if sources[0].path in BUILT_IN:
        raise ValueError(f"--streaming reads Parquet files, --data {sources[0].path} is none: leave it out")
    for option, given in (("--num_proc", reading.num_proc), ("--end_of_text", end_of_text)):
        if given is not None:
            raise ValueError(f"{option} {given} has no meaning with --streaming; leave it out")
    encoder = find_tokenizer(tokenizer, sources[0].path)
    streamed = [StreamedSource(source, encoder, seq_length, reading) for source in sources]
    told = [source.description for source in streamed]
    if validation_data:
        load = _Loader(sources[0].name, tokenizer, seq_length, vocab_size, None, reading)
        validation = [load.validation(source) for source in _validation_sources(validation_data)]
        told += load.told
    else:
        wanted = shares([source.source.weight or source.sequences for source in streamed], validation_sequences)
        validation = [
            HeldOutSequences(source, source.hold_out(max(1, count)))
            for source, count in zip(streamed, wanted, strict=True)
        ]
    _check_vocabulary(" ".join(source.path for source in sources), len(encoder), vocab_size)
    description = "; ".join(told) + "; streamed"
    return Corpus(Streams(streamed), ConcatDataset(validation), len(encoder), encoder.eos_token_id, description)


def _check_vocabulary(data: str, tokenizer_ids: int, model_ids: int) -> None:
    if tokenizer_ids > model_ids:
        raise ValueError(
            f"the tokens of --data {data} need {tokenizer_ids} ids but the model embeds {model_ids}: choose the "
            "tokenizer that belongs to the model"
        )


def _validation_sources(words: Sequence[str]) -> list[Source]:
    sources = parse_sources(words)
    if wrong := next((source for source in sources if source.weight or source.path in BUILT_IN), None):
        raise ValueError(f"--validation_data {wrong.name}: give files, folders or globs, without weights: all is read")
    return sources


def _in_shares(parts: list[Sequences], weights: tuple[float, ...]) -> list[Dataset]:
    """Evenly spaced items of each part, as many of them as its weight asks for, and at least one."""
    most = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    counts = [max(1, int(most * weight)) for weight in weights]
    return [
        Subset(part, [i * len(part) // count for i in range(count)]) for part, count in zip(parts, counts, strict=True)
    ]


class _Loader:
    """Sources as sequences. told: what was found in each. vocab_size: of the tokenizer, if one was needed."""

    def __init__(
        self,
        data: str,
        tokenizer: str | None,
        seq_length: int,
        vocab_size: int,
        end_of_text: int | None,
        reading: Reading,
    ) -> None:
        self._tokenizer, self._seq_length, self._reading = tokenizer, seq_length, reading
        self._model_ids = vocab_size
        self.vocab_size: int | None = None
        self.end_of_text = end_of_text
        if end_of_text is None and tokenizer is not None:
            self.end_of_text = find_tokenizer(tokenizer, data).eos_token_id
        self.told: list[str] = []

    def train_and_validation(self, source: Source, split: bool) -> tuple[Sequences, Sequences | None]:
        """The halves of a source; only the first, with all of it, unless `split`."""
        files, validation_files = find_files(source), ()
        if files.kind == "tokens":
            training, validation_files = training_and_validation(files)
            files = Files(files.kind, training)
        tokens = self._open(source, files)
        if not split:
            return self._cut(tokens, all_of(tokens), "training"), None
        if validation_files:
            held_out = self._open(source, Files("tokens", validation_files), "validation on ")
            return self._cut(tokens, all_of(tokens), "training"), self._cut(held_out, all_of(held_out), "validation")
        training_runs, validation_runs = hold_out(tokens)
        return self._cut(tokens, training_runs, "training"), self._cut(tokens, validation_runs, "validation")

    def validation(self, source: Source) -> Sequences:
        """All of a source of --validation_data."""
        tokens = self._open(source, find_files(source, "--validation_data"), "validation on ")
        return self._cut(tokens, all_of(tokens), "validation")

    def _open(self, source: Source, files: Files, told_of: str = "") -> Tokens:
        left_out = ""
        if files.kind == "tokens":
            tokens = open_token_files(source.name, files.paths, self.end_of_text)
        elif (tokens := saved_tokens(source.name, files) if files.kind == "saved" else None) is None:
            encoder = find_tokenizer(self._tokenizer, source.name)
            if self.end_of_text != encoder.eos_token_id:
                raise ValueError(
                    f"--end_of_text {self.end_of_text} is for token files: text gets the id {encoder.eos_token_id} of "
                    f"--tokenizer {self._tokenizer}; leave it out"
                )
            self.vocab_size = len(encoder)
            tokens, left_out = tokenise(source.name, files, self._tokenizer, self._reading)
        share = f" (weight {source.weight:g})" if source.weight else ""
        documents = f"{tokens.documents} documents, " if tokens.documents is not None else ""
        told = f"{documents}{len(tokens)} tokens ({tokens.digest()}){left_out}"
        self.told.append(f"{told_of}{source.name}{share}: {told}")
        return tokens

    def _cut(self, tokens: Tokens, runs: np.ndarray, half: str) -> Sequences:
        cut = Sequences(tokens, runs, self._seq_length, self._model_ids)
        if not len(cut):
            raise ValueError(
                f"--data {tokens.name}: the {half} documents give no sequence of {self._seq_length} tokens; add text"
            )
        return cut


def train_loader(
    dataset: Dataset, batches: Sampler[list[int]], workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Micro-batches of token ids [micro_batch, seq_length], int64. workers: processes that read ahead."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory)


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
