"""Any cut of any block structure: what the ranks hold adds up to the whole, and seams complete every cut block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ds_memopt.blocks import Columns, Contiguous, ParamBlocks, Tiled
from ds_memopt.kernels import add_means, multiply_elements
from ds_memopt.optimizers.block_state.block_index import (
    BlockIndex,
    block_starts,
    cut_blocks,
    most_blocks,
    split_interval,
)
from ds_memopt.shards import Interval, Layout, RankBorders, Seams, SeamTable, even_borders


def structure(*sections) -> ParamBlocks:
    numel = sum(section.numel for section in sections)
    return ParamBlocks(role="test", rule="test", shape=(numel,), sections=sections)


STRUCTURES = {
    "rows": structure(Contiguous(7, 13)),
    "whole": structure(Contiguous(91, 1)),
    "elementwise": structure(Contiguous(1, 91)),
    "columns": structure(Columns(7, ((1, 13),))),
    "fused columns": structure(Columns(8, ((3, 4), (1, 6)))),
    "heads then rows": structure(Contiguous(20, 3), Contiguous(5, 12)),
    "interleaved heads": structure(*[Contiguous(20, 2), Contiguous(5, 4)] * 3),
    "tiles": structure(Tiled(9, 10, 4)),
    "tiles that fit": structure(Tiled(9, 8, 4)),
    "short rows": structure(Tiled(9, 3, 4)),
    "rows then tiles": structure(Contiguous(5, 4), Tiled(6, 7, 2)),
    "experts by column": structure(Columns(4, ((1, 6),)), Columns(4, ((1, 6),)), Columns(4, ((1, 6),))),
}


def block_ids(blocks: ParamBlocks) -> np.ndarray:
    """The block of every element, element by element."""
    ids, first = [], 0
    for section in blocks.sections:
        if isinstance(section, Contiguous):
            ids += [first + i // section.length for i in range(section.numel)]
        elif isinstance(section, Tiled):
            for row in range(section.rows):
                base = first + row * section.blocks_per_row
                ids += [base + column // section.length for column in range(section.columns)]
        else:
            widths = [width for width, count in section.runs for _ in range(count)]
            of_column = [block for block, width in enumerate(widths) for _ in range(width)]
            ids += [first + of_column[i % section.num_columns] for i in range(section.numel)]
        first += section.num_blocks
    return np.array(ids)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("partition", [1, 2, 5, 6, 7, 13, 20, 30, 37, 64, 200])
def test_ranks_together_hold_every_block_once(name, partition):
    """Every partition of a parameter that lies at offset 11 of a flat buffer, as ZeRO-1/2 cut it."""
    blocks, offset = STRUCTURES[name], 11
    numel = blocks.shape[0]
    ids = block_ids(blocks)
    values = torch.randn(numel, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = torch.bincount(torch.from_numpy(ids)).double()
    expected = torch.zeros_like(sizes).index_add_(0, torch.from_numpy(ids), values**2) / sizes
    expected_mean = torch.zeros_like(sizes).index_add_(0, torch.from_numpy(ids), values) / sizes
    columns = any(isinstance(section, Columns) for section in blocks.sections)
    if not columns:
        starts = block_starts(blocks)
        assert starts.tolist() == [*np.unique(ids, return_index=True)[1], numel]

    borders = even_borders(offset, numel, partition)
    edges = [0, *borders, numel]
    assert all((edge + offset) % partition == 0 for edge in borders)
    on_ranks = [set(ids[start:stop]) for start, stop in zip(edges, edges[1:], strict=False)]
    assert most_blocks(blocks, borders) >= max(map(len, on_ranks))

    # A block must be completed exactly if several ranks hold some of it; columns are declared cut as a whole.
    shared = {block for block in range(blocks.num_blocks) if sum(block in rank for rank in on_ranks) > 1}
    cut = set(cut_blocks(blocks, borders))
    if "columns" in name or "experts" in name:
        assert shared <= cut
    else:
        assert shared == cut

    indexes, squares, means = [], [], []
    for start, stop in zip(edges, edges[1:], strict=False):
        layout = Layout((Interval("p", start, stop - start, 0, 3),), (RankBorders(None, {"p": borders}),))
        flat = torch.cat([torch.full((3,), torch.nan), values[start:stop], torch.full((2,), torch.nan)]).double()
        index = BlockIndex(layout, {"p": blocks}, [None], [flat])
        square, mean = index.mean_squares({0: flat}), index.new_blocks([0])
        if not columns:
            assert sum(piece.rows * piece.count * piece.width for piece in index.pieces[0]) == stop - start
            for piece in index.pieces[0]:  # of short rows and tiles, blocks have several sizes
                add_means({0: flat}, [[piece]], mean, piece.size)
        spread = torch.cat([flat[:3], torch.ones(stop - start).double(), flat[-2:]])
        multiply_elements({0: spread}, square, index.pieces)
        (part,) = index.intervals[0]
        assert torch.equal(spread[3:-2], square[0][torch.from_numpy(ids[start:stop]) - part.first])
        assert part.count == index.num_blocks[0] <= most_blocks(blocks, borders)
        indexes.append(index)
        squares.append(square[0])
        means.append(mean[0])

    # What an all_reduce does: every rank's slots, added up.
    for quantity, whole in ((squares, expected), (means, expected_mean)):
        if quantity is means and columns:
            continue
        slots = torch.zeros(indexes[0].seams.num_slots, dtype=torch.float64)
        for index, local in zip(indexes, quantity, strict=True):
            slots.index_add_(0, index._seam_slots[0], local[index._seam_blocks[0]])
        for index, local in zip(indexes, quantity, strict=True):
            local[index._seam_blocks[0]] = slots[index._seam_slots[0]]
            (part,) = index.intervals[0]
            torch.testing.assert_close(local, whole[part.first : part.first + part.count], rtol=1e-12, atol=1e-15)


def test_seams_work_in_a_process_group_without_a_backend_name():
    """As torch.distributed.init_process_group() makes it, and init_device_mesh."""
    torch.distributed.init_process_group(rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        borders = {"p": even_borders(0, 91, 10)}
        seams = Seams((RankBorders(None, borders),), lambda name, cuts: cut_blocks(STRUCTURES["rows"], cuts))
        slots = torch.arange(float(seams.num_slots))
        seams.begin_sum(slots)()
        assert seams.num_slots > 0 and slots.tolist() == list(range(seams.num_slots))
    finally:
        torch.distributed.destroy_process_group()


def test_aligned_borders_make_no_seam():
    table = SeamTable({"p": even_borders(0, 91, 7)}, lambda name, borders: cut_blocks(STRUCTURES["rows"], borders))
    assert table.num_slots == 0


def test_pieces_are_few():
    """The cost of a step is its number of pieces: three for any interval of one section, however long."""
    pieces, first, count = split_interval(Interval("p", 3, 85, 0, 0), STRUCTURES["rows"], torch.device("cpu"), 0, 0)
    assert [(piece.offset, piece.count, piece.width, piece.block) for piece in pieces] == [
        (0, 1, 4, 0),
        (4, 11, 7, 1),
        (81, 1, 4, 12),
    ]
    assert (first, count) == (0, 13)
