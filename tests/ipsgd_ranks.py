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
    stored,
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

STEPS = 2
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
TRIED = dict.fromkeys(("IPSGD, tensor", "IPSGD, two passes", "AdaLomo"), FEW) | {
    "IPSGD": tuple(PLACEMENTS),
    "AdaLomo, two passes": FEW[2:],
    "Addax": (*FEW, "zero3, offload of parameters"),
    "Addax, two passes": FEW[1:],
    "Addax, tensor": FEW[:1],
}
"""Placements under which each of the options is tried on two ranks."""
LENGTHS = (12, 16, 6, 13, 10, 8, 7, 14, 9, 15, 16, 5)
ORDERS = {
    "mixed": range(GLOBAL_BATCH),
    "long first": sorted(range(GLOBAL_BATCH), key=LENGTHS.__getitem__, reverse=True),
    "short first": sorted(range(GLOBAL_BATCH), key=LENGTHS.__getitem__),
}
EMPTY = (
    {"order": "long first"}, {"order": "short first"}, {"longest": THRESHOLD}, {"shortest": THRESHOLD + 1},
    {"order": "long first", "labels_from": 8},
)  # fmt: skip
"""Batches of whose halves a rank, or all, lack the rows or the labels: each is a step's."""
NO_LABELS, HALF = {"order": "long first", "labels_from": 12}, ("IPSGD, two passes", "AdaLomo")
"""One of two ranks has no labels at all; where."""


def hyper_of(options: str) -> dict:
    return (
        {"lr": 1e-4}
        if options == "AdamW"
        else {"lr": 0.03 if "AdaLomo" in options else 0.1, "weight_decay": 0.1} | OPTIONS[options]
    )


def data(
    order: str = "mixed", steps: int = STEPS, labels_from: int | None = None, shortest: int = 0, longest: int = 16
) -> list[dict]:
    """Global batches of padded rows, each with a prompt, so that their numbers of labels differ.

    labels_from: only rows of this length on have labels.
    """
    results, place = [], torch.arange(16)
    lengths = torch.tensor(LENGTHS).clamp(shortest, longest)
    for tokens in batches(steps):
        there = place < lengths[:, None]
        counted = there & (place >= tokens[:, :1] % 4)
        if labels_from is not None:
            counted &= (lengths >= labels_from)[:, None]
        rows = {"input_ids": tokens, "attention_mask": there.long(), "labels": tokens.where(counted, -100)}
        results.append({key: value[list(ORDERS[order])] for key, value in rows.items()})
    return results


def lacking_halves() -> list[dict]:
    return [data(**case, steps=step + 1)[step] for step, case in enumerate(EMPTY)]


def local(batch: dict) -> dict:
    """This rank's rows, padded to their longest."""
    mine = {key: value.chunk(dist.get_world_size())[dist.get_rank()] for key, value in batch.items()}
    return {key: value[:, : mine["attention_mask"].sum(1).max()] for key, value in mine.items()}


def long_rows(batch: dict) -> torch.Tensor:
    return batch["attention_mask"].sum(1) > THRESHOLD


def take(batch: dict, rows: torch.Tensor) -> dict | None:
    return {key: value[rows] for key, value in batch.items()} if rows.any() else None


def sum_of_losses(model, batch: dict | None) -> tuple[torch.Tensor, int]:
    """And the number of tokens; of a batch that is None, or without labels, nothing."""
    given = batch if batch is not None else dict.fromkeys(("input_ids", "labels"), torch.zeros(1, 4, dtype=torch.long))
    logits = model(input_ids=given["input_ids"], attention_mask=given.get("attention_mask")).logits
    labels = given["labels"][:, 1:].flatten()
    total = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, reduction="sum", ignore_index=-100)
    return (total, int((labels != -100).sum())) if batch is not None else (total * 0, 0)


def plain(model, options: str, global_batches: list[dict], mine: Callable = lambda batch: batch):
    """Weights after steps with closures, without DeepSpeed. mine: picks this rank's rows."""
    optimizer = METHODS[type_of(options)].from_model(model, model.parameters(), **hyper_of(options))
    for batch in map(mine, global_batches):
        if isinstance(optimizer, Addax):
            above = long_rows(batch)
            zo, fo = take(batch, above), take(batch, ~above)
            optimizer.step(lambda zo=zo: sum_of_losses(model, zo), lambda fo=fo: sum_of_losses(model, fo))
        else:
            optimizer.step(lambda batch=batch: sum_of_losses(model, batch))
    return full_parameters(model)


def engine_of(stage: int, options: str, hyper=None, zero_init=False, make: Callable = llama, weights=None, **changes):
    config = ds_config(stage, type_of(options), hyper_of(options) | (hyper or {}), **changes)
    model = llama_under_zero_init(config) if zero_init else make()
    if weights:
        model.load_state_dict(weights)
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


def exact(tried: dict[str, tuple]) -> dict[str, dict]:
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


def hsdp() -> dict[str, dict]:
    """Shards on two of four ranks, twice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    tried = ("AdaLomo, two passes", "Addax, tensor")
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


def weights_and_skipped(stage: int, options: str, some_batches: list[dict]) -> tuple[dict, int]:
    with running(stage, options) as engine:
        train(engine, some_batches)
        return full_parameters(engine.module), engine.skipped_steps


def without_threshold() -> list[dict[str, torch.Tensor]]:
    """Weights where both halves are the whole batch: as it is, and with its number of tokens, which Trainer tells."""
    results = []
    for told in (False, True):
        with running(2, "Addax", {"length_threshold": None}) as engine:
            for batch in data():
                count = {"num_items_in_batch": (batch["labels"][:, 1:] != -100).sum()}
                engine.backward(engine(**batch, **(count if told else {})).loss)
                engine.step()
            results.append(full_parameters(engine.module))
    return results


def by_train_step(stage: int, options: str, order: str) -> dict[str, torch.Tensor]:
    """With a batch; for Addax one for each half, None where this rank has no rows of it."""
    with running(stage, options, {"length_threshold": None} if options == "Addax" else {}) as engine:
        for batch in map(local, data(order)):
            above = long_rows(batch)
            engine.train_step(*([take(batch, above), take(batch, ~above)] if options == "Addax" else [batch]))
        return full_parameters(engine.module)


def trainer(stage: int, options: str) -> dict[str, torch.Tensor]:
    """transformers' Trainer with nothing but a JSON, "auto" values included; it reports all ranks' loss once."""
    ds_memopt.register()
    config = ds_config(stage, options, hyper_of(options) | dict.fromkeys(["lr", "weight_decay"], "auto"))
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(), per_device_train_batch_size=GLOBAL_BATCH // dist.get_world_size(),
        num_train_epochs=1, learning_rate=0.1, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=0.0,
        deepspeed=config | dict.fromkeys(["train_micro_batch_size_per_gpu", "gradient_clipping"], "auto"), report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    rows = [{key: value[row] for key, value in batch.items()} for batch in data() for row in range(GLOBAL_BATCH)]
    run = InOrderTrainer(model=llama(), args=arguments, train_dataset=rows, data_collator=default_data_collator)
    run.train()
    assert type(run.deepspeed.basic_optimizer) is METHODS[options]
    assert abs(run.state.log_history[0]["loss"] - llama()(**next(iter(data()))).loss) < 1e-2
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


STAGES = (0, 2, 3)
"""What steps do is the same at ZeRO-1 and 2."""


def in_bf16() -> tuple[dict[str, dict], dict[tuple[str, int], int]]:
    """{options: {placement: weights}}, and what the last step has sent, also that of AdamW. "fp32 sums": gradients
    added up in fp32, before any rule, so for one."""
    fsdp2 = {o: {"fsdp2": plain(shard_fsdp2(bf16_llama()), o, data(), local)} for o in ("IPSGD", "AdaLomo", "Addax")}
    results, sent = fsdp2 | {"AdamW": {}}, {}
    for options in results:
        for stage in STAGES:
            # As in a model of usual size: a layer is gathered anew for backward, and for both halves of Addax at once.
            anew = {"stage3_max_reuse_distance": 30000 if options == "Addax" else 0, "stage3_prefetch_bucket_size": 0}
            case = {"zero_optimization": anew if stage == 3 else {}, **BF16}
            if options == "IPSGD":
                with running(stage, options, make=bf16_llama, communication_data_type="fp32", **case) as engine:
                    train(engine, data())
                    results[options][f"zero{stage}, fp32 sums"] = full_parameters(engine.module)
            with running(stage, options, make=bf16_llama, **case) as engine:
                train(engine, data()[:-1])
                with CommunicationMeter() as meter:
                    train(engine, data()[-1:])
                results[options][f"zero{stage}"] = full_parameters(engine.module)
                sent[options, stage] = meter.bytes_sent()
    return results, sent


WARMUP = {"warmup_min_lr": 0.01, "warmup_max_lr": 0.1, "warmup_num_steps": 3, "warmup_type": "linear"}


def skipping(stage: int, options: str) -> tuple[list[tuple], dict[str, torch.Tensor]]:
    """What three steps counted, in the second of which the last rank's loss is not finite, and the weights."""
    counted, last = [], dist.get_rank() == dist.get_world_size() - 1
    with running(stage, options, scheduler={"type": "WarmupLR", "params": WARMUP}) as engine:
        for step, batch in enumerate(map(local, data(steps=3))):
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


RESUMED = [("AdaLomo", 0), ("AdaLomo", 2), ("Addax, two passes", 2), ("Addax, two passes", 3)]
"""With the stage; what ZeRO-2 saves is taken over elsewhere as well."""


def resumed(folder: Path, stage: int, options: str) -> dict[str, dict[str, torch.Tensor]]:
    """Weights at a checkpoint, at the end, and at the end after loading it anew."""
    case, steps, file = {"stage": stage, "options": options, **BF16}, data(steps=3), folder / f"{options} {stage}"
    with running(**case) as engine:
        train(engine, steps[:2])
        engine.save_checkpoint(file)
        results = {"saved": full_parameters(engine.module), **held(engine.basic_optimizer)}
        train(engine, steps[2:])
        results["end"] = full_parameters(engine.module)
    with running(**case) as engine:
        train(engine, steps[2:])  # what it knew before must go
        load_only_data(engine)
        results["message"] = message(engine.load_checkpoint, file)
        results["loaded"] = full_parameters(engine.module)
        train(engine, steps[2:])
        results["resumed"] = full_parameters(engine.module)
    return results


ELSEWHERE = (("AdaLomo", 1), ("AdaLomo", 3), ("Addax, two passes", 0))
"""Which of them go on at which stage: at ZeRO-1 from the file, else from what was held, by the parameters' names."""


def elsewhere(folder: Path, saved: dict[str, tuple]) -> dict[tuple[str, int], dict]:
    """What is held of runs that were saved on two ranks, and the weights at their end. saved: {options: (weights,
    parts, progress)}."""
    results, steps = {}, data(steps=3)[2:]
    for options, stage in ELSEWHERE:
        weights, *state = saved[options]
        with running(stage, options, make=bf16_llama, weights=stage != 1 and weights, **BF16) as engine:
            if stage == 1:
                engine.load_checkpoint(folder / f"{options} 2")
            else:
                engine.basic_optimizer.load_named_state(*state)
            results[options, stage] = held(engine.basic_optimizer)
            train(engine, steps)
            results[options, stage]["end"] = full_parameters(engine.module)
    with running(2, "AdaLomo", {"keep": "fp32"}, **BF16) as engine:
        results["other options"] = message(engine.load_checkpoint, folder / "AdaLomo 2")
    return results


class Interrupted(Exception):
    """Raised in a forward."""


def interrupted(stage: int, options: str) -> tuple[list[bool], dict[str, torch.Tensor]]:
    """Whether an exception left every bit that this rank stores, in each of a step's forwards, one after another, and
    the weights after going on."""
    with running(stage, options) as engine:
        first, second = data()
        train(engine, [first])
        projection, all_stood = engine.module.get_submodule("model.layers.1.mlp.down_proj"), []
        forward = projection.forward
        for at in range(3 if options == "Addax" else 1):
            calls = []

            def failing(*inputs, at=at, calls=calls):
                calls.append(forward(*inputs))
                if len(calls) == at + 1:
                    raise Interrupted
                return calls[-1]

            before, projection.forward = [p.clone() for p in stored(engine.module)], failing
            with contextlib.suppress(Interrupted):
                train(engine, [second])
                calls.clear()  # it was not raised
            all_stood.append(all(map(torch.equal, before, stored(engine.module))) and len(calls) == at + 1)
        projection.forward = forward
        train(engine, [second])
        return all_stood, full_parameters(engine.module)


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
    ("accelerate", 2): (with_accelerate, 2, "Addax"),
    ("train_step", 3): (by_train_step, 3, "IPSGD", "mixed"),
    ("train_step of halves", 3): (by_train_step, 3, "Addax", "mixed"),
    ("train_step of a half on each rank", 3): (by_train_step, 3, "Addax", "short first"),
}
"""What makes all steps at a stage, of which method, with rows in which order."""


def on_two_ranks(folder: Path) -> dict:
    return {
        "exact": exact(TRIED),
        "fsdp2 loop": {options: unchanged_loop_of_fsdp2(options) for options in ("IPSGD", "IPSGD, tensor", "AdaLomo")},
        "empty": {stage: weights_and_skipped(stage, "Addax", lacking_halves()) for stage in STAGES},
        "no labels": {(stage, o): weights_and_skipped(stage, o, data(**NO_LABELS)) for stage in (0, 3) for o in HALF},
        "loops": {name: function(*arguments) for name, (function, *arguments) in LOOPS.items()},
        "bf16": in_bf16(),
        "skipping": {(o, stage): skipping(stage, o) for stage in STAGES for o in ("IPSGD", "Addax")},
        "resumed": {(options, stage): resumed(folder, stage, options) for options, stage in RESUMED},
        "interrupted": {(o, stage): interrupted(stage, o) for stage in (2, 3) for o in ("IPSGD", "Addax")},
        "given back": [given_back(0, "IPSGD"), given_back(2, "Addax")],
        "threshold": {stage: chosen_threshold(stage) for stage in (2, 3)}, "messages": messages(),
    }  # fmt: skip


def on_three_ranks(folder: Path, saved: dict[str, tuple]) -> dict:
    """Neither rows of matrices nor parameters divide by 3."""
    tried = ("zero2, small buckets", "zero3")
    return {
        "exact": exact(dict.fromkeys(("AdaLomo, two passes", "Addax, tensor"), tried)),
        "elsewhere": elsewhere(folder, saved),
    }


def on_one_rank() -> dict:
    tried = {"IPSGD": ("zero0",), "AdaLomo, two passes": ("zero3, small buckets",), "Addax": ("zero0", "zero3")}
    return {"exact": exact(tried), "without threshold": without_threshold()}
