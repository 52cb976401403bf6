"""Worker of test_ipsgd.py: IPSGD and Addax under one placement after another, and in people's loops."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
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
    shard_fsdp2,
    train_plain,
)
from tiny import local as local_batches
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments, default_data_collator

import ds_memopt
from ds_memopt import Addax
from ds_memopt.engines.checkpoint_files import load_only_data
from ds_memopt.measure import CommunicationMeter
from ds_memopt.optimizers import METHODS

STEPS = 3
BF16 = {"bf16": {"enabled": True}}
SMALL = {"reduce_bucket_size": 3000}
THRESHOLD = 11
ADDAX = {"alpha": 0.005, "epsilon": 1e-2, "compiled": False, "noise": "rademacher", "length_threshold": THRESHOLD}
OPTIONS = {
    "IPSGD": {},
    "IPSGD, tensor": {"clip": "tensor", "max_norm": 0.2},
    "IPSGD, two passes": {"clip": "two_pass"},
    "AdaLomo": {"rule": "adalomo"},
    "AdaLomo, two passes": {"rule": "adalomo", "clip": "two_pass"},
    "Addax": ADDAX,
    "Addax, two passes": ADDAX | {"clip": "two_pass"},
    "Addax, tensor": ADDAX | {"clip": "tensor", "max_norm": 0.2},
}
PLACEMENTS = {
    "zero0": {"stage": 0},
    "zero0, small buckets": {"stage": 0, "zero_optimization": SMALL},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2, small buckets": {"stage": 2, "zero_optimization": SMALL},
    "zero3": {"stage": 3},
    "zero3, small buckets": {"stage": 3, "zero_optimization": SMALL},
    "zero3, zero.Init": {"stage": 3, "zero_init": True},
    "zero3, offload of parameters": {"stage": 3, "zero_optimization": {"offload_param": {"device": "cpu"}}},
}
FEW = ("zero0", "zero2, small buckets", "zero3, small buckets")
TRIED = {name: tuple(PLACEMENTS) if name in ("IPSGD", "Addax") else FEW for name in OPTIONS}
"""Placements under which each of the options is tried."""
LENGTHS = (12, 16, 6, 13, 10, 8, 7, 14, 9, 15, 16, 5)
ORDERS = {
    "mixed": range(GLOBAL_BATCH),
    "long first": sorted(range(GLOBAL_BATCH), key=LENGTHS.__getitem__, reverse=True),
    "short first": sorted(range(GLOBAL_BATCH), key=LENGTHS.__getitem__),
}
EMPTY = {
    "long on one rank": {"order": "long first"},
    "long on the other": {"order": "short first"},
    "all short": {"threshold": 16},
    "all long": {"threshold": 4},
    "no labels on one rank": {"order": "long first", "labels_from": 8},
}
"""Batches of which a rank, or all, lack a half."""
EMPTY_AT = [(stage, case) for stage in (2, 3) for case in EMPTY] + [(0, "long on one rank")]
"""With the stage: at ZeRO-0 only whether a rank without the half takes part in the sum."""
NO_LABELS, HALF = {"order": "long first", "labels_from": 12}, ("IPSGD, two passes", "AdaLomo")
"""One of two ranks has no labels at all; where."""


def hyper_of(options: str) -> dict:
    return {"lr": 0.03 if "AdaLomo" in options else 0.1, "weight_decay": 0.1} | OPTIONS[options]


def data(order: str = "mixed", steps: int = STEPS, labels_from: int | None = None, **_) -> list[dict]:
    """Global batches of padded rows, each with a prompt, so that their numbers of labels differ.

    labels_from: only of this row on have labels.
    """
    results, place = [], torch.arange(16)
    lengths = torch.tensor(LENGTHS)
    for tokens in batches(steps):
        there = place < lengths[:, None]
        counted = there & (place >= tokens[:, :1] % 4)
        if labels_from is not None:
            counted &= (lengths >= labels_from)[:, None]
        rows = {"input_ids": tokens, "attention_mask": there.long(), "labels": tokens.where(counted, -100)}
        results.append({key: value[list(ORDERS[order])] for key, value in rows.items()})
    return results


def local(batch: dict) -> dict:
    """This rank's rows, padded to their longest."""
    mine = {key: value.chunk(dist.get_world_size())[dist.get_rank()] for key, value in batch.items()}
    return {key: value[:, : mine["attention_mask"].sum(1).max()] for key, value in mine.items()}


def long_rows(batch: dict, threshold: int) -> torch.Tensor:
    return batch["attention_mask"].sum(1) > threshold


def take(batch: dict, rows: torch.Tensor) -> dict | None:
    return {key: value[rows] for key, value in batch.items()} if rows.any() else None


def sum_of_losses(model, batch: dict | None) -> tuple[torch.Tensor, int]:
    """And the number of tokens; of a batch that is None, or without labels, nothing."""
    given = batch if batch is not None else dict.fromkeys(("input_ids", "labels"), torch.zeros(1, 4, dtype=torch.long))
    logits = model(input_ids=given["input_ids"], attention_mask=given.get("attention_mask")).logits
    labels = given["labels"][:, 1:].flatten()
    total = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, reduction="sum", ignore_index=-100)
    return (total, int((labels != -100).sum())) if batch is not None else (total * 0, 0)


def plain(model, options: str, global_batches: list[dict], mine: Callable = lambda batch: batch, threshold=THRESHOLD):
    """Weights after steps with closures, without DeepSpeed. mine: picks this rank's rows."""
    optimizer = METHODS[type_of(options)].from_model(model, model.parameters(), **hyper_of(options))
    for batch in map(mine, global_batches):
        go_on(model, optimizer, batch, threshold)
    return full_parameters(model)


def go_on(model, optimizer, batch: dict, threshold: int = THRESHOLD) -> None:
    if isinstance(optimizer, Addax):
        above = long_rows(batch, threshold)
        zo, fo = take(batch, above), take(batch, ~above)
        optimizer.step(lambda: sum_of_losses(model, zo), lambda: sum_of_losses(model, fo))
    else:
        optimizer.step(lambda: sum_of_losses(model, batch))


def engine_of(stage: int, options: str, hyper: dict | None = None, zero_init=False, make: Callable = llama, **changes):
    config = ds_config(stage, type_of(options), hyper_of(options) | (hyper or {}), **changes)
    model = llama_under_zero_init(config) if zero_init else make()
    return initialize(model, config, model_parameters=model.parameters())


@contextlib.contextmanager
def running(*arguments, **keywords):
    engine = engine_of(*arguments, **keywords)
    yield engine
    engine.destroy()


def train(engine, some_batches: list[dict]) -> None:
    for batch in map(local, some_batches):
        engine.backward(engine(**batch).loss)
        engine.step()


def cuts_a_row(engine) -> bool:
    """Whether what this rank updates of a matrix begins or ends within a row."""
    optimizer = engine.basic_optimizer
    shapes = {name: getattr(p, "ds_shape", p.shape) for p, name in optimizer.names_by_tensor().items()}
    ends = [(p.name, end) for p in optimizer.placement.parts() for end in (p.start, p.start + len(p.elements))]
    return any(end % shapes[name][-1] for name, end in ends if len(shapes[name]) == 2)


def exact(tried: dict[str, tuple] = TRIED) -> dict[str, dict]:
    """{options: {placement: weights}}."""
    results = {}
    for options, placements in tried.items():
        results[options] = {"fsdp2": plain(shard_fsdp2(llama()), options, data(), local)}
        for placement in placements:
            case = PLACEMENTS[placement]
            with running(**case, options=options) as engine:
                train(engine, data())
                results[options][placement] = full_parameters(engine.module)
                assert cuts_a_row(engine) == (case["stage"] > 0 and dist.get_world_size() > 1)
    return results


def some_exact() -> dict[str, dict]:
    """The same on ranks that divide neither rows nor parameters."""
    results = {}
    for options in ("IPSGD, tensor", "AdaLomo, two passes", "Addax"):
        results[options] = {"fsdp2": plain(shard_fsdp2(llama()), options, data(), local)}
        for placement in ("zero0", "zero2, small buckets", "zero3"):
            with running(**PLACEMENTS[placement], options=options) as engine:
                train(engine, data())
                results[options][placement] = full_parameters(engine.module)
    return results


def hsdp() -> dict[str, dict]:
    """Shards on two of four ranks, twice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    tried = ("IPSGD, tensor", "IPSGD, two passes", "AdaLomo", "Addax")
    return {options: plain(shard_fsdp2(llama(), mesh), options, data(), local) for options in tried}


def same_lengths() -> list[dict]:
    """Batches of which every rank has as many tokens."""
    whole = torch.ones(GLOBAL_BATCH, 16, dtype=torch.long)
    return [{"input_ids": batch, "labels": batch, "attention_mask": whole} for batch in batches(STEPS)]


def unchanged_loop_of_fsdp2(options: str) -> dict[str, torch.Tensor]:
    model = shard_fsdp2(llama())
    optimizer = METHODS["IPSGD"].from_model(model, model.parameters(), **hyper_of(options))
    train_plain(model, optimizer, local_batches(STEPS))
    return full_parameters(model)


def empty(stage: int, case: dict, options: str = "Addax") -> tuple[dict, int]:
    threshold = {"length_threshold": case.get("threshold", THRESHOLD)} if options == "Addax" else {}
    with running(stage, options, threshold) as engine:
        train(engine, data(**case))
        return full_parameters(engine.module), engine.skipped_steps


def by_train_step(stage: int, options: str, order: str) -> dict[str, torch.Tensor]:
    """With a batch; for Addax one for each half, None where this rank has no rows of it."""
    with running(stage, options, {"length_threshold": None} if options == "Addax" else {}) as engine:
        for batch in map(local, data(order)):
            above = long_rows(batch, THRESHOLD)
            engine.train_step(*([take(batch, above), take(batch, ~above)] if options == "Addax" else [batch]))
        return full_parameters(engine.module)


def trainer(stage: int, options: str) -> dict[str, torch.Tensor]:
    """transformers' Trainer with nothing but a JSON, "auto" values included."""
    ds_memopt.register()
    hyper = hyper_of(options) | {"lr": "auto", "weight_decay": "auto"}
    config = ds_config(stage, options, hyper, gradient_clipping="auto")
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(), per_device_train_batch_size=GLOBAL_BATCH // dist.get_world_size(),
        num_train_epochs=1, learning_rate=0.1, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=0.0,
        deepspeed=config | {"train_micro_batch_size_per_gpu": "auto"}, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    rows = [{key: value[row] for key, value in batch.items()} for batch in data() for row in range(GLOBAL_BATCH)]
    run = InOrderTrainer(model=llama(), args=arguments, train_dataset=rows, data_collator=default_data_collator)
    run.train()
    assert type(run.deepspeed.basic_optimizer) is METHODS[options]
    weights = full_parameters(run.deepspeed.module)
    run.deepspeed.destroy()
    return weights


def with_accelerate(stage: int, options: str) -> dict[str, torch.Tensor]:
    ds_memopt.register()
    reset_accelerate()
    config = ds_config(stage, options, hyper_of(options))
    accelerator = accelerate.Accelerator(deepspeed_plugin=accelerate.DeepSpeedPlugin(hf_ds_config=config))
    model = llama()
    model, optimizer = accelerator.prepare(model, DummyOptim(model.parameters(), **hyper_of(options)))
    for batch in map(local, data()):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    weights = full_parameters(model.module)
    model.destroy()
    return weights


def in_bf16() -> dict[str, dict]:
    """{options: {placement: weights}}; "fp32 sums": gradients added up in fp32, before any rule, so for one."""
    cases = {name: {"stage": stage} for stage, name in enumerate(("zero0", "zero1", "zero2", "zero3"))}
    fp32 = {f"{name}, fp32 sums": case | {"communication_data_type": "fp32"} for name, case in cases.items()}
    results = {}
    for options in ("IPSGD", "AdaLomo", "Addax"):
        results[options] = {"fsdp2": plain(shard_fsdp2(bf16_llama()), options, data(), local)}
        for name, case in (cases | fp32 if options == "IPSGD" else cases).items():
            with running(options=options, make=bf16_llama, **case, **BF16) as engine:
                train(engine, data())
                results[options][name] = full_parameters(engine.module)
    return results


TRAFFIC = ("IPSGD", "AdaLomo", "Addax")


def traffic(options: str, stage: int) -> dict:
    """What a step sends after DeepSpeed has traced the first ones."""
    # As in a model of usual size: a layer is gathered anew for backward, and for both halves of Addax at once.
    anew = {"stage3_max_reuse_distance": 30000 if options == "Addax" else 0, "stage3_prefetch_bucket_size": 0}
    case = {"zero_optimization": anew if stage == 3 else {}, **BF16}
    if options == "AdamW":
        model = llama()
        engine = initialize(model, ds_config(stage, "AdamW", {"lr": 1e-4}, **case), model_parameters=model.parameters())
    else:
        engine = engine_of(stage, options, **case)
    train(engine, data(steps=7)[: 6 if stage == 3 else 1])
    with CommunicationMeter() as meter:
        train(engine, data(steps=7)[6:])
    engine.destroy()
    return {"sent": meter.bytes_sent(), "by collective": meter.by_collective()}


WARMUP = {"warmup_min_lr": 0.01, "warmup_max_lr": 0.1, "warmup_num_steps": 3, "warmup_type": "linear"}


def skipping(stage: int, options: str) -> tuple[list[tuple], dict[str, torch.Tensor]]:
    """What four steps counted, in the second of which the last rank's loss is not finite, and the weights."""
    counted, last = [], dist.get_rank() == dist.get_world_size() - 1
    with running(stage, options, scheduler={"type": "WarmupLR", "params": WARMUP}) as engine:
        for step, batch in enumerate(map(local, data(steps=4))):
            before = full_parameters(engine.module)
            loss = engine(**batch).loss
            engine.backward(loss * float("nan") if step == 1 and last else loss)
            engine.step()
            after = full_parameters(engine.module)
            stood = all(torch.equal(before[name], after[name]) for name in before)
            counted.append((stood, engine.skipped_steps, engine.optimizer.optimizer.skipped_steps, engine.get_lr()[0]))
        return counted, after


def held(optimizer) -> dict:
    parts = [part._replace(values=part.values.clone()) for part in optimizer.named_state()]
    return {"parts": parts, "progress": copy.deepcopy(optimizer.progress)}


RESUMED = ("AdaLomo", "Addax, two passes")
SAVED_AT = (0, 2, 3)
"""The stages; what ZeRO-2 saves is taken over by ZeRO-1 as well."""


def resumed(folder: Path, stage: int, options: str) -> dict[str, dict[str, torch.Tensor]]:
    """Weights at a checkpoint, at the end, and at the end after loading it anew."""
    case, steps, file = {"stage": stage, "options": options, **BF16}, data(steps=5), folder / f"{options} {stage}"
    with running(**case) as engine:
        train(engine, steps[:3])
        engine.save_checkpoint(file)
        results = {"saved": full_parameters(engine.module), **held(engine.basic_optimizer)}
        train(engine, steps[3:])
        results["end"] = full_parameters(engine.module)
    with running(**case) as engine:
        train(engine, steps[3:4])  # what it knew before must go
        load_only_data(engine)
        results["message"] = message(engine.load_checkpoint, file)
        results["loaded"] = full_parameters(engine.module)
        train(engine, steps[3:])
        results["resumed"] = full_parameters(engine.module)
    return results


def elsewhere(folder: Path, options: str, weights: dict, parts: list, progress: dict) -> dict[str, dict]:
    """On any number of ranks: what is held of a run that was saved on two, and the weights at its end."""

    def saved_model():
        model = bf16_llama()
        model.load_state_dict(weights)
        return model

    results, steps = {}, data(steps=5)[3:]
    with running(1, options, **BF16) as engine:
        engine.load_checkpoint(folder / f"{options} 2")
        results["zero1"] = held(engine.basic_optimizer)
        train(engine, steps)
        results["zero1"]["end"] = full_parameters(engine.module)
    for stage in (0, 3):
        with running(stage, options, make=saved_model, **BF16) as engine:
            engine.basic_optimizer.load_named_state(parts, progress)
            results[f"zero{stage}, by name"] = held(engine.basic_optimizer)
            train(engine, steps)
            results[f"zero{stage}, by name"]["end"] = full_parameters(engine.module)
    model = shard_fsdp2(saved_model())
    optimizer = METHODS[type_of(options)].from_model(model, model.parameters(), **hyper_of(options))
    optimizer.load_named_state(parts, progress)
    results["fsdp2, by name"] = held(optimizer)
    for batch in map(local, steps):
        go_on(model, optimizer, batch)
    results["fsdp2, by name"]["end"] = full_parameters(model)
    with running(2, options, {"keep": "fp32"}, **BF16) as engine:
        results["other options"] = message(engine.load_checkpoint, folder / f"{options} 2")
    return results


INTERRUPTED = (("IPSGD", 0), ("Addax", 0), ("Addax", 1), ("Addax", 2))
"""The method, and the number of the forward in a step that fails."""


class Interrupted(Exception):
    """Raised in a forward."""


def interrupted(stage: int, options: str, at: int) -> tuple[bool, dict[str, torch.Tensor]]:
    """Whether an exception in a step's forward left every bit that this rank stores, and the weights after going on."""
    with running(stage, options) as engine:
        steps = data()
        train(engine, steps[:1])
        projection, calls = engine.module.get_submodule("model.layers.1.mlp.down_proj"), []
        forward = projection.forward

        def failing(*inputs):
            calls.append(forward(*inputs))
            if len(calls) == at + 1:
                raise Interrupted
            return calls[-1]

        stored = [getattr(p, "ds_tensor", p).detach() for p in engine.module.parameters()]
        before, projection.forward = [p.clone() for p in stored], failing
        with contextlib.suppress(Interrupted):
            train(engine, steps[1:2])
            calls.clear()  # it was not raised
        projection.forward = forward
        stood = all(torch.equal(a, b) for a, b in zip(before, stored, strict=True)) and len(calls) == at + 1
        train(engine, steps[1:])
        return stood, full_parameters(engine.module)


def given_back(stage: int, options: str) -> bool:
    """Whether a model is as it was after the engine: gradients stay where backward puts them."""
    with running(stage, options) as engine:
        train(engine, data(steps=1))
        model = engine.module
    before = full_parameters(model)
    model(**local(data(steps=1)[0])).loss.backward()
    after = full_parameters(model)
    return all(p.grad is not None for p in model.parameters()) and all(torch.equal(before[n], after[n]) for n in before)


def chosen_threshold(stage: int) -> int:
    """What "auto" chooses on ranks whose first batches differ, in an amount of memory."""
    with running(stage, "Addax", {"length_threshold": "auto", "memory_gib": 0.05, "fo_batch": 3}) as engine:
        train(engine, data("long first", steps=1))
        return engine.basic_optimizer.length_threshold


def messages() -> dict[str, str]:
    """What wrong calls are told."""
    results, batch = {}, local(data()[0])
    for options in ("IPSGD", "Addax"):
        results[options, "accumulation"] = message(engine_of, 2, options, gradient_accumulation_steps=2)
        with running(2, options) as engine:
            results[options, "no backward"] = message(engine.step)
            loss = engine(**batch).loss
            engine.backward(loss)
            results[options, "no forward"] = message(engine.backward, loss)
            engine.step()
            first, second = engine(**batch).loss, engine(**batch).loss
            results[options, "two forwards"] = message(engine.backward, first + second)
            results[options, "no loss"] = message(
                engine, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            )
    with running(2, "Addax") as engine:
        results["Addax", "position"] = message(engine, batch["input_ids"])
        results["Addax", "lengths"] = message(engine, input_ids=batch["input_ids"])
        results["Addax", "no batch"] = message(engine.train_step, None, None)
    results["Addax", "memory"] = message(engine_of, 2, "Addax", {"length_threshold": "auto"})
    with running(2, "Addax", {"length_threshold": "auto", "memory_gib": 1e-4}) as engine:
        results["Addax", "too small"] = message(train, engine, data(steps=1))
    return results


def type_of(options: str) -> str:
    return options.split(",")[0].replace("AdaLomo", "IPSGD")


LOOPS = {
    ("Trainer", 2): (trainer, 2, "IPSGD"),
    ("Trainer", 3): (trainer, 3, "Addax"),
    ("accelerate", 1): (with_accelerate, 1, "IPSGD"),
    ("accelerate", 2): (with_accelerate, 2, "Addax"),
    ("train_step", 3): (by_train_step, 3, "IPSGD", "mixed"),
    ("train_step of halves", 3): (by_train_step, 3, "Addax", "mixed"),
    ("train_step of a half on each rank", 1): (by_train_step, 1, "Addax", "long first"),
    ("train_step of a half on each rank", 3): (by_train_step, 3, "Addax", "short first"),
}
"""What makes three steps at a stage, of which method, with rows in which order."""


def on_two_ranks(folder: Path) -> dict:
    return {
        "exact": exact(),
        "fsdp2 loop": {options: unchanged_loop_of_fsdp2(options) for options in ("IPSGD", "IPSGD, tensor", "AdaLomo")},
        "empty": {(stage, name): empty(stage, EMPTY[name]) for stage, name in EMPTY_AT},
        "no labels": {(stage, o): empty(stage, NO_LABELS, o) for stage in (0, 3) for o in HALF},
        "loops": {name: function(*arguments) for name, (function, *arguments) in LOOPS.items()},
        "bf16": in_bf16(),
        "traffic": {(o, stage): traffic(o, stage) for stage in range(4) for o in ("AdamW", *TRAFFIC)},
        "skipping": {(o, stage): skipping(stage, o) for stage in (0, 2, 3) for o in ("IPSGD", "Addax")},
        "resumed": {(o, stage): resumed(folder, stage, o) for stage in SAVED_AT for o in RESUMED},
        "interrupted": {(o, stage, at): interrupted(stage, o, at) for stage in (2, 3) for o, at in INTERRUPTED},
        "given back": [given_back(stage, options) for stage in (0, 2) for options in ("IPSGD", "Addax")],
        "threshold": {stage: chosen_threshold(stage) for stage in (2, 3)}, "messages": messages(),
    }  # fmt: skip


def on_one_rank() -> dict:
    return exact(dict.fromkeys(OPTIONS, ("zero0", "zero3, small buckets")))
