"""What --data takes, how it is cut, split, mixed and packed."""

from __future__ import annotations

import bz2
import gzip
import json
import re
import struct
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from ds_memopt.train.data import order, tokenised
from ds_memopt.train.data.corpus import load_corpus, stream_corpus
from ds_memopt.train.data.documents import cut_into_pieces, read_documents
from ds_memopt.train.data.packing import check_document_borders, model_inputs, positions_in_documents
from ds_memopt.train.data.sources import Files, Source, parse_sources
from ds_memopt.train.data.tokenised import Reading

WORDS, EOS = 60, 0
DOCUMENTS = [" ".join(f"w{i}" for _ in range(9)) for i in range(WORDS)]  # 9 tokens i + 2, and the end


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {"<eos>": EOS, "<unk>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _lines(documents=DOCUMENTS, field="text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(documents)).encode()


def _table(documents=DOCUMENTS):
    return pa.table({"id": range(len(documents)), "text": documents})


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def _megatron(folder: Path, ids: list[list[int]]) -> None:
    np.concatenate([np.array(one, np.int32) for one in ids]).tofile(folder / "a.bin")
    lengths = np.array([len(one) for one in ids], np.int32)
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * 4
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(ids), len(ids) + 1)
    (folder / "a.idx").write_bytes(
        head + lengths.tobytes() + starts.tobytes() + np.arange(len(ids) + 1).astype(np.int64).tobytes()
    )


IDS = [[i + 2] * 9 + [EOS] for i in range(WORDS)]
FORMS = {
    "jsonl": lambda f: (f / "a.jsonl").write_bytes(_lines()),
    "jsonl.gz": lambda f: (f / "a.jsonl.gz").write_bytes(
        b"".join(gzip.compress(_lines(some)) for some in (DOCUMENTS[:9], DOCUMENTS[9:]))
    ),
    "json.zst": lambda f: (f / "a.json.zst").write_bytes(_zstd(_lines())),
    "array": lambda f: (f / "a.json").write_text(json.dumps([{"text": text} for text in DOCUMENTS])),
    "parquet": lambda f: [
        pq.write_table(_table(DOCUMENTS[:25]), f / "0.parquet", row_group_size=7),
        pq.write_table(_table(DOCUMENTS[25:]), f / "1.parquet"),
        (f / "README.md").write_text("the dataset's page"),
    ],
    "text": lambda f: [(f / f"{i:02}.txt").write_text(text) for i, text in enumerate(DOCUMENTS)],
    "paragraphs.bz2": lambda f: (f / "a.txt.bz2").write_bytes(bz2.compress("\n\n".join(DOCUMENTS).encode())),
    "saved": lambda f: datasets.Dataset(_table()).save_to_disk(f),
    "saved tokens": lambda f: datasets.Dataset.from_dict({"input_ids": IDS}).save_to_disk(f),
    "nanoGPT": lambda f: np.concatenate(IDS).astype(np.uint16).tofile(f / "a.bin"),
    "llm.c": lambda f: (f / "a.bin").write_bytes(
        np.array([20240520, 1, 600] + [0] * 253, np.int32).tobytes() + np.concatenate(IDS).astype(np.uint16).tobytes()
    ),
    "Megatron": lambda f: _megatron(f, IDS),
}  # fmt: skip


def _rows(half) -> list[list[int]]:
    return [half[row].tolist() for row in range(len(half))]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_documents(tmp_path, tokenizer, form):
    source = tmp_path / "source"
    source.mkdir()
    FORMS[form](source)
    loaded = load_corpus([f"words={source}"], tokenizer, 10, vocab_size=62)
    halves = [_rows(half) for half in (loaded.train, loaded.validation)]
    assert sorted(halves[0] + halves[1]) == IDS and halves[0] == sorted(
        halves[0]
    )  # each once, in the order of the files
    assert len(halves[1]) == 3 and loaded.train[0].dtype == torch.int64
    assert loaded.description == "words: 60 documents, 600 tokens (d3af29b4)" and loaded.ends_of_documents() == EOS


def test_tokens_are_made_once(tmp_path, tokenizer, monkeypatch, capfd):
    for part in range(3):
        pq.write_table(_table(DOCUMENTS[20 * part : 20 * part + 20]), tmp_path / f"{part}.parquet", row_group_size=6)
    words = [str(tmp_path / "*.parquet")]
    alone = load_corpus(words, tokenizer, 16, 62)
    made = sorted((tmp_path / "cache").rglob("*.arrow"))
    tokenised._load_tokenizer.cache_clear()
    again = load_corpus(words, tokenizer, 30, 62, reading=Reading(num_proc=2))  # another length and number of processes
    assert sorted((tmp_path / "cache").rglob("*.arrow")) == made and len(made) == 1
    assert len(again.train) == 570 // 30 and len(alone.train) == 570 // 16

    (tmp_path / "2.parquet").touch()  # a file that may have changed
    parallel = load_corpus(words, tokenizer, 16, 62, reading=Reading(num_proc=2))
    assert len([*(tmp_path / "cache").rglob("*.arrow")]) > len(made)
    assert _rows(parallel.train) == _rows(alone.train) and _rows(parallel.validation) == _rows(alone.validation)
    assert parallel.description == alone.description


FILES_OF_LINES = {
    "a.txt": b"\n \n  one\ntwo \n\n\t\n\nthree\r\n\r\nf\xffour\nfive\n" + b"six " * 9 + b"\n\n\n\nseven",
    "a.jsonl": b'\n"one"\n{"text": "two"}\r\n\n{"text": 3}\n{"a\n' + b'"' + b"four " * 9 + b'"\n\n\n"\xff"\n"five"',
}


@pytest.mark.parametrize("name", FILES_OF_LINES)
def test_a_file_of_lines_gives_the_same_documents_in_any_number_of_pieces(tmp_path, monkeypatch, name):
    """With the lines of bad ones. At a byte a piece there is one that begins at each byte."""
    monkeypatch.setattr("ds_memopt.train.data.documents.BYTES_PER_PIECE", 1)
    path, content = tmp_path / name, FILES_OF_LINES[name]
    path.write_bytes(content)
    files = Files("text" if name == "a.txt" else "json", (str(path),))

    def read(parts):
        pieces = cut_into_pieces(files, parts)
        assert len(pieces) == parts
        return [document for piece in pieces for document in read_documents(piece, ["text"])]

    whole = read(1)
    assert all(read(parts) == whole for parts in range(2, len(content) + 1))
    if name == "a.txt":
        texts = re.split(r"\n\s*\n", content.decode(errors="replace").replace("\r", ""))
        assert [text for text in texts if text.strip()] == [
            document.text or "f\ufffdour\nfive\n" + "six " * 9 for document in whole
        ]
    else:
        assert [document.text for document in whole] == ["one", "two", None, None, "four " * 9, None, "five"]
    lines = [re.fullmatch(f"{path}, line (\\d+): .*", document.fault)[1] for document in whole if document.fault]
    assert lines == (["10"] if name == "a.txt" else ["5", "6", "10"])

    (tmp_path / "array.json").write_text('[\n"one",\n"two"]')
    (piece,) = cut_into_pieces(Files("json", (str(tmp_path / "array.json"),)), 3)
    assert [document.text for document in read_documents(piece, ["text"])] == ["one", "two"]


def test_other_data_of_the_same_size_are_told_apart(tmp_path, tokenizer):
    told = []
    for name, documents in (("a", DOCUMENTS), ("b", [*DOCUMENTS[:-2], *DOCUMENTS[:-3:-1]]), ("c", DOCUMENTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        told.append(load_corpus([f"words={tmp_path / name}.jsonl"], tokenizer, 10, 62).description)
    assert told[0] == told[2] != told[1]


def test_bad_rows_are_named_counted_and_limited(tmp_path, tokenizer):
    lines = _lines().splitlines(keepends=True)
    lines[4], lines[30], lines[31] = b'{"text": 5}\n', b"{no JSON\n", b'{"text": "\\ud800"}\n'
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    words = [f"words={tmp_path / 'a.jsonl'}"]
    with pytest.raises(
        ValueError,
        match=rf"^--data words: {tmp_path}/a.jsonl, line 5: the field 'text' must be a string, it is 5; --bad_rows",
    ):
        load_corpus(words, tokenizer, 10, 62)
    for allowed in (2, 2 / 60):
        with pytest.raises(
            ValueError, match=r"3 of 60 rows are bad, the first: .*line 5.*--bad_rows .* allows for less"
        ):
            load_corpus(words, tokenizer, 10, 62, reading=Reading(bad_rows=allowed))
    for allowed in (3, 0.05):
        loaded = load_corpus(words, tokenizer, 10, 62, reading=Reading(bad_rows=allowed))
        assert sorted(_rows(loaded.train) + _rows(loaded.validation)) == [
            IDS[i] for i in range(60) if i not in (4, 30, 31)
        ]
        assert "57 documents, 570 tokens" in loaded.description
        assert "; 3 of 60 rows are bad, the first: " in loaded.description

    pq.write_table(pa.table({"text": ["w1", None]}), tmp_path / "b.parquet", row_group_size=1)
    with pytest.raises(ValueError, match=r"b.parquet, row 2: the field 'text' must be a string, it is None"):
        load_corpus([str(tmp_path / "b.parquet")], tokenizer, 10, 62, reading=Reading(num_proc=2))


def test_files_that_cannot_be_read_are_named(tmp_path, tokenizer):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(_lines())[:-30])
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and nothing more")
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "high.bin").write_bytes(np.full(400, 99, np.uint16).tobytes())
    _megatron(tmp_path, IDS)
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-4])
    (tmp_path / "c.jsonl").write_bytes(_lines(field="content"))
    cases = [
        ("cut.jsonl.gz", tokenizer, r"cut.jsonl.gz is damaged or cannot be read"),
        ("no.parquet", tokenizer, r"no.parquet is no Parquet file"),
        ("odd.bin", None, r"odd.bin has 3 bytes"),
        ("high.bin", tokenizer, r"high.bin does not hold the id 0"),
        ("a.bin", None, r"a.bin is damaged: it holds 599 ids, but .*a.idx tells 600"),
        ("c.jsonl", tokenizer, r"line 1: rows need a field 'text', they have id, content; --text_field"),
    ]
    for name, folder, message in cases:
        with pytest.raises(ValueError, match=message):
            load_corpus([str(tmp_path / name)], folder, 10, 62)
    with pytest.raises(ValueError, match="high.bin holds token id 99, but the model embeds 62"):
        load_corpus([str(tmp_path / "high.bin")], None, 10, 62).train[0]
    with pytest.raises(ValueError, match="files of several kinds .json, parquet, tokens.*a glob such as"):
        load_corpus([str(tmp_path)], tokenizer, 10, 62)
    assert (
        len(load_corpus([str(tmp_path / "c.jsonl")], tokenizer, 10, 62, reading=Reading(("text", "content"))).train)
        == 57
    )


def test_data_that_makes_no_corpus_is_refused(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"body": "w1"}\n' * 3)
    (tmp_path / "one.jsonl").write_text('{"text": "w1"}\n')
    (tmp_path / "short.jsonl").write_text('{"text": "w1"}\n' * 3)
    (tmp_path / "empty").mkdir()
    cases = [
        ("nowhere", tokenizer, "--data .*nowhere: no such file or folder"),
        ("empty", tokenizer, "no file of .parquet, .jsonl, "),
        ("rows.jsonl", tokenizer, "rows need a field 'text', they have body"),
        ("one.jsonl", tokenizer, "holds 1 documents; 2 are needed"),
        ("short.jsonl", tokenizer, "documents give no sequence of 10 tokens"),
        ("rows.jsonl", None, "needs --tokenizer FOLDER"),
        ("rows.jsonl", str(tmp_path / "no"), "needs --tokenizer FOLDER .* got .*no"),
    ]
    for name, folder, message in cases:
        with pytest.raises(ValueError, match=message):
            load_corpus(str(tmp_path / name), folder, 10, vocab_size=62)
    with pytest.raises(ValueError, match="--tokenizer .* has no meaning with --data stdlib"):
        load_corpus("stdlib", tokenizer, 10, vocab_size=256)
    with pytest.raises(ValueError, match="--num_proc, --bad_rows and --end_of_text have no meaning with --data stdlib"):
        load_corpus("stdlib", None, 10, vocab_size=256, end_of_text=0)
    with pytest.raises(ValueError, match="--validation_data v.jsonl: give files, folders or globs, without weights"):
        load_corpus([str(tmp_path / "short.jsonl")], tokenizer, 1, 62, validation_data=["v.jsonl:2"])
    with pytest.raises(ValueError, match="stdlib need 256 ids but the model embeds 100"):
        load_corpus("stdlib", None, 10, vocab_size=100)


def test_validation_lies_beside_or_at_the_end_or_in_sources_of_its_own(tmp_path, tokenizer):
    np.arange(40).astype(np.uint16).tofile(tmp_path / "train.bin")
    tail = load_corpus([str(tmp_path / "train.bin")], None, 2, 62)  # nothing tells documents apart
    assert _rows(tail.validation) == [[38, 39]] and _rows(tail.train)[-1] == [36, 37]
    with pytest.raises(ValueError, match="nothing tells where the documents of .* end; give --end_of_text"):
        tail.ends_of_documents()

    (np.arange(10) + 50).astype(np.uint16).tofile(tmp_path / "val.bin")
    for path in (tmp_path, tmp_path / "train.bin"):
        beside = load_corpus([str(path)], None, 2, 62)
        assert _rows(beside.validation) == [[i, i + 1] for i in range(50, 60, 2)] and len(beside.train) == 20

    (tmp_path / "v.jsonl").write_bytes(_lines(DOCUMENTS[:2]))
    own = load_corpus([str(tmp_path / "train.bin")], tokenizer, 10, 62, validation_data=[str(tmp_path / "v.jsonl")])
    assert _rows(own.validation) == IDS[:2] and len(own.train) == 4


def test_words_of_data():
    assert parse_sources(["web=hf://datasets/a/b/**/*.parquet:0.7", "code=a/*.gz:.3"]) == [
        Source("web", "hf://datasets/a/b/**/*.parquet", 0.7), Source("code", "a/*.gz", 0.3),
    ]  # fmt: skip
    assert parse_sources(["a/b.jsonl"]) == [Source("a/b.jsonl", "a/b.jsonl")]
    for words, message in [
        (["a:1", "b"], "some sources have a weight"),
        (["a:1", "b:0"], "must be above 0"),
        (["x=a:1", "x=b:1"], "two sources have one name"),
        (["stdlib", "b"], "stand alone"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_sources(words)


def test_a_mixture_has_its_shares_in_each_window_on_any_number_of_ranks(tmp_path, tokenizer):
    for name, documents in (("a", DOCUMENTS[:40]), ("b", DOCUMENTS[40:])):
        (tmp_path / f"{name}.jsonl").write_bytes(_lines(documents))
    words = [f"a={tmp_path / 'a.jsonl'}:0.7", f"b={tmp_path / 'b.jsonl'}:0.3"]
    loaded = load_corpus(words, tokenizer, 10, 62)
    assert loaded.sizes == (38, 19) and len(loaded.validation) == 3 and loaded.weights == (0.7, 0.3)

    def steps(world, rest=range(400), seed=5):
        ranks = [
            list(order.StepBatches(loaded.train, 10 // world, 1, rank, world, seed, rest, loaded.mixture(seed)))
            for rank in range(world)
        ]
        return [sorted(i for batch in batches for i in batch) for batches in zip(*ranks, strict=True)]

    whole = steps(1)
    assert steps(2) == steps(5) == whole and steps(2, range(133, 400)) == whole[133:] and steps(1, seed=6) != whole
    flat = [
        i for batches in order.StepBatches(loaded.train, 10, 1, 0, 1, 5, range(400), loaded.mixture(5)) for i in batches
    ]
    for start in range(0, 4000, order.WINDOW):
        assert sum(i < 38 for i in flat[start : start + order.WINDOW]) == 700
    of_a = [i for i in flat if i < 38]
    for start in range(0, 2800 - 38, 38):  # epochs of its own
        assert sorted(of_a[start : start + 38]) == list(range(38))
    assert order.shares([1, 1, 1], 10) == [4, 3, 3]
    with pytest.raises(ValueError, match="weight of 0.0001 of 1 is less than 1 of 1000 sequences"):
        order.Mixture([5, 5], [0.9999, 0.0001], 0)


def test_a_packed_document_has_the_logits_that_it_has_alone():
    sizes = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.3)).eval()
    ids = torch.randint(1, 40, (2, 24))
    ids[0, [6, 7, 15]] = EOS  # documents of 7, 1, 8 and 8 tokens
    ids[1, 23] = EOS
    inputs = model_inputs(ids, EOS)
    assert positions_in_documents(ids, EOS)[0].tolist() == [*range(7), 0, *range(8), *range(8)]
    with torch.no_grad():
        packed = model(**inputs, use_cache=False).logits[0]
        for start, stop in [(0, 7), (7, 8), (8, 16), (16, 24)]:
            alone = model(input_ids=ids[:1, start:stop]).logits[0]
            # measured: 1.8e-6; without borders 8
            torch.testing.assert_close(packed[start:stop], alone, atol=1e-5, rtol=0)
        assert (model(input_ids=ids).logits[0, 16:] - packed[16:]).abs().max() > 0.5

    class Engine:
        module = model
        train = eval = staticmethod(lambda: None)

        def __init__(self, looks: bool):
            self._looks = looks

        def __call__(self, input_ids, position_ids, use_cache):
            return model(input_ids=input_ids, position_ids=position_ids if self._looks else None, use_cache=use_cache)

    check_document_borders(Engine(True), EOS, 2, 24, torch.device("cpu"))
    with pytest.raises(ValueError, match="LlamaForCausalLM lets a document attend to the one before it"):
        check_document_borders(Engine(False), EOS, 2, 24, torch.device("cpu"))


def test_streamed_data_are_a_function_of_seed_and_step(tmp_path, tokenizer):
    for part in range(2):
        pq.write_table(_table(DOCUMENTS[30 * part : 30 * part + 30]), tmp_path / f"{part}.parquet", row_group_size=6)
    (tmp_path / "b.jsonl").write_bytes(_lines())
    words = [f"words={tmp_path}/*.parquet"]  # 10 row groups of 60 tokens, which is 7 sequences of 8, and a rest

    def steps(world, rest=range(50), seed=3, accumulation=1):
        streams = stream_corpus(words, tokenizer, 8, 62, validation_sequences=9).train
        micro = 4 // world // accumulation
        loaders = [
            streams.loader(micro, accumulation, rank, world, seed, rest, workers=0, pin_memory=False)
            for rank in range(world)
        ]
        batches = [list(loader) for loader in loaders]
        assert {len(one) for one in batches} == {len(rest) * accumulation}
        return [
            sorted(
                row
                for one in batches
                for batch in one[s * accumulation : (s + 1) * accumulation]
                for row in batch.tolist()
            )
            for s in range(len(rest))
        ]

    whole = steps(1)
    assert steps(2) == steps(4) == steps(2, accumulation=2) == whole
    assert steps(2, range(31, 50)) == whole[31:] and steps(1, seed=4) != whole

    loaded = stream_corpus(words, tokenizer, 8, 62, validation_sequences=9)
    held_out = {i for row in _rows(loaded.validation) for i in row} - {EOS}
    trained = {i for step in whole for row in step for i in row} - {EOS}
    assert not held_out & trained and len(held_out) == 12
    assert len(held_out | trained) >= 58  # the end of a row group may lie beyond its sequences
    assert loaded.validation[11].tolist() == loaded.validation[11].tolist()  # also when it is read again
    assert loaded.description.startswith("words: 10 row groups, ")
    with pytest.raises(ValueError, match="--num_proc 2 has no meaning with --streaming"):
        stream_corpus(words, tokenizer, 8, 62, reading=Reading(num_proc=2))
    (batches,) = [list(loaded.train.loader(4, 1, 0, 1, 3, range(2), workers=1, pin_memory=False))]
    assert [sorted(batch.tolist()) for batch in batches] == whole[:2]

    with pytest.raises(ValueError, match="8 row groups beside 2 for validation, but a global batch reads 9 of them"):
        loaded.train.loader(9, 1, 0, 1, 3, range(2), workers=0, pin_memory=False)
    with pytest.raises(ValueError, match="--streaming reads row groups .*b.jsonl is json"):
        stream_corpus([str(tmp_path / "b.jsonl")], tokenizer, 8, 62)
    two = [f"a={tmp_path / '0.parquet'}:0.75", f"b={tmp_path / '1.parquet'}:0.25"]
    batches = list(
        stream_corpus(two, tokenizer, 10, 62).train.loader(4, 1, 0, 1, 3, range(9), workers=0, pin_memory=False)
    )
    assert all(sum(int(row[0]) < 32 for row in batch) == 3 for batch in batches)
