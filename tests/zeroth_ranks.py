"""Worker of test_zeroth.py: MeZO under one placement after another, and in the loops that people have."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils import DummyOptim
from engines_ranks import InOrderTrainer, message, reset_accelerate
from tiny import (
    GLOBAL_BATCH,
    batches,
    bf16_llama,
    ds_config,
    full_parameters,
    initialize,
    llama,
    llama_under_zero_init,
    local,
    shard_fsdp2,
    stored,
    train,
)
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

import ds_memopt
from ds_memopt import MeZO
from ds_memopt.engines.checkpoint_files import load_only_data
from ds_memopt.measure import CommunicationMeter

STEPS = 2
HYPER = {"lr": 1e-4, "weight_decay": 0.1, "noise": "rademacher", "seed": 3, "compiled": False}
BF16 = {"bf16": {"enabled": True}}
OPTIONS = {
    "rademacher": {},
    "gaussian": {"noise": "gaussian"},
    "one-sided": {"estimator": "one_sided", "probes": 2},
    "epsilon 0.1": {"epsilon": 0.1},
    "bf16": {"momentum": 0.5},
    "LeZO": {"layer_fraction": 0.5},
    "SubZero": {"rank": 2},
    "Sparse-MeZO": {"magnitude_fraction": 0.5},
}
PLACEMENTS = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3, two passes": {"stage": 3, "hyper": {"lockstep": False}},
    "zero3, zero.Init": {"stage": 3, "zero_init": True},
    "zero3, offload of parameters": {"stage": 3, "zero_optimization": {"offload_param": {"device": "cpu"}}},
}
TRIED = {
    "rademacher": tuple(PLACEMENTS),
    "bf16": ("zero0", "zero2", "zero3", "zero3, two passes"),
    "gaussian": ("zero3",),
    "one-sided": ("zero0", "zero3"),
    "epsilon 0.1": ("zero2",),
    "LeZO": ("zero3",),
    "SubZero": ("zero2", "zero3"),
    "Sparse-MeZO": ("zero2", "zero3"),
}
"""Placements under which each of the options is tried: ZeRO-1 and 2 share all code of MeZO."""


def engine_of(stage: int, hyper: dict | None = None, zero_init: bool = False, make: Callable = llama, **changes):
    config = ds_config(stage, "MeZO", HYPER | (hyper or {}), **changes)
    model = llama_under_zero_init(config) if zero_init else make()
    return initialize(model, config, model_parameters=model.parameters())


@contextlib.contextmanager
def running(*arguments, **keywords):
    engine = engine_of(*arguments, **keywords)
    yield engine
    engine.destroy()


def plain(model, hyper: dict, data, labels_of: Callable = lambda batch: batch, in_fp64: bool = False):
    """Weights after some steps without DeepSpeed. in_fp64: the loss, not the logits. hyper: lr may be one per step."""
    rates = hyper.get("lr", HYPER["lr"])
    rates = rates if isinstance(rates, list) else [rates] * len(data)
    optimizer = MeZO.from_model(model, model.parameters(), **HYPER | hyper | {"lr": 0.0})
    for batch, rate in zip(data, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate

        def loss(batch=batch):
            output = model(input_ids=batch, labels=labels_of(batch))
            if not in_fp64:
                return output.loss
            return cross_entropy(output.logits[:, :-1].double().flatten(0, 1), batch[:, 1:].flatten())

        optimizer.step(loss)
    return full_parameters(model)


def exact(names: Sequence[str], placements: Sequence[str] = tuple(PLACEMENTS)) -> dict[str, dict]:
    """{options: {placement: weights}}; "fp64 sums": FSDP2 with the loss in fp64."""
    results = {}
    for name in names:
        hyper, make, changes = OPTIONS[name], llama, {}
        if name == "bf16":
            make, changes = bf16_llama, BF16
        results[name] = {"fsdp2": plain(shard_fsdp2(make()), hyper, local(STEPS))}
        results[name]["fp64 sums"] = plain(shard_fsdp2(make()), hyper, local(STEPS), in_fp64=True)
        for placement in [placement for placement in TRIED[name] if placement in placements]:
            case = PLACEMENTS[placement]
            with running(**case | {"hyper": hyper | case.get("hyper", {})} | changes) as engine:
                train(engine, local(STEPS))
                results[name][placement] = full_parameters(engine.module)
                assert cuts_a_row(engine.basic_optimizer) == (case["stage"] > 0 and dist.get_world_size() > 1)
    return results


def cuts_a_row(optimizer: MeZO) -> bool:
    """Whether what this rank updates of a matrix begins or ends within a row."""
    ends = [(part.name, end) for part in optimizer.placement.parts() for end in (part.start, part.start + part.length)]
    shapes = optimizer.probe.directions.shapes
    return any(end % shapes[name][-1] for name, end in ends if len(shapes[name]) == 2)


def labels_of(batch: torch.Tensor, above: int = 85) -> torch.Tensor:
    """In every row the labels from the first token on that is larger: a share that differs from row to row."""
    return torch.where(torch.cummax(batch, dim=1).values > above, batch, -100)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=12, n_head=3, n_layer=1, vocab_size=101, n_positions=16))


def accumulation(stage: int, micro_batches: int, above: int, make: Callable = llama) -> dict[str, torch.Tensor]:
    """above: see `labels_of`; with -1 all labels count, with 95 some micro-batches have none."""
    with running(stage, make=make, gradient_accumulation_steps=micro_batches) as engine:
        for batch in local(STEPS):
            for part in batch.chunk(micro_batches):
                engine.backward(engine(input_ids=part, labels=labels_of(part, above)).loss)
                engine.step()
        return full_parameters(engine.module)


def schedule(stage: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    warmup = {"warmup_min_lr": 1e-6, "warmup_max_lr": 1e-4, "warmup_num_steps": 3, "warmup_type": "linear"}
    rates = []
    with running(stage, scheduler={"type": "WarmupLR", "params": warmup}) as engine:
        for batch in local(3):
            rates.append(engine.get_lr()[0])
            train(engine, [batch])
        return rates, full_parameters(engine.module)


def trainer(stage: int) -> dict[str, torch.Tensor]:
    """transformers' Trainer with nothing but a JSON, "auto" values included, and two micro-batches a step."""
    ds_memopt.register()
    config = ds_config(stage, "MeZO", HYPER | {"lr": "auto", "weight_decay": "auto"}, gradient_clipping="auto")
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(), per_device_train_batch_size=GLOBAL_BATCH // 2 // dist.get_world_size(),
        gradient_accumulation_steps=2, num_train_epochs=1, learning_rate=HYPER["lr"], lr_scheduler_type="constant",
        weight_decay=HYPER["weight_decay"], deepspeed=config | {"gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto"}, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": labels_of(row[None])[0]} for batch in batches(STEPS) for row in batch]
    run = InOrderTrainer(model=llama(), args=arguments, train_dataset=rows)
    run.train()
    assert type(run.deepspeed.basic_optimizer) is MeZO
    weights = full_parameters(run.deepspeed.module)
    run.deepspeed.destroy()
    return weights


def with_accelerate(stage: int) -> dict[str, torch.Tensor]:
    ds_memopt.register()
    reset_accelerate()
    config = ds_config(stage, "MeZO", HYPER, gradient_accumulation_steps=2)
    accelerator = accelerate.Accelerator(deepspeed_plugin=accelerate.DeepSpeedPlugin(hf_ds_config=config))
    model = llama()
    model, optimizer = accelerator.prepare(model, DummyOptim(model.parameters(), **HYPER))
    for batch in local(STEPS):
        for part in batch.chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=part, labels=labels_of(part)).loss)
                optimizer.step()
                optimizer.zero_grad()
    weights = full_parameters(model.module)
    model.destroy()
    return weights


def wrong_tokens(stage: int, generate: bool) -> tuple[list, dict[str, torch.Tensor]]:
    """An objective without a gradient: the share of predicted, or generated, tokens that have the wrong parity."""
    with running(stage, hyper={"epsilon": 0.1}) as engine:
        firsts = []
        for batch in local(STEPS):

            def wrong(batch=batch):
                if generate:
                    tokens = engine.module.generate(batch[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
                else:
                    tokens = engine(input_ids=batch).logits.argmax(dim=-1)
                return (tokens % 2 == 1).sum().item(), tokens.numel()

            firsts.append(engine.train_step(wrong))
        assert (engine.global_steps, engine.optimizer.optimizer.steps) == (STEPS, STEPS)
        return firsts, full_parameters(engine.module)


def traffic() -> dict[str, dict]:
    """What a step sends after DeepSpeed has traced the first ones, and the bytes of each parameter."""
    results, cases = {}, PLACEMENTS | {"AdamW": {"stage": 3}}
    for name in ("zero0", "zero2", "zero3", "zero3, two passes", "AdamW"):
        case, method = cases[name], "AdamW" if name == "AdamW" else "MeZO"
        hyper = {"lr": 1e-4} if name == "AdamW" else HYPER | case.get("hyper", {})
        model = llama()
        # As a model of usual size is: gathered anew for backward.
        anew = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0} if name == "AdamW" else {}
        config = ds_config(case["stage"], method, hyper, zero_optimization=anew, **BF16)
        engine = initialize(model, config, model_parameters=model.parameters())
        *first, last = local(4)
        train(engine, first)
        with CommunicationMeter() as meter:
            train(engine, [last])
        weights = {n: 2 * p.ds_numel if hasattr(p, "ds_numel") else 2 * p.numel() for n, p in model.named_parameters()}
        results[name] = {"sent": meter.bytes_sent(), "by collective": meter.by_collective(), "weights": weights}
        engine.destroy()
    return results


class Interrupted(Exception):
    """Raised in a forward."""


def interrupted_step(model, step: Callable, at: int) -> tuple[bool, bool]:
    """Whether the exception came through, and whether it left every bit that this rank stores as it was."""
    projection, calls = model.get_submodule("model.layers.1.mlp.down_proj"), []
    forward = projection.forward

    def failing(*args, **kwargs):
        calls.append(forward(*args, **kwargs))
        if len(calls) == at + 1:
            raise Interrupted
        return calls[-1]

    shards = stored(model)
    before, projection.forward, raised = [p.clone() for p in shards], failing, False
    try:
        step()
    except Interrupted:
        raised = True
    projection.forward = forward
    if not isinstance(model, FSDPModule):  # whose root stays gathered after an exception
        shards = stored(model)
    return raised, all(map(torch.equal, before, shards))


def interruptions() -> dict[str, tuple]:
    """For each placement: what `interrupted_step` saw at each evaluation, and the weights after going on."""
    results = {}
    for name in ("zero2", "zero3", "zero3, two passes"):
        with running(**PLACEMENTS[name]) as engine:
            data = local(STEPS)
            train(engine, data[:1])
            seen = [interrupted_step(engine.module, lambda: train(engine, data[1:2]), at) for at in (0, 1)]  # noqa: B023
            train(engine, data[1:])
            results[name] = seen, full_parameters(engine.module)
    model = shard_fsdp2(llama())
    optimizer = MeZO.from_model(model, model.parameters(), **HYPER)
    go_on(model, optimizer, data[:1])
    seen = [interrupted_step(model, lambda: go_on(model, optimizer, data[1:2]), at) for at in (0, 1)]
    go_on(model, optimizer, data[1:])
    results["fsdp2"] = seen, full_parameters(model)
    return results


def skipping(stage: int) -> tuple[list[tuple], dict[str, torch.Tensor]]:
    """What three steps counted, in the second of which the last rank's loss is not finite, and the weights."""
    counted, last = [], dist.get_rank() == dist.get_world_size() - 1
    warmup = {"warmup_min_lr": 1e-6, "warmup_max_lr": 1e-4, "warmup_num_steps": 3, "warmup_type": "linear"}
    with running(stage, scheduler={"type": "WarmupLR", "params": warmup}) as engine:
        for step, batch in enumerate(local(3)):
            before = full_parameters(engine.module)
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss * float("nan") if step == 1 and last else loss)
            engine.step()
            after = full_parameters(engine.module)
            stood = all(torch.equal(before[name], after[name]) for name in before)
            counted.append((stood, engine.skipped_steps, engine.optimizer.optimizer.skipped_steps, engine.get_lr()[0]))
        return counted, after


RESUMED = {"momentum": 0.5, "normalize": True, "lr": 1e-5}


def resumed(folder: Path, stage: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights at a checkpoint, in the 16-bit file written there, at the end, and at the end after loading it anew."""
    gather = {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}} if stage == 3 else {}
    case, data = {"stage": stage, "hyper": RESUMED, **BF16, **gather}, local(3)
    with running(**case) as engine:
        train(engine, data[:2])
        engine.save_checkpoint(folder / f"zero{stage}")
        assert engine.save_16bit_model(folder / f"zero{stage}-16bit")
        results = {"saved": full_parameters(engine.module), **held(engine.basic_optimizer)}
        train(engine, data[2:])
        results["end"] = full_parameters(engine.module)
    with running(**case) as engine:
        train(engine, data[2:])  # what it knew before must go
        load_only_data(engine)
        assert engine.load_checkpoint(folder / f"zero{stage}")[0] is not None
        results["loaded"] = full_parameters(engine.module)
        train(engine, data[2:])
        results["resumed"] = full_parameters(engine.module)
    with running(**case) as engine:
        train(engine, data[2:])
        results["message"] = message(engine.load_checkpoint, folder / f"zero{stage}", load_module_only=True)
        results["weights alone"] = full_parameters(engine.module)
    file = folder / f"zero{stage}-16bit" / "pytorch_model.bin"
    results["16 bit"] = torch.load(file, weights_only=True)
    return results


def held(optimizer: MeZO) -> dict:
    parts = [part._replace(values=part.values.clone()) for part in optimizer.named_state()]
    return {"parts": parts, "progress": copy.deepcopy(optimizer.progress)}


def elsewhere(folder: Path, weights: dict[str, torch.Tensor], parts: list, progress: dict) -> dict[str, dict]:
    """On any number of ranks: what is held of a run that was saved on two, and the weights at its end."""
    results, data = {}, local(3)[2:]
    hyper = {"hyper": RESUMED, **BF16}
    for name, saved in (("zero1", 2), ("zero2", 0)):
        with running(PLACEMENTS[name]["stage"], **hyper) as engine:
            engine.load_checkpoint(folder / f"zero{saved}")
            results[name] = held(engine.basic_optimizer)
            train(engine, data)
            results[name]["end"] = full_parameters(engine.module)

    def saved_model():
        model = bf16_llama()
        model.load_state_dict(weights)
        return model

    with running(3, make=saved_model, **hyper) as engine:
        engine.basic_optimizer.load_named_state(parts, progress)
        results["zero3, by name"] = held(engine.basic_optimizer)
        train(engine, data)
        results["zero3, by name"]["end"] = full_parameters(engine.module)
    model = shard_fsdp2(saved_model())
    optimizer = MeZO.from_model(model, model.parameters(), **HYPER | RESUMED)
    optimizer.load_named_state(parts, progress)
    results["fsdp2, by name"] = held(optimizer)
    go_on(model, optimizer, data)
    results["fsdp2, by name"]["end"] = full_parameters(model)
    with running(0, **hyper) as engine:
        results["zero2 at zero0"] = message(engine.load_checkpoint, folder / "zero2")
    with running(2, **hyper | {"hyper": RESUMED | {"momentum": 0.6}}) as engine:
        results["other options"] = message(engine.load_checkpoint, folder / "zero2")
    with running(3, **hyper) as engine:
        results["zero2 at zero3"] = message(engine.load_checkpoint, folder / "zero2")
    return results


def messages() -> dict[str, str]:
    """What wrong calls are told."""
    results, batch = {}, local(1)[0]
    with running(2) as engine:
        loss = engine(input_ids=batch, labels=batch).loss
        results["no loss"] = message(engine, input_ids=batch)
        engine.backward(loss)
        results["no forward"] = message(engine.backward, loss)
        engine.step()
        own_loss = engine.module.loss_function
        engine.module.loss_function = lambda *inputs, **keywords: own_loss(*inputs, **keywords).bfloat16()
        results["16-bit loss"] = message(engine, input_ids=batch, labels=batch)
        engine.module.loss_function = own_loss
        output = engine(input_ids=batch, labels=batch)
        own = cross_entropy(output.logits.flatten(0, 1), batch.flatten())
        results["another loss"] = message(engine.backward, own)
        first = engine(input_ids=batch, labels=batch).loss
        second = engine(input_ids=batch, labels=batch).loss
        results["two forwards"] = message(engine.backward, first + second)
    with running(2) as engine:
        results["no backward"] = message(engine.step)
    with running(0, gradient_clipping=1.0) as engine:
        results["clipping"] = message(train, engine, local(1))
        frozen = [p.requires_grad for p in engine.module.parameters()]
    results["given back"] = any(frozen), [p.requires_grad for p in engine.module.parameters()]
    results["hooks"] = [len(module._forward_hooks) for module in engine.module.modules()]
    return results


def resumed_fsdp2() -> dict[str, dict[str, torch.Tensor]]:
    """The same without DeepSpeed, by what each rank's state_dicts hold."""

    def build(data) -> tuple:
        model = shard_fsdp2(bf16_llama())
        optimizer = MeZO.from_model(model, model.parameters(), **HYPER | {"momentum": 0.5, "lr": 1e-5})
        go_on(model, optimizer, data)
        return model, optimizer

    data = local(3)
    model, optimizer = build(data[:2])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go_on(model, optimizer, data[2:])
    new_model, new_optimizer = build(data[2:])
    new_model.load_state_dict(saved[0])
    new_optimizer.load_state_dict(saved[1])
    go_on(new_model, new_optimizer, data[2:])
    return {"end": full_parameters(model), "resumed": full_parameters(new_model)}


def go_on(model, optimizer, data) -> None:
    for batch in data:
        optimizer.step(lambda batch=batch: model(input_ids=batch, labels=batch).loss)


LOOPS = {
    ("accumulation", 3, 2, 85): (accumulation, 3, 2, 85),
    **{("accumulation", stage, 3, -1): (accumulation, stage, 3, -1) for stage in (0, 2)},
    ("trainer", 3): (trainer, 3),
    ("accelerate", 2): (with_accelerate, 2),
}
"""Loops whose steps are made of two or three micro-batches."""


def on_two_ranks(folder: Path) -> dict:
    return {
        "exact": exact(OPTIONS),
        "loops": {name: function(*arguments) for name, (function, *arguments) in LOOPS.items()},
        "no labels": accumulation(2, 3, 95),
        "gpt2": accumulation(2, 2, 85, gpt2),
        "wrong tokens": {(stage, how): wrong_tokens(stage, how) for stage in (0, 3) for how in (False, True)},
        "traffic": traffic(),
        "interruptions": interruptions(),
        "skipping": {stage: skipping(stage) for stage in (0, 2, 3)},
        "resumed": {stage: resumed(folder, stage) for stage in (0, 2, 3)} | {"fsdp2": resumed_fsdp2()},
        "messages": messages(),
    }


def on_three_ranks(*saved) -> dict:
    """Neither rows nor parameters divide by 3."""
    return {"exact": exact(("rademacher", "bf16"), ("zero1", "zero2", "zero3")), "elsewhere": elsewhere(*saved)}


def on_one_rank() -> dict:
    """The same placements, and a schedule."""
    return {
        "exact": exact(("rademacher", "one-sided", "bf16"), ("zero0", "zero3")),
        "schedule": {stage: schedule(stage) for stage in (0, 2, 3)},
    }
