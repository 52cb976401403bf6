"""Checks the fused steps on a GPU and measures what they gain. bash launch/gpu_check.sh runs it.

Needs torch, Triton, numpy, regex and this package's source. A part that fails is recorded, and the others run. The
exit code is 1 if a part raised, if a step differs from plain PyTorch's, or if no fused step ran. A missed goal is told.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_memory import largest_micro_batch, predicted_peak
from plain_llama import PlainLlama, Shape, build

from ds_memopt.kernels import join
from ds_memopt.kernels.back_ends import BACK_ENDS, VARIABLE, back_end_for, status
from ds_memopt.measure import GIB, peak_memory_gib, reset_peak_memory
from ds_memopt.optimizers import METHODS
from ds_memopt.optimizers.adamw import AdamW
from ds_memopt.optimizers.block_state.storage import REMAINDER

COMPARED = {
    "small": Shape(40, 2, 4, 53, 67),
    "uneven": Shape(264, 2, 3, 709, 1013),
    "wide": Shape(2048, 2, 16, 5632, 3001),
}
"""What the steps are compared on: rows that no power of two divides, and rows as long as a large model's."""

LLAMA_1B = Shape(2048, 18, 16, 5632, 32000)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "AdamMini, state in bf16": ("AdamMini", {"state_dtype": "bf16"}),
    **{f"GWT, level {level}": ("GWT", {"level": level}) for level in (1, 3, 4, 5)},
    "GWT, no limiter": ("GWT", {"limiter": None}),
    "GWT over AdamMini": ("GWT", {"base": "adam_mini"}),
    "GWT over AdamMini, no limiter": ("GWT", {"base": "adam_mini", "limiter": None}),
    "BAdam over AdamMini": ("BAdam", {"base": "adam_mini"}),
    "MeZO, Rademacher": ("MeZO", {"noise": "rademacher"}),
}
"""What the steps are compared with: methods and their options."""

PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    f"{method}, {', '.join(options.values())}": (method, options)
    for method, options in (
        ("AdamMini", {"state_dtype": "int8"}),
        ("AdamMini", {"state_dtype": "int8", "masters": "remainder16"}),
        ("AdamMini", {"state_dtype": "int8", "masters": "remainder8"}),
        ("AdamW", {"state_dtype": "bf16", "masters": "remainder16"}),
        ("AdamW", {"state_dtype": "int8", "masters": "remainder8"}),
        ("GWT", {"state_dtype": "int8", "masters": "remainder8"}),
    )
}
"""States, and masters of bf16 weights, in fewer bits. They are rounded at random, by the same bits; a sum in another
order makes another code here and there."""

RULES = METHODS | {"AdamW": AdamW}

STEPS_COMPARED = 3
LIMIT = 1e-5
"""Of the largest difference to plain PyTorch's movement, in fp32; sums in another order give about 1e-6."""
PACKED_LIMIT = 1e-4
"""Of the difference of packed masters as a whole, over their movement; 1e-5 on a CPU, with wrong bits 4e-4 or more."""
CODES_LIMIT = 1e-3
"""Of the share of codes that differ; 1e-4 on a CPU, with wrong scales 4e-3, with wrong bits a third."""


class Settings(NamedTuple):
    """How much is measured, and where. steps: timed ones of each contestant. tokens: sequences and their length."""

    device: torch.device
    shapes: dict[str, Shape]
    model: Shape
    steps: int
    sequences: int
    length: int
    memory_cap_gib: float
    small: bool


def new_optimizer(settings: Settings, method: str, model: PlainLlama, **options: Any) -> Any:
    """With what a method needs where all sequences are equally long; for a trial nothing is compiled."""
    rule = RULES[method]
    options |= rule.for_equal_lengths
    if settings.small:
        options |= rule.accepted({"compiled": False})
    return rule.from_model(model, **options)


def new_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> PlainLlama:
    torch.manual_seed(0)
    return build(shape, dtype, device)


def step(optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor]) -> None:
    """One step of training in plain PyTorch, as the optimizer's documents show it."""
    if getattr(optimizer, "splits_batch", False):
        optimizer.step(loss, loss)
    elif getattr(optimizer, "writes_weights", False):
        optimizer.step(loss)
    else:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@contextlib.contextmanager
def kernels(word: str | None) -> Iterator[None]:
    """While this lasts DS_MEMOPT_KERNELS is this word; None: as it was."""
    before = os.environ.get(VARIABLE)
    try:
        if word is not None:
            os.environ[VARIABLE] = word
        yield
    finally:
        if word is not None:
            del os.environ[VARIABLE]
            if before is not None:
                os.environ[VARIABLE] = before


class Stepped(NamedTuple):
    """before, after: each parameter, as fp32 masters where something is kept of them. codes: packed states."""

    before: list[torch.Tensor]
    after: list[torch.Tensor]
    codes: list[torch.Tensor]


def stepped(settings: Settings, variant: str, shape: Shape, dtype: torch.dtype) -> Stepped:
    """After some steps; random gradients where the method takes them from backward."""
    (method, options), device = (VARIANTS | PACKED)[variant], settings.device
    model = new_model(shape, dtype, device)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = new_optimizer(settings, method, model, lr=0.01, weight_decay=0.1, **options)
    generator = torch.Generator(device).manual_seed(1)
    tokens = torch.randint(shape.vocabulary, (2, 16), device=device, generator=generator)
    for _ in range(STEPS_COMPARED):
        if optimizer.writes_weights:
            step(optimizer, lambda: model(tokens))
            continue
        for p in model.parameters():
            gradient = torch.randn(p.shape, dtype=dtype, device=device, generator=generator)
            p.grad = gradient if p.requires_grad else None
        optimizer.step()
    after, codes = [], []
    for p in model.parameters():
        state = optimizer.state.get(p, {}) if variant in PACKED else {}
        after.append(join(p.detach(), state[REMAINDER]) if REMAINDER in state else p.detach())
        codes += [kept for key, kept in state.items() if key.endswith("_code") or kept.dtype == torch.bfloat16]
    return Stepped(before, after, codes)


def compare(settings: Settings, variant: str, shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """The largest difference to plain PyTorch's weights over the largest movement of their parameter, and the largest
    of a weight over what it may be. In 16 bits a weight may be rounded to its neighbour in each step. Of what is packed
    the difference as a whole, and as much over what it and the share of different codes may be."""
    with kernels("plain"):
        plain = stepped(settings, variant, shape, dtype)
    fused = stepped(settings, variant, shape, dtype)
    if variant in PACKED:
        return _compare_packed(plain, fused)
    worst = excess = 0.0
    for tensors in zip(plain.before, plain.after, fused.after, strict=True):
        before, expected, found = (tensor.double() for tensor in tensors)
        distance, difference = (expected - before).abs().max().item(), (found - expected).abs()
        allowed = torch.full_like(expected, LIMIT * distance)
        if dtype == torch.bfloat16:
            allowed += STEPS_COMPARED * torch.finfo(dtype).eps * (before.abs() + distance)
        worst = max(worst, difference.max().item() / distance if distance else 0.0)
        excess = max(excess, torch.where(difference == 0, 0.0, difference / allowed).max().item())
    return worst, excess


def _compare_packed(plain: Stepped, fused: Stepped) -> tuple[float, float]:
    before, expected, found = (torch.cat([p.flatten() for p in kept]).double() for kept in (*plain[:2], fused.after))
    apart = ((found - expected).norm() / (expected - before).norm()).item()
    different = sum((ours != theirs).sum().item() for ours, theirs in zip(fused.codes, plain.codes, strict=True))
    share = different / sum(kept.numel() for kept in plain.codes)
    return apart, max(apart / PACKED_LIMIT, share / CODES_LIMIT)


def weights_dtype(options: dict[str, Any]) -> torch.dtype:
    """What weights are in beside packed states."""
    return torch.bfloat16 if "masters" in options else torch.float32


def check_correctness(settings: Settings) -> list[dict[str, Any]]:
    rows = []
    for variant, (_, options) in (VARIANTS | PACKED).items():
        dtypes = (torch.float32, torch.bfloat16) if variant in VARIANTS else (weights_dtype(options),)
        for name, shape in settings.shapes.items():
            for dtype in dtypes:
                row = {"method": variant, "shape": name, "dtype": str(dtype).removeprefix("torch.")}
                try:
                    worst, excess = compare(settings, variant, shape, dtype)
                    row |= {"difference": worst, "of_allowed": excess, "ok": excess <= 1}
                except Exception as error:  # the other cases are still to be seen
                    row |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
                rows.append(row)
    return rows


def timed(device: torch.device, action: Callable[[], Any]) -> float:
    """Seconds that an action takes, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def paired(device: torch.device, contestants: dict[str, Callable[[], Any]], times: int) -> dict[str, float]:
    """The median seconds of each, run by turns, after two runs that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(times + 2):
        for name, action in contestants.items():
            one = timed(device, action)
            if turn >= 2:
                seconds[name].append(one)
    return {name: statistics.median(values) for name, values in seconds.items()}


def copy_bandwidth(settings: Settings) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2**20 if settings.small else 2**30, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    seconds = paired(settings.device, {"copy": lambda: target.copy_(source)}, settings.steps)["copy"]
    return 2 * source.nbytes / seconds


def measure_steps(settings: Settings) -> dict[str, Any]:
    """Steps on parameters and gradients in fp32, beside torch's fused AdamW."""
    model = new_model(settings.model, torch.float32, settings.device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    count = sum(p.numel() for p in model.parameters())
    baseline = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    contestants = {
        "AdamMini": new_optimizer(settings, "AdamMini", model, lr=1e-6),
        "GWT-2, no limiter": new_optimizer(settings, "GWT", model, lr=1e-6, limiter=None),
        "GWT-2": new_optimizer(settings, "GWT", model, lr=1e-6),
    }
    actions = {"torch's fused AdamW": baseline.step} | {name: one.step for name, one in contestants.items()}
    seconds, bandwidth = paired(settings.device, actions, settings.steps), copy_bandwidth(settings)
    moved_bytes = {"torch's fused AdamW": 28 * count}
    moved_bytes |= {name: optimizer.step_bytes() for name, optimizer in contestants.items()}
    first = seconds["torch's fused AdamW"]
    rows = [
        {
            "method": name,
            "ms": 1e3 * one,
            "ratio": one / first,
            "bytes_per_parameter": moved_bytes[name] / count,
            "of_copy_bandwidth": moved_bytes[name] / one / bandwidth,
        }
        for name, one in seconds.items()
    ]
    return {"parameters": count, "copy_bytes_per_s": bandwidth, "rows": rows}


def measure_packed(settings: Settings) -> list[dict[str, Any]]:
    """Steps on what is packed: their time, what must move, and on a GPU what a step allocates besides."""
    rows, device = [], settings.device
    for name, (method, options) in PACKED.items():
        model = new_model(settings.model, weights_dtype(options), device)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer = new_optimizer(settings, method, model, lr=1e-6, **options)
        seconds = paired(device, {name: optimizer.step}, settings.steps)[name]
        count = sum(p.numel() for p in model.parameters())
        row = {"method": name, "ms": 1e3 * seconds, "bytes_per_parameter": optimizer.step_bytes() / count}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            optimizer.step()
            row["allocated_per_parameter"] = (torch.cuda.max_memory_allocated(device) - before) / count
        rows.append(row)
        del model, optimizer
        gc.collect()
    return rows


def measure_probe(settings: Settings) -> dict[str, Any]:
    """What of a step of MeZO is not forwards: perturbing and updating."""
    model = new_model(settings.model, torch.bfloat16, settings.device)
    optimizer = new_optimizer(settings, "MeZO", model, lr=1e-9)
    tokens = torch.randint(settings.model.vocabulary, (settings.sequences, settings.length), device=settings.device)

    @torch.no_grad()
    def forwards() -> None:
        model(tokens), model(tokens)

    actions = {"step": lambda: optimizer.step(lambda: model(tokens)), "forwards": forwards}
    seconds = paired(settings.device, actions, settings.steps)
    share = 1 - seconds["forwards"] / seconds["step"]
    return {"step_ms": 1e3 * seconds["step"], "forwards_ms": 1e3 * seconds["forwards"], "share": share}


def train(settings: Settings, method: str | None, sequences: int, steps: int) -> tuple[float, float | None]:
    """Tokens a second, and the peak in GiB on a GPU, of the median step in bf16. method: None for torch's fused AdamW.

    Methods that write the weights have them in bf16, others in fp32 under autocast, with gradients in fp32.
    """
    in_bf16 = method is not None and METHODS[method].writes_weights
    model = new_model(settings.model, torch.bfloat16 if in_bf16 else torch.float32, settings.device)
    if method is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    else:
        optimizer = new_optimizer(settings, method, model, lr=1e-6)
    tokens = torch.randint(settings.model.vocabulary, (sequences, settings.length), device=settings.device)

    def loss() -> torch.Tensor:
        with torch.autocast(settings.device.type, torch.bfloat16, enabled=not in_bf16):
            return model(tokens)

    reset_peak_memory(settings.device)
    seconds = paired(settings.device, {"step": lambda: step(optimizer, loss)}, steps)["step"]
    halves = 2 if getattr(optimizer, "splits_batch", False) else 1
    return halves * tokens.numel() / seconds, peak_memory_gib(settings.device).get("peak_allocated_gib")


def measure_training(settings: Settings) -> list[dict[str, Any]]:
    rows = []
    for method in (None, *METHODS):
        row: dict[str, Any] = {"method": method or "AdamW, torch's fused"}
        try:
            row["tokens_per_s"], row["peak_gib"] = train(settings, method, settings.sequences, settings.steps)
            row["predicted_gib"] = (
                predicted_peak(settings.model, method, settings.sequences, settings.length, settings.device) / GIB
            )
            row["largest_micro_batch"] = largest_micro_batch(
                lambda sequences, method=method: train(settings, method, sequences, 1),
                settings.memory_cap_gib,
                settings.device,
            )
        except Exception as error:  # the other methods are still to be seen
            row["error"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        gc.collect()
    return rows


def goals(found: dict[str, Any], small: bool) -> list[dict[str, Any]]:
    """What was aimed at, and what came out. met: None where nothing was measured, or on sizes that tell nothing."""
    rows = {row["method"]: row for row in (found["steps"].get("result") or {}).get("rows", [])}
    aims = [
        ("AdamMini's step over torch's fused AdamW", "AdamMini", "ratio", 0.80, False),
        ("GWT-2's step without limiter over torch's fused AdamW", "GWT-2, no limiter", "ratio", 0.65, False),
        *((f"{name}: its own bytes a second over a copy's", name, "of_copy_bandwidth", 0.80, True)
          for name in ("AdamMini", "GWT-2, no limiter", "GWT-2")),
    ]  # fmt: skip
    told = [(text, rows.get(name, {}).get(key), limit, least) for text, name, key, limit, least in aims]
    share = (found["probe"].get("result") or {}).get("share")
    told.append(("MeZO's perturbing and updating over its step", share, 0.10, False))
    return [
        {
            "goal": f"{text} {'>=' if least else '<='} {limit:.2f}",
            "measured": value,
            "met": None if value is None or small else (value >= limit if least else value <= limit),
        }
        for text, value, limit, least in told
    ]


PARTS: dict[str, Callable[[Settings], Any]] = {
    "correctness": check_correctness,
    "steps": measure_steps,
    "packed": measure_packed,
    "probe": measure_probe,
    "training": measure_training,
}


def run(settings: Settings) -> dict[str, Any]:
    """All parts, each with its result or error, and its seconds."""
    device, name = settings.device, platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    report: dict[str, Any] = {
        "device": name, "torch": torch.__version__, "back_ends": status(), "small": settings.small,
        "memory_cap_gib": settings.memory_cap_gib, "tokens": [settings.sequences, settings.length], "parts": {},
    }  # fmt: skip
    fused = next((end for end, offer in BACK_ENDS.items() if offer.device == device.type), "plain")
    report["compared"] = fused if back_end_for(device) is not None else "plain"
    for part, action in PARTS.items():
        start = time.perf_counter()
        try:
            entry = {"result": action(settings)}
        except Exception:  # it is recorded, and the other parts run
            entry = {"error": traceback.format_exc()}
        report["parts"][part] = entry | {"seconds": time.perf_counter() - start}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report["goals"] = goals(report["parts"], settings.small)
    report["failures"] = failures(report)
    return report


def failures(report: dict[str, Any]) -> list[str]:
    """What raised, and which steps differ."""
    told = [f"{part}: {entry['error'].splitlines()[-1]}" for part, entry in report["parts"].items() if "error" in entry]
    if report["compared"] == "plain":
        reasons = "; ".join(filter(None, report["back_ends"].values()))
        told.append(f"no fused steps ran, plain PyTorch was compared with itself: {reasons or 'DS_MEMOPT_KERNELS'}")
    for part in ("correctness", "training"):
        for row in report["parts"][part].get("result", []):
            if not row.get("ok", True) or "error" in row:
                told.append(f"{part}: {', '.join(f'{key} {value}' for key, value in row.items())}")
    return told


def as_markdown(report: dict[str, Any]) -> str:
    lines = [f"# {report['device']}, torch {report['torch']}, steps by {report['compared']}", ""]
    lines += ["Tiny sizes: the figures tell nothing.", ""] if report["small"] else []
    lines += _table(report["goals"], ("goal", "measured", "met"))
    parts = {name: entry.get("result") for name, entry in report["parts"].items()}
    if parts["steps"]:
        steps = parts["steps"]
        lines += [f"## A step on {steps['parameters']:,} parameters in fp32", ""]
        lines += [f"A copy moves {steps['copy_bytes_per_s'] / 1e9:,.0f} GB/s.", ""]
        lines += _table(steps["rows"], ("method", "ms", "ratio", "bytes_per_parameter", "of_copy_bandwidth"))
    if parts["packed"]:
        lines += ["## A step on packed weights and states", "", "allocated_per_parameter: bytes, during the step.", ""]
        lines += _table(parts["packed"], ("method", "ms", "bytes_per_parameter", "allocated_per_parameter"))
    if parts["training"]:
        sequences, length = report["tokens"]
        lines += [f"## Training in bf16, {sequences} sequences of {length} tokens", ""]
        lines += [f"largest_micro_batch: with {report['memory_cap_gib']:g} GiB. predicted_gib: without a GPU.", ""]
        columns = ("method", "tokens_per_s", "peak_gib", "predicted_gib", "largest_micro_batch", "error")
        lines += _table(parts["training"], columns)
    if parts["correctness"]:
        lines += ["## Difference to plain PyTorch, over the largest movement", ""]
        lines += _table(parts["correctness"], ("method", "shape", "dtype", "difference", "of_allowed", "ok", "error"))
    lines += ["## Failures", "", *(f"- {failure}" for failure in report["failures"] or ["none"])]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    cells = [[_cell(column, row.get(column)) for column in columns] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *cells)] + [""]


def _cell(column: str, value: Any) -> str:
    if column == "met":
        return {True: "yes", False: "MISSED", None: "not judged"}[value]
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value).replace("\n", " ").replace("|", "/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--memory_cap_gib", type=float, default=24, help="for the largest micro-batch")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the command out")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_check: torch finds no GPU here. --device cpu --small tries the command out without one.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # a limit on memory is that of one GPU
    logging.getLogger("ds_memopt").setLevel(logging.WARNING)
    if arguments.small:
        tiny = {"small": COMPARED["small"]}
        settings = Settings(device, tiny, Shape(32, 2, 2, 48, 64), 2, 2, 16, arguments.memory_cap_gib, True)
    else:
        settings = Settings(device, COMPARED, LLAMA_1B, 10, 16, 512, arguments.memory_cap_gib, False)
    report = run(settings)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
    text = as_markdown(report)
    (arguments.output_dir / "gpu_check.md").write_text(text)
    print(text)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
