"""Peak memory of a MeZO step inside the engine: that of inference, and what is kept of its updates."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import torch
from spawn import run_ranks
from tiny import bf16_llama, local, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zeroth import BF16, running

from ds_memopt.shards import inplace

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
}


class AliveBytes(TorchDispatchMode):
    """Bytes of all storages that tensors refer to: `alive`, from the start of this on, and `peak`, the most of it.

    What an operation takes and gives back before it returns is not seen."""

    def __enter__(self):
        self.alive = self.peak = 0
        self._known = set()
        gc.collect()
        for candidate in gc.get_objects():
            if isinstance(candidate, torch.Tensor):
                self._count(candidate)
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.alive -= size


def many_small_layers():
    """In bf16; its largest matrix has 0.3 % of its weights."""
    return bf16_llama(num_hidden_layers=64, **SIZES)


def peaks(stage: int) -> dict[str, int]:
    """Of a forward without gradients, and of the engine's second step."""
    batch = local(1)[0]
    with AliveBytes() as before:
        pass
    model = many_small_layers().eval()
    with torch.no_grad(), AliveBytes() as inference:
        model(input_ids=batch, labels=batch)
    parameters = sum(p.numel() for p in model.parameters())
    del model
    with mock.patch.object(inplace, "BUCKET", 2**16), running(stage, make=many_small_layers, **BF16) as engine:
        train(engine, [batch])  # residuals come to be
        with AliveBytes() as training:
            train(engine, [batch])
    names = {"inference": inference.peak, "training": training.peak}
    return {"parameters": parameters} | {name: peak - before.alive for name, peak in names.items()}


@pytest.mark.parametrize("stage, ranks", [(0, 1), (1, 1), (1, 2)])
def test_a_step_takes_the_memory_of_inference_and_the_residuals(stage, ranks):
    """2 / N bytes per weight. Limit 1.05 of both; measured 1.005, and 1.022 on two ranks. The copy of the module that
    runs, its noise and what is gathered at once are small beside this model, as they are in one of usual size.

    What ZeRO-1 gathers at once, 64 MiB and 1 / N of that, is cut to what it is of 1.5e9 weights. Uncut it keeps within
    5 % from 6.7e8 weights on, and for this model, gathered as a whole, the figure is 1.95 and 1.97. With fp32 masters
    it would be 1.33 and more, with a copy of all weights 1.5 and more."""
    for run in run_ranks(peaks, ranks, stage):
        ratio = run["training"] / (run["inference"] + 2 * run["parameters"] / ranks)
        print(stage, ranks, run, ratio)
        assert 1 <= ratio <= 1.05
