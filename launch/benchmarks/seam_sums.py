"""Cost of the seams of Adam-mini for Llama-2-70B on many ranks, computed from the layout alone, without processes.

    python launch/benchmarks/seam_sums.py --ranks 1024

Prints, for ZeRO-1/2 and ZeRO-3, the slowest rank's time to build its table, once a run, and the bytes of the buffer
that one all_reduce sums at every step.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_memopt.blocks import assign_blocks
from ds_memopt.optimizers.block_state.block_index import BlockIndex
from ds_memopt.shards import Layout, RankBorders, partition_each_parameter, partition_flat_buffer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024)
    ranks = parser.parse_args().ranks
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    numels = {name: parameter.numel() for name, parameter in model.named_parameters()}
    blocks = assign_blocks(model)

    offsets, total = [], 0
    for name, numel in numels.items():
        offsets.append((name, total, numel))
        total += numel
    pieces = [(name, numel, -(-numel // ranks)) for name, numel in numels.items()]
    print(f"Llama-2-70B, {total:,} parameters in {len(numels)} tensors, {ranks} ranks")
    for stage in ("ZeRO-1/2", "ZeRO-3"):
        slowest, seam_bytes = 0.0, 0
        for rank in sorted({0, ranks // 2, ranks - 1}):
            start = time.perf_counter()
            if stage == "ZeRO-3":
                intervals, borders = partition_each_parameter(pieces, rank)
            else:
                intervals, borders = partition_flat_buffer(offsets, -(-total // ranks), rank)
            index = BlockIndex(
                Layout(tuple(intervals), (RankBorders(None, borders),)), blocks, [None], [torch.empty(0)]
            )
            slowest = max(slowest, time.perf_counter() - start)
            seam_bytes = 4 * index.seams.num_slots
        print(f"{stage}: table in {slowest:.2f} s, seam buffer {seam_bytes:,} bytes")


if __name__ == "__main__":
    main()
