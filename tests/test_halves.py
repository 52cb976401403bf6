"""A batch of Addax in two halves: rows by their lengths, stand-ins, counts, and what memory rows of a length take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_peak import AliveBytes
from tiny import llama
from transformers.loss.loss_utils import ForCausalLMLoss

from ds_memopt import IPSGD
from ds_memopt.engines.split_batch import halves, largest_length

TOKENS = 10
ENGINE = SimpleNamespace(module=SimpleNamespace(loss_function=ForCausalLMLoss))
SILENT = SimpleNamespace(module=SimpleNamespace(loss_function=None))
NOTHING = torch.full((1, TOKENS), -100)


def batch_of(lengths: list[int], left: bool = False) -> dict:
    """Padded rows whose tokens tell the row and the place: 23 is the fourth of the third."""
    tokens = torch.arange(len(lengths))[:, None] * TOKENS + torch.arange(TOKENS)
    place = torch.arange(TOKENS).flip(0) if left else torch.arange(TOKENS)
    mask = (place < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.where(mask == 1, -100)}


def rows_of(half) -> list[int]:
    return [row // TOKENS for row in half.keywords["input_ids"][:, 0].tolist()]


def width_of(half) -> int:
    """The same for all keys."""
    (width,) = {
        half.keywords[key].shape[1] for key in ("input_ids", "attention_mask", "labels") if key in half.keywords
    }
    return width


@pytest.mark.parametrize("told_by", ["attention_mask", "labels"])
def test_rows_go_by_their_length_and_short_ones_are_cut(told_by):
    """A row as long as the threshold is short. Only padding goes, and none of what has no token in each place."""
    batch = batch_of([4, 7, 2, 10]) | {"weight": torch.arange(4), "classes": torch.ones(4, 5), "use_cache": False}
    batch |= {"hidden": torch.ones(4, TOKENS, 2)}
    if told_by == "labels":
        del batch["attention_mask"]
        batch["labels"][1, :4] = -100  # a prompt is part of the row
    zo, fo = halves(ENGINE, batch, 4, None)
    assert (rows_of(zo), rows_of(fo)) == ([1, 3], [0, 2]) and (width_of(zo), width_of(fo)) == (TOKENS, 4)
    for half, rows, width in ((zo, [1, 3], TOKENS), (fo, [0, 2], 4)):
        assert all(torch.equal(half.keywords[key], batch[key][rows, :width]) for key in batch if key in LIKE_TOKENS)
        assert half.keywords["weight"].tolist() == rows and half.keywords["classes"].shape == (2, 5)
        assert half.keywords["use_cache"] is False and half.keywords.keys() == batch.keys()


LIKE_TOKENS = ("input_ids", "attention_mask", "labels", "hidden")


def test_tokens_are_counted_from_the_mask_and_padding_on_the_left_stays():
    """What is cut on the right would be tokens."""
    zo, fo = halves(ENGINE, batch_of([4, 7, 2], left=True), 4, None)
    assert (rows_of(zo), rows_of(fo)) == ([1], [0, 2]) and (width_of(zo), width_of(fo)) == (TOKENS, TOKENS)


@pytest.mark.parametrize(
    "threshold, expected", [(1, ([0, 1], [])), (2, ([0], [1])), (3, ([0], [1])), (4, ([], [0, 1]))]
)
def test_an_empty_half_gets_a_stand_in_that_counts_nothing(threshold, expected):
    """The beginning of the first row; its loss is a number, although none of its labels may be."""
    batch = batch_of([4, 2])
    batch["labels"][0] = torch.where(torch.arange(TOKENS) == 3, 1, -100)
    for half, rows in zip(halves(ENGINE, batch, threshold, None), expected, strict=True):
        if rows:
            assert rows_of(half) == rows
            assert half.count == (batch["labels"][rows][:, 1:] != -100).sum() > 0
        else:
            assert rows_of(half) == [0] and width_of(half) == 8 and half.count == 0
            assert torch.equal(half.keywords["labels"], batch["input_ids"][:1, :8])


def test_rows_without_labels_get_a_stand_in():
    """Else their loss, the mean of nothing, would be no number."""
    batch = batch_of([8, 3, 2])
    batch["labels"][1:] = -100
    zo, fo = halves(ENGINE, batch, 4, None)
    assert rows_of(zo) == [0] and zo.count == 7
    assert fo.count == 0 and torch.equal(fo.keywords["labels"], fo.keywords["input_ids"])


def test_a_first_token_counts_for_nothing_and_rows_count_where_nothing_tells():
    """As the model's own loss: of a causal one the first label is predicted from nothing."""
    batch = batch_of([4, 2, 10])
    assert [half.count for half in halves(ENGINE, batch, 4, None)] == [9, 3 + 1]
    assert [half.count for half in halves(SILENT, batch, 4, None)] == [1, 2]
    assert [half.count for half in halves(ENGINE, batch | {"num_items_in_batch": 13}, 4, None)] == [9, 3 + 1]
    assert all(
        "num_items_in_batch" not in h.keywords for h in halves(ENGINE, batch | {"num_items_in_batch": 1}, 4, None)
    )


def test_without_a_threshold_the_first_rows_are_the_zeroth_order_half():
    """Or, without a number of them, all are both halves, and nothing is cut."""
    batch = batch_of([4, 7, 2])
    whole = halves(ENGINE, batch, None, None)
    assert [rows_of(half) for half in whole] == [[0, 1, 2]] * 2 and [half.count for half in whole] == [10, 10]
    zo, fo = halves(ENGINE, batch, None, 2)
    assert (rows_of(zo), rows_of(fo)) == ([0, 1], [2]) and (width_of(zo), width_of(fo)) == (TOKENS, 2)
    assert (zo.count, fo.count) == (9, 1)
    zo, fo = halves(ENGINE, batch, None, 3)
    assert rows_of(zo) == [0, 1, 2] and fo.count == 0


def test_where_nothing_tells_the_lengths_the_remedy_is_told():
    tokens = batch_of([4, 2])["input_ids"]
    for batch in ({"input_ids": tokens}, {"input_ids": tokens, "labels": torch.tensor([0, 1])}):
        with pytest.raises(ValueError) as error:
            halves(ENGINE, batch, 4, None)
        assert "length_threshold=4 needs the rows' lengths: call engine(...) with attention_mask or" in str(error.value)
        assert "or set length_threshold to null." in str(error.value)


def test_positions_shared_by_all_rows_are_cut_too():
    batch = batch_of([4, 7, 2]) | {"position_ids": torch.arange(TOKENS)[None]}
    zo, fo = halves(ENGINE, batch, 4, None)
    assert torch.equal(fo.keywords["position_ids"], torch.arange(4)[None])


def memory(model, optimizer, rows: int, length: int) -> tuple[int, int]:
    """Bytes that a forward leaves for backward, and the most at once until a step in place is made."""
    batch = torch.zeros(rows, length, dtype=torch.long)
    with AliveBytes() as alive:
        before = alive.alive
        loss = model(input_ids=batch, labels=batch).loss
        kept = alive.alive - before
        loss.backward()
        optimizer.step()
    return kept, alive.peak - before


LARGEST = {"eager": 4 * 10 * 300**2, "sdpa": 4 * 10 * 12 * 300}
"""Bytes of a row's largest tensor: attention of 10 heads, which eager keeps, or their queries."""


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("width", [32, 400])
def test_the_largest_length_fits_and_wastes_little(attention, width):
    """Whether measured at rows of 32 or at the first 256 tokens of 400: what is kept and twice the largest tensor is
    told for a row of 300 to a token or two. A whole step then takes 0.97 of the memory with eager attention, 0.98 with
    sdpa."""
    model = llama(attn_implementation=attention, num_hidden_layers=4)
    optimizer, rows = IPSGD.from_model(model), 3
    batch = dict.fromkeys(("input_ids", "labels"), torch.zeros(2, width, dtype=torch.long))
    kept, peak = memory(model, optimizer, rows, 300)
    found = largest_length(model, batch, rows, kept + 2 * rows * LARGEST[attention])
    most = memory(model, optimizer, rows, largest_length(model, batch, rows, peak))[1] / peak
    print(attention, width, found, most)
    assert abs(found - 300) <= 3 and 0.9 <= most <= 1
