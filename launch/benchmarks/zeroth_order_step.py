"""What of a MeZO step is not forward passes: perturbing and updating, by plain PyTorch, compiled, and by fused kernels.

First nanoseconds per element of the noise itself, of a perturbed copy, and of the updates of MeZO, Addax and IPSGD;
then whole steps against the two plain forwards. All contestants take turns in one run.

python launch/benchmarks/zeroth_order_step.py                        # tiny preset, sequences of 512
python launch/benchmarks/zeroth_order_step.py --device cuda --model llama-1b --dtype bf16
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from transformers import LlamaForCausalLM

from ds_memopt import MeZO
from ds_memopt.kernels import Moved, NoiseSource, Step, add_noise, move
from ds_memopt.kernels.back_ends import VARIABLE
from ds_memopt.train.presets import find_model

ELEMENTS = {"cpu": 2**22, "cuda": 2**28}
WORKS = {"fused": False, "plain, compiled": True, "plain": False}
"""How noise is made, and whether torch.compile is asked."""


class OneTerm(NamedTuple):
    """The noise of a step of MeZO."""

    source: NoiseSource
    start: int = 0

    def sources(self) -> list[tuple[NoiseSource, float]]:
        return [(self.source, 1e-3)]

    def add_(self, direction: torch.Tensor, weights: torch.Tensor, start: int) -> None:
        add_noise(direction, direction, self.source, start, 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq_length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
    print(f"{arguments.dtype} on {device}, torch {torch.__version__}, median of {arguments.steps} turns")
    for kind in ("gaussian", "rademacher"):
        _compare_elements(kind, dtype, arguments.device, arguments.steps)
    _compare_steps(arguments, dtype)


def _compare_elements(kind: str, dtype: torch.dtype, device: str, turns: int) -> None:
    elements = ELEMENTS[device]
    weights = torch.randn(elements, device=device).to(dtype)
    out, gradient = torch.empty_like(weights), torch.randn_like(weights)
    kept = torch.zeros(elements, dtype=torch.int16, device=device) if dtype == torch.bfloat16 else None

    def works(name: str) -> dict[str, Callable[[], object]]:
        source = NoiseSource(kind, 0x243F6A8885A308D3, 3, 1, WORKS[name])
        step, zero = partial(Step, weights, kept, 1e-9, 0.1), Moved(0.0, 0.0)
        return {
            "noise": lambda: add_noise(out, None, source, 0),
            "perturbed copy": lambda: add_noise(out, weights, source, 0, 1e-3),
            "MeZO's update": lambda: move([step(noise=OneTerm(source))], zero),
            "Addax's update": lambda: move([step(gradient, 0.9, OneTerm(source))], zero),
            "IPSGD's update": lambda: move([step(gradient)], zero),
        }

    every = {name: works(name) for name in WORKS}
    for what in every["fused"]:
        medians = _medians({name: _on(name, every[name][what]) for name in WORKS}, turns, device)
        shown = ", ".join(f"{name} {1e9 * seconds / elements:.2f}" for name, seconds in medians.items())
        print(f"{kind:10} {what:14} ns per element: {shown}")


def _compare_steps(arguments: argparse.Namespace, dtype: torch.dtype) -> None:
    config, _ = find_model(arguments.model)
    model = LlamaForCausalLM(config).to(arguments.device, dtype)
    ids = torch.randint(config.vocab_size, (arguments.batch, arguments.seq_length), device=arguments.device)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    functions: dict[str, Callable[[], object]] = {"two forwards": lambda: (forward(), forward())}
    for noise in ("gaussian", "rademacher"):
        for name, compiled in WORKS.items():
            optimizer = MeZO.from_model(model, lr=1e-9, noise=noise, compiled=compiled)
            functions[f"{noise}, {name}"] = _on(name, partial(optimizer.step, forward))
    medians = _medians(functions, arguments.steps, arguments.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {arguments.batch} x {arguments.seq_length} tokens")
    plain = medians["two forwards"]
    for name, median in medians.items():
        print(f"{name:27} {1e3 * median:8.1f} ms  perturbation and update: {1 - plain / median:6.1%} of the step")


def _on(name: str, function: Callable[[], object]) -> Callable[[], object]:
    """The function on a back end."""

    def run() -> None:
        if name == "fused":
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = "plain"
        function()

    return run


def _medians(functions: Mapping[str, Callable[[], object]], turns: int, device: str) -> dict[str, float]:
    """Seconds of each, which take turns; two turns before do not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns + 2):
        for name, function in functions.items():
            _synchronize(device)
            start = time.perf_counter()
            function()
            _synchronize(device)
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(measured) for name, measured in times.items()}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
