"""Worker of test_lockstep.py: MeZO at ZeRO-3 in lockstep and in two passes, and the bytes of AdamW beside it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tiny import VOCABULARY, ds_config, full_parameters, initialize, llama, local, train

from ds_memopt.measure import CommunicationMeter

LAYERS = 4
HYPER = {"lr": 1e-3, "noise": "rademacher", "compiled": False}
SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "hidden_size": 48, "num_attention_heads": 4}
# With fewer layers embeddings and routers weigh much in what Mixtral sends.
SMALL = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "num_hidden_layers": 6}


def models() -> dict:
    """Tiny models of four families: GPT-2 looks positions up for a batch of one, Mixtral routes tokens to experts."""
    return {
        "Llama": lambda: llama(num_hidden_layers=LAYERS),
        "GPT-2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=48, n_layer=LAYERS, n_head=4)
        ),
        "OPT": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**SIZES, ffn_dim=64, max_position_embeddings=32, word_embed_proj_dim=48)
        ),
        "Mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SMALL, num_local_experts=4, tie_word_embeddings=False)
        ),
    }


WITH_ADDAX = ("Llama", "GPT-2")
"""GPT-2 has dropout, too."""


def across_the_batch(model):
    """A model that mixes the rows of a batch, which lockstep would mix with those of the other sign."""
    model.lm_head.register_forward_pre_hook(lambda module, inputs: inputs[0] - inputs[0].mean(dim=0))
    return model


def engine_of(make, method: str, hyper: dict):
    torch.manual_seed(0)
    model = make()
    # In a model of usual size a layer stays gathered between the two signs, but nothing from forward to backward.
    reuse = 0 if method == "AdamW" else 30000
    zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": reuse, "sub_group_size": 10**9}
    zero |= {"stage3_max_live_parameters": 60000, "stage3_prefetch_bucket_size": 0}
    config = ds_config(3, method, ({"lr": 1e-3} if method == "AdamW" else HYPER) | hyper, zero_optimization=zero)
    return initialize(model, config, model_parameters=model.parameters())


def run(make, method: str = "MeZO", **hyper) -> dict:
    engine = engine_of(make, method, hyper)
    *first, last = local(3)
    losses = train(engine, first)
    with CommunicationMeter() as meter:
        losses += train(engine, [last])
    result = {"weights": full_parameters(engine.module), "sent": meter.bytes_sent(), "losses": losses}
    result["lockstep"] = method != "AdamW" and engine.optimizer.evaluator.lockstep is not None
    engine.destroy()
    return result


def halves(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every third row is short."""
    short = torch.arange(len(batch)) % 3 == 0
    return {
        "input_ids": batch,
        "labels": torch.where(short[:, None] & (torch.arange(batch.shape[1]) >= 9), -100, batch),
    }


class Interrupted(Exception):
    """Raised in a forward."""


def addax(make, lockstep: bool, interrupt: bool = False, autocast: bool = False) -> dict:
    """Four steps. interrupt: before the last, one that fails in the first-order half and one in the other."""
    engine = engine_of(make, "Addax", {"alpha": 0.1, "length_threshold": 12, "lockstep": lockstep})
    data, raised = local(4), []

    def step(batch: torch.Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            loss = engine(**halves(batch)).loss
        engine.backward(loss)
        engine.step()

    for batch in data[:3]:
        torch.manual_seed(len(batch))  # of dropout
        step(batch)
    for with_graph in (True, False) if interrupt else ():

        def fail(module, inputs, output, with_graph=with_graph):
            if torch.is_grad_enabled() == with_graph:
                raise Interrupted(with_graph)

        handle = engine.module.model.layers[2].mlp.down_proj.register_forward_hook(fail)
        try:
            step(data[3])
        except Interrupted as error:
            raised.append(error.args[0])
        handle.remove()
    torch.manual_seed(1)
    with CommunicationMeter() as meter:
        step(data[3])
    weights, in_lockstep = full_parameters(engine.module), engine.optimizer.evaluator.lockstep is not None
    engine.destroy()
    return {"weights": weights, "sent": meter.bytes_sent(), "lockstep": in_lockstep, "raised": raised}


def everything() -> dict:
    results = {}
    for name, make in models().items():
        for probes in (1, 2) if name == "Llama" else (1,):
            for lockstep in (True, False):
                results[name, probes, lockstep] = run(make, probes=probes, lockstep=lockstep)
        for lockstep in (True, False) if name in WITH_ADDAX else ():
            results[name, "Addax", lockstep] = addax(make, lockstep)
        results[name, "AdamW"] = run(make, "AdamW")
    results["Llama", "Addax", "interrupted"] = addax(models()["Llama"], lockstep=True, interrupt=True)
    for lockstep in (True, False):
        results["autocast", lockstep] = addax(models()["Llama"], lockstep, autocast=True)
        results["mixed", 1, lockstep] = run(lambda: across_the_batch(models()["Llama"]()), lockstep=lockstep)
    return results


def write_trajectory(folder: Path, stage: int) -> dict[str, torch.Tensor]:
    """A run in bf16 with a schedule, its base and its trajectory in files; returns the weights at the end."""
    model = llama()
    if dist.get_rank() == 0:
        base = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
        torch.save(base, folder / f"base{stage}.bin")
    scheduler = {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 5, "warmup_num_steps": 2, "warmup_max_lr": 1e-4},
    }
    hyper = HYPER | {"lr": 1e-4, "weight_decay": 0.1, "trajectory": str(folder / f"steps{stage}")}
    config = ds_config(stage, "MeZO", hyper, bf16={"enabled": True}, scheduler=scheduler)
    engine = initialize(model, config, model_parameters=model.parameters())
    data = local(4)
    train(engine, data[:2])
    engine.save_checkpoint(folder / f"checkpoint{stage}")
    train(engine, data[2:])
    weights = full_parameters(engine.module)
    engine.destroy()

    model = llama(seed=3)
    engine = initialize(model, config, model_parameters=model.parameters())
    engine.load_checkpoint(folder / f"checkpoint{stage}")
    train(engine, data[2:])
    resumed = full_parameters(engine.module)
    assert all(torch.equal(weights[name], resumed[name]) for name in weights), "the resumed run went elsewhere"
    engine.destroy()
    return weights


def trajectories(folder: Path) -> tuple[dict[int, dict[str, torch.Tensor]], dict[str, str]]:
    """The weights at the end of runs that write one, and why others could not."""
    ends = {stage: write_trajectory(folder, stage) for stage in (2, 3)}
    return ends, {path: refused_trajectory(str(folder / path)) for path in ("steps2", "nowhere/steps")}


def refused_trajectory(path: str) -> str:
    """Where a run of one step fails, and with which words: all in a time in which ranks still wait for each other."""
    model, engine = llama(), None
    try:
        config = ds_config(2, "MeZO", HYPER | {"trajectory": path})
        engine = initialize(model, config, model_parameters=model.parameters())
        train(engine, local(1))
    except ValueError as error:
        dist.barrier()
        return f"{'while it is built' if engine is None else 'at the first step'}: {error}"
    return "no error"
