"""Documents of text files, JSON, Parquet and saved datasets, one by one, each with the place that it has there."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ds_memopt.train.data.sources import COMPRESSIONS, Files, kind_of, open_file

READ_AT_ONCE = 256
"""Rows of a Parquet file or a saved dataset."""


class Piece(NamedTuple):
    """A part of a source that one process reads. start, stop: row groups of a Parquet file, rows of a saved dataset;
    else 0, and 1 where a document is a paragraph of the file."""

    path: str
    kind: str
    start: int = 0
    stop: int = 0


class Document(NamedTuple):
    """text: None where the row is bad, and fault, naming file and line or row, says how."""

    text: str | None
    fault: str | None = None


def cut_into_pieces(files: Files, parts: int) -> list[Piece]:
    """Pieces in the order of the files; files that allow it are cut into up to `parts` each."""
    if files.kind == "parquet":
        return [
            Piece(path, "parquet", start, stop)
            for path in files.paths
            for start, stop in _spread(open_parquet(path).num_row_groups, parts)
        ]
    if files.kind == "saved":
        (path,) = files.paths
        return [Piece(path, "saved", start, stop) for start, stop in _spread(len(load_saved(path)), parts)]
    by_paragraph = files.kind == "text" and len(files.paths) == 1
    return [Piece(path, files.kind, 0, int(by_paragraph)) for path in files.paths]


def _spread(whole: int, parts: int) -> list[tuple[int, int]]:
    edges = [whole * part // parts for part in range(parts + 1)]
    return [(start, stop) for start, stop in zip(edges, edges[1:], strict=False) if start < stop]


def read_documents(piece: Piece, text_field: Sequence[str]) -> Iterator[Document]:
    """The documents of a piece. text_field: names of the field with the text; the first that a row has counts.

    ValueError naming the file if it cannot be read on.
    """
    try:
        yield from READERS[piece.kind](piece, text_field)
    except (OSError, EOFError) as error:  # also pyarrow's
        raise ValueError(f"{piece.path} is damaged or cannot be read: {error}") from error


def _read_text(piece: Piece, text_field: Sequence[str]) -> Iterator[Document]:
    with _decompressed(piece.path) as stream:
        try:
            whole = stream.read().decode()
        except UnicodeDecodeError as error:
            yield Document(None, f"{piece.path}: {error}")
            return
    if not piece.stop:
        yield Document(whole)
        return
    yield from (Document(paragraph) for paragraph in re.split(r"\n\s*\n", whole.strip()) if paragraph)


def _read_json(piece: Piece, text_field: Sequence[str]) -> Iterator[Document]:
    with _decompressed(piece.path) as stream:
        first = stream.readline()
        if first.lstrip().startswith(b"["):  # one array, not an object a line
            try:
                rows = json.loads(first + stream.read())
            except ValueError as error:
                raise ValueError(f"{piece.path}: no JSON: {error}") from error
            for number, row in enumerate(rows, 1):
                yield _of_row(row, text_field, f"{piece.path}, row {number}")
            return
        for number, line in enumerate(_chain(first, stream), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield Document(None, f"{piece.path}, line {number}: no JSON: {error}")
            else:
                yield _of_row(row, text_field, f"{piece.path}, line {number}")


def _chain(first: bytes, rest: Iterable[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _read_parquet(piece: Piece, text_field: Sequence[str]) -> Iterator[Document]:
    file = open_parquet(piece.path)
    field = column_of(file.schema_arrow.names, text_field, piece.path)
    row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
    groups = range(piece.start, piece.stop)
    for batch in file.iter_batches(READ_AT_ONCE, row_groups=groups, columns=[field]):
        for text in batch.column(0).to_pylist():
            row += 1
            yield _of_text(text, field, f"{piece.path}, row {row}")


def _read_saved(piece: Piece, text_field: Sequence[str]) -> Iterator[Document]:
    dataset = load_saved(piece.path)
    field = column_of(dataset.column_names, text_field, piece.path)
    dataset = dataset.select_columns([field])
    for start in range(piece.start, piece.stop, READ_AT_ONCE):
        texts = dataset[start : min(start + READ_AT_ONCE, piece.stop)][field]
        for row, text in enumerate(texts, start + 1):
            yield _of_text(text, field, f"{piece.path}, row {row}")


READERS = {"text": _read_text, "json": _read_json, "parquet": _read_parquet, "saved": _read_saved}


def column_of(names: Sequence[str], text_field: Sequence[str], path: str) -> str:
    """The column that holds the text. ValueError if the table has none of text_field."""
    field = next((name for name in text_field if name in names), None)
    if field is None:
        raise ValueError(f"{path}: {_lacks(names, text_field)}")
    return field


def _lacks(names: Iterable[str], text_field: Sequence[str]) -> str:
    wanted = " or ".join(map(repr, text_field))
    return f"rows need a field {wanted}, they have {', '.join(names)}; --text_field names another"


def _of_row(row: Any, text_field: Sequence[str], place: str) -> Document:
    if isinstance(row, str):
        return _of_text(row, "", place)
    if not isinstance(row, dict):
        return Document(None, f"{place}: an object with a text, or a string, is needed, this is {row!r:.40}")
    field = next((name for name in text_field if name in row), None)
    if field is None:
        return Document(None, f"{place}: {_lacks(row, text_field)}")
    return _of_text(row[field], field, place)


def _of_text(text: Any, field: str, place: str) -> Document:
    if not isinstance(text, str):
        return Document(None, f"{place}: the field {field!r} must be a string, it is {text!r:.40}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: no tokenizer takes it
        return Document(None, f"{place}: {error}")
    return Document(text)


def open_parquet(path: str) -> Any:
    """A `pyarrow.parquet.ParquetFile`. ValueError naming the file if it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(open_file(path))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no Parquet file, or damaged: {error}") from error


def load_saved(path: str) -> Any:
    """The `datasets.Dataset` in a folder of `save_to_disk`; of several splits the one named "train"."""
    import datasets

    found = datasets.load_from_disk(path)
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise ValueError(f"{path} has no split 'train' but {', '.join(found)}: name the folder of one, {path}/NAME")
        return found["train"]
    return found


def _decompressed(path: str) -> io.BufferedReader:
    import pyarrow

    assert kind_of(path) in ("text", "json")
    compression = COMPRESSIONS.get(PurePosixPath(path).suffix)
    stream = open_file(path)
    return io.BufferedReader(pyarrow.input_stream(stream, compression=compression) if compression else stream)
