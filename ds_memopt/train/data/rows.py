"""Fine-tuning data: rows of a prompt and its completion, as token ids and as batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader, Sampler

from ds_memopt.engines.losses import IGNORED_LABEL
from ds_memopt.train.presets import TINY_VOCABULARY

Pair = tuple[list[int], list[int]]  # token ids of a prompt and of a completion


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and of the completions it may have. The first is the right one."""

    prompt: list[int]
    candidates: list[list[int]]

    @property
    def pair(self) -> Pair:
        return self.prompt, self.candidates[0]

    def __len__(self) -> int:
        """Tokens that are trained on: prompt and right completion."""
        return len(self.prompt) + len(self.candidates[0])


@dataclass(frozen=True)
class Encoder:
    """Text to token ids. begin stands before every prompt, end after every completion; folder holds the tokenizer, None
    for bytes."""

    encode: Callable[[str], list[int]]
    begin: list[int]
    end: list[int]
    folder: str | None


def find_encoder(tokenizer: str | None, model: str, vocab_size: int) -> Encoder:
    """The tokenizer in the folder `tokenizer`, else in the folder `model`, else bytes for a model that embeds 256 ids.

    A prompt begins with the tokenizer's BOS where the tokenizer puts it, a completion ends with its EOS where it has
    one. Bytes have neither. ValueError if there is no tokenizer.
    """
    here = [Path(model) / name for name in ("tokenizer.json", "tokenizer_config.json")]
    folder = tokenizer or (model if any(path.is_file() for path in here) else None)
    if folder is None and vocab_size == TINY_VOCABULARY:
        return Encoder(lambda text: list(text.encode()), [], [], None)
    if folder is None or not Path(folder).is_dir():
        raise ValueError(
            f"--tokenizer {folder}: no such folder; the model embeds {vocab_size} ids and needs the Hugging Face "
            "tokenizer that belongs to it, in its own folder or by --tokenizer FOLDER"
        )
    coder = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    bos, eos = ([] if token is None else [token] for token in (coder.bos_token_id, coder.eos_token_id))
    puts_bos = coder("")["input_ids"][:1] == bos
    return Encoder(
        lambda text: coder.encode(text, add_special_tokens=False, verbose=False), bos if puts_bos else [], eos, folder
    )


def load_rows(path: str, encoder: Encoder, seq_length: int, vocab_size: int) -> list[Row]:
    """The rows of a JSONL file: {"prompt": str, "completion": str}, and optionally "choices", a list of strings, one of
    them the completion. Other fields are ignored.

    Prompt and completion are encoded apart, as at inference, so that their border is one between tokens too.
    ValueError naming file and line for a row that is none, that is longer than seq_length tokens (nothing is cut off),
    or that has ids which the model does not embed.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f'{path} is empty: it must hold lines like {{"prompt": "2 + 3 =", "completion": " 5"}}')
    rows, too_long = [], {}  # line: tokens
    for number, line in enumerate(lines, 1):
        try:
            row = _encode(_parse(line), encoder)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        longest = max(map(len, row.candidates))
        if len(row.prompt) + longest > seq_length:
            too_long[number] = len(row.prompt) + longest
        if (highest := max(map(max, [row.prompt, *row.candidates]))) >= vocab_size:
            raise ValueError(
                f"{path}, line {number}: token id {highest}, but the model embeds {vocab_size}: choose the tokenizer "
                "that belongs to the model"
            )
        rows.append(row)
    if too_long:
        first, tokens = next(iter(too_long.items()))
        raise ValueError(
            f"{path}, line {first}: prompt and completion have {tokens} tokens, more than --seq_length {seq_length}; "
            f"{len(too_long)} of {len(rows)} rows are too long, the longest has {max(too_long.values())}: raise "
            "--seq_length, or shorten or remove them"
        )
    return rows


def _parse(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a JSON object is needed, this is a {type(fields).__name__}")
    for name in ("prompt", "completion"):
        if not isinstance(fields.get(name), str) or not fields[name]:
            raise ValueError(f"the field {name!r} must be a string that is not empty, it is {fields.get(name)!r}")
    choices = fields.get("choices")
    if choices is not None:
        if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
            raise ValueError(f"the field 'choices' must be a list of strings that are not empty, it is {choices!r}")
        if len(choices) < 2 or len(set(choices)) < len(choices) or fields["completion"] not in choices:
            raise ValueError(
                f"the field 'choices' must hold the completion {fields['completion']!r} and others, each once; it is "
                f"{choices!r}"
            )
    return fields


def _encode(fields: dict[str, Any], encoder: Encoder) -> Row:
    completion = fields["completion"]
    rivals = [choice for choice in fields.get("choices") or [] if choice != completion]
    ids = {text: encoder.encode(text) for text in (fields["prompt"], completion, *rivals)}
    if nothing := [text for text, tokens in ids.items() if not tokens]:
        raise ValueError(f"{nothing[0]!r} has no tokens in this tokenizer")
    candidates = [ids[text] + encoder.end for text in (completion, *rivals)]
    if len(set(map(tuple, candidates))) < len(candidates):
        raise ValueError(
            f"some of the choices {fields['choices']!r} have the same tokens, so that none can be told apart"
        )
    return Row(encoder.begin + ids[fields["prompt"]], candidates)


def collate(pairs: list[Pair]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, int64 [pairs, tokens of the longest]: prompt, completion, padding.

    The labels are the completion's ids, and ignored on prompt and padding.
    """
    ids = [torch.tensor(prompt + completion) for prompt, completion in pairs]
    labels = [torch.tensor([IGNORED_LABEL] * len(prompt) + completion) for prompt, completion in pairs]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }


def totals(rows: Sequence[Row], steps: Iterable[list[int]]) -> tuple[list[int], list[int]]:
    """(tokens, targets): tokens[s] counts the rows of the first s steps, targets[s] the completions of step s + 1.

    steps: indices of the rows of each step, on all ranks together.
    """
    tokens, targets = [0], []
    for step in steps:
        targets.append(sum(len(rows[i].candidates[0]) for i in step))
        tokens.append(tokens[-1] + sum(len(rows[i]) for i in step))
    return tokens, targets


def train_batches(
    rows: Sequence[Row], batches: Sampler[list[int]], targets: Sequence[float], accumulation: int
) -> Iterator[dict[str, Any]]:
    """Keyword arguments of the forward for each micro-batch of one rank. targets[i]: what the sum of the loss over the
    micro-batch is divided by in the i-th step, as num_items_in_batch."""
    loader = DataLoader([row.pair for row in rows], batch_sampler=batches, collate_fn=collate)
    for index, batch in enumerate(loader):
        yield batch | {"num_items_in_batch": targets[index // accumulation]}
