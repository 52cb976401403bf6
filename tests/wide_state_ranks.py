"""Worker of test_wide_state.py: a rule with three numbers per row, under ZeRO-2 and FSDP2."""

from __future__ import annotations

from unittest import mock

import torch
from tiny import HYPER, ds_config, full_parameters, initialize, llama, local, shard_fsdp2, train, train_plain

from ds_memopt import AdamMini, kernels
from ds_memopt.blocks import Contiguous, ParamBlocks
from ds_memopt.optimizers.block_state.block_index import BlockIndex
from ds_memopt.optimizers.block_state.sharded_optimizer import StateLayout
from ds_memopt.shards import numel_of

BEFORE, AFTER = 3, 3
FAST = HYPER | {"lr": 1.0}


class RowMoments(AdamMini):
    """p <- p - lr * g * (s + a) / (sqrt(q) + 1e-3) with moving averages of each row's sums of g, g^2 and |g|."""

    states = {"sums": StateLayout("row", width=3)}

    def build_structures(self, roles):
        rows = {
            name: ParamBlocks(b.role, "per row", b.shape, (Contiguous(b.shape[-1], numel_of(b.shape[:-1])),))
            for name, b in roles.items()
        }
        return {"row": rows}

    def update(self, call):
        rows = call.indexes["row"]
        sums = rows.new_blocks(call.gradients, width=3)
        for column, term in enumerate((torch.Tensor.clone, torch.square, torch.abs)):
            one = rows.new_blocks(call.gradients)
            kernels.add_means({n: term(g) for n, g in call.gradients.items()}, rows.pieces, one, size=1)
            for number, values in one.items():
                sums[number][:, column] = values
        rows.complete(sums, width=3)
        call.advance()
        steps, factors = {n: g.clone() for n, g in call.gradients.items()}, {}
        for number, state in call.state("sums").items():
            state.lerp_(sums[number], 0.1)
            factors[number] = (state[:, 0] + state[:, 2]) / (state[:, 1].sqrt() + 1e-3)
        kernels.multiply_elements(steps, factors, rows.pieces)
        for number, step in steps.items():
            call.parameters[number].sub_(step, alpha=call.groups[number]["lr"])


def local_batches() -> list[torch.Tensor]:
    return local(BEFORE + AFTER)


def zero2() -> tuple[dict, dict, list, dict, int]:
    """Weights after BEFORE steps and at the end; after BEFORE the state by name and the progress; blocks cut."""
    model, data = llama(), local_batches()
    optimizer = RowMoments.from_model(model, model.parameters(), **FAST)
    config = ds_config(2, zero_allow_untested_optimizer=True)
    del config["optimizer"]
    engine = initialize(model, config, optimizer=optimizer)
    train(engine, data[:BEFORE])
    parts = [part._replace(values=part.values.clone()) for part in optimizer.named_state()]
    before, progress = full_parameters(engine.module), dict(optimizer.progress)
    train(engine, data[BEFORE:])
    indexes = [index for _, by_structure in optimizer._indexes.values() for index in by_structure.values()]
    cut = sum(index.seams.num_slots for index in indexes)
    results = before, full_parameters(engine.module), parts, progress, cut
    engine.destroy()
    return results


def fsdp2() -> tuple[dict, dict, list, dict, int]:
    """As `zero2`. FSDP2 cuts no row."""
    model, data = shard_fsdp2(llama()), local_batches()
    optimizer = RowMoments.from_model(model, **FAST)
    train_plain(model, optimizer, data[:BEFORE])
    parts = [part._replace(values=part.values.clone()) for part in optimizer.named_state()]
    before, progress = full_parameters(model), dict(optimizer.progress)
    train_plain(model, optimizer, data[BEFORE:])
    return before, full_parameters(model), parts, progress, 0


def on_ranks() -> dict[str, tuple]:
    results = {"zero2": zero2(), "fsdp2": fsdp2()}
    with mock.patch.object(BlockIndex, "complete", lambda index, *sums, width=1: None):
        results["zero2, seams left open"] = zero2()
    return results
