"""Documents of text files, JSON, Parquet and saved datasets, one by one, each with the place that it has there."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ds_memopt.train.data.sources import COMPRESSIONS, Files, kind_of, open_file, stamp

READ_AT_ONCE = 256
"""Rows of a Parquet file or a saved dataset."""

BYTES_PER_PIECE = 2**20
"""Of lines: a smaller piece is not worth opening the file once more."""


class Piece(NamedTuple):
    """A part of a source that one process reads. kind: of the files, or "paragraphs" where these are the documents.
    start, stop: row groups of a Parquet file, rows of a saved dataset, else bytes; both 0 for a whole file."""

    path: str
    kind: str
    start: int = 0
    stop: int = 0


class Document(NamedTuple):
    """text: None where the row is bad, and fault, naming file and line or row, says how."""

    text: str | None
    fault: str | None = None

    def at(self, place: str) -> Document:
        """With the place in its fault, if it has one."""
        return self if self.fault is None else Document(None, f"{place}: {self.fault}")


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
    kind = "paragraphs" if files.kind == "text" and len(files.paths) == 1 else files.kind
    return [Piece(path, kind, *part) for path in files.paths for part in _parts_of_lines(path, kind, parts)]


def _parts_of_lines(path: str, kind: str, parts: int) -> list[tuple[int, int]]:
    if kind == "text" or PurePosixPath(path).suffix in COMPRESSIONS or (kind == "json" and _is_array(path)):
        return [(0, 0)]
    size = stamp(path)[1]
    return _spread(size, min(parts, 1 + size // BYTES_PER_PIECE))


def _is_array(path: str) -> bool:
    with open_file(path) as stream:
        return stream.read(io.DEFAULT_BUFFER_SIZE).lstrip().startswith(b"[")


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
        yield _decode(stream.read()).at(piece.path)


def _read_paragraphs(piece: Piece, text_field: Sequence[str]) -> Iterator[Document]:
    """What stands between blank lines: the paragraphs before which the last blank line begins in the piece."""
    lines = _Lines(piece)
    with lines.stream:
        paragraph, first, is_ours = [], 0, not piece.start
        for number, (begin, line) in enumerate(chain(lines, [(piece.stop, b"")]), 1):  # the end is a blank line, too
            if line.strip():
                first = first if paragraph else number
                paragraph += [line] * is_ours
                continue
            if paragraph:
                yield lines.at(first, _decode(b"".join(paragraph).rstrip(b"\r\n")))
            if piece.stop and begin >= piece.stop:
                return
            paragraph, is_ours = [], True


def _decode(text: bytes) -> Document:
    try:
        return Document(text.decode())
    except UnicodeDecodeError as error:
        return Document(None, str(error))


def _read_json(piece: Piece, text_field: Sequence[str]) -> Iterator[Document]:
    lines = _Lines(piece)
    with lines.stream:
        for number, (begin, line) in enumerate(lines, 1):
            if piece.stop and begin >= piece.stop:
                return
            if not begin and line.lstrip().startswith(b"["):  # one array, not an object a line
                yield from _of_array(line + lines.stream.read(), text_field, piece.path)
                return
            if line.strip():
                yield lines.at(number, _of_line(line, text_field))


def _of_array(text: bytes, text_field: Sequence[str], path: str) -> Iterator[Document]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        yield _of_row(row, text_field).at(f"{path}, row {number}")


class _Lines:
    """The lines that begin in a piece and those after them, each with the byte at which it begins."""

    def __init__(self, piece: Piece) -> None:
        self._path, self._start = piece.path, piece.start
        self.stream = _decompressed(piece.path)
        if piece.start:
            self.stream.seek(piece.start - 1)
            self._start += len(self.stream.readline()) - 1

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        begin = self._start
        for line in self.stream:
            yield begin, line
            begin += len(line)

    def at(self, number: int, document: Document) -> Document:
        """With the place of the line that was given as the number-th."""
        return document.at(f"{self._path}, line {self._before + number}") if document.fault else document

    @functools.cached_property
    def _before(self) -> int:
        """Lines of the file before the first one. They are counted for a fault alone, as they may be most of it."""
        lines, left = 0, self._start
        with open_file(self._path) as stream:
            while some := stream.read(min(left, 2**20)):
                lines, left = lines + some.count(b"\n"), left - len(some)
        return lines


def _read_parquet(piece: Piece, text_field: Sequence[str]) -> Iterator[Document]:
    file = open_parquet(piece.path)
    field = column_of(file.schema_arrow.names, text_field, piece.path)
    row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
    groups = range(piece.start, piece.stop)
    for batch in file.iter_batches(READ_AT_ONCE, row_groups=groups, columns=[field]):
        for text in batch.column(0).to_pylist():
            row += 1
            yield _of_text(text, field).at(f"{piece.path}, row {row}")


def _read_saved(piece: Piece, text_field: Sequence[str]) -> Iterator[Document]:
    dataset = load_saved(piece.path)
    field = column_of(dataset.column_names, text_field, piece.path)
    dataset = dataset.select_columns([field])
    for start in range(piece.start, piece.stop, READ_AT_ONCE):
        texts = dataset[start : min(start + READ_AT_ONCE, piece.stop)][field]
        for row, text in enumerate(texts, start + 1):
            yield _of_text(text, field).at(f"{piece.path}, row {row}")


READERS = {
    "text": _read_text,
    "paragraphs": _read_paragraphs,
    "json": _read_json,
    "parquet": _read_parquet,
    "saved": _read_saved,
}


def column_of(names: Sequence[str], text_field: Sequence[str], path: str) -> str:
    """The column that holds the text. ValueError if the table has none of text_field."""
    field = next((name for name in text_field if name in names), None)
    if field is None:
        raise ValueError(f"{path}: {_lacks(names, text_field)}")
    return field


def _lacks(names: Iterable[str], text_field: Sequence[str]) -> str:
    wanted = " or ".join(map(repr, text_field))
    return f"rows need a field {wanted}, they have {', '.join(names)}; --text_field names another"


def _of_line(line: bytes, text_field: Sequence[str]) -> Document:
    try:
        row = json.loads(line)
    except ValueError as error:
        return Document(None, f"no JSON: {error}")
    return _of_row(row, text_field)


def _of_row(row: Any, text_field: Sequence[str]) -> Document:
    if isinstance(row, str):
        return _of_text(row, "")
    if not isinstance(row, dict):
        return Document(None, f"an object with a text, or a string, is needed, this is {row!r:.40}")
    field = next((name for name in text_field if name in row), None)
    if field is None:
        return Document(None, _lacks(row, text_field))
    return _of_text(row[field], field)


def _of_text(text: Any, field: str) -> Document:
    if not isinstance(text, str):
        return Document(None, f"the field {field!r} must be a string, it is {text!r:.40}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: no tokenizer takes it
        return Document(None, str(error))
    return Document(text)


def open_parquet(path: str) -> Any:
    """A `pyarrow.parquet.ParquetFile`. ValueError naming the file if it is none."""
    import pyarrow
    import pyarrow.parquet

    stream = open_file(path)
    try:
        return pyarrow.parquet.ParquetFile(stream)
    except (pyarrow.ArrowException, ValueError) as error:  # fsspec's too, where a server gives no parts of a file
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
