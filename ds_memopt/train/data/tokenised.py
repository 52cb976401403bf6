"""Text as token ids: each document is encoded once, and kept in the cache of `datasets`, memory-mapped."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from ds_memopt.train.data.documents import Piece, cut_into_pieces, load_saved, read_documents
from ds_memopt.train.data.sequences import Tokens
from ds_memopt.train.data.sources import Files, local_path, stamp

CACHE_VERSION = 2
"""Of what `_encode` yields: another number, and nothing that was kept before is used again."""

BYTES_PER_PROCESS = 2**25
"""Less text than this is encoded sooner by one process: the tokenizer itself has threads."""

ENCODED_AT_ONCE = 256
"""Documents."""


@dataclass(frozen=True)
class Reading:
    """How text is read. The fields are options of the job: see `train.options.PretrainOptions`."""

    text_field: tuple[str, ...] = ("text",)
    num_proc: int | None = None
    bad_rows: float = 0.0


def find_tokenizer(tokenizer: str | None, data: str) -> Any:
    """The tokenizer in a local folder. ValueError if there is none, or if it cannot separate documents."""
    if tokenizer is None or not Path(tokenizer).is_dir():
        raise ValueError(f"--data {data} needs --tokenizer FOLDER with a local Hugging Face tokenizer, got {tokenizer}")
    return _load_tokenizer(tokenizer)


@functools.cache
def _load_tokenizer(folder: str) -> Any:
    encoder = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if encoder.eos_token_id is None:
        raise ValueError(f"--tokenizer {folder} has no end-of-sequence token, which must separate documents")
    return encoder


def tokenise(name: str, files: Files, tokenizer: str, reading: Reading) -> tuple[Tokens, str]:
    """The documents of the files as one stream, each ending with the end-of-sequence token; and what was left out.

    What was encoded before, by any run with this tokenizer, is taken from the cache: neither the number of processes
    nor the length of sequences matters. ValueError for more bad rows than reading.bad_rows, naming the first.
    """
    import datasets

    size = sum(stamp(path)[1] or 0 for path in _all_files(files))
    cores = len(os.sched_getaffinity(0))
    processes = reading.num_proc or min(cores, 1 + size // BYTES_PER_PROCESS)
    pieces = cut_into_pieces(files, processes)
    if not pieces:
        raise ValueError(f"--data {name} holds 0 documents")
    try:
        rows = datasets.Dataset.from_generator(
            _encode,
            features=datasets.Features(
                {"input_ids": datasets.List(datasets.Value("int32")), "fault": datasets.Value("string")}
            ),
            # datasets cuts lists, and lists alone, into a part for each process
            gen_kwargs={
                "pieces": pieces,
                "tokenizer": tokenizer,
                "text_field": tuple(reading.text_field),
                "strict": reading.bad_rows == 0,
                "threads": processes == 1,
            },
            num_proc=min(processes, len(pieces)) if processes > 1 else None,
            fingerprint=_fingerprint(files, tokenizer, reading),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"--data {name}: {error.__cause__ or error}") from error
    left_out = _check_bad_rows(name, rows, reading.bad_rows)
    return tokens_of_rows(name, rows), left_out


def _encode(
    pieces: list[Piece], tokenizer: str, text_field: Sequence[str], strict: bool, threads: bool
) -> Iterator[dict[str, Any]]:
    """A row for each document: its ids, int32, or its fault. strict: end at the first fault."""
    import datasets

    if not threads:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in this process: there is one for each core
    encoder = _load_tokenizer(tokenizer)
    end = encoder.eos_token_id
    try:
        for piece in pieces:
            documents = read_documents(Piece(*piece), text_field)
            while some := list(islice(documents, ENCODED_AT_ONCE)):
                fault = next((document.fault for document in some if document.fault), None)
                if strict and fault:
                    raise ValueError(f"{fault}; --bad_rows allows for some, which are left out")
                texts = [document.text for document in some if document.text is not None]
                encoded = iter(encoder(texts, verbose=False)["input_ids"] if texts else [])
                for document in some:
                    if document.text is None:
                        yield {"input_ids": None, "fault": document.fault}
                        continue
                    ids = next(encoded)
                    ids = ids if ids[-1:] == [end] else [*ids, end]
                    yield {"input_ids": np.array(ids, np.int32), "fault": None}
    except ValueError as error:
        # datasets passes on its own error alone, and an error from another process loses its cause
        raise datasets.exceptions.DatasetGenerationError(str(error)) from None


def _fingerprint(files: Files, tokenizer: str, reading: Reading) -> str:
    """The name of the encoded documents in the cache: the same in each run and on each rank, another when a file, the
    tokenizer, or anything else changes that they depend on."""
    encoder = [
        (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(Path(tokenizer).iterdir())
        if path.is_file() and ("token" in path.name or path.name in ("vocab.json", "merges.txt", "spiece.model"))
    ]
    stamps = [stamp(path) for path in _all_files(files)]
    told = [CACHE_VERSION, transformers.__version__, encoder, stamps, list(reading.text_field)]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:32]


def _all_files(files: Files) -> list[str]:
    if files.kind != "saved":
        return list(files.paths)
    return sorted(str(path) for path in Path(local_path(files.paths[0])).rglob("*") if path.is_file())


def _check_bad_rows(name: str, rows: Any, bad_rows: float) -> str:
    """What to tell of the bad rows; "" if there is none. ValueError for too many."""
    faults = rows.data.column("fault")
    bad = len(rows) - faults.null_count
    if not bad:
        return ""
    first = next(fault for fault in faults.drop_null().to_pylist()[:1])
    told = f"{bad} of {len(rows)} rows are bad, the first: {first}"
    if bad > (bad_rows if bad_rows >= 1 else bad_rows * len(rows)):
        raise ValueError(f"--data {name}: {told}; --bad_rows {bad_rows:g} allows for less")
    return f"; {told}"


def saved_tokens(name: str, files: Files) -> Tokens | None:
    """The rows of a saved dataset that holds token ids; None if it holds text."""
    rows = load_saved(files.paths[0])
    if "input_ids" not in rows.column_names:
        return None
    return tokens_of_rows(name, rows.select_columns(["input_ids"]).flatten_indices() if rows._indices else rows)


def tokens_of_rows(name: str, rows: Any) -> Tokens:
    """A stream whose documents are the rows, memory-mapped as the dataset is."""
    import pyarrow

    parts, lengths = [], []
    for chunk in rows.data.column("input_ids").chunks:
        if not pyarrow.types.is_list(chunk.type) and not pyarrow.types.is_large_list(chunk.type):
            chunk = chunk.cast(pyarrow.list_(chunk.type.value_type))
        offsets = chunk.offsets.to_numpy()
        parts.append(chunk.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]])
        lengths.append(np.diff(offsets))
    filled = np.concatenate([[0], *lengths]).astype(np.int64)
    borders = np.concatenate([[0], np.cumsum(filled[filled > 0])])  # a bad row has no tokens and is no document
    return Tokens(name, parts, borders)
