"""The tiny model, data and engines that the multi-rank tests share."""

from __future__ import annotations

import contextlib
import copy

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import ds_memopt
from ds_memopt.optimizers import METHODS

VOCABULARY, GLOBAL_BATCH, LENGTH = 101, 12, 16
FIRST_ORDER = {word: method for word, method in METHODS.items() if not method.writes_weights}
"""The methods for which ZeRO lays flat partitions."""
HYPER = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """GQA, odd vocabulary, rows of odd length, head_dim != hidden / heads: what naive partitions get wrong."""
    torch.manual_seed(seed)
    config = dict(
        hidden_size=40, intermediate_size=53, num_hidden_layers=2, num_attention_heads=10, num_key_value_heads=5,
        head_dim=12, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=False,
        attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**config | changes))


def bf16_llama(**changes) -> LlamaForCausalLM:
    """In bf16 as DeepSpeed makes it: the parameters only, the rotary buffer stays in fp32."""
    model = llama(**changes)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model


def llama_under_zero_init(config: dict) -> LlamaForCausalLM:
    """The same weights as `llama`: the seed draws others here, where each rank sees parameters of other shapes."""
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = llama()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        model.load_state_dict(llama().state_dict())
    return model


def batches(steps: int, rank: int = 0, world_size: int = 1, seed: int = 1):
    """This rank's rows of the same global batches, whatever the number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    rows = GLOBAL_BATCH // world_size
    for _ in range(steps):
        batch = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, LENGTH), generator=generator)
        yield batch[rank * rows : (rank + 1) * rows]


def local(steps: int) -> list[torch.Tensor]:
    """This rank's rows, on any rank."""
    return list(batches(steps, dist.get_rank(), dist.get_world_size()))


def ds_config(stage: int, optimizer: str = "AdamMini", hyper: dict | None = None, **changes) -> dict:
    micro_batches = changes.get("gradient_accumulation_steps", 1)
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size() // micro_batches,
        "optimizer": {"type": optimizer, "params": HYPER if hyper is None else hyper},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    if optimizer == "AdamW":
        # torch's AdamW, not DeepSpeed's fused one: nothing to compile, and the same rounding in every placement.
        config["optimizer"]["params"] = config["optimizer"]["params"] | {"torch_adam": True}
    if stage == 3:
        # Several sub-groups; the norms stay gathered on every rank, the matrices do not.
        config["zero_optimization"] |= {"sub_group_size": 3000, "stage3_param_persistence_threshold": 100}
    config["zero_optimization"] |= changes.pop("zero_optimization", {})
    return config | changes


def initialize(model, config: dict, **arguments):
    ds_memopt.register()
    return deepspeed.initialize(model=model, config=copy.deepcopy(config), **arguments)[0]


def train(engine, data) -> list[float]:
    losses = []
    for batch in data:
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def train_plain(model, optimizer, data) -> list[float]:
    losses = []
    for batch in data:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shard_fsdp2(model, mesh=None, **options):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def full_parameters(model) -> dict[str, torch.Tensor]:
    """Whole weights by name, whatever the engine: a collective under ZeRO-3 and FSDP2."""
    named = dict(model.named_parameters())
    sharded = [p for p in named.values() if hasattr(p, "ds_id")]
    gather = deepspeed.zero.GatheredParameters(sharded) if sharded else contextlib.nullcontext()
    with gather:
        return {
            # DDP puts "module." before every name.
            name.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().float().clone()
            for name, p in named.items()
        }


def stored(model) -> list[torch.Tensor]:
    """What this rank stores of each parameter, as the parameter itself or its shard."""
    held = [getattr(p, "ds_tensor", p).detach() for p in model.parameters()]
    return [p.to_local() if hasattr(p, "to_local") else p for p in held]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(((a[name].double() - b[name].double()) ** 2).sum() for name in a).item() ** 0.5


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, and of the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal_tensors(ours, theirs) -> int:
    """How many tensors the two have; they must be equal bit for bit."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
        return 1
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        return sum(equal_tensors(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        return sum(map(equal_tensors, ours, theirs))
    return 0
