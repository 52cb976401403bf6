"""A batch in two halves: long rows for the zeroth-order half of a step, short ones for the first-order half."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ds_memopt.engines.losses import IGNORED_LABEL, tokens_of

STAND_IN = 8
"""Tokens of the row, counting for nothing, that a rank computes with where others have samples and it has none."""

PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "labels")
"""Keywords of transformers models that are [rows, tokens, ...]."""


class Half(NamedTuple):
    """keywords: what to call the model with. count: tokens (rows, where nothing tells) that its loss is the mean of."""

    keywords: dict[str, Any]
    count: torch.Tensor | int


def halves(
    engine, keywords: Mapping[str, Any], length_threshold: int | None, zo_batch: int | None
) -> tuple[Half, Half]:
    """The zeroth-order and the first-order half of a batch; one without rows gets a stand-in that counts 0.

    A row's length is the number of tokens in its attention mask, else that up to its last label. The first-order half
    is cut to its longest row: what follows is padding.

    Raises ValueError where a length_threshold is given and nothing tells the lengths.
    """
    if length_threshold is None and zo_batch is None:
        whole = half_of(engine, keywords)
        return whole, whole
    mask, labels = keywords.get("attention_mask"), keywords.get("labels")
    ends = lengths = None
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        ends, lengths = _ends(mask != 0), (mask != 0).sum(1)
    elif isinstance(labels, torch.Tensor) and labels.dim() == 2:
        ends = lengths = _ends(labels != IGNORED_LABEL)
    if length_threshold is None:
        short = torch.arange(_rows(keywords)) >= zo_batch
    elif lengths is not None:
        short = lengths <= length_threshold
    else:
        raise ValueError(
            f"length_threshold={length_threshold} needs the rows' lengths: call engine(...) with attention_mask or "
            "labels [rows, tokens] by keyword, give the halves to engine.train_step(zo_batch, fo_batch), or set "
            "length_threshold to null."
        )
    width = int(ends[short.to(ends.device)].max()) if ends is not None and bool(short.any()) else None
    return _take(engine, keywords, ~short), _take(engine, keywords, short, width)


def half_of(engine, keywords: Mapping[str, Any]) -> Half:
    """A half that is all of a batch; a stand-in for one without labels, whose loss would be no number."""
    given = {key: value for key, value in keywords.items() if key != "num_items_in_batch"}
    count = tokens_of(engine, given)
    if count is None:
        return Half(given, _rows(given))
    return Half(given, count) if count else stand_in(given)


def stand_in(keywords: Mapping[str, Any]) -> Half:
    """The beginning of a batch's first row, whose loss is a number and counts 0."""
    short = cut(keywords, torch.arange(_rows(keywords)) < 1, STAND_IN)
    tokens, labels = short.get("input_ids"), short.get("labels")
    if labels is not None and tokens is not None and labels.shape == tokens.shape:
        short["labels"] = tokens.clone()  # a row without labels has no loss
    if isinstance(short.get("attention_mask"), torch.Tensor):
        short["attention_mask"] = torch.ones_like(short["attention_mask"])  # nor one of padding
    return Half(short, 0)


def cut(keywords: Mapping[str, Any], rows: torch.Tensor, width: int | None = None) -> dict[str, Any]:
    """Some rows of a batch, cut to a width. rows: a mask. What has no rows is left as it is."""
    count, taken = _rows(keywords), {}
    per_token = [keywords[key] for key in PER_TOKEN if isinstance(keywords.get(key), torch.Tensor)]
    tokens = next((value.shape[1] for value in per_token if value.dim() > 1), None)
    for key, value in keywords.items():
        if key == "num_items_in_batch":
            continue
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == tokens:
            value = value[:, :width] if len(value) in (1, count) else value  # one row may be for all
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == count:
            value = value[rows.to(value.device)]
        taken[key] = value
    return taken


def _take(engine, keywords: Mapping[str, Any], rows: torch.Tensor, width: int | None = None) -> Half:
    return half_of(engine, cut(keywords, rows, width)) if bool(rows.any()) else stand_in(keywords)


def _rows(keywords: Mapping[str, Any]) -> int:
    known = [keywords[key] for key in PER_TOKEN if keywords.get(key) is not None]
    return len((known or [value for value in keywords.values() if isinstance(value, torch.Tensor) and value.dim()])[0])


def _ends(there: torch.Tensor) -> torch.Tensor:
    """For each row of a mask [rows, tokens] the number of tokens up to the last that is there."""
    positions = torch.arange(1, there.shape[1] + 1, device=there.device)
    return (there * positions).amax(1)


def largest_length(
    forward: Callable[..., Any], keywords: Mapping[str, Any], rows: int, available: int, longest: int = 256
) -> int:
    """How long `rows` rows may be for what a forward keeps for backward to fit `available` bytes.

    Two short rows are measured: what is kept grows as a * length + b * length^2, the square by attention.
    """
    first = cut(keywords, torch.arange(_rows(keywords)) < 1, longest)
    width = next(first[key].shape[1] for key in PER_TOKEN if isinstance(first.get(key), torch.Tensor))
    points = []
    for length in (width, width // 2):
        row = cut(first, torch.ones(1, dtype=torch.bool), length)
        if "labels" in row and "input_ids" in row:
            row["labels"] = row["input_ids"].clone()
        points.append((length, _bytes_kept(lambda row=row: forward(**row))))
    (long, most), (short, least) = points
    square = (most / long - least / short) / (long - short)
    linear = most / long - square * long
    most_tokens = available / rows
    if square * long < 1e-3 * linear:
        return int(most_tokens / linear)
    return int(((linear**2 + 4 * square * most_tokens) ** 0.5 - linear) / (2 * square))


def _bytes_kept(forward: Callable[[], Any]) -> int:
    """Bytes that a forward keeps for backward, and twice the largest tensor: its gradient, and that of its source."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # held until all is counted: an address must not be given out twice
    kept = sum(storages.values()) + 2 * max(storages.values())
    del output
    return kept
