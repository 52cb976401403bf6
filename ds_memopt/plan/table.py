"""The command `ds-memopt plan`: what fits under every method and stage, as a table, and a ds_config of what is best."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from ds_memopt.measure import GIB, MEMORY_BANDWIDTH, MIB
from ds_memopt.optimizers import METHODS, method_of
from ds_memopt.optimizers.base.hyper_parameters import check_range
from ds_memopt.plan.activations import Activations, measure_activations
from ds_memopt.plan.planned_layout import FSDP2, Stage
from ds_memopt.plan.predict import DTYPES, RULES, Prediction, predict, stages_of
from ds_memopt.results.record import write_json
from ds_memopt.train.config import AUTO, load_config
from ds_memopt.train.flops import model_flops
from ds_memopt.train.presets import find_model

STAGES = (0, 1, 2, 3)
USUAL_BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size, in elements, which it allocates whole even if the model is smaller."""

NEAREST_TO_ADAMW_FIRST = ("AdamW", *METHODS)
"""The order in which methods are recommended."""

HEADING = """\
{model}, {gpus} GPUs of {gpu_memory}, sequences of {seq_length} tokens, {dtype}. GiB of each GPU.
A sequence's activations: {plain:.2f}, with selective checkpointing {selective:.2f}, with full {checkpointed:.2f};
its fp32 logits alone {logits:.2f}.
besides: buckets, gathered weights, gradients on their way. batch, select., checkp.: the largest micro-batch that fits,
without activation checkpointing, with selective and with full; "-" where none does. BAdam: while its largest block
trains.
gain: how many times fewer bytes a sequence costs on the wire, in the largest micro-batch, than with AdamW at the stage
where that sends least. FSDP2: weights and gradients in fp32.
"""
FASTER = """\
faster: a step for a sequence, than AdamW's where that is fastest, if GPUs keep {tflops:g} TFLOP/s, send {bandwidth} a \
second, and
wait. How far a step gets is not compared: MeZO needs many more."""
STEP = """\
step ms: what the method's step reads and writes, at {gigabytes:,.0f} GB/s, the {gpu}'s as its maker states it.
Unmeasured: `bash launch/gpu_check.sh` measures it on yours."""

UNITS = {"GB": 10**9, "GiB": GIB, "MB": 10**6, "MiB": MIB}


@dataclass(frozen=True)
class Candidate:
    """A method at a stage. options: its hyper-parameters that are not the default ones. name: of both.
    zero: what is planned of zero_optimization; the rest has DeepSpeed's defaults.

    micro_batch: sequences that fit, 0 if none does; selective, checkpointed: with checkpointing. flops: of a forward
        and a backward of one sequence, None if the formula does not hold for the model.
    """

    name: str
    method: str
    options: Mapping[str, Any]
    stage: Stage
    zero: Mapping[str, Any]
    prediction: Prediction
    micro_batch: int
    selective: int
    checkpointed: int
    flops: float | None

    @property
    def placement(self) -> str:
        """In words."""
        return self.stage if self.stage == FSDP2 else f"ZeRO-{self.stage}"

    @property
    def batch(self) -> int:
        """The micro-batch to run it with: with no more checkpointing than is needed."""
        return self.micro_batch or self.selective or self.checkpointed

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a step."""
        return sum(self.prediction.sent.values())

    @property
    def sent_for_a_sequence(self) -> float | None:
        """Bytes, in the largest micro-batch that fits; None if none does."""
        batch = max(self.micro_batch, self.selective, self.checkpointed)
        return self.sent / batch if batch else None

    def step_seconds(self, memory_bandwidth: float) -> float | None:
        """Of the method's own step where the GPU's memory moves so many bytes a second; None if its bytes are not
        known."""
        moved = self.prediction.step_bytes
        return None if moved is None else moved / memory_bandwidth

    def seconds(self, tflops: float, bandwidth: float, memory_bandwidth: float | None = None) -> float | None:
        """For a sequence, with the checkpointing that is fastest, if the GPU keeps this speed in matrix
        products, sends this many bytes a second, and never does both at once; with the bandwidth of its memory, the
        method's own step is added. None where passes or that step are not known or nothing fits."""
        passes, step = self.prediction.passes, self.step_seconds(memory_bandwidth) if memory_bandwidth else 0.0
        if self.flops is None or passes is None or step is None:
            return None
        backward = passes >= 1  # else there is nothing to run forward again for
        ways = ((max(self.micro_batch, self.selective), passes), (self.checkpointed, passes + backward / 3))
        return min(
            (
                self.flops * times / (tflops * 1e12) + (self.sent / bandwidth + step) / batch
                for batch, times in ways
                if batch
            ),
            default=None,
        )


@dataclass(frozen=True)
class Comparison:
    """All rows, and bytes of one sequence: activations without and with checkpointing, and the logits in fp32 that are
    there at a time."""

    rows: list[Candidate]
    plain: int
    selective: int
    checkpointed: int
    logits: int


def compare_methods(
    model: str | PretrainedConfig,
    gpus: int,
    gpu_memory: int,
    seq_length: int,
    methods: Iterable[str] = NEAREST_TO_ADAMW_FIRST,
    dtype: str = "bf16",
    loss_chunks: int = 1,
    attention: str = "sdpa",
    fsdp2: bool = False,
    reduce_once: bool = False,
    replicas: int = 1,
) -> Comparison:
    """Every method at every stage, or under FSDP2, if that is asked for and with release_gradients.

    methods: types, with the options that they have by default, or paths of ds_configs whose optimizer block is taken.
    model: a preset, a folder with a Hugging Face config.json, or such a configuration. gpus: ranks. gpu_memory: bytes
        of each that a run may use. seq_length: tokens of each sequence. loss_chunks, attention: as the jobs' options;
        methods that compare losses have whole logits. reduce_once, replicas: of FSDP2, as
        the job's options.

    Raises ValueError for a number out of range, an unknown method, or a model that is not found.
    """
    sizes = {"gpus": gpus, "gpu_memory": gpu_memory, "seq_length": seq_length, "loss_chunks": loss_chunks}
    for name, value in sizes.items():
        check_range(name, value, isinstance(value, int) and value >= 1, "an integer >= 1", "Give what you have.")
    named = [(name, *_optimizer(name)) for name in methods]
    config = find_model(model)[0] if isinstance(model, str) else model
    measure = cache(partial(measure_activations, config, seq_length, DTYPES[dtype], eager=attention == "eager"))
    kinds = ("none", "selective", "full")
    with no_init_weights(), torch.device("meta"):
        built = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=DTYPES[dtype])
    flops = model_flops(built, None, seq_length)
    bucket = min(USUAL_BUCKET, sum(p.numel() for p in built.parameters()))
    zero = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": bucket}
    rows = []
    for name, method, options in named:
        for stage in (FSDP2,) if fsdp2 else _stages(method, options):
            of_zero, of_fsdp2 = zero, {}
            if stage == FSDP2:
                of_zero, of_fsdp2 = {}, {"reduce_once": reduce_once, "replicas": replicas}
            place = {"stage": stage, "ranks": gpus, "zero": of_zero, **of_fsdp2}
            prediction = predict(built, method, options, dtype=dtype, **place)
            fits = [_largest(prediction, _needed(method, measure, kind, loss_chunks), gpu_memory) for kind in kinds]
            per_sequence = None if isinstance(flops, str) else flops.per_token * seq_length
            rows.append(Candidate(Path(name).stem, method, options, stage, of_zero, prediction, *fits, per_sequence))
    logits = 4 * math.ceil(seq_length / loss_chunks) * config.get_text_config().vocab_size
    sizes = (measure(checkpointing=kind, loss_chunks=loss_chunks).first for kind in kinds)
    return Comparison(rows, *sizes, logits)


def _stages(method: str, options: Mapping[str, Any]) -> Sequence[Stage]:
    """Where the method runs with these options."""
    if options.get("release_gradients"):
        return (FSDP2,)
    return [stage for stage in STAGES if stage or not RULES[method].steps_on_bf16(options)]


def _optimizer(name: str) -> tuple[str, dict[str, Any]]:
    """Type and options of what the user named."""
    block = load_config(name).get("optimizer", {}) if name.endswith(".json") else {"type": name}
    method = block.get("type")
    limit = f"all, ds_configs, or some of {', '.join(RULES)}"
    check_range("optimizer", method, method in RULES, limit, "Write it so.")
    return method, {key: value for key, value in block.get("params", {}).items() if value != AUTO}


def _needed(method: str, measure: Callable[..., Activations], kind: str, loss_chunks: int) -> Activations:
    """For losses at perturbed weights two forwards, as in lockstep; with gradients as well those beside backward."""
    does = method_of(method)
    if not does.uses_losses:
        return measure(checkpointing=kind, loss_chunks=loss_chunks)
    forward = measure(backward=False)
    pair = Activations(forward.first + forward.further, 2 * forward.further)
    if not does.uses_gradients:
        return pair
    backward = measure(checkpointing=kind, loss_chunks=1)
    return Activations(backward.first + pair.first, backward.further + pair.further)


def _largest(prediction: Prediction, activations: Activations, memory: int) -> int:
    """The largest micro-batch whose peak is within these bytes."""
    room = memory - prediction.held
    if prediction.step > room:
        return 0
    rest = room - prediction.backward - activations.first
    return 0 if rest < 0 else 1 + rest // activations.further


def recommend(rows: Sequence[Candidate]) -> Candidate | None:
    """Of what fits: the method that is nearest to AdamW, where it sends least for each sequence; None if nothing fits.

    Without checkpointing if that fits anywhere, and with selective rather than with full.
    """
    for method in NEAREST_TO_ADAMW_FIRST:
        for attribute in ("micro_batch", "selective", "checkpointed"):
            fitting = [row for row in rows if row.method == method and getattr(row, attribute)]
            if fitting:
                return min(fitting, key=lambda row: row.sent / getattr(row, attribute))
    return None


def as_text(
    rows: Sequence[Candidate],
    tflops: float | None = None,
    bandwidth: int | None = None,
    memory_bandwidth: float | None = None,
) -> str:
    """A table, in GiB of each rank; what fits is marked with its largest micro-batch.

    tflops, bandwidth: what a GPU keeps and sends (bytes) in a second; adds how much faster a sequence is trained.
    memory_bandwidth: bytes that its memory moves in a second; adds the time of the method's own step.
    """
    head = ["method", "ZeRO", "weights", "masters", "gradients", "states", "besides", "sent a step"]
    head += ["batch", "select.", "checkp."]
    gains = {"gain": _gains(rows, lambda row: row.sent_for_a_sequence)}
    if tflops and bandwidth:
        gains["faster"] = _gains(rows, lambda row: row.seconds(tflops, bandwidth, memory_bandwidth))
    if memory_bandwidth:
        steps = [row.step_seconds(memory_bandwidth) for row in rows]
        gains["step ms"] = ["-" if step is None else f"{1e3 * step:.2f}" for step in steps]
    lines = [(*head, *gains)]
    for number, row in enumerate(rows):
        p = row.prediction
        besides = max(p.backward, p.step)
        sizes = (p.weights, p.masters, p.gradients, sum(p.states.values()), besides, row.sent)
        fits = (str(size) if size else "-" for size in (row.micro_batch, row.selective, row.checkpointed))
        ratios = (column[number] for column in gains.values())
        lines.append((row.name, str(row.stage), *(f"{size / GIB:.2f}" for size in sizes), *fits, *ratios))
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "\n".join("".join(map(str.rjust, line, widths)) for line in lines)


def _gains(rows: Sequence[Candidate], cost: Callable[[Candidate], float | None]) -> list[str]:
    """AdamW's least cost over each row's; "-" where one of them is not known."""
    costs = [cost(row) for row in rows]
    of_adamw = [c for row, c in zip(rows, costs, strict=True) if row.method == "AdamW" and c is not None]
    if not of_adamw:
        return ["-"] * len(rows)
    return ["-" if c is None else f"{min(of_adamw) / c:.2f}" if c else "inf" for c in costs]


def details(rows: Sequence[Candidate]) -> str:
    """Each row by kind: a line for every state, what completes shared blocks, and what a pass and the step need."""
    lines = []
    for row in rows:
        p = row.prediction
        lines.append(f"{row.name} at {row.placement}, bytes of a rank")
        kinds = {"weights and buffers": p.weights, "masters": p.masters, "gradients": p.gradients}
        kinds |= {f"state {name}": size for name, size in p.states.items()}
        kinds |= {"besides, forward and backward": p.backward, "besides, step": p.step}
        kinds |= {f"sent, {name}": size for name, size in p.sent.items()}
        kinds |= {"of that for shared blocks": p.seams}
        kinds |= {"read and written by the step": p.step_bytes} if p.step_bytes is not None else {}
        lines += [f"{name:>32} {size:>18,}" for name, size in kinds.items()]
    return "\n".join(lines)


def ds_config(row: Candidate, dtype: str = "bf16") -> dict[str, Any]:
    """What to run a row with; learning rate and schedule are left "auto"."""
    adam = ("lr", "betas", "eps", "weight_decay")
    no_set = method_of(row.method).writes_weights or row.options.get("release_gradients", False)
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": row.batch,
        "gradient_accumulation_steps": 1 if no_set else "auto",
        "gradient_clipping": 0.0 if no_set else 1.0,
        "optimizer": {
            "type": row.method,
            "params": RULES[row.method].accepted(dict.fromkeys(adam, AUTO)) | row.options,
        },
        "bf16": {"enabled": dtype == "bf16"},
        **({} if row.stage == FSDP2 else {"zero_optimization": {"stage": row.stage, **row.zero}}),
    }


def bytes_of(text: str) -> int:
    """Bytes of "80GB" (10^9), "80GiB" (1024^3), "512MB". ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)", text.strip())
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is no amount of memory. Write a number and GB or GiB, such as 80GB.")
    return int(float(match[1]) * UNITS[match[2]])


def run(
    model: str,
    gpus: int,
    gpu_memory: str,
    seq_length: int,
    optimizer: str,
    dtype: str,
    loss_chunks: int,
    attention: str,
    fsdp2: bool,
    reduce_once: bool,
    replicas: int,
    tflops: float | None,
    bandwidth: str | None,
    gpu: str | None,
    by_kind: bool,
    output: Path | None,
) -> None:
    """Print the table and a recommendation; write its ds_config. Raises ValueError as `compare_methods` does."""
    if (tflops is None) != (bandwidth is None):
        raise ValueError("tflops and bandwidth tell together how fast a step is. Give both or none.")
    if tflops is not None:
        check_range("tflops", tflops, tflops > 0, "a number > 0", "Half of the data sheet's is usual.")
    if gpu not in (None, *MEMORY_BANDWIDTH):
        raise ValueError(f"--gpu {gpu} is not known: choose one of {', '.join(MEMORY_BANDWIDTH)}")
    memory_bandwidth = MEMORY_BANDWIDTH[gpu] if gpu else None
    if reduce_once and not fsdp2:
        raise ValueError("--reduce_once is FSDP2's: add --fsdp2, or leave it out.")
    if replicas > 1 and not fsdp2:
        raise ValueError(f"--replicas {replicas} is FSDP2's: add --fsdp2, or leave it out.")
    known = [name for name in NEAREST_TO_ADAMW_FIRST if not fsdp2 or FSDP2 in stages_of(name)]
    methods = known if optimizer == "all" else optimizer.split(",")
    given = (gpus, bytes_of(gpu_memory), seq_length)
    compared = compare_methods(model, *given, methods, dtype, loss_chunks, attention, fsdp2, reduce_once, replicas)
    names = ("plain", "selective", "checkpointed", "logits")
    rows, sizes = compared.rows, {name: getattr(compared, name) / GIB for name in names}
    print(HEADING.format(model=model, gpus=gpus, gpu_memory=gpu_memory, seq_length=seq_length, dtype=dtype, **sizes))
    print(as_text(rows, tflops, bandwidth and bytes_of(bandwidth), memory_bandwidth))
    if bandwidth:
        print(FASTER.format(tflops=tflops, bandwidth=bandwidth))
    if gpu:
        print(STEP.format(gpu=gpu, gigabytes=memory_bandwidth / 1e9))
    if by_kind:
        print(f"\n{details(rows)}")
    best = recommend(rows)
    if best is None:
        print("\nNothing fits. Use more GPUs or shorter sequences, or offload to the CPU, which is not planned here.")
        if output:
            raise ValueError(f"nothing fits, so {output} is not written. Use more GPUs or shorter sequences.")
        return
    kind = "selective" if best.selective else "full"
    checkpointing = "" if best.micro_batch else f" with {kind} activation checkpointing"
    print(f"\nRecommended: {best.name} at {best.placement}, micro-batches of {best.batch}{checkpointing}.")
    print("Of the methods that fit it is the nearest to AdamW, and at this stage it sends least for each sequence.")
    if output:
        write_json(output, ds_config(best, dtype))
        print(f"Written: {output}")
